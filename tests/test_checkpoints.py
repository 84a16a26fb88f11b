"""Oracles: safetensors' own writer, gguf-py's tensor map, llama.cpp's rule for q and k said again."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import qjax
from qjax import QjaxError, formats
from qjax.io import names, safetensors_file
from qjax.io.checkpoint_write import write_folder
from qjax.io.checkpoints import INDEX, WEIGHTS, read_folder
from qjax.io.stored import Stored
from qjax.io.tokenizer import Tokenizer
from qjax.io.vocabulary import BYTE_OF
from qjax.models.config import Config
from qjax.models.transformer import tensor_shapes

pytestmark = pytest.mark.in_haste

CONFIG = Config(
    architecture="llama",
    n_layers=2,
    d_model=24,
    d_ff=40,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    vocab=50,
    n_ctx=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    tied=True,
)
HF_SHAPES = {
    "model.embed_tokens.weight": (50, 24),
    "model.norm.weight": (24,),
} | {
    f"model.layers.{i}.{name}.weight": shape
    for i in range(2)
    for name, shape in {
        "input_layernorm": (24,),
        "self_attn.q_proj": (48, 24),
        "self_attn.k_proj": (16, 24),
        "self_attn.v_proj": (16, 24),
        "self_attn.o_proj": (24, 48),
        "post_attention_layernorm": (24,),
        "mlp.gate_proj": (40, 24),
        "mlp.up_proj": (40, 24),
        "mlp.down_proj": (24, 40),
    }.items()
}


@pytest.fixture
def weights():
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in HF_SHAPES.items()}


def save(folder: Path, weights, **config):
    """A folder as transformers writes it."""
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() | config))
    return folder


def save_shards(folder: Path, weights, weight_map=None):
    save(folder, weights).joinpath(WEIGHTS).unlink()
    halves = [dict(list(weights.items())[i::2]) for i in range(2)]
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for file, half in zip(files, halves):
        save_file(half, folder / file, metadata={"format": "pt"})
    placed = {name: file for file, half in zip(files, halves) for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed | (weight_map or {})}))
    return folder


def load(folder):
    return {name: tensor.load() for name, tensor in read_folder(folder).tensors.items()}


# ── names and rows ─────────────────────────────────────────────────────────────────────────────────────


def test_names_are_gguf_pys():
    gguf = pytest.importorskip("gguf")
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.n_layers)
    untied = [*HF_SHAPES, "lm_head.weight"]
    assert {names.to_gguf(name, CONFIG) for name in untied} == {*tensor_shapes(CONFIG), "output.weight"}
    for name in untied:
        assert names.to_gguf(name, CONFIG) == theirs.get_name(name, try_suffixes=(".weight",))
        assert names.to_hf(names.to_gguf(name, CONFIG), CONFIG) == name


@pytest.mark.parametrize(
    "name",
    ["", "blk.weight", "blk.{}.attn_q.weight", "blk.01.attn_q.weight", "blk.0.attn_q.scale", "lm_head.weight"],
)
def test_unknown_names(name):
    with pytest.raises(QjaxError, match="not known"):
        names.to_hf(name, CONFIG)


@given(st.integers(1, 5), st.integers(1, 6))
def test_interleave(n_heads, half):
    rows = np.arange(n_heads * 2 * half * 3).reshape(-1, 3)
    # conversion/llama.py permute, for one row: row j of half s of a head goes to its row 2j + s.
    expected = np.empty_like(rows)
    for head in range(n_heads):
        for s in range(2):
            for j in range(half):
                expected[head * 2 * half + 2 * j + s] = rows[head * 2 * half + s * half + j]
    np.testing.assert_array_equal(names.interleave(rows, n_heads), expected)
    np.testing.assert_array_equal(names.deinterleave(expected, n_heads), rows)


def test_interleave_in_jax():
    rows = jnp.arange(48).reshape(24, 2)
    np.testing.assert_array_equal(names.interleave(rows, 3), names.interleave(np.asarray(rows), 3))
    np.testing.assert_array_equal(names.deinterleave(names.interleave(rows, 3), 3), rows)


def test_rows_are_interleaved_in_q_and_k_only(tmp_path, weights):
    tensors = load(save(tmp_path, weights))
    assert list(tensors) == list(tensor_shapes(CONFIG))
    for name, x in weights.items():
        heads = {"self_attn.q_proj": 6, "self_attn.k_proj": 2}.get(name[15:-7])
        expected = x if heads is None else x.reshape(heads, 2, 4, 24).swapaxes(1, 2).reshape(x.shape)
        np.testing.assert_array_equal(tensors[names.to_gguf(name, CONFIG)], expected, err_msg=name)


# ── reading and writing ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_folder_to_folder_keeps_the_bytes(tmp_path, weights, dtype):
    cast = {name: x.astype(jnp.dtype(dtype)) for name, x in weights.items()}
    source = save(tmp_path, cast)
    config, tensors = read_folder(source)
    assert config == CONFIG
    assert {tensor.format.name for tensor in tensors.values()} == {
        {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    }
    loaded = {name: tensor.load() for name, tensor in tensors.items()}
    assert all(isinstance(x, jax.Array) and x.dtype.name == dtype for x in loaded.values())
    write_folder(tmp_path / "new" / "copy", config, loaded)
    assert (tmp_path / "new" / "copy" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    assert read_folder(tmp_path / "new" / "copy").config == config
    assert sorted(path.name for path in (tmp_path / "new" / "copy").iterdir()) == ["config.json", WEIGHTS]


def test_shards(tmp_path, weights):
    (tmp_path / "one").mkdir()
    one, shards = load(save(tmp_path / "one", weights)), load(save_shards(tmp_path, weights))
    assert one.keys() == shards.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], shards[name])
    # Writing over shards leaves one model, not two.
    write_folder(tmp_path, CONFIG, shards)
    assert not (tmp_path / INDEX).exists()
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "one" / WEIGHTS).read_bytes()


def test_rotary_frequencies_are_ignored(tmp_path, weights):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert len(load(save(tmp_path, weights | extra))) == len(weights)


def test_head(tmp_path, weights):
    head = {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}
    # An own head; no head, whatever the config says; a copy of the embedding; a contradiction.
    untied = read_folder(save(tmp_path, weights | head, tie_word_embeddings=False))
    assert not untied.config.tied
    np.testing.assert_array_equal(untied.tensors["output.weight"].load(), head["lm_head.weight"])
    assert read_folder(save(tmp_path, weights, tie_word_embeddings=False)).config.tied
    copied = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    assert "output.weight" not in read_folder(save(tmp_path, weights | copied)).tensors
    with pytest.raises(QjaxError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        read_folder(save(tmp_path, weights | head))


def test_tokenizer_goes_along(tmp_path, weights):
    tokenizer = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": [*list(BYTE_OF)[:48], '!"', "<|end|>"],
            "tokenizer.ggml.token_type": [1] * 49 + [3],
            "tokenizer.ggml.merges": ['! "'],
            "tokenizer.ggml.eos_token_id": 49,
        }
    )
    write_folder(tmp_path, CONFIG, load(save(tmp_path, weights)), tokenizer)
    again = Tokenizer.from_folder(tmp_path)
    assert again.tokens == tokenizer.tokens
    assert (again.bos_id, again.eos_id) == (None, 49)
    assert again.encode('!"<|end|>', parse_special=True) == [48, 49]
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 49


def test_write_refuses(tmp_path, weights):
    tensors = load(save(tmp_path, weights))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for change, message in [
        ({"blk.0.attn_q.weight": None}, "blk.0.attn_q.weight is missing"),
        ({"output.weight": tensors["token_embd.weight"]}, "output.weight has no place"),
        ({"output_norm.weight": jnp.ones(25)}, r"output_norm.weight has shape \(25,\), expected \(24,\)"),
        ({"output_norm.weight": jnp.ones(24, jnp.int32)}, "output_norm.weight is I32"),
        ({"blk.1.ffn_up.weight": qjax.quantize(jnp.ones((40, 32)), "Q8_0")}, "blk.1.ffn_up.weight is Q8_0"),
    ]:
        changed = {name: x for name, x in (tensors | change).items() if x is not None}
        with pytest.raises(QjaxError, match=message):
            write_folder(tmp_path, CONFIG, changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ── a full disk; bad folders are in hostile/folders.py ─────────────────────────────────────────────────


class Filled(Stored):
    """A tensor that does not fit the disk."""

    def __init__(self, like):
        self.shape, self.format = like.shape, formats.get("F32")

    @property
    def data(self):
        raise OSError(28, "No space left on device")

    def load(self):
        raise NotImplementedError


@pytest.mark.parametrize("max_bytes", [None, 10_000])
def test_full_disk_leaves_the_old_weights(tmp_path, weights, max_bytes):
    tensors = load(save(tmp_path / "old", weights))
    before = (tmp_path / "old" / WEIGHTS).read_bytes()
    tensors["output_norm.weight"] = Filled(tensors["output_norm.weight"])
    target = tmp_path / ("old" if max_bytes is None else "new")
    with pytest.raises(OSError, match="No space left"):
        write_folder(target, CONFIG, tensors, None, max_bytes)
    assert (tmp_path / "old" / WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in target.iterdir()) == ([] if max_bytes else sorted(["config.json", WEIGHTS]))
    assert load_file(tmp_path / "old" / WEIGHTS).keys() == weights.keys()


# ── tensor by tensor ───────────────────────────────────────────────────────────────────────────────────


def test_files_are_the_librarys(tmp_path):
    """Types of several widths, names that JSON escapes, no elements, no axes."""
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5, dtype=np.uint8),
        'é "x"': np.ones((2, 2), jnp.bfloat16),
        "h": np.ones(3, np.float16),
        "A": np.array(3, np.float32),
        "empty": np.ones((0, 4), np.float16),
    }
    names = {"uint8": "U8", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    parts = {
        name: safetensors_file.Part(names[x.dtype.name], x.shape, lambda x=x: [x.reshape(-1).view(np.uint8)])
        for name, x in arrays.items()
    }
    safetensors_file.write(tmp_path / "ours", parts)
    save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_are_no_larger_than_allowed(tmp_path, weights):
    tensors = read_folder(save(tmp_path / "one", weights)).tensors
    largest, total = max(x.nbytes for x in weights.values()), sum(x.nbytes for x in weights.values())
    files = write_folder(tmp_path / "many", CONFIG, tensors, None, 2 * largest)
    assert len(files) == len([*(tmp_path / "many").glob("*.safetensors")]) > 3
    sizes = [sum(x.nbytes for x in load_file(file).values()) for file in files]
    assert max(sizes) <= 2 * largest
    assert sum(sizes) == total
    # Two that follow each other would not fit into one.
    assert all(a + b > 2 * largest for a, b in itertools.pairwise(sizes))
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["metadata"] == {"total_size": total}
    again = load(tmp_path / "many")
    for name, x in load(tmp_path / "one").items():
        np.testing.assert_array_equal(again[name], x)
    with pytest.raises(QjaxError, match=r"model-00001-of-\d+.safetensors: exists already"):
        write_folder(tmp_path / "many", CONFIG, tensors, None, 2 * largest)
