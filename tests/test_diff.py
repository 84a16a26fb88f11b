"""qjax diff: what it finds against what was changed, errors against gguf-py's dequantizer and float64."""

import json
import math
import re

import gguf as gguf_py
import numpy as np
import pytest
from conftest import fails
from gguf import GGMLQuantizationType as Kind

import qjax.diff
from qjax.diff import diff
from qjax.io import gguf, stored
from qjax.io.gguf import Value, ValueType
from qjax.source import open_source

pytestmark = pytest.mark.in_haste

RNG = np.random.default_rng(0)
WEIGHTS = RNG.standard_normal((300, 64)).astype(np.float32)
METADATA = {"general.architecture": "llama", "n": 1, "words": ["a", "b", "c"], "x": 1.5}


def write(path, metadata=METADATA, **tensors):
    gguf.write(path, metadata, tensors or {"t": WEIGHTS})
    return path


def quantized(x: np.ndarray, kind: Kind) -> np.ndarray:
    return gguf_py.quants.quantize(x, kind)


def write_quantized(path, x: np.ndarray, kind: Kind):
    writer = gguf_py.GGUFWriter(path, "llama")
    writer.add_tensor("t", quantized(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_equal_files(run, tmp_path):
    a = write(tmp_path / "a.gguf", u=WEIGHTS[0], t=WEIGHTS)
    # Another order is no difference.
    b = write(tmp_path / "b.gguf", dict(reversed(METADATA.items())), t=WEIGHTS, u=WEIGHTS[0])
    assert not diff(a, b)
    code, out, err = run("diff", a, b)
    assert (code, err) == (0, "")
    assert out.endswith("no difference\n")
    assert json.loads(run("diff", a, b, "--json")[1])["equal"] is True


def test_metadata(run, tmp_path):
    changed = {
        "general.architecture": "llama",
        "n": Value(ValueType.UINT64, 1),
        "words": ["a", "B", "c", "d"],
        "new": True,
    }
    a, b = write(tmp_path / "a.gguf"), write(tmp_path / "b.gguf", changed)
    code, out, _ = run("diff", a, b)
    assert code == 1
    assert "metadata: 2 changed, 1 added, 1 removed" in out
    assert "tensors" not in out.split("metadata:")[1]
    lines = {tuple(re.split(r"  +", line.strip())) for line in out.splitlines()}
    assert {
        ("~", "n", "UINT32 1", "UINT64 1"),
        ("~", "words", "ARRAY[STRING, 3] at 1: ['b']", "ARRAY[STRING, 4] at 1: ['B']"),
        ("-", "x", "FLOAT32 1.5"),
        ("+", "new", "BOOL True"),
    } <= lines
    code, out, _ = run("diff", a, b, "--json")
    found = json.loads(out)
    assert (code, found["equal"], found["tensors"]) == (1, False, [])
    assert found["metadata"][0] == {
        "key": "n",
        "before": {"type": "UINT32", "value": 1},
        "after": {"type": "UINT64", "value": 1},
    }
    assert [change["key"] for change in found["metadata"]] == ["n", "words", "x", "new"]


@pytest.mark.parametrize(
    ("before", "after", "at"),
    [([1, 2, 3], [1, 2], 2), ([1, 2], [1, 5], 1), ([math.nan, 1.0], [math.nan, 2.0], 1), ([0.0], [-0.0], 0)],
)
def test_arrays_are_shown_where_they_differ(tmp_path, before, after, at):
    a, b = (write(tmp_path / f"{i}.gguf", {"k": value}) for i, value in enumerate((before, after)))
    (change,) = diff(a, b).metadata
    assert all(f" at {at}: " in cell for cell in change.cells()[2:])


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_errors_of_a_format(tmp_path, monkeypatch, kind):
    """Slabs of 512 weights and pieces of 1000 bytes: neither ends where the other or a row does."""
    monkeypatch.setattr(qjax.diff, "SLAB", 512)
    monkeypatch.setattr(stored, "PIECE_BYTES", 1000)
    a = write(tmp_path / "a.gguf", {"general.architecture": "llama"})
    b = write_quantized(tmp_path / "b.gguf", WEIGHTS, kind)
    (change,) = diff(a, b).tensors
    assert (change.sign, change.before.format, change.after.format) == ("~", "F32", kind.name)

    x = WEIGHTS.astype(np.float64).ravel()
    y = gguf_py.quants.dequantize(quantized(WEIGHTS, kind), kind).astype(np.float64).ravel()
    e = change.error
    assert e.n == x.size
    assert e.rmse == pytest.approx(np.sqrt(np.mean((x - y) ** 2)), rel=1e-6)
    assert e.relative_rmse == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-6)
    assert e.sqnr_db == pytest.approx(20 * np.log10(np.linalg.norm(x) / np.linalg.norm(x - y)), abs=1e-5)
    assert e.max_error == pytest.approx(np.max(np.abs(x - y)), rel=1e-6)
    assert e.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-9)


def test_one_weight_that_differs_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(qjax.diff, "SLAB", 512)
    other = WEIGHTS.copy()
    other[-1, -1] += 1
    a, b = write(tmp_path / "a.gguf"), write(tmp_path / "b.gguf", t=other)
    (change,) = diff(a, b).tensors
    assert change.error.max_error == 1
    assert change.error.mse == pytest.approx(1 / other.size)


def test_tensors_that_cannot_be_compared(run, tmp_path):
    a = write(tmp_path / "a.gguf", old=WEIGHTS[0], reshaped=WEIGHTS, empty=np.zeros((0, 4), np.float32))
    b = write(tmp_path / "b.gguf", reshaped=WEIGHTS.T.copy(), new=WEIGHTS[1], empty=np.zeros((0, 4), np.float16))
    found = diff(a, b)
    assert [(change.name, change.sign, change.error) for change in found.tensors] == [
        ("old", "-", None),
        ("reshaped", "~", None),
        ("empty", "~", None),
        ("new", "+", None),
    ]
    out = run("diff", a, b)[1]
    assert "tensors: 2 changed, 1 added, 1 removed" in out
    assert "300×64 → 64×300" in out
    assert "F32 → F16" in out
    json_tensors = json.loads(run("diff", a, b, "--json")[1])["tensors"]
    assert json_tensors[0]["before"]["shape"] == [64]
    assert json_tensors[0]["after"] is json_tensors[0]["error"] is None


def test_numbers_that_are_none(run, tmp_path):
    bad = WEIGHTS.copy()
    bad[0, 0], bad[0, 1] = np.nan, np.inf
    zero = np.zeros_like(WEIGHTS)
    a = write(tmp_path / "a.gguf", same=bad, nan=WEIGHTS, zero=zero, exact=np.float32([[0.5]]))
    b = write(tmp_path / "b.gguf", same=bad, nan=bad, zero=WEIGHTS, exact=np.float16([[0.5]]))
    nan, zero, exact = (change.error for change in diff(a, b).tensors)
    assert all(math.isnan(value) for value in (nan.mse, nan.sqnr_db, nan.max_error, nan.cosine))
    assert (zero.sqnr_db, zero.relative_rmse, zero.cosine) == (-math.inf, math.inf, 0)
    assert (exact.mse, exact.sqnr_db, exact.relative_rmse, exact.cosine) == (0, math.inf, 0, 1)
    errors = [change["error"] for change in json.loads(run("diff", a, b, "--json")[1])["tensors"]]
    assert errors[0]["mse"] == "NaN"
    assert errors[1]["sqnr_db"] == "-Infinity"
    assert errors[2]["sqnr_db"] == "Infinity"


def test_a_folder_and_a_file(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "PIECE_BYTES", 100_000)
    found = open_source("tiny")
    gguf.write(tmp_path / "tiny.gguf", found.metadata | {"general.name": "other"}, found.tensors)
    different = diff("tiny", tmp_path / "tiny.gguf")
    assert [change.key for change in different.metadata] == ["general.name"]
    assert different.tensors == ()
    assert "general.name" in different._repr_html_()


def test_bad_input(run, tmp_path):
    a = write(tmp_path / "a.gguf")
    fails(run("diff", a, tmp_path / "absent.gguf"), "no such file")
