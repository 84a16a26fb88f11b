"""GGML files from before GGUF, written byte by byte: read as they are, and as llama.cpp's converter has them.

Oracles: the layout as published (llama.cpp convert_llama_ggml_to_gguf.py), and that script itself.
"""

import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import fails
from hostile.ggml_files import EMBD, FF, FILES, HEADER, HEADS, LAYERS, TOKENS, VOCAB, build, readable, tensors
from hypothesis import given
from hypothesis import strategies as st
from oracles import programs

import qjax
from qjax import QjaxError
from qjax.io import ggml_legacy, gguf
from qjax.source import open_source


def write(tmp_path, data, name="model.bin"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


CASES = [(kind, format) for kind in FILES for format in readable(kind)]


@pytest.mark.parametrize(("kind", "format"), CASES)
def test_what_is_written_is_read(tmp_path, kind, format):
    file = ggml_legacy.read(write(tmp_path, build(kind, format)))
    assert file.container == kind
    assert [*file.tensors] == [name for name, *_ in tensors(format)]
    for name, shape, of, content in tensors(format):
        found = file.tensors[name]
        assert (found.shape, found.format) == (shape, of)
        assert found.data.tobytes() == content, name


def test_k_quants(tmp_path):
    """Rows of 256; only in the youngest of these files."""
    content = qjax.formats.get("Q6_K").nbytes((EMBD, 256))
    listed = [
        (name, shape, qjax.formats.get("Q6_K"), bytes(range(100)) * (content // 100) + bytes(content % 100))
        if name.endswith("ffn_down.weight")
        else (name, shape, of, data)
        for name, shape, of, data in tensors("Q4_0", ff=256)
    ]
    file = ggml_legacy.read(write(tmp_path, build("GGJT 3", "Q6_K", listed=listed)))
    assert file.tensors["blk.1.ffn_down.weight"].data.tobytes() == listed[-1][3]


def test_metadata(tmp_path):
    metadata = ggml_legacy.read(write(tmp_path, build("GGJT 1", "F16"))).metadata
    sizes = {
        "general.file_type": 1, "llama.context_length": 2048, "llama.embedding_length": EMBD,
        "llama.block_count": LAYERS, "llama.feed_forward_length": FF, "llama.rope.dimension_count": EMBD // HEADS,
        "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": HEADS,
        "llama.attention.layer_norm_rms_epsilon": np.float32(5e-6), "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    assert {key: metadata[key] for key in sizes} == sizes
    texts, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert texts[:3] == ["<unk>", "<s>", "</s>"]
    assert texts[3:259] == [f"<0x{i:02X}>" for i in range(256)]
    assert texts[259:264] == ["\u2581the", "a\u2581b", "\udcff\udcfe", "", "\u00fc"]
    assert types.tolist()[:263] == [2, 3, 3, *[6] * 256, 1, 1, 1, 3]
    assert set(types[263:].tolist()) == {1}
    np.testing.assert_array_equal(metadata["tokenizer.ggml.scores"], -np.arange(VOCAB, dtype=np.float32) / 8)


def test_fewer_heads_of_keys_are_seen_from_their_shape(tmp_path):
    """As only LLaMA 2 70B has them, whose norm and context are known then."""
    path = write(tmp_path, build("GGJT 3", "F16", kv_heads=2))
    metadata, prefix = ggml_legacy.read(path).metadata, "llama.attention"
    assert metadata[f"{prefix}.head_count_kv"] == 2
    assert metadata[f"{prefix}.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert metadata["llama.context_length"] == 4096


def test_what_files_do_not_say_can_be_said(tmp_path):
    metadata = ggml_legacy.read(write(tmp_path, build()), norm_eps=1e-6, n_ctx=8192).metadata
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-6)
    assert metadata["llama.context_length"] == 8192


# ── where models are named ───────────────────────────────────────────────────────────────────────────


def test_info_quantize_and_set(tmp_path, run):
    path = write(tmp_path, build("GGJT 1", "F16"))
    code, out, _ = run("info", path)
    assert code == 0
    assert "GGJT 1" in out
    assert "llama.attention.head_count_kv" in out
    target = tmp_path / "out.gguf"
    epsilon = "llama.attention.layer_norm_rms_epsilon"
    assert run("quantize", path, target, "COPY", "--override-kv", f"{epsilon}=float:1e-6")[0] == 0
    before, after = ggml_legacy.read(path), gguf.read(target)
    assert after.metadata[epsilon] == np.float32(1e-6)
    assert after.metadata["general.file_type"] == 1
    for name, tensor in before.tensors.items():
        assert after.tensors[name].data.tobytes() == tensor.data.tobytes()
    fails(run("set", path, "general.name", "x"), "a GGML file from before GGUF")
    assert run("quantize", path, tmp_path / "q4_0.gguf", "Q4_0")[0] == 0
    assert gguf.read(tmp_path / "q4_0.gguf").tensors["blk.0.attn_q.weight"].format.name == "Q4_0"


def test_the_model_runs(tmp_path):
    """With the logits of the GGUF file that holds the same."""
    tokens = [token for token in TOKENS if token != b"\xff\xfe"] + [b" "]
    path = write(tmp_path, build("GGJT 3", "F16", kv_heads=2, tokens=tokens))
    source = open_source(path)
    gguf.write(tmp_path / "same.gguf", source.metadata, source.tensors)
    try:
        ours, same = qjax.load(path), qjax.load(tmp_path / "same.gguf")
    except QjaxError as error:
        if "tokenizer.ggml.model is 'llama'; known" not in str(error):
            raise
        pytest.skip(str(error))
    ids = [1, 70, 259, 262]
    logits = np.asarray(ours.logits(ids))
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits, same.logits(ids))
    assert ours.tokenizer.decode(ours.encode("the a b\n\u00fc")[1:]).strip() == "the a b\n\u00fc"


# ── llama.cpp's converter ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "format"), CASES)
def test_llama_cpps_converter_writes_the_same_file(tmp_path, llama_cpp, kind, format):
    path = write(tmp_path, build(kind, format))
    assert convert(path, ours(path)) == written(path)


def test_llama_cpps_converter_of_a_70b(tmp_path, llama_cpp):
    path = write(tmp_path, build("GGJT 3", "F16", kv_heads=2))
    assert convert(path, ours(path), "--gqa", "2", "--eps", "1e-5", "-c", "4096") == written(path)


def ours(path):
    return ggml_legacy.read(path)


def written(path) -> bytes:
    file, target = ours(path), path.with_suffix(".ours.gguf")
    gguf.write(target, file.metadata, file.tensors)
    return target.read_bytes()


# The script gives shapes in weights.  gguf-py takes them for bytes by now, so that it fails, or writes other shapes.
REPAIRED = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0] + "/gguf-py")
from gguf import gguf_writer
gguf_writer.quant_shape_from_byte_shape = lambda shape, type: shape
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert(path, file, *options) -> bytes:
    """What the script makes of it; the description is each program's own."""
    script, target = programs.source() / "convert_llama_ggml_to_gguf.py", path.with_suffix(".theirs.gguf")
    description = file.metadata["general.description"]
    command = [sys.executable, "-c", REPAIRED, script, "-i", path, "-o", target, "--desc", description, *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return target.read_bytes()


# ── what is refused: hostile/ggml_files.py, and ──────────────────────────────────────────────────────


def test_no_file_and_another(tmp_path):
    with pytest.raises(QjaxError, match="no such file"):
        ggml_legacy.read(tmp_path / "none.bin")
    assert not ggml_legacy.recognizes(write(tmp_path, b"GGUF" + bytes(20)))


SMALL = build(tokens=TOKENS[:4], listed=[])


@given(st.integers(0, len(SMALL) + 40), st.binary(max_size=8))
def test_any_damage_is_one_error(tmp_path_factory, at, new):
    """In what stands before the tensors, or after, where they would begin."""
    folder = tmp_path_factory.mktemp("damaged")
    data = SMALL + HEADER + struct.pack("<2I", EMBD, 4) + b"tok_embeddings.weight" + bytes(EMBD * 16)
    with pytest.raises(QjaxError, match=r"^.*model.bin: [^\n]*$"):
        ggml_legacy.read(write(folder, data[:at] + new + data[at + len(new) :]))
