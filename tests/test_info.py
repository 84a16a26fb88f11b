"""What qjax info says, against gguf-py's reader, and that files nobody vouches for cannot steer what shows them."""

import json
from html.parser import HTMLParser

import gguf as gguf_py
import numpy as np
import pytest
from conftest import fails
from hypothesis import example, given, settings
from hypothesis import strategies as st

import qjax
from qjax import formats
from qjax.info import info
from qjax.io import gguf
from qjax.io.gguf import Metadata, Value, ValueType
from qjax.io.summary import MAX_HTML_ROWS, FileSummary, TensorSummary, layer_groups
from qjax.table import MAX_CELL, Table, printable

pytestmark = pytest.mark.in_haste

SCALARS = {
    "k.u8": Value(ValueType.UINT8, 255),
    "k.i8": Value(ValueType.INT8, -128),
    "k.u16": Value(ValueType.UINT16, 65535),
    "k.i16": Value(ValueType.INT16, -3),
    "k.u32": Value(ValueType.UINT32, 2**32 - 1),
    "k.i32": Value(ValueType.INT32, -4),
    "k.u64": Value(ValueType.UINT64, 2**64 - 1),
    "k.i64": Value(ValueType.INT64, -(2**63)),
    "k.f32": Value(ValueType.FLOAT32, 0.1),
    "k.f64": Value(ValueType.FLOAT64, 0.1),
    "k.bool": Value(ValueType.BOOL, True),
    "k.str": Value(ValueType.STRING, "ünï\n"),
}
ARRAYS = {
    "k.words": ["a", "b"] * 100,
    "k.numbers": np.arange(500, dtype=np.int16),
    "k.floats": np.float64([0.5, 0.25]),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("info") / "x.gguf"
    tensors = {"token_embd.weight": np.zeros((3, 5), np.float16)}
    for layer in range(3):
        tensors[f"blk.{layer}.ffn_up.weight"] = np.full((4, 32), layer, np.float32)
        tensors[f"blk.{layer}.ffn_norm.weight"] = np.ones(7, np.float32)
    gguf.write(path, {"general.architecture": "llama"} | SCALARS | ARRAYS, tensors)
    return path


def test_json_is_what_gguf_py_reads(run, path):
    code, out, err = run("info", path, "--json-array")
    assert (code, err) == (0, "")
    found = json.loads(out)
    reader = gguf_py.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(found["metadata"]) == list(fields)
    for key, field in fields.items():
        entry = found["metadata"][key]
        assert entry["type"] == field.types[0].name
        value = field.contents()
        assert entry["value"] == (value.tolist() if isinstance(value, np.ndarray) else value)
        if entry["type"] == "ARRAY":
            assert (entry["element_type"], entry["count"]) == (field.types[1].name, len(value))

    assert [t["name"] for t in found["tensors"]] == [t.name for t in reader.tensors]
    for tensor, expected in zip(found["tensors"], reader.tensors):
        assert tensor["shape"] == expected.shape.tolist()[::-1]
        assert tensor["format"] == expected.tensor_type.name
        assert tensor["offset"] == expected.data_offset
        assert (tensor["n_weights"], tensor["size_bytes"]) == (expected.n_elements, expected.n_bytes)
    size_bytes, n_weights = (sum(int(getattr(t, a)) for t in reader.tensors) for a in ("n_bytes", "n_elements"))
    assert (found["n_tensors"], found["n_weights"], found["size_bytes"]) == (7, n_weights, size_bytes)
    assert found["bpw"] == 8 * size_bytes / n_weights
    assert found["file_bytes"] == path.stat().st_size
    f32 = found["types"]["F32"]
    assert (f32["n_tensors"], f32["n_weights"], f32["bpw"]) == (6, 405, 32)
    assert f32["size_bytes"] + found["types"]["F16"]["size_bytes"] == size_bytes


def test_arrays_stay_out_of_json_unless_asked_for(run, path):
    found = json.loads(run("info", path, "--json")[1])
    assert found["metadata"]["k.words"] == {"type": "ARRAY", "element_type": "STRING", "count": 200}
    assert found["metadata"]["k.u8"] == {"type": "UINT8", "value": 255}
    assert "tensors" not in json.loads(run("info", path, "--json", "--no-tensors")[1])


def test_text(run, path):
    code, out, _ = run("info", path)
    assert code == 0
    for part in (*SCALARS, *ARRAYS, "ARRAY[STRING, 200]", "'ünï\\n'", "blk.2.ffn_norm.weight"):
        assert part in out
    shown = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.startswith("  k.")}
    assert (shown["k.f32"], shown["k.f64"], shown["k.u64"]) == ("0.1", "0.1", str(2**64 - 1))
    (line,) = (line for line in out.splitlines() if "blk.1.ffn_up.weight" in line)
    offset = gguf.read(path).tensors["blk.1.ffn_up.weight"].offset
    assert line.split() == ["blk.1.ffn_up.weight", "F32", "4×32", "32", "512", "B", str(offset)]
    assert "blk." not in run("info", path, "--no-tensors")[1]


def test_markdown_has_the_same_cells(run, path):
    out = run("info", path, "--markdown")[1]
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    assert ["blk.1.ffn_norm.weight", "F32", "7", "32", "28 B"] in [row[:5] for row in rows]
    assert ["k.i8", "INT8", "-128"] in rows
    assert len({row.count("|") for row in out.split("## tensors")[1].splitlines() if row}) == 2


# gguf-py's table has 40 bytes for Q8_1, ggml-common.h block_q8_1 has 36; no file holds it.
@pytest.mark.parametrize("kind", [k for k in gguf_py.GGMLQuantizationType if k.name != "Q8_1"], ids=lambda k: k.name)
def test_every_type_of_gguf_py(tmp_path, kind):
    """Sizes by gguf-py's table; a type that qjax has not is named by its number."""
    block, size = gguf_py.GGML_QUANT_SIZES[kind]
    writer = gguf_py.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("t", np.zeros((2, 3 * size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if kind.name not in formats.names():
        with pytest.raises(qjax.QjaxError, match=f"tensor 't': unknown tensor type id {kind.value}"):
            info(tmp_path / "x.gguf")
        return
    (tensor,) = info(tmp_path / "x.gguf").tensors
    assert (tensor.format, tensor.shape, tensor.size_bytes) == (kind.name, (2, 3 * block), 6 * size)
    assert tensor.bpw == 8 * size / block


def test_numbers_that_json_has_not(run, tmp_path):
    values = {"a": float("nan"), "b": float("-inf"), "c": np.float32([1, np.inf])}
    gguf.write(tmp_path / "x.gguf", values, {})
    out = run("info", tmp_path / "x.gguf", "--json-array")[1]

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(out, parse_constant=refuse)["metadata"]
    assert [found[key]["value"] for key in "abc"] == ["NaN", "-Infinity", [1, "Infinity"]]


def test_folders(run):
    summary = info("tiny")
    assert (summary.container, summary.architecture) == ("safetensors", "llama")
    assert summary.total.n_weights == sum(t.n_weights for t in summary.tensors) == 3672320
    assert {t.offset for t in summary.tensors} == {None}
    assert "–" in str(summary)


# --- Layers ---


def rows(*tensors: tuple[str, str]) -> list[TensorSummary]:
    return [TensorSummary(name, format, (32,), 32, 10, 2.5, 0) for name, format in tensors]


@pytest.mark.parametrize(
    ("tensors", "groups"),
    [
        ([], []),
        ([("a", "F32"), ("b", "F32")], ["outside the layers: 2 tensors, 20 B"]),
        ([("blk.0.a", "F32")], ["blk.0 (1 tensor, 10 B)"]),
        (
            [("x", "F32"), *((f"blk.{i}.a", "F32") for i in range(12)), ("y", "F32")],
            ["outside the layers: 2 tensors, 20 B", "blk.0 … 11 (12 layers alike, each 1 tensor, 10 B)"],
        ),
        (
            [(f"blk.{i}.a", "F32") for i in (1, 10, 11, 2, 3)],
            ["blk.1 … 11 (5 layers alike, each 1 tensor, 10 B)"],
        ),
        (
            [("blk.0.a", "F32"), ("blk.1.a", "F32"), ("blk.2.a", "F16"), ("blk.3.a", "F32")],
            ["blk.0 … 1 (2 layers alike, each 1 tensor, 10 B)", "blk.2 (1 tensor, 10 B)", "blk.3 (1 tensor, 10 B)"],
        ),
        (
            [("enc.blk.0.a", "F32"), ("dec.blk.0.a", "F32"), ("blk.0", "F32")],
            ["enc.blk.0 (1 tensor, 10 B)", "dec.blk.0 (1 tensor, 10 B)", "outside the layers: 1 tensor, 10 B"],
        ),
    ],
)
def test_layer_groups(tensors, groups):
    assert [str(group) for group in layer_groups(rows(*tensors))] == groups


# --- Hostile text ---


class Checker(HTMLParser):
    """Notes every tag and attribute."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.open = set(), set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes.update(attrs)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def summary_of(text: str) -> FileSummary:
    tensors = rows((text, "F32"), (f"blk.0.{text}", "F32"))
    metadata = Metadata({text or "k": text, "general.architecture": text, "words": [text] * 9})
    return FileSummary(text, "GGUF 3", (text,), 0, metadata, tuple(tensors))


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(), max_size=20))
@example("<script>alert(1)</script>")
@example("</td></table><img src=x onerror=alert(1)>")
@example("\x1b[2J\x1b]0;title\x07")
@example("a\nb\r\tc\u2028")
@example("\u202etxt.exe")
@example("\udcff\udc80")
@example("x" * 10_000)
@example("`|*[a](javascript:alert(1))\\")
@example("")
def test_text_from_a_file_is_only_text(text):
    summary = summary_of(text)
    checker = Checker(summary._repr_html_())
    assert not checker.open
    assert checker.tags == {"table", "thead", "tbody", "tr", "th", "td", "details", "summary"}
    # Nothing that a dark page would make unreadable.
    assert checker.attributes == {("style", "text-align:left"), ("style", "text-align:right")}
    for shown in (summary._repr_html_(), str(summary), repr(summary), summary.markdown()):
        assert all(line.isprintable() for line in shown.split("\n"))
        shown.encode()
        assert len(shown) < 20_000
    assert json.loads(json.dumps(summary.to_json()))["architecture"] == text
    # No text makes a row or a column more.
    cells = [line for line in summary.markdown().splitlines() if line.startswith("|")]
    assert len(cells) == 8 + 2 + 2 + 2 + len(summary.metadata) + 2 + 2 + 2
    assert len(str(summary).splitlines()) == 8 + 2 + 3 + 2 + len(summary.metadata) + 1 + 2 + 3


def test_long_files_are_cut_in_notebooks():
    tensors = rows(*((f"t{i}", "F32") for i in range(MAX_HTML_ROWS + 7)))
    metadata = Metadata({f"k{i}": i for i in range(MAX_HTML_ROWS + 5)})
    shown = FileSummary("x", "GGUF 3", ("x",), 0, metadata, tuple(tensors))._repr_html_()
    assert f"metadata (the first {MAX_HTML_ROWS} of {MAX_HTML_ROWS + 5})" in shown
    assert f"tensors (the first {MAX_HTML_ROWS} of {MAX_HTML_ROWS + 7})" in shown
    assert f'<td style="text-align:left">t{MAX_HTML_ROWS}' not in shown


# --- Tables ---


def test_tables_align():
    table = Table({"name": "<", "n": ">"}, [("a", "1"), ("bcdef", "1000")])
    assert str(table).splitlines() == ["name      n", "a         1", "bcdef  1000"]
    assert table.markdown().splitlines()[1] == "| --- | --: |"
    aligned = ["| name  |    n |", "| ----- | ---: |", "| a     |    1 |", "| bcdef | 1000 |"]
    assert table.markdown(aligned=True).splitlines() == aligned
    assert str(Table({"name": "<"}, [])) == "name"


def test_long_cells_are_cut():
    assert printable("x" * MAX_CELL) == "x" * MAX_CELL
    assert printable("x" * (MAX_CELL + 1)) == "x" * (MAX_CELL - 1) + "…"
    assert len(printable("\n" * 10**6)) == MAX_CELL


def test_bad_input(run, path, tmp_path):
    fails(run("info", tmp_path / "absent.gguf"), "no such file")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-100])
    fails(run("info", tmp_path / "cut.gguf"), "cut short")
