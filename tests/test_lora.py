"""LoRA adapters: against the algebra in Hugging Face's layout, llama.cpp's converter of them, and llama-perplexity."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import fails, sampled
from oracles.programs import converted, output
from safetensors.numpy import load_file, save_file
from test_architectures import TOKENS
from test_architectures import write as write_model
from test_evaluate import byte_tokenizer

import qjax
from qjax import QjaxError
from qjax.convert import adapter_to_gguf, to_folder, to_gguf
from qjax.io import gguf, hub
from qjax.quantize_file import quantize_file
from qjax.tensor import QTensor

pytestmark = pytest.mark.in_haste

RANK, ALPHA = 4, 6.0
PREFIX = "base_model.model."
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")


def drawn_pairs(weights, dtype=np.float32, rank=RANK, scale=0.05):
    """A pair for each of MATRICES in each layer, and the head if there is one."""
    rng = np.random.default_rng(0)
    pairs = {}
    for name, x in sorted(weights.items()):
        if (any(part in name for part in MATRICES) and name.endswith(".weight")) or name == "lm_head.weight":
            shapes = {"A": (rank, x.shape[1]), "B": (x.shape[0], rank)}
            for part, shape in shapes.items():
                key = f"{PREFIX}{name.removesuffix('.weight')}.lora_{part}.weight"
                pairs[key] = (rng.standard_normal(shape) * scale).astype(dtype)
    return pairs


def save_adapter(folder, pairs, **described):
    folder.mkdir()
    save_file(pairs, folder / "adapter_model.safetensors", {"format": "pt"})
    usual = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [*MATRICES], "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(usual | described))
    return folder


def merged_by_hand(weights, pairs, scale=ALPHA / RANK):
    """In Hugging Face's layout, where peft adds them."""
    merged = dict(weights)
    for key, a in pairs.items():
        if ".lora_A." in key:
            name = key.removeprefix(PREFIX).replace(".lora_A.weight", ".weight")
            merged[name] = weights[name] + np.float32(scale) * (pairs[key.replace("lora_A", "lora_B")] @ a)
    return merged


@pytest.fixture(params=sampled(["llama", "qwen2"], "llama"))
def folders(request, tmp_path):
    """A model, an adapter of it, and the two as one."""
    base, merged = tmp_path / "base", tmp_path / "merged"
    write_model(base, request.param)
    byte_tokenizer().to_folder(base)
    weights = load_file(base / "model.safetensors")
    pairs = drawn_pairs(weights)
    shutil.copytree(base, merged)
    save_file(merged_by_hand(weights, pairs), merged / "model.safetensors", {"format": "pt"})
    return base, save_adapter(tmp_path / "adapter", pairs, base_model_name_or_path=str(base)), merged


def test_an_adapter_is_added(folders, tmp_path):
    """To the weights and the logits; from a folder of PEFT's and from a GGUF file of it."""
    base, adapter, merged = folders
    written = adapter_to_gguf(adapter, tmp_path / "a.gguf")
    assert (written.n_matrices, written.size_bytes) == (21, (tmp_path / "a.gguf").stat().st_size)
    expected = qjax.load(merged)
    for lora in (adapter, tmp_path / "a.gguf"):
        model = qjax.load(base, lora=lora)
        for name, x in expected.tensors.items():
            np.testing.assert_allclose(model.tensors[name], x, atol=1e-6)
    difference = np.abs(np.asarray(model.logits(TOKENS)) - np.asarray(qjax.load(base).logits(TOKENS)))
    assert difference.max() > 0.05
    np.testing.assert_allclose(model.logits(TOKENS), expected.logits(TOKENS), atol=1e-4)


def test_merged_files(folders, run, tmp_path):
    """convert --lora: to a folder, and to GGUF, quantized at once."""
    base, adapter, merged = folders
    code, _, err = run("convert", base, tmp_path / "new", "--lora", adapter, "--outtype", "f32")
    assert (code, err) == (0, "")
    weights, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "new", merged))
    assert weights.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(weights[name], x, atol=1e-6)
    for number, (source, options) in enumerate(((base, {"lora": adapter}), (tmp_path / "new", {}))):
        to_gguf(source, tmp_path / f"{number}.gguf", "q8_0", general={"general.name": "N"}, **options)
    one, two = (gguf.read(tmp_path / f"{number}.gguf") for number in (0, 1))
    assert [*one.tensors] == [*two.tensors]
    assert all(np.array_equal(t.data, two.tensors[name].data) for name, t in one.tensors.items())


def test_quantized_weights_stay_but_for_those_that_change(folders, tmp_path):
    base, adapter, _ = folders
    quantize_file(base, tmp_path / "q.gguf", "Q8_0")
    plain, changed = qjax.load(tmp_path / "q.gguf").tensors, qjax.load(tmp_path / "q.gguf", lora=adapter).tensors
    for name, x in changed.items():
        touched = any(f".{part}." in name for part in ("attn_q", "attn_k", "attn_v", "ffn_down")) and "bias" not in name
        if touched or name == "output.weight":
            assert not isinstance(x, QTensor), name
            assert np.abs(np.asarray(x) - np.asarray(qjax.dequantize(plain[name]))).max() > 0.01
        else:
            assert isinstance(x, QTensor) == isinstance(plain[name], QTensor)


def test_rank_stabilized_adapters(folders, tmp_path):
    """Their scale is alpha / √rank (Kalajdzievski 2023), which GGUF has no word for but another alpha."""
    _, adapter, _ = folders
    described = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(described | {"use_rslora": True}))
    adapter_to_gguf(adapter, tmp_path / "a.gguf")
    assert gguf.read(tmp_path / "a.gguf").metadata["adapter.lora.alpha"] == ALPHA * 2


@pytest.mark.parametrize(
    ("pairs", "described", "message"),
    [
        ({"lm_head.weight": (256, 64)}, {}, "lm_head.weight is no part of a LoRA pair"),
        ({f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight": (4, 64)}, {}, r"found a \(4, 64\); expected a"),
        (
            {f"{PREFIX}model.embed_tokens.lora_{p}.weight": s for p, s in (("A", (4, 64)), ("B", (256, 4)))},
            {},
            "changes the embedding",
        ),
        (
            {f"{PREFIX}model.layers.0.mlp.up_proj.lora_{p}.weight": s for p, s in (("A", (4, 64)), ("B", (90, 4)))},
            {},
            r"changes blk.0.ffn_up.weight of shape \(90, 64\), which has shape \(96, 64\)",
        ),
        (
            {f"{PREFIX}model.layers.9.mlp.up_proj.lora_{p}.weight": s for p, s in (("A", (4, 64)), ("B", (96, 4)))},
            {},
            "blk.9.ffn_up.weight of shape .* does not exist in this model",
        ),
        ({f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight": np.ones((4, 64), np.int32)}, {}, "lora_A.weight is I32"),
        ({}, {"use_dora": True}, "use_dora is True, which GGUF cannot express"),
        ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({}, {"lora_alpha": "x"}, "lora_alpha is 'x', expected a number"),
        ({}, {}, "there are no tensors"),
    ],
)
def test_adapters_that_are_refused(tmp_path, pairs, described, message):
    write_model(tmp_path / "base", "llama")
    byte_tokenizer().to_folder(tmp_path / "base")
    made = {name: np.ones(x, np.float32) if isinstance(x, tuple) else x for name, x in pairs.items()}
    save_adapter(tmp_path / "adapter", made, **described)
    with pytest.raises(QjaxError, match=message):
        qjax.load(tmp_path / "base", lora=tmp_path / "adapter")


def test_bad_input(run, folders, tmp_path):
    base, adapter, _ = folders
    quantize_file("tiny", tmp_path / "tiny.gguf", "COPY")
    out = tmp_path / "out.gguf"
    fails(run("convert", base, out, "--lora", tmp_path / "tiny.gguf"), "no LoRA adapter: general.type")
    fails(run("convert", adapter, out, "--outtype", "q4_0"), "an adapter is written as f32, f16, bf16, q8_0")
    fails(run("convert", "tiny", out, "--lora", tmp_path / "nothing"), "no such file")
    fails(run("convert", "tiny", out, "--base", "tiny"), "is no adapter, and --base is for these alone")
    fails(run("convert", adapter, out, "--lora", adapter), "is an adapter, and --lora adds one to a model")
    fails(run("convert", adapter, out, "--split-max-tensors", 3), "adapters are not quantized or split")
    fails(run("convert", adapter, tmp_path / "out"), "adapters are written as GGUF")
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 1}')
    fails(run("convert", adapter, out), "names no base model; give it as base (--base)")
    assert not out.exists()


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tiny_adapter(tmp_path):
    weights = load_file(hub.BUNDLED["tiny"] / "model.safetensors")
    return save_adapter(tmp_path / "Owl-tiny-lora", drawn_pairs(weights, scale=0.15), base_model_name_or_path="tiny")


def test_llama_perplexity_agrees(llama_cpp, tiny_adapter, run, tmp_path):
    """With the GGUF file that is written here, on the tiny model in float32."""
    text = "".join(tale.text for tale in qjax.data.tales.generate(seed=1, n=8))
    (tmp_path / "text.txt").write_text(text)
    to_gguf("tiny", tmp_path / "tiny.gguf", "f32")
    adapter_to_gguf(tiny_adapter, tmp_path / "a.gguf")
    command = [llama_cpp / "llama-perplexity", "-m", tmp_path / "tiny.gguf", "-f", tmp_path / "text.txt", "-c", 64]
    printed = output(*command, "--lora", tmp_path / "a.gguf", "--chunks", 4, "-b", 64, last="Final estimate")
    theirs = float(re.search(r"PPL = ([\d.]+)", printed)[1])
    code, out, _ = run(
        *("perplexity", "tiny", "--lora", tmp_path / "a.gguf", "-f", tmp_path / "text.txt", "-c", 64, "--json"),
        *("--chunks", 4, "--precision", "float32"),
    )
    assert code == 0
    ours = json.loads(out)["value"]
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours > 5, "the adapter makes a difference"


@pytest.mark.exact
@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_files_are_those_of_the_converter(llama_cpp_sources, tiny_adapter, tmp_path, outtype):
    card = "---\nlicense: mit\nbase_model: Org/Tiny-7M\n---\n"
    (tiny_adapter / "README.md").write_text(card)
    script = llama_cpp_sources / "convert_lora_to_gguf.py"
    flags = ("--base", hub.BUNDLED["tiny"], "--outtype", outtype)
    converted(script, tiny_adapter, tmp_path / "theirs.gguf", *flags)
    adapter_to_gguf(tiny_adapter, tmp_path / "ours.gguf", outtype)
    ours, theirs = (gguf.read(tmp_path / f"{who}.gguf") for who in ("ours", "theirs"))
    assert [*ours.metadata.typed.items()] == [*theirs.metadata.typed.items()]
    assert [(n, t.format.name, t.shape) for n, t in ours.tensors.items()] == [
        (n, t.format.name, t.shape) for n, t in theirs.tensors.items()
    ]
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_folders_are_not_taken_for_adapters(tmp_path):
    to_folder("tiny", tmp_path / "t")
    with pytest.raises(QjaxError, match=r"adapter_config.json: there is no such file"):
        adapter_to_gguf(tmp_path / "t", tmp_path / "a.gguf")
