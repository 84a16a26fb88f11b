"""qjax set: gguf-py reads the new values; tensors and other entries stay; nothing is changed by mistake."""

import errno
import json

import gguf as gguf_py
import numpy as np
import pytest
from conftest import fails

from qjax import QjaxError
from qjax.io import gguf
from qjax.io.gguf import Value, ValueType
from qjax.io.metadata_edit import assignment, edit

METADATA = {
    "general.architecture": "llama",
    "general.name": "Owl",
    "k.u8": Value(ValueType.UINT8, 1),
    "k.i64": Value(ValueType.INT64, 1),
    "k.f32": 1.5,
    "k.f64": Value(ValueType.FLOAT64, 0.1),
    "k.bool": False,
    "k.words": ["a", "b"],
    "k.numbers": np.int16([1, 2, 3]),
    "k.flags": [True, False],
}
TENSORS = {"a": np.arange(5, dtype=np.float32), "b": np.arange(64, dtype=np.float16).reshape(2, 32)}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.gguf"
    gguf.write(path, METADATA, TENSORS)
    return path


def fields(path):
    """Key to (types, value), and the tensors, as gguf-py reads them."""
    reader = gguf_py.GGUFReader(path)
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, TENSORS[tensor.name])
    assert len(reader.tensors) == len(TENSORS)
    found = {}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            value = field.contents()
            found[key] = [t.name for t in field.types], value.tolist() if isinstance(value, np.ndarray) else value
    return found


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("general.name", "A much longer name: ünï = 🦉", "A much longer name: ünï = 🦉"),
        ("general.name", "", ""),
        ("k.u8", "255", 255),
        ("k.u8", "0x10", 16),
        ("k.i64", "-9223372036854775808", -(2**63)),
        ("k.f32", "-2", -2.0),
        ("k.f64", "1e300", 1e300),
        ("k.bool", "True", True),
        ("k.words", '["c", "", "[d]"]', ["c", "", "[d]"]),
        ("k.words", "[]", []),
        ("k.numbers", "[-7]", [-7]),
        ("k.flags", "[true]", [True]),
    ],
)
def test_a_value_keeps_its_type_and_place(run, path, key, text, value):
    before = fields(path)
    code, out, err = run("set", path, "--", key, text)
    assert (code, err) == (0, "")
    assert key in out
    after = fields(path)
    assert list(after) == list(before)
    types, found = after.pop(key)
    assert found == value
    # gguf-py sees no type in an array without elements.
    assert types == before.pop(key)[0] or (types, value) == (["ARRAY"], [])
    assert after == before


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("k.u8=UINT32:70000", ["UINT32"], 70000),
        ("k.u8=string:1", ["STRING"], "1"),
        ("new=INT8:-1", ["INT8"], -1),
        ("new=FLOAT32:0.25", ["FLOAT32"], 0.25),
        ("new=BOOL:false", ["BOOL"], False),
        ("new=STRING:a=b:c", ["STRING"], "a=b:c"),
        ("new=ARRAY[UINT16]:[1, 65535]", ["ARRAY", "UINT16"], [1, 65535]),
        ('new=array[string]:["x"]', ["ARRAY", "STRING"], ["x"]),
        ("new=ARRAY[FLOAT32]:[1, 2.5]", ["ARRAY", "FLOAT32"], [1.0, 2.5]),
    ],
)
def test_a_type_that_is_given_is_taken(run, path, text, types, value):
    assert run("set", path, "--set", text)[0] == 0
    assert fields(path)[text.split("=")[0]] == (types, value)


def test_remove_rename_and_set_at_once(run, path):
    arguments = ["general.name", "Barn owl", "--set", "a.new=UINT8:3", "--set", "z.new=BOOL:true"]
    arguments += ["--remove", "k.u8", "--remove", "k.words", "--rename", "k.f32=k.single"]
    code, out, _ = run("set", path, *arguments, "--json")
    assert code == 0
    assert list(fields(path)) == [
        *("general.architecture", "general.name", "k.i64", "k.single", "k.f64", "k.bool", "k.numbers", "k.flags"),
        *("a.new", "z.new"),
    ]
    report = json.loads(out)
    assert report["written"] is True
    changes = {change["key"]: (change["before"], change["after"]) for change in report["changes"]}
    assert changes["general.name"] == ({"type": "STRING", "value": "Owl"}, {"type": "STRING", "value": "Barn owl"})
    assert changes["k.u8"] == ({"type": "UINT8", "value": 1}, None)
    assert changes["a.new"] == (None, {"type": "UINT8", "value": 3})
    assert len(changes) == 7


def test_dry_run_and_no_change_write_nothing(run, path):
    raw, time = path.read_bytes(), path.stat().st_mtime_ns
    code, out, _ = run("set", path, "general.name", "Barn owl", "--dry-run")
    assert code == 0
    assert "dry run, nothing written" in out
    assert "STRING 'Barn owl'" in out
    assert "nothing to write" in run("set", path, "general.name", "Owl")[1]
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (raw, time)


def test_to_another_file(run, path, tmp_path):
    raw = path.read_bytes()
    assert run("set", path, "general.name", "Barn owl", "-o", tmp_path / "y.gguf")[0] == 0
    assert path.read_bytes() == raw
    assert fields(tmp_path / "y.gguf")["general.name"] == (["STRING"], "Barn owl")
    # There and back gives the same bytes.
    assert run("set", tmp_path / "y.gguf", "general.name", "Owl")[0] == 0
    assert (tmp_path / "y.gguf").read_bytes() == raw


@pytest.mark.parametrize(
    "change",
    [
        ["general.architecture", "qwen2"],
        ["--remove", "general.architecture"],
        ["--rename", "general.architecture=general.arch"],
        ["--rename", "general.name=tokenizer.ggml.model"],
        ["--set", "general.alignment=UINT32:64"],
        ["--set", "split.count=UINT16:0"],
        ["--set", "general.quantization_version=UINT32:3"],
        ["--set", 'tokenizer.ggml.tokens=ARRAY[STRING]:["a"]'],
    ],
)
def test_protected_keys_need_force(run, path, change):
    raw = path.read_bytes()
    fails(run("set", path, *change), "is protected")
    assert path.read_bytes() == raw
    assert run("set", path, *change, "--force")[0] == 0
    assert path.read_bytes() != raw
    fields(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["general.nmae", "x"], "no metadata key 'general.nmae'. Did you mean general.name"),
        (["general.name"], "give general.name a value"),
        (["k.u8", "256"], "256 does not fit UINT8; to change its type give KEY=TYPE:VALUE"),
        (["k.u8", "1.5"], "'1.5' is not a value of type UINT8"),
        (["k.u8", "one"], "'one' is not a value of type UINT8"),
        (["k.bool", "1"], "'1' is not a value of type BOOL"),
        (["k.f32", "1e39"], "does not fit FLOAT32"),
        (["k.words", "a"], "'a' is not a JSON list of STRING"),
        (["k.words", '"ab"'], "is not a JSON list of STRING"),
        (["k.words", '{"a": 1}'], "is not a JSON list of STRING"),
        (["k.words", "[1]"], "expected str for STRING"),
        (["k.numbers", "[40000]"], "40000 does not fit INT16"),
        (["k.numbers", "[[1]]"], "expected int for INT16"),
        (["k.numbers", "[" * 9999], "is not a JSON list of INT16"),
        (["--set", "k.u8=300"], "expected KEY=TYPE:VALUE"),
        (["--set", "k.u8=INT:300"], "unknown metadata type 'INT', expected ARRAY[...] or one of UINT8, INT8"),
        (["--set", "k.u8=ARRAY:[1]"], "unknown metadata type 'ARRAY'"),
        (["--set", "k.u8=ARRAY[ARRAY]:[[1]]"], "unknown metadata type 'ARRAY[ARRAY]'"),
        (["--set", "k.u8=ARRAY[UINT8:[1]"], "unknown metadata type 'ARRAY[UINT8'"),
        (["--set", "k.u8=UINT8:-1"], "metadata key 'k.u8': -1 does not fit UINT8"),
        (["--remove", "absent"], "no metadata key 'absent'"),
        (["--rename", "absent=x"], "no metadata key 'absent'"),
        (["--rename", "k.u8"], "expected OLD=NEW"),
        (["--rename", "k.u8=k.i64"], "'k.i64' exists already"),
        (["--set", "general.alignment=UINT32:3", "--force"], "expected a UINT32 power of two"),
    ],
)
def test_bad_input_changes_nothing(run, path, arguments, message):
    raw = path.read_bytes()
    for extra in ([], ["--dry-run"]):
        fails(run("set", path, *arguments, *extra), message)
    assert path.read_bytes() == raw
    assert [p.name for p in path.parent.iterdir()] == ["x.gguf"]


def test_full_disk(run, path, monkeypatch):
    raw = path.read_bytes()

    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qjax.io.atomic.os.fsync", fsync)
    code, out, err = run("set", path, "general.name", "Barn owl")
    assert (code, out) == (1, "")
    assert err.endswith("not written (No space left on device); what was there before is unchanged\n")
    assert len(err.splitlines()) == 1
    assert path.read_bytes() == raw
    assert [p.name for p in path.parent.iterdir()] == ["x.gguf"]


def test_shards(tmp_path, path):
    """The first shard is edited as it is; the others have nothing to edit."""
    from qjax.io.splits import split

    first, second = (file.path for file in split(path, tmp_path / "m", max_tensors=1).files)
    edit(first, {"general.name": "Barn owl"})
    file = gguf.read(second)
    assert file.metadata["general.name"] == "Barn owl"
    assert [*file.tensors] == ["a", "b"]
    with pytest.raises(QjaxError, match="is a shard, and the metadata of a model are in its first"):
        edit(second, {"x": Value.of(1)})


def test_python_values(path):
    report = edit(path, {"k.u8": Value(ValueType.STRING, "one"), "k.f32": "2.5"})
    assert [change.key for change in report.changes] == ["k.u8", "k.f32"]
    assert gguf.read(path).metadata.typed["k.u8"] == Value(ValueType.STRING, "one")
    assert assignment("a.b=UINT8:3") == ("a.b", Value(ValueType.UINT8, 3))
