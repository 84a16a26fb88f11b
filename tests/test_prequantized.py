"""GPTQ, AWQ and FP8 folders: against what AutoGPTQ and AutoAWQ packed, llama.cpp's converter, and the definition."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fails
from oracles import programs
from safetensors.numpy import load_file, save_file

import qjax
from qjax import QjaxError
from qjax.diff import diff
from qjax.formats import Affine
from qjax.io import gguf, hub, prequantized
from qjax.io.checkpoints import INDEX, WEIGHTS, read_folder
from qjax.io.raw_tensor import RawTensor
from qjax.io.tokenizer import Tokenizer
from qjax.methods.repack import repack
from qjax.models.config import Config
from qjax.models.transformer import tensor_shapes
from qjax.source import open_source

pytestmark = pytest.mark.in_haste

DTYPES = {
    "float16": "F16", "float32": "F32", "bfloat16": "BF16", "int32": "I32", "int16": "I16", "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Given(RawTensor):
    """A part without a file."""

    values: np.ndarray

    def read(self):
        return self.values


def read(config, parts):
    """The weight, as a folder's reader puts it together."""
    scheme = prequantized.read_scheme(Path(), {"quantization_config": config})
    parts = {name: Given(f"w.{name}", DTYPES[x.dtype.name], x.shape, Path(), x) for name, x in parts.items()}
    assert all(scheme.part(part.name, part.dtype) == name for name, part in parts.items())
    shape, format = scheme.describe(parts)
    t = scheme.weight(parts, format)
    assert t.shape == shape
    assert (t.format == format) if isinstance(t, qjax.QTensor) else (t.dtype.name == format.dtype)
    return t


def dense(t):
    return np.asarray(qjax.dequantize(t) if isinstance(t, qjax.QTensor) else t)


# ── what the programs packed that made such files ────────────────────────────────────────────────────

STORED = Path(__file__).parent / "data" / "gptq_awq.npz"


def stored_cases():
    with np.load(STORED) as file:
        cases = {}
        for key in file:
            case, part = key.split("/")
            cases.setdefault(case, {})[part] = file[key]
    return cases


@pytest.mark.parametrize("case", stored_cases())
def test_decodes_as_the_program_that_packed(case):
    """Bit for bit, once rounded to float16, in which these decode."""
    parts = stored_cases()[case]
    decoded, method, bits = parts.pop("decoded"), case.split()[0][:-1], int(case.split()[0][-1])
    t = read({"quant_method": method, "bits": bits}, parts)
    np.testing.assert_array_equal(dense(t).astype(np.float16), decoded)
    if case.endswith("desc_act"):
        assert t.dtype == jnp.float16
    else:
        size = 96 if case.endswith("row") else 32
        assert t.format == Affine(bits=bits, block_size=size, symmetric=False, zero_point=True)


# ── the definition ───────────────────────────────────────────────────────────────────────────────────


def stream(codes, bits):
    """Rows of codes as words of one number each, the first code in its lowest bits."""
    rows = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in codes]
    return np.array([np.frombuffer(n.to_bytes(codes.shape[1] * bits // 8, "little"), "<i4") for n in rows])


def pack_gptq(codes, zeros, scales, bits, groups, v2=False):
    """Of codes (d_out, d_in), zero points and scales (d_out, n_groups)."""
    zeros = zeros.T if v2 else (zeros.T.astype(int) - 1) % 2**bits
    return {
        "qweight": np.ascontiguousarray(stream(codes, bits).T), "qzeros": stream(zeros, bits),
        "scales": np.ascontiguousarray(scales.T), "g_idx": groups.astype(np.int32),
    }  # fmt: skip


def pack_awq(codes, zeros, scales):
    order = np.arange(len(codes)).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].ravel()
    return {
        "qweight": stream(codes.T[:, order], 4), "qzeros": stream(zeros.T[:, order], 4),
        "scales": np.ascontiguousarray(scales.T),
    }  # fmt: skip


def drawn(bits, d_out, d_in, size, dtype="float16", seed=0, zeros=None):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (d_out, d_in))
    drawn_zeros = rng.integers(0, 2**bits, (d_out, d_in // size))
    scales = rng.uniform(0.001, 0.1, (d_out, d_in // size)).astype(jnp.dtype(dtype))
    return codes, drawn_zeros if zeros is None else np.full_like(drawn_zeros, zeros), scales


def weights(codes, zeros, scales, groups):
    return (codes - zeros[:, groups]) * scales.astype(np.float64)[:, groups]


CONFIGS = {
    "v1": {"quant_method": "gptq"},
    "v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "v2 as transformers says it": {"quant_method": "gptq", "format": "gptq_v2"},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_the_definition(bits, config):
    """All weights exactly, zero points of 0 among them, which the first version stores as 2^bits - 1."""
    groups, values = np.arange(96) // 32, drawn(bits, 32, 96, 32)
    parts = pack_gptq(*values, bits, groups, v2=config != "v1")
    assert (values[1] == 0).any()
    np.testing.assert_array_equal(dense(read(CONFIGS[config] | {"bits": bits}, parts)), weights(*values, groups))
    del parts["g_idx"]
    np.testing.assert_array_equal(dense(read(CONFIGS[config] | {"bits": bits}, parts)), weights(*values, groups))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_awq_is_the_definition(dtype):
    values, groups = drawn(4, 32, 96, 32, dtype), np.arange(96) // 32
    t = read({"quant_method": "awq", "version": "GEMM", "w_bit": 4}, pack_awq(*values))
    assert t.format.scale_dtype == dtype
    np.testing.assert_array_equal(dense(t), weights(*values, groups).astype(np.float32))


def test_groups_of_another_order_or_length_are_floats():
    """Of the scales' type, as the weights have no format that says where the groups are."""
    codes, zeros, scales = drawn(4, 32, 96, 32)
    config = {"quant_method": "gptq", "bits": 4, "desc_act": True}
    shuffled = np.random.default_rng(0).permutation(np.arange(96) // 32)
    t = read(config, pack_gptq(codes, zeros, scales, 4, shuffled))
    np.testing.assert_array_equal(t, weights(codes, zeros, scales, shuffled).astype(np.float16))
    short = np.minimum(np.arange(96) // 40, 2)
    t = read(config, pack_gptq(codes, zeros, scales, 4, short))
    np.testing.assert_array_equal(t, weights(codes, zeros, scales, short).astype(np.float16))


# ── what does not fit ────────────────────────────────────────────────────────────────────────────────


def changed(part, change):
    return lambda parts: parts | {part: change(parts[part])}


def of_groups(parts, n):
    """With so many groups, and nothing that says which columns are in which."""
    return {
        k: np.resize(v, (n, v.shape[1])) if k in ("scales", "qzeros") else v for k, v in parts.items() if k != "g_idx"
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: {k: v for k, v in p.items() if k != "scales"}, "the part scales of the GPTQ layer is missing"),
        (lambda p: {k: v for k, v in p.items() if k != "qweight"}, "the part qweight of the GPTQ layer is missing"),
        (changed("qweight", lambda x: x[:-1]), r"contradict each other at 4 bits: qweight \[11, 32\], qzeros"),
        (changed("qweight", lambda x: x[:, :-1]), "contradict each other"),
        (changed("qweight", lambda x: x.astype(np.int16)), r"qweight is I16\[12, 32\], expected I32 with 2 axes"),
        (changed("qweight", lambda x: x[:0]), r"qweight is I32\[0, 32\], .*none empty"),
        (changed("qzeros", lambda x: x[:, :-1]), "contradict each other"),
        (changed("qzeros", lambda x: x[:-1]), "contradict each other"),
        (changed("qzeros", lambda x: x.reshape(-1)), r"qzeros is I32\[12\], expected I32 with 2 axes"),
        (changed("scales", lambda x: x[:, :-1]), "contradict each other"),
        (changed("scales", lambda x: x.astype(np.int32)), "scales is I32.*expected F16 or BF16 or F32"),
        (changed("g_idx", lambda x: x[:-1]), "contradict each other"),
        (changed("g_idx", lambda x: x + 1), "g_idx names groups 1 to 3, expected 0 to 2"),
        (changed("g_idx", lambda x: x - 1), "g_idx names groups -1 to 1, expected 0 to 2"),
        (lambda p: of_groups(p, 5), "96 columns do not divide into 5 groups, and there is no g_idx"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(damage, message):
    parts = damage(pack_gptq(*drawn(4, 32, 96, 32), 4, np.arange(96) // 32))
    with pytest.raises(QjaxError, match=message):
        read({"quant_method": "gptq", "bits": 4}, parts)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 5}, r"by 'gptq' \(bits 5\)"),
        ({"quant_method": "gptq"}, "by 'gptq' .no more is said"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "bits 4, checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "bits 4, is_marlin_format True"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "by 'awq' .bits 4, version 'gemv'"),
        ({"quant_method": "awq", "bits": 8}, "by 'awq' .bits 8"),
        ({"quant_method": "awq", "bits": 4, "version": 3}, "version 3"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "'compressed-tensors' .format 'pack-"),
        ({"quant_method": "fp8"}, "'fp8' .no more is said"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size \[128, 0\]"),
        ({"quant_method": "fp8", "weight_block_size": [1, 1, 1]}, r"weight_block_size \[1, 1, 1\]"),
        ({"quant_method": ["x"]}, r"by \['x'\]"),
    ],
)
def test_other_schemes_are_named(config, message):
    with pytest.raises(
        QjaxError, match=f"config.json: the model is quantized .*{message}.*gptq .*, awq .* bitsandbytes"
    ):
        prequantized.read_scheme(Path(), {"quantization_config": config})


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────

CONFIG = Config("llama", 1, 64, 96, 2, 1, 32, 2048, 64, 1e-5, 1e4, tied=True)
# Hugging Face's names beside GGUF's.
HF = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"} | {
    f"blk.0.{gguf}.weight": f"model.layers.0.{hf}.weight"
    for gguf, hf in {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }.items()
}  # fmt: skip
SHAPES = {HF[name]: shape for name, shape in tensor_shapes(CONFIG).items()}


def in_gguf(name, x):
    """Rows as a GGUF file has them: the two halves of each head of q and k are interleaved."""
    heads = {"attn_q": CONFIG.n_heads, "attn_k": CONFIG.n_kv_heads}.get(name.split(".")[-2])
    return x if heads is None else x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


QUANTIZED = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}}


def layers(scattered=()):
    """Hugging Face's name to (codes, zeros, scales, groups) for each matrix of a layer."""
    for i, (name, shape) in enumerate(tensor_shapes(CONFIG).items()):
        if len(shape) == 2 and name.startswith("blk"):
            groups = np.arange(shape[1]) // 32
            rng = np.random.default_rng(i)
            yield (
                HF[name],
                (*drawn(4, *shape, 32, seed=i), rng.permutation(groups) if name in scattered else groups),
            )


def plain(**extra):
    """The other tensors, in float16."""
    rng = np.random.default_rng(100)
    shapes = {name: shape for name, shape in tensor_shapes(CONFIG).items() if len(shape) == 1 or "blk" not in name}
    return {HF[name]: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()} | extra


def gptq_folder(folder, scattered=(), config=QUANTIZED, **extra):
    stored = plain(**extra)
    for name, (codes, zeros, scales, groups) in layers(scattered):
        parts = pack_gptq(codes, zeros, scales, 4, groups)
        stored |= {f"{name.removesuffix('weight')}{part}": x for part, x in parts.items()}
    return save(folder, stored, config)


def float_folder(folder, scattered=()):
    dense = {name: weights(*values).astype(np.float32) for name, values in layers(scattered)}
    return save(folder, plain() | dense, {})


def save(folder, stored, config):
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    Tokenizer.from_folder(hub.BUNDLED["tiny"]).to_folder(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() | config))
    return folder


def test_a_folder_has_the_weights_of_the_float_folder(tmp_path):
    """Rows of q and k change their places, with their scales."""
    ours, theirs = read_folder(gptq_folder(tmp_path / "a")).tensors, read_folder(float_folder(tmp_path / "b")).tensors
    assert [*ours] == [*theirs]
    for name, tensor in ours.items():
        t = tensor.load()
        assert (tensor.shape, tensor.format) == (t.shape, t.format if isinstance(t, qjax.QTensor) else tensor.format)
        np.testing.assert_array_equal(dense(t), theirs[name].load(), err_msg=name)
    kinds = {ours[name].format.name for name in ours if name.startswith("blk") and "norm" not in name}
    assert kinds == {"Affine(4 bits, block 32, zero point)"}


def test_awq_folder(tmp_path):
    stored = plain()
    for name, (codes, zeros, scales, _) in layers():
        parts = pack_awq(codes, zeros, scales)
        stored |= {f"{name.removesuffix('weight')}{part}": x for part, x in parts.items()}
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}}
    ours = read_folder(save(tmp_path / "a", stored, config))
    assert ours.container == "safetensors, AWQ of 4 bits"
    for name, tensor in read_folder(float_folder(tmp_path / "b")).tensors.items():
        np.testing.assert_array_equal(dense(ours.tensors[name].load()), tensor.load(), err_msg=name)


def test_the_parts_may_lie_in_several_files(tmp_path):
    folder, whole = gptq_folder(tmp_path / "a"), read_folder(gptq_folder(tmp_path / "b")).tensors
    stored = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {f"model-0000{i + 1}-of-00003.safetensors": dict(list(stored.items())[i::3]) for i in range(3)}
    for file, part in files.items():
        save_file(part, folder / file)
    placed = {name: file for file, part in files.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    for name, tensor in read_folder(folder).tensors.items():
        np.testing.assert_array_equal(dense(tensor.load()), dense(whole[name].load()))


SCATTERED = ("blk.0.ffn_up.weight", "blk.0.attn_q.weight")


def test_scattered_groups_are_told(tmp_path, run):
    folder = gptq_folder(tmp_path / "a", SCATTERED)
    code, out, _ = run("info", folder)
    assert code == 0
    assert "safetensors, GPTQ of 4 bits, 2 matrices with scattered groups (desc_act) read as F16" in out
    ours, theirs = (read_folder(f).tensors for f in (folder, float_folder(tmp_path / "b", SCATTERED)))
    for name, tensor in ours.items():
        x = theirs[name].load()
        np.testing.assert_array_equal(dense(tensor.load()), x.astype(jnp.float16) if name in SCATTERED else x)
        assert (tensor.format.name == "F16") == (name in SCATTERED or not name.startswith("blk") or "norm" in name)


def test_biases_of_zeros_are_none(tmp_path):
    """Of layers that have none by config.json; AutoGPTQ wrote such."""
    bias = "model.layers.0.self_attn.q_proj.bias"
    tensors = read_folder(gptq_folder(tmp_path / "a", **{bias: np.zeros(64, np.float16)})).tensors
    assert "blk.0.attn_q.bias" not in tensors
    with pytest.raises(QjaxError, match=f"{bias} has no place in a model"):
        read_folder(gptq_folder(tmp_path / "b", **{bias: np.ones(64, np.float16)}))


def test_the_description_may_stand_in_a_file_of_its_own(tmp_path):
    folder = gptq_folder(tmp_path / "a", config={})
    with pytest.raises(QjaxError, match=r"proj.g_idx is I32, expected one of F32"):
        read_folder(folder)
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    assert read_folder(folder).container == "safetensors, GPTQ of 4 bits"


def test_damage_in_a_folder_names_file_and_layer(tmp_path):
    folder = gptq_folder(tmp_path / "a")
    stored = load_file(folder / WEIGHTS)
    del stored["model.layers.0.mlp.up_proj.scales"]
    save_file(stored, folder / WEIGHTS)
    with pytest.raises(
        QjaxError, match=r"model.safetensors: model.layers.0.mlp.up_proj: the part scales .* is missing"
    ):
        read_folder(folder)
    for config, message in [
        ({"quantization_config": 4}, "config.json: quantization_config is 4, expected an object"),
        ({"quantization_config": {"quant_method": "hqq"}}, "b/config.json: the model is quantized by 'hqq'"),
    ]:
        with pytest.raises(QjaxError, match=message):
            read_folder(gptq_folder(tmp_path / "b", config=config))


def test_it_is_quantized_as_the_float_folder(tmp_path, run):
    """To the same bytes, through the weights it stands for, and only if that is asked for."""
    ours, theirs = gptq_folder(tmp_path / "a"), float_folder(tmp_path / "b")
    fails(run("quantize", ours, tmp_path / "x.gguf", "Q8_0"), "--allow-requantize")
    files = []
    for folder in (ours, theirs):
        target = tmp_path / f"{folder.name}.gguf"
        assert run("quantize", folder, target, "Q8_0", "--allow-requantize")[0] == 0
        files.append(gguf.read(target).tensors)
    assert [*files[0]] == [*files[1]]
    for name, tensor in files[0].items():
        assert tensor.data.tobytes() == files[1][name].data.tobytes(), name


def test_it_is_compared(tmp_path):
    """With what was made of it, by weights; with itself, and with the float folder, whose weights are the same."""
    folder, scattered = gptq_folder(tmp_path / "a"), gptq_folder(tmp_path / "b", SCATTERED)
    assert not diff(folder, folder)
    assert {change.name for change in diff(folder, scattered).tensors} == {*SCATTERED}
    changes = diff(folder, float_folder(tmp_path / "c")).tensors
    assert {change.name for change in changes} == {name for name, hf in HF.items() if hf in dict(layers())}
    assert all(change.error.max_error == 0 for change in changes)


def test_the_model_runs(tmp_path):
    model = qjax.load(gptq_folder(tmp_path / "a"))
    params = jax.tree.map(
        lambda w: qjax.dequantize(w) if isinstance(w, qjax.QTensor) else w,
        model.params, is_leaf=lambda w: isinstance(w, qjax.QTensor),
    )  # fmt: skip
    dense = dataclasses.replace(model, params=params).logits([1, 2, 3, 4])
    np.testing.assert_allclose(model.logits([1, 2, 3, 4]), dense, rtol=0, atol=1e-4 * np.abs(dense).max())
    with pytest.raises(QjaxError, match="has no GGUF type"):
        model.save(tmp_path / "model.gguf")


# ── FP8 ──────────────────────────────────────────────────────────────────────────────────────────────

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 48]}


def fp8_parts(d_out, d_in, dtype="float32", seed=0):
    """Every finite value of a code; blocks at the edges have less than 32 rows and 48 columns."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(np.setdiff1d(np.arange(256), [0x7F, 0xFF]), (d_out, d_in)).astype(np.uint8)
    scales = rng.uniform(1e-4, 1e-2, (-(-d_out // 32), -(-d_in // 48))).astype(jnp.dtype(dtype))
    return {"weight": codes.view(jnp.float8_e4m3fn), "weight_scale_inv": scales}


def e4m3(codes):
    """OCP 8-bit floating point: sign, 4 bits of exponent, 3 of mantissa; without infinities."""
    sign, exponent, mantissa = codes >> 7, (codes >> 3 & 15).astype(int), (codes & 7).astype(float)
    magnitude = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    return np.where(sign, -magnitude, magnitude)


def fp8_weights(parts):
    codes, scales = parts["weight"].view(np.uint8), parts["weight_scale_inv"].astype(np.float64)
    rows, columns = (np.arange(n) // size for n, size in zip(codes.shape, (32, 48)))
    return e4m3(codes) * scales[np.ix_(rows, columns)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_is_the_definition(dtype):
    """Products rounded to float32; those of bfloat16 scales have no more bits than it."""
    parts = fp8_parts(70, 100, dtype)
    np.testing.assert_array_equal(read(FP8, parts), fp8_weights(parts).astype(np.float32))


def test_a_block_may_be_larger_than_the_matrix():
    """However large, it takes no memory."""
    parts = fp8_parts(30, 40)
    config = FP8 | {"weight_block_size": [2**40, 2**70]}
    np.testing.assert_array_equal(read(config, parts), fp8_weights(parts).astype(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"weight": p["weight"]}, "the part weight_scale_inv of an FP8 matrix is missing"),
        (lambda p: {"weight_scale_inv": p["weight_scale_inv"]}, "the part weight of an FP8 matrix is missing"),
        (lambda p: p | {"weight": p["weight"][0]}, r"shape \(100,\), expected a matrix"),
        (lambda p: p | {"weight": p["weight"][:0]}, r"shape \(0, 100\), expected a matrix"),
        (lambda p: p | {"weight": p["weight"][:64]}, r"F32\[3, 3\], expected floats \[2, 3\] for a matrix \[64, 100\]"),
        (lambda p: p | {"weight_scale_inv": p["weight_scale_inv"].T[:1]}, r"F32\[1, 3\], expected floats \[3, 3\]"),
        (lambda p: p | {"weight_scale_inv": np.ones((3, 3), np.int32)}, "weight_scale_inv is I32"),
    ],
)
def test_fp8_that_contradicts_itself(change, message):
    with pytest.raises(QjaxError, match=message):
        read(FP8, change(fp8_parts(70, 100)))


def fp8_folder(folder, config=FP8):
    """Written as torch writes it: safetensors' writer for numpy has no 8-bit floats."""
    stored = plain()
    for name, *_ in layers():
        parts = fp8_parts(*SHAPES[name], seed=len(stored))
        stored |= {name: parts["weight"], f"{name}_scale_inv": parts["weight_scale_inv"]}
    folder.mkdir()
    header, data = {}, b""
    for name, x in stored.items():
        offsets = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": DTYPES[x.dtype.name], "shape": x.shape, "data_offsets": offsets}
        data += x.tobytes()
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    Tokenizer.from_folder(hub.BUNDLED["tiny"]).to_folder(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() | {"quantization_config": config}))
    return stored


def test_fp8_folder(tmp_path):
    stored = fp8_folder(tmp_path / "a")
    checkpoint = read_folder(tmp_path / "a")
    assert checkpoint.container == "safetensors, FP8 in blocks of 32×48, read as F32"
    for name, tensor in checkpoint.tensors.items():
        hf, x = HF[name], np.asarray(tensor.load())
        scales = stored.get(f"{hf}_scale_inv")
        expected = stored[hf] if scales is None else fp8_weights({"weight": stored[hf], "weight_scale_inv": scales})
        np.testing.assert_array_equal(x, in_gguf(name, expected).astype(x.dtype))
    (tmp_path / "a" / WEIGHTS).write_bytes(bytes(100))
    with pytest.raises(QjaxError, match="model.layers.0.mlp.up_proj.weight: the file has changed"):
        checkpoint.tensors["blk.0.ffn_up.weight"].load()


# ── llama.cpp's converter ────────────────────────────────────────────────────────────────────────────

# The converter wants a tokenizer that it knows.
CONVERTER = """
import runpy, sys
sys.argv = sys.argv[1:]
folder = sys.argv[0].rpartition("/")[0]
sys.path[:0] = [folder + "/gguf-py", folder]
from conversion.llama import LlamaModel
LlamaModel.set_vocab = lambda self: None
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def converted(folder):
    """The tensors it makes of a folder, in float32."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    script, target = programs.source() / "convert_hf_to_gguf.py", folder.with_suffix(".theirs.gguf")
    command = [sys.executable, "-c", CONVERTER, script, folder, "--outfile", target, "--outtype", "f32"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return gguf.read(target).tensors


@pytest.mark.exact
def test_llama_cpps_converter_decodes_gptq_alike(tmp_path, llama_cpp):
    folder = gptq_folder(tmp_path / "a", SCATTERED)
    theirs, matrices = converted(folder), dict(layers(SCATTERED))
    for name, tensor in open_source(folder).tensors.items():
        ours, x = dense(tensor.load()), np.asarray(theirs[name].load())
        if values := matrices.get(HF[name]):
            # It takes a stored zero point of 15 for 16; AutoGPTQ stores 0 so.
            _, zeros, _, groups = values
            has_zero = in_gguf(name, (zeros == 0)[:, groups])
            assert 0 < has_zero.mean() < 0.2
            ours, x = ours[~has_zero], x[~has_zero]
        np.testing.assert_array_equal(ours, x.astype(ours.dtype), err_msg=name)


@pytest.mark.exact
def test_llama_cpps_converter_decodes_fp8_alike(tmp_path, llama_cpp):
    fp8_folder(tmp_path / "a")
    theirs = converted(tmp_path / "a")
    for name, tensor in open_source(tmp_path / "a").tensors.items():
        np.testing.assert_array_equal(tensor.load(), theirs[name].load(), err_msg=name)


# ── the same weights in GGML's formats ───────────────────────────────────────────────────────────────


def affine(bits, size, zeros, dtype="float16"):
    values, groups = drawn(bits, 32, 256, size, dtype, zeros=zeros), np.arange(256) // size
    return read({"quant_method": "gptq", "bits": bits}, pack_gptq(*values, bits, groups)), values


@pytest.mark.parametrize(
    ("bits", "size", "zeros", "format"),
    [
        (2, 32, None, "Q4_0"), (3, 64, None, "Q4_0"), (4, 128, 8, "Q4_0"), (4, 256, 8, "Q4_0"), (4, 32, None, "Q5_0"),
        (4, 64, 15, "Q5_0"), (4, 32, 0, "Q4_1"), (8, 128, 128, "Q8_0"), (8, 128, None, None), (8, 128, 127, None),
        (4, 16, 8, None),
    ],
)  # fmt: skip
def test_repacking_keeps_every_weight(bits, size, zeros, format):
    t, values = affine(bits, size, zeros)
    repacked = repack(t)
    if format is None:
        assert repacked is None
        return
    assert repacked.format.name == format
    exact = weights(*values, np.arange(256) // size)
    np.testing.assert_array_equal(np.asarray(qjax.dequantize(repacked), np.float64), exact)
    again = qjax.QTensor.from_bytes(repacked.to_bytes(), format, repacked.shape)
    np.testing.assert_array_equal(qjax.dequantize(again), exact)


def test_repacking_with_a_minimum_that_float16_holds():
    """Zero points times scales of a few bits are such."""
    codes, zeros, scales = drawn(4, 32, 64, 32)
    zeros[0, 0], codes[0, 0] = 3, 15  # twelve steps above zero, which Q4_0 has not
    scales = np.ldexp(1.0, np.random.default_rng(0).integers(-9, -3, scales.shape)).astype(np.float16)
    t = read({"quant_method": "gptq", "bits": 4}, pack_gptq(codes, zeros, scales, 4, np.arange(64) // 32))
    assert repack(t).format.name == "Q4_1"
    np.testing.assert_array_equal(qjax.dequantize(repack(t)), weights(codes, zeros, scales, np.arange(64) // 32))


def test_repacking_refuses_scales_that_float16_has_not():
    t, _ = affine(4, 32, 8, "float32")
    assert repack(t) is None
    assert repack(qjax.quantize(np.ones((2, 64), np.float32), "Q4_0")) is None
    assert repack(qjax.quantize(np.ones((2, 64), np.float32), Affine(symmetric=False))) is None


def test_repacking_scales_that_rows_share():
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    t = qjax.quantize(x, Affine(block_size="tensor", symmetric=False, zero_point=True))
    np.testing.assert_array_equal(qjax.dequantize(repack(t)), qjax.dequantize(t))
