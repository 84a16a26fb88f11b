"""Model and load: files to params and back, generation, real SmolLM2 against values of llama.cpp."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared

import qjax
from qjax import QjaxError
from qjax.io import gguf, hub
from qjax.io.tokenizer import Tokenizer
from qjax.model import Model
from qjax.models import cache, transformer
from qjax.models.config import Config
from qjax.quantize_file import quantize_file
from qjax.source import open_source

pytestmark = pytest.mark.in_haste

CONFIG = Config(
    architecture="llama",
    n_layers=2,
    d_model=64,
    d_ff=96,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    vocab=2048,
    n_ctx=64,
    norm_eps=2**-17,  # the same in float32, which GGUF has for it
    rope_theta=10000.0,
    tied=True,
)
TOKENS = [[5, 3, 9, 100, 2000, 7]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model as a safetensors folder."""
    path = tmp_path_factory.mktemp("models") / "random"
    params = transformer.stack(transformer.init(CONFIG, jax.random.key(0)), CONFIG)
    Model(CONFIG, params, Tokenizer.from_folder(hub.BUNDLED["tiny"])).save(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return qjax.load(folder)


def equal_bytes(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for x, y in zip(jax.tree.leaves(a[name]), jax.tree.leaves(b[name]), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8), err_msg=name)


def test_folder_to_gguf_to_folder(model, folder, tmp_path):
    model.save(tmp_path / "m.gguf")
    again = qjax.load(tmp_path / "m.gguf")
    assert again.config == model.config
    equal_bytes(dict(again.tensors), dict(model.tensors))
    assert again.tokenizer.to_gguf() == model.tokenizer.to_gguf()
    again.save(tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    np.testing.assert_array_equal(again.logits(TOKENS), model.logits(TOKENS))


def test_gguf_written_whole_equals_gguf_streamed(model, folder, tmp_path):
    report = quantize_file(folder, tmp_path / "streamed.gguf", "Q4_0")
    model.quantize("Q4_0").save(tmp_path / "whole.gguf")
    assert (tmp_path / "streamed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    file = gguf.read(tmp_path / "streamed.gguf")
    assert file.metadata["general.file_type"] == 2
    assert file.metadata["general.quantization_version"] == 2
    assert file.tensors["token_embd.weight"].format.name == "Q8_0"
    assert report.bpw == pytest.approx(file.bpw)
    assert report.size_bytes == sum(t.nbytes for t in file.tensors.values())


def test_quantized_logits_are_those_of_the_decoded_weights(model):
    quantized = model.quantize(qjax.formats.get("Q5_1"))
    tensors = {name: qjax.dequantize(t) if isinstance(t, qjax.QTensor) else t for name, t in quantized.tensors.items()}
    decoded = replace(model, params=transformer.stack(tensors, CONFIG))
    np.testing.assert_allclose(quantized.logits(TOKENS), decoded.logits(TOKENS), atol=1e-5)
    assert quantized.bpw < model.bpw / 5
    assert quantized.n_weights == model.n_weights


def test_mixed_formats_unroll_into_runs(model):
    mixed = model.quantize({r"blk\.0\.": "Q8_0", r"blk\.1\.ffn": "Q4_0"})
    assert len(mixed.params.runs) == 2
    assert {name: t.format.name for name, t in mixed.tensors.items() if isinstance(t, qjax.QTensor)} == {
        **{f"blk.0.{n}.weight": "Q8_0" for n in ("attn_q", "attn_k", "attn_v", "attn_output")},
        **{f"blk.0.ffn_{n}.weight": "Q8_0" for n in ("gate", "up", "down")},
        **{f"blk.1.ffn_{n}.weight": "Q4_0" for n in ("gate", "up", "down")},
    }
    assert mixed.logits(TOKENS).shape == (1, 6, 2048)


def test_rounding_reaches_every_matrix(model):
    nearest, floored = (model.quantize("Q4_0", rounding=r) for r in (None, "floor"))
    d = [np.asarray(m.tensors["blk.0.ffn_up.weight"].fields.d) for m in (nearest, floored)]
    np.testing.assert_array_equal(*d)
    codes = [np.asarray(m.tensors["blk.0.ffn_up.weight"].fields.qs) for m in (nearest, floored)]
    assert (codes[0] != codes[1]).mean() > 0.4


def test_stream_joins_to_generate(model):
    pieces = list(model.stream("Once upon a time", max_tokens=20))
    generation = model.generate("Once upon a time", max_tokens=20)
    assert "".join(text for text, _ in pieces) == generation.text
    assert str(generation) == "Once upon a time" + generation.text
    assert generation.finish_reason == "length"
    assert len(generation.tokens) == 20


def test_logits_refuse_foreign_ids(model):
    with pytest.raises(QjaxError, match="ids from -1 to 7, expected 0 to 2047"):
        model.logits([[-1, 7]])
    assert model.logits([5, 3]).shape == (2, 2048)


def test_target_stays_when_quantizing_fails(folder, tmp_path):
    target = tmp_path / "out.gguf"
    target.write_bytes(b"precious")
    for source, error in ((folder, "unknown rounding"), (tmp_path / "absent.gguf", "no such file")):
        with pytest.raises(QjaxError, match=error):
            quantize_file(source, target, "Q4_0", rounding="nearst" if source == folder else None)
        assert target.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_source_is_not_overwritten(model, tmp_path):
    path = tmp_path / "m.gguf"
    model.save(path)
    before = path.read_bytes()
    with pytest.raises(QjaxError, match="is the model to be read"):
        quantize_file(path, path, "Q8_0")
    with pytest.raises(QjaxError, match="name that ends in .gguf"):
        quantize_file(path, tmp_path / "folder", "Q8_0")
    assert path.read_bytes() == before


def test_unknown_architecture(model, tmp_path):
    path = tmp_path / "m.gguf"
    gguf.write(path, model.metadata | {"general.architecture": "mamba"}, dict(model.tensors))
    with pytest.raises(QjaxError, match="unknown architecture 'mamba'; known: gemma2, .*llama"):
        qjax.load(path)


def test_tokenizer_larger_than_embedding(model, tmp_path):
    path = tmp_path / "m.gguf"
    gguf.write(path, model.metadata, dict(model.tensors) | {"token_embd.weight": model.params.token_embd[:2000]})
    with pytest.raises(QjaxError, match="2048 tokens, the embedding only 2000 rows"):
        qjax.load(path)


def test_cache_types_have_to_exist_and_to_fit(folder):
    with pytest.raises(QjaxError, match="cache_v is 'q9', expected one of f32, f16, bf16, q8_0"):
        qjax.load(folder, cache_v="q9")
    with pytest.raises(QjaxError, match="cache_k is Q8_0, whose blocks of 32 do not divide the model's head size"):
        qjax.load(folder, cache_k="Q8_0")


# By default some, and in thorough runs each type once, for a pair takes long to compile.
PAIRS = [("f16", "q5_1"), ("q8_0", "iq4_nl")]
OTHERS = [pytest.param(*p, marks=pytest.mark.thorough) for p in (("f32", "bf16"), ("q5_0", "q4_1"), ("q4_0", "q4_0"))]
EQUAL = [pytest.param(kind, kind, marks=pytest.mark.exact) for kind in cache.TYPES if kind != "q4_0"]


@pytest.mark.parametrize(("k", "v"), [*PAIRS, *OTHERS, *EQUAL])
def test_generates_through_each_cache_type(k, v):
    tiny = qjax.load("tiny", cache_k=k.upper(), cache_v=v)
    assert [held.name for held in tiny.cache_types("f32")] == [k, v]
    # 4 bits are enough for how most tales begin.
    assert tiny.generate("Once upon a time", max_tokens=4).text.startswith(" there was a")


@pytest.mark.parametrize(("value", "n_rot"), [(None, 64), ("", 64), ("0", 64), ("no", 64), ("1", 1), ("-2x", 1)])
def test_llama_cpp_s_variable_disables_the_rotation(monkeypatch, value, n_rot):
    monkeypatch.delenv("LLAMA_ATTN_ROT_DISABLE", raising=False)
    if value is not None:
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", value)
    tiny = qjax.load("tiny", cache_k="q8_0", cache_v="q8_0")
    assert [held.n_rot for held in tiny.cache_types("f32")] == [n_rot, n_rot]


def test_compilation_cache_is_on_and_can_be_moved_or_disabled(monkeypatch, tmp_path):
    from qjax import model

    before = jax.config.jax_compilation_cache_dir
    try:
        for setting, expected in (("off", None), (str(tmp_path / "here"), str(tmp_path / "here"))):
            jax.config.update("jax_compilation_cache_dir", None)
            monkeypatch.setenv("QJAX_COMPILATION_CACHE", setting)
            model.enable_compilation_cache()
            assert jax.config.jax_compilation_cache_dir == expected
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.delenv("QJAX_COMPILATION_CACHE")
        monkeypatch.setenv("QJAX_CACHE", str(tmp_path))
        model.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# ── a real model ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def peer():
    return json.loads(shared("peers/smollm2-135m-instruct.json").read_text())


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return qjax.load(smollm2_path)


def test_smollm2_file_is_written_back_with_the_same_bytes(smollm2_path, tmp_path):
    source = open_source(smollm2_path)
    gguf.write(tmp_path / "copy.gguf", source.metadata, source.tensors)
    assert (tmp_path / "copy.gguf").read_bytes() == smollm2_path.read_bytes()


@pytest.mark.exact
def test_smollm2_says_what_llama_cpp_says(smollm2_path, peer):
    """Greedy text from the same weights in float32."""
    model = qjax.load(smollm2_path, dtype="float32")
    for case in peer["greedy"]:
        assert str(model.generate(case["prompt"], max_tokens=case["max_tokens"])).rstrip() == case["text"].rstrip()


def test_smollm2_weights_are_packed(smollm2):
    assert smollm2.bpw == pytest.approx(5.74, abs=0.01)
    assert smollm2.params.token_embd.format.name == "Q8_0"
    assert jnp.dtype(smollm2.params.runs[0]["ffn_up.weight"].fields.qs.dtype) == jnp.uint8
