"""Receipts and qjax verify: files of other programs follow from their source; of tampered ones it says where."""

import dataclasses
import hashlib
import json
import subprocess
from pathlib import Path

import gguf as gguf_py
import jax
import numpy as np
import pytest
from conftest import fails
from oracles import programs
from safetensors.numpy import load_file, save_file
from test_evaluate import TEXT, byte_tokenizer

import qjax
from qjax import QjaxError
from qjax.io import gguf, imatrix, splits
from qjax.io.gguf import Metadata, Value, ValueType
from qjax.io.imatrix import Entry, Imatrix
from qjax.methods import receipt as receipts
from qjax.methods import recipes
from qjax.methods.receipt import Receipt
from qjax.models import transformer
from qjax.models.config import Config
from qjax.quantize_file import quantize_file

pytestmark = pytest.mark.in_haste

CONFIG = Config("llama", 1, 32, 64, 2, 1, 32, 256, 64, 1e-5, 1e4, True)
METADATA = Metadata(byte_tokenizer().to_gguf() | {key: value for key, (_, value) in CONFIG.to_gguf().items()})
DOWN = "blk.0.ffn_down.weight"


def weights(seed=0):
    return {name: np.asarray(w) for name, w in transformer.init(CONFIG, jax.random.key(seed)).items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "source.gguf"
    gguf.write(path, METADATA, weights())
    return path


@pytest.fixture(scope="module")
def matrix(source):
    path, rng = source.with_suffix(".imatrix"), np.random.default_rng(0)
    columns = {name: w.shape[-1] for name, w in weights().items() if w.ndim > 1 and name.startswith("blk")}
    entries = {name: Entry(rng.random((1, n), np.float32), np.ones(1, np.float32)) for name, n in columns.items()}
    imatrix.write(path, Imatrix(entries, ("text",), 7, 512))
    return path


@pytest.fixture(scope="module")
def weighed(source, matrix):
    """Q8_0, and Q4_0 in one tensor, weighed, with a receipt."""
    path = source.with_name("weighed.gguf")
    recipe = recipes.recipe("Q8_0", tensor_types={"ffn_(down|norm)": "Q4_0"})
    quantize_file(source, path, recipe, imatrix=matrix, receipt=True)
    return path


@pytest.fixture
def edited(weighed, tmp_path):
    """A function to a copy of the file with metadata that differ."""

    def edit(**changes):
        file, path = gguf.read(weighed), tmp_path / "edited.gguf"
        entries = {key: value for key, value in file.metadata.typed.items() if key not in changes.get("drop", ())}
        gguf.write(path, Metadata(entries) | changes.get("put", {}), file.tensors)
        return path

    return edit


# ── receipts ─────────────────────────────────────────────────────────────────────────────────────────


def test_llama_cpps_files_have_none_unless_it_is_asked_for(source, tmp_path):
    """They are its own to the last byte; what it does not write has one, whoever writes it."""
    ours, named = tmp_path / "ours.gguf", tmp_path / "named.gguf"
    quantize_file(source, ours, "Q8_0")
    assert not any(key.startswith("qjax.") for key in gguf.read(ours).metadata)
    quantize_file(source, named, "Q8_0", receipt=True)
    assert [key for key in gguf.read(named).metadata if key.startswith("qjax.")] == [
        "qjax.receipt", "qjax.version", "qjax.contract", "qjax.source_sha256", "qjax.recipe.name",
        "qjax.recipe.default", "qjax.recipe.file_type", "qjax.recipe.fallback",
    ]  # fmt: skip
    for wanted in (None, False):
        quantize_file(source, ours, "Q8_0", rounding="floor", receipt=wanted)
        found = Receipt.read(gguf.read(ours).metadata)
        assert (found and found.rounding) == (None if wanted is False else "floor")


def test_models_have_them_too(source, tmp_path):
    model = qjax.load(source).quantize("Q8_0", rounding="floor")
    model.save(tmp_path / "m.gguf")
    assert qjax.verify(tmp_path / "m.gguf", source)
    assert Receipt.read(gguf.read(tmp_path / "m.gguf").metadata).source_sha256 == by_hand(weights())
    again = model.quantize("Q4_0", allow_requantize=True)
    assert not any(key.startswith("qjax.") for key in again.metadata), "what a changed model was made of is not known"


def by_hand(tensors):
    """The hash as it is described."""
    lines = [
        f"{name} {'x'.join(map(str, w.shape))} {hashlib.sha256(w.astype('<f4').tobytes()).hexdigest()}\n"
        for name, w in sorted(tensors.items())
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_hash_of_weights_is_of_their_values(source, tmp_path):
    """Not of order, shards, container or width; another weight, name or shape is another hash."""
    tensors = {name: w.astype(np.float16).astype(np.float32) for name, w in weights().items()}
    expected, halves = by_hand(tensors), {name: w.astype(np.float16) for name, w in tensors.items()}
    gguf.write(tmp_path / "m.gguf", METADATA, dict(reversed(halves.items())))
    shards = splits.split(tmp_path / "m.gguf", tmp_path / "s", max_tensors=4)
    assert len(shards.files) > 2
    qjax.load(tmp_path / "m.gguf").save(tmp_path / "folder")
    for path in (tmp_path / "m.gguf", shards.files[1].path, tmp_path / "folder"):
        assert receipts.weights_sha256(qjax.source.open_source(path).tensors) == expected
    assert receipts.weights_sha256(tensors) == expected
    for other in (weights(1), {f"{name}x": w for name, w in tensors.items()}, {n: w[None] for n, w in tensors.items()}):
        assert receipts.weights_sha256(other) != expected


def test_receipts_are_read_as_they_were_written(weighed, matrix):
    """By gguf-py too; expressions have become the names they decided."""
    fields = gguf_py.GGUFReader(weighed).fields
    assert fields["qjax.imatrix_sha256"].contents() == hashlib.sha256(matrix.read_bytes()).hexdigest()
    assert fields["qjax.recipe.tensor_types"].contents() == [f"{DOWN}=Q4_0"]
    found = Receipt.read(gguf.read(weighed).metadata)
    assert Receipt.read(Metadata(found.to_metadata())) == found
    whole = dataclasses.replace(
        found, method="awq+gptq", rounding="floor", keep_split=True, include_weights=("a", "b"), exclude_weights=("c",),
        calibrate_sha256="0", n_ctx=128, chunks=3, overrides=("k",), jax="1", device="cpu",
        recipe=dataclasses.replace(found.recipe, pure=True, output_tensor_type=qjax.formats.get("Q6_K"), converts=True),
    )  # fmt: skip
    assert Receipt.read(Metadata(whole.to_metadata())) == whole


def test_imatrix_in_memory_is_hashed_as_its_file(matrix):
    assert receipts.imatrix_sha256(imatrix.read(matrix)) == hashlib.sha256(matrix.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("put", "drop", "message"),
    [
        ({"qjax.receipt": 2}, (), "the receipt is of a newer qjax ('0.1.0'). Update qjax."),
        ({}, ("qjax.source_sha256",), "metadata key qjax.source_sha256 is missing"),
        ({"qjax.n_ctx": "512"}, (), "metadata key qjax.n_ctx is STRING, which no receipt has there"),
        ({"qjax.include_weights": [1]}, (), "qjax.include_weights is ARRAY[INT32, 1], which no receipt"),
        ({"qjax.recipe.default": "Q4_9"}, (), "metadata key qjax.recipe.default: unknown format 'Q4_9'"),
        ({"qjax.recipe.file_type": "Q4_9"}, (), "qjax.recipe.file_type: unknown file type 'Q4_9'"),
        ({"qjax.recipe.tensor_types": ["Q8_0"]}, (), "metadata key qjax.recipe.tensor_types: "),
        ({"qjax.method": "gptx"}, (), "unknown method 'gptx'"),
        ({"qjax.rounding": "up"}, (), "unknown rounding"),
    ],
)
def test_damaged_receipts_are_refused(run, edited, source, matrix, put, drop, message):
    if "qjax.recipe.tensor_types" in put:
        put = {"qjax.recipe.tensor_types": ["Q8_0", "x=Q8_9"]}
    path = edited(put=put, drop=drop)
    fails(run("verify", path, "--from", source, "--imatrix", matrix), message)


# ── qjax verify ──────────────────────────────────────────────────────────────────────────────────────


def flip(path: Path, name: str, at: int, target: Path) -> Path:
    """A copy in which one bit of a tensor is another."""
    data = bytearray(path.read_bytes())
    data[gguf.read(path).tensors[name].offset + at] ^= 4
    target.write_bytes(data)
    return target


def test_a_file_follows_from_its_source(run, weighed, source, matrix):
    code, out, err = run("verify", weighed, "--from", source, "--imatrix", matrix)
    n_blocks = sum(w.size // (32 if w.ndim > 1 else 1) for w in weights().values())
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{weighed} follows from {source}",
        f"tensors: 11 of 11 as they follow, {n_blocks:,} blocks; byte-exact",
    ]


@pytest.mark.parametrize(("name", "at", "block"), [(DOWN, 18 * 5 + 17, 5), ("token_embd.weight", 0, 0)])
def test_one_bit_is_found(run, weighed, source, matrix, tmp_path, name, at, block):
    path = flip(weighed, name, at, tmp_path / "t.gguf")
    code, out, _ = run("verify", path, "--from", source, "--imatrix", matrix, "--json")
    told = json.loads(out)
    assert (code, told["follows"], told["n_differing"], told["metadata"]) == (1, False, 1, [])
    n_blocks = weights()[name].size // 32
    assert told["tensors"] == [
        {"name": name, "problem": "bytes", "n_blocks": n_blocks, "n_differing": 1, "first": block}
    ]
    shown = str(qjax.verify(path, source, imatrix=matrix)).splitlines()
    assert shown[1].startswith("tensors: 10 of 11 as they follow")
    assert shown[-1].split() == [name, "bytes", "1", "of", f"{n_blocks}", str(block)]


def test_another_source_is_refused_before_anything_is_computed(run, weighed, matrix, tmp_path):
    gguf.write(tmp_path / "other.gguf", METADATA, weights(1))
    code, out, _ = run("verify", weighed, "--from", tmp_path / "other.gguf", "--imatrix", matrix)
    assert code == 1
    assert f"source: its sha256 is {by_hand(weights(1))}, the receipt names {by_hand(weights())}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "importance matrix: the receipt names one of sha256"),
        (["--imatrix", "OTHER"], "importance matrix: its sha256 is"),
        (["--imatrix", "MATRIX", "--calibrate", "OTHER"], "calibration text: the receipt names none"),
        (["--imatrix", "MATRIX", "--type", "Q4_0"], "its receipt says how it was made"),
    ],
)
def test_what_the_receipt_names_has_to_be_given(run, weighed, source, matrix, tmp_path, arguments, message):
    made = imatrix.read(matrix)
    imatrix.write(tmp_path / "OTHER", dataclasses.replace(made, datasets=("other",)))
    if "--calibrate" in arguments:
        (tmp_path / "OTHER").write_text("text")
    paths = {"OTHER": tmp_path / "OTHER", "MATRIX": matrix}
    fails(run("verify", weighed, "--from", source, *(paths.get(a, a) for a in arguments)), message)


def test_metadata_count_but_for_names(edited, source, matrix):
    """A chat template is code."""
    name = edited(put={"general.name": "other", "quantize.imatrix.file": "elsewhere"})
    assert qjax.verify(name, source, imatrix=matrix)
    template = qjax.verify(edited(put={"tokenizer.chat_template": "{{ x }}"}), source, imatrix=matrix)
    assert not template
    assert [change.key for change in template.metadata] == ["tokenizer.chat_template"]
    assert "tokenizer.chat_template" in str(template)


def test_what_was_set_by_hand_is_expected(source, tmp_path):
    quantize_file(source, tmp_path / "o.gguf", "Q8_0", overrides={"llama.rope.freq_base": 5e4}, receipt=True)
    assert qjax.verify(tmp_path / "o.gguf", source)


def test_a_file_of_another_version(edited, source, matrix):
    found = qjax.verify(edited(put={"qjax.version": "0.0.9"}), source, imatrix=matrix)
    assert found
    assert found.notes == (f"made with qjax 0.0.9; here it is {qjax.__version__}",)


def test_files_of_other_programs(run, tmp_path):
    """Without a receipt, by the formats that they have: here gguf-py's blocks."""
    kinds = {DOWN: "Q8_0", "blk.0.ffn_up.weight": "Q4_0", "blk.0.attn_q.weight": "BF16"}
    source, path = tmp_path / "source.gguf", tmp_path / "theirs.gguf"
    described = {"llama.block_count": 1, "llama.attention.head_count": 2}
    gguf.write(source, {"general.architecture": "llama"} | described, weights())
    writer = gguf_py.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_uint32("general.quantization_version", 2)
    for name, w in weights().items():
        kind = gguf_py.GGMLQuantizationType[kinds.get(name, "F32")]
        writer.add_tensor(name, gguf_py.quants.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, out, err = run("verify", path, "--from", source)
    assert (code, err, out.splitlines()[1][:8]) == (0, "", "tensors:"), out
    code, out, _ = run("verify", path, "--from", source, "--type", "Q8_0")
    assert code == 1
    assert "format Q4_0, expected Q8_0" in out


def test_what_is_missing_or_too_much(source, tmp_path):
    """Tensors under other names, and of other shapes."""
    tensors = weights()
    tensors["more"] = tensors.pop("output_norm.weight")
    tensors[DOWN] = tensors[DOWN].reshape(-1, 32)
    gguf.write(tmp_path / "x.gguf", METADATA | {"general.quantization_version": Value(ValueType.UINT32, 2)}, tensors)
    found = qjax.verify(tmp_path / "x.gguf", source)
    assert {tensor.name: tensor.problem for tensor in found.tensors} == {
        "output_norm.weight": "is missing", "more": "is not in the source", DOWN: "shape 64×32, expected 32×64"
    }  # fmt: skip


METHODS = [
    "rtn",
    *(pytest.param(name, marks=pytest.mark.exact) for name in ("gptq", "gptaq", "awq+clip", "rotate+hqq")),
]


@pytest.mark.parametrize("method", METHODS)
def test_calibrated_methods_are_done_again(run, source, tmp_path, method):
    """With the text that the receipt names, and no other."""
    (tmp_path / "text").write_text(TEXT + "\n")
    (tmp_path / "other").write_text(TEXT[1:])
    path = tmp_path / "m.gguf"
    command = ["quantize", source, path, "Q8_0", "--method", method, "--calibrate", tmp_path / "text", "-c", 32]
    assert run(*command, "--chunks", 2)[0] == 0
    named = gguf.read(path).metadata
    assert named["qjax.calibrate_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert (named["qjax.n_ctx"], named["qjax.chunks"]) == (32, 2)
    assert (named["qjax.contract"], named["qjax.jax"]) == ("repeatable", jax.__version__)
    code, out, _ = run("verify", path, "--from", source, "--calibrate", tmp_path / "text")
    assert (code, "repeatable" in out) == (0, True), out
    fails(run("verify", path, "--from", source, "--calibrate", tmp_path / "other"), "calibration text: its sha256 is")
    fails(run("verify", path, "--from", source), "calibration text: the receipt names one")


def test_a_folder_and_its_files(run, source, tmp_path):
    """What `qjax convert` makes of a folder, in shards."""
    qjax.load(source).save(tmp_path / "folder")
    options = ["--outtype", "q8_0", "--receipt", "--split-max-tensors", 5]
    assert run("convert", tmp_path / "folder", tmp_path / "c.gguf", *options)[0] == 0
    shard = next(tmp_path.glob("c-00002*"))
    assert qjax.verify(shard, tmp_path / "folder")
    (tmp_path / "folder").rename(tmp_path / "renamed")
    assert qjax.verify(shard, tmp_path / "renamed"), "what a folder is called does not count"
    path = tmp_path / "renamed" / "model.safetensors"
    save_file({name: w + 1 if "embed" in name else w for name, w in load_file(path).items()}, path)
    assert not qjax.verify(shard, tmp_path / "renamed").is_source


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────────


def test_llama_quantizes_files_follow(llama_cpp, tmp_path):
    quantize_file("tiny", tmp_path / "f32.gguf", "F32")
    subprocess.run(
        [llama_cpp / "llama-quantize", tmp_path / "f32.gguf", tmp_path / "q.gguf", "Q8_0", "1"],
        check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    assert qjax.verify(tmp_path / "q.gguf", "tiny")
    assert qjax.verify(tmp_path / "q.gguf", "tiny", "Q8_0")
    assert len(qjax.verify(tmp_path / "q.gguf", "tiny", "BF16").tensors) == 29


def test_llama_cpp_reads_files_with_receipts(llama_cpp, tmp_path):
    quantize_file("tiny", tmp_path / "q.gguf", "Q8_0", receipt=True)
    command = [llama_cpp / "llama-completion", "-m", tmp_path / "q.gguf", "-p", "Once", "-n", 4, "--temp", 0, "-no-cnv"]
    assert "Once" in programs.output(*command, "--no-warmup", "-t", 1, last="graphs reused")


def test_verify_raises_what_is_wrong(source, tmp_path):
    with pytest.raises(QjaxError, match="no such file"):
        qjax.verify(tmp_path / "none.gguf", source)
