"""GGML files from before GGUF, written here byte by byte: read as they are, and as llama.cpp's converter has them.

Oracles: the layout as published (llama.cpp convert_llama_ggml_to_gguf.py), and that script itself.
"""

import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import fails
from hypothesis import given
from hypothesis import strategies as st
from oracles import programs

import qjax
from qjax import QjaxError
from qjax.io import ggml_legacy, gguf
from qjax.source import open_source

VOCAB, EMBD, HEADS, LAYERS, FF = 300, 64, 4, 2, 96
# Magic number, version, whether tokens have scores, and to what tensors are aligned.
FILES = {
    "GGML 1": (b"lmgg", None, False, 1),
    "GGMF 1": (b"fmgg", 1, True, 1),
    "GGJT 1": (b"tjgg", 1, True, 32),
    "GGJT 2": (b"tjgg", 2, True, 32),
    "GGJT 3": (b"tjgg", 3, True, 32),
}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q6_K": 18}
# GGUF's names beside those of these files, said again.
NAMES = {
    "token_embd": "tok_embeddings", "output_norm": "norm", "output": "output", "attn_norm": "attention_norm",
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3", "ffn_norm": "ffn_norm",
}  # fmt: skip
# As the old converter wrote them: bytes as they are, three names in brackets, spaces, text that is no UTF-8.
TOKENS = [
    b"<unk>", b" \xe2\x81\x87 ", b"", *(bytes([i]) for i in range(256)), b" the", b"a b", b"\xff\xfe", b"",
    "\u00fc".encode(), *(f" t{i}".encode() for i in range(36)),
]  # fmt: skip


def shapes(kv_heads=HEADS, ff=FF):
    """By GGUF name."""
    kv = kv_heads * EMBD // HEADS
    layer = {
        "attn_norm": (EMBD,), "attn_q": (EMBD, EMBD), "attn_k": (kv, EMBD), "attn_v": (kv, EMBD),
        "attn_output": (EMBD, EMBD), "ffn_norm": (EMBD,), "ffn_gate": (ff, EMBD), "ffn_up": (ff, EMBD),
        "ffn_down": (EMBD, ff),
    }  # fmt: skip
    outside = {"token_embd": (VOCAB, EMBD), "output_norm": (EMBD,), "output": (VOCAB, EMBD)}
    return {f"{name}.weight": shape for name, shape in outside.items()} | {
        f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()
    }


def tensors(format="F32", **sizes):
    """Blocks at random: (GGUF name, shape, format, bytes)."""
    rng = np.random.default_rng(0)
    for name, shape in shapes(**sizes).items():
        of = qjax.formats.get("F32" if len(shape) == 1 else format)
        if of.name.startswith("F"):
            yield name, shape, of, rng.standard_normal(shape).astype(f"<f{of.type_size}").tobytes()
        else:
            yield name, shape, of, rng.bytes(of.nbytes(shape))


def old_name(name):
    *layer, inside, weight = name.replace("blk.", "layers.").rsplit(".", 2)
    return ".".join([*layer, NAMES[inside], weight])


def build(kind="GGJT 3", format="F32", *, numbers=None, tokens=TOKENS, listed=None, **sizes) -> bytes:
    magic, version, scores, alignment = FILES[kind]
    data = magic + (b"" if version is None else struct.pack("<I", version))
    numbers = numbers or (len(tokens), EMBD, 256, HEADS, LAYERS, EMBD // HEADS, FILE_TYPES.get(format, 1))
    data += struct.pack("<7I", *numbers)
    for i, token in enumerate(tokens):
        data += struct.pack("<I", len(token)) + token + (struct.pack("<f", -i / 8) if scores else b"")
    for name, shape, of, content in tensors(format, **sizes) if listed is None else listed:
        name = old_name(name).encode()
        data += struct.pack("<3I", len(shape), len(name), of.ggml_id)
        data += struct.pack(f"<{len(shape)}I", *reversed(shape)) + name
        data += bytes(-len(data) % alignment) + content
    return data


def write(tmp_path, data, name="model.bin"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def readable(kind):
    version = int(kind[-1]) if kind.startswith("GGJT") else 0
    return [
        "F32",
        "F16",
        *(["Q5_0", "Q5_1"] if version >= 2 else []),
        *(["Q4_0", "Q4_1", "Q8_0"] if version == 3 else []),
    ]


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


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q5_1"])
def test_old_blocks_are_named_and_refused(tmp_path, kind, format):
    if format in readable(kind):
        return
    path = write(tmp_path, build(kind, format))
    since = 2 if format.startswith("Q5") else 3
    with pytest.raises(
        QjaxError, match=rf"model.bin: .*tok_embeddings.*{format} blocks of a {kind} .*GGJT {since}.*float16"
    ):
        ggml_legacy.read(path)


def changed(**changes):
    numbers = dict(vocab=VOCAB, embd=EMBD, mult=256, head=HEADS, layer=LAYERS, rot=EMBD // HEADS, ftype=0)
    return build(numbers=tuple((numbers | changes).values()))


def with_tensors(change):
    return build(listed=change(list(tensors())))


def renamed(listed, new):
    (_, *rest), *others = listed
    return [(new, *rest), *others]


def typed(ggml_id):
    """The first tensor of another type."""
    return build().replace(struct.pack("<3I", 2, len("tok_embeddings.weight"), 0), struct.pack("<3I", 2, 21, ggml_id))


HEADER = struct.pack("<3I", 2, 21, 0)
BAD = {
    "version": (build().replace(b"tjgg\3", b"tjgg\4", 1), "GGJT version 4, expected 1, 2, 3"),
    "GGMF version": (b"fmgg" + struct.pack("<8I", 2, *[8] * 7), "GGMF version 2, expected 1"),
    "cut in the numbers": (build()[:20], "the number head needs 4 bytes, the file has 0 left"),
    "no heads": (changed(head=0), "64 columns in 0 heads of 16"),
    "heads": (changed(head=5), "64 columns in 5 heads of 16.*Whisper"),
    "rot": (changed(rot=8), "64 columns in 4 heads of 8"),
    "no columns": (changed(embd=0, rot=0), "0 columns in 4 heads of 0"),
    "no tokens": (changed(vocab=0), "0 tokens, expected 3 at least"),
    "tokens": (changed(vocab=2**32 - 1), f"a vocabulary of {2**32 - 1} tokens needs {2**35 - 8} bytes"),
    "more tokens": (changed(vocab=VOCAB + 1), r"has \d+ dimensions"),
    "fewer tokens": (changed(vocab=VOCAB - 1), r"has \d+ dimensions"),
    "no layers": (changed(layer=0), "n_layers is 0"),
    "layers": (changed(layer=2**31), f"{2**31} layers, more than there are tensors"),
    "a layer more": (changed(layer=3), "blk.2.attn_norm.weight is missing"),
    "a layer fewer": (changed(layer=1), "blk.1.attn_norm.weight has shape .*expected none in 1 layers"),
    "length": (build(tokens=[b"x" * 5000, b"", b""]), "token 0 has 5000 bytes, expected at most 4095"),
    "cut in a token": (build()[:39], "token 0 needs 5 bytes, the file has 2 left|needs"),
    "cut in a header": (build()[:-1] + HEADER[:7], "needs"),
    "cut in the data": (build()[:-1], "layers.1.feed_forward.w2.weight.*needs 24576 bytes, the file has 24575 left"),
    "three dimensions": (build().replace(HEADER, struct.pack("<3I", 3, 21, 0)), "has 3 dimensions, expected 1 or 2"),
    "no dimensions": (build().replace(HEADER, struct.pack("<3I", 0, 21, 0)), "has 0 dimensions, expected 1 or 2"),
    "name": (build().replace(HEADER, struct.pack("<3I", 2, 2**31, 0)), f"name of a tensor has {2**31} bytes"),
    "unknown name": (with_tensors(lambda t: [("blk.0.attn_q.weight", *t[0][1:]), *t]), "occurs twice"),
    "negative type": (typed(2**32 - 1), "unknown tensor type id 4294967295"),
    "removed type": (typed(4), "Q4_2 blocks of a GGJT 3 file.*given up"),
    "younger type": (typed(30), "BF16 is younger than such files"),
    "rows": (typed(14), "tok_embeddings.*row length 64 is not a multiple of 256"),
    "missing": (with_tensors(lambda t: t[1:]), "token_embd.weight"),
    "no tensors": (build(listed=[]), "2 layers, more than there are tensors"),
    "a part of a model": (
        with_tensors(lambda t: [(n, (s[0] // 2, *s[1:]), f, d[: len(d) // 2]) for n, s, f, d in t]),
        "has shape .*bin.1",
    ),
    "a large tensor": (
        build().replace(struct.pack("<2I", EMBD, VOCAB), struct.pack("<2I", 2**32 - 1, 2**32 - 1), 1),
        f"tok_embeddings.weight' needs {4 * (2**32 - 1) ** 2} bytes",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files(tmp_path, case):
    data, message = BAD[case]
    with pytest.raises(QjaxError, match=message) as error:
        ggml_legacy.read(write(tmp_path, data))
    assert str(error.value).startswith(f"{tmp_path / 'model.bin'}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rope.freqs", "layers.0.attention.wq", "layers.00.attention.wq.weight", "norm.bias"])
def test_unknown_tensors(tmp_path, name):
    data = build()
    header, new = struct.pack("<2I", EMBD, VOCAB) + b"tok_embeddings.weight", name.encode()
    data = data.replace(HEADER + header, struct.pack("<5I", 2, len(new), 0, EMBD, VOCAB) + new)
    with pytest.raises(QjaxError, match=f"tensor '{name}': a LLaMA model has no such tensor"):
        ggml_legacy.read(write(tmp_path, data))


def test_an_empty_file_and_another(tmp_path):
    with pytest.raises(QjaxError, match="the file is empty"):
        ggml_legacy.read(write(tmp_path, b""))
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
