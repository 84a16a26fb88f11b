"""GGUF files: against gguf-py and llama.cpp both ways, and against everything a broken file can say.

The files read here are built by gguf-py, by llama.cpp, or byte by byte by the helpers below.
"""

import errno
import math
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

import gguf as gguf_py
import jax.numpy as jnp
import numpy as np
import pytest
from hostile import gguf_files
from hostile.gguf_bytes import (
    ARCH,
    ARR,
    BOOL,
    CODES,
    F32,
    F64,
    IDS,
    STR,
    U16,
    U32,
    array,
    build,
    entry,
    pad,
    scalar,
    string,
    tensor,
    u32,
    u64,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import ggml

import qjax
from qjax import QjaxError, QTensor, formats
from qjax.io import atomic, cursor, gguf, hub
from qjax.io.gguf import Metadata, Value, ValueType


def read_bytes(folder: Path, raw: bytes, name="x.gguf") -> gguf.GGUFFile:
    path = folder / name
    path.write_bytes(raw)
    return gguf.read(path)


TWO = [tensor("a", [3], IDS["F32"], 0), tensor("b", [32, 2], IDS["Q8_0"], 32)]
TWO_DATA = pad(np.array([1, 2, 3], "<f4").tobytes()) + pad(bytes(range(68)))
SMALL = build([ARCH, string("list") + u32(ARR) + array(STR, [string("x"), string("")])], TWO, TWO_DATA)


# --- Reading ---


def test_a_small_file(tmp_path):
    file = read_bytes(tmp_path, SMALL)
    assert dict(file.metadata) == {"general.architecture": "llama", "list": ["x", ""]}
    a, b = file.tensors.values()
    assert (a.name, a.shape, a.format.name, a.nbytes) == ("a", (3,), "F32", 12)
    assert (b.name, b.shape, b.format.name, b.nbytes) == ("b", (2, 32), "Q8_0", 68)
    assert isinstance(a.data, np.memmap)
    assert a.data.shape == (1, 12)
    assert b.data.shape == (2, 34)
    assert b.offset == len(SMALL) - 96
    np.testing.assert_array_equal(a.load(), np.float32([1, 2, 3]))
    loaded = b.load()
    assert isinstance(loaded, QTensor)
    assert loaded.shape == (2, 32)
    assert np.asarray(loaded.to_bytes()).tobytes() == bytes(range(68))
    assert (file.version, file.architecture, file.n_weights, file.size_bytes) == (3, "llama", 67, len(SMALL))
    assert file.bpw == 8 * 80 / 67


def test_version_2_is_read_and_written_as_3(tmp_path):
    file = read_bytes(tmp_path, build([ARCH], TWO, TWO_DATA, version=2))
    assert file.version == 2
    gguf.write(tmp_path / "y.gguf", file.metadata, file.tensors)
    assert (tmp_path / "y.gguf").read_bytes() == build([ARCH], TWO, TWO_DATA)


def test_reprs_show_no_data(tmp_path):
    file = read_bytes(tmp_path, build([ARCH, entry("k", STR, b"\xff" * 9999)], TWO, TWO_DATA))
    assert "F32 ×1, Q8_0 ×1" in repr(file)
    assert len(repr(file)) < 200
    assert len(file._repr_html_()) < 5000
    assert "k: STRING = '\\udcff\\udcff" in repr(file.metadata)
    assert repr(file.tensors["b"]) == "TensorInfo(b, Q8_0, 2×32, 68 B)"


@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096])
def test_alignment(tmp_path, alignment):
    second = 12 + -12 % alignment
    tensors = [tensor("a", [3], IDS["F32"], 0), tensor("b", [5], IDS["F32"], second)]
    values = [np.arange(3, dtype="<f4"), np.arange(5, dtype="<f4")]
    data = b"".join(pad(v.tobytes(), alignment) for v in values)
    raw = build([entry("general.alignment", U32, alignment)], tensors, data, alignment=alignment)
    file = read_bytes(tmp_path, raw)
    for info, value in zip(file.tensors.values(), values):
        np.testing.assert_array_equal(info.load(), value)
    gguf.write(tmp_path / "y.gguf", file.metadata, file.tensors)
    assert (tmp_path / "y.gguf").read_bytes() == raw


@pytest.mark.parametrize("dims", [[], [1], [0], [4, 0], [0, 4], [2, 3, 1, 1], [1, 2, 3, 4]])
def test_shapes(tmp_path, dims):
    values = np.arange(math.prod(dims), dtype="<f4").reshape(dims[::-1])
    raw = build([], [tensor("t", dims, IDS["F32"], 0)], pad(values.tobytes()))
    file = read_bytes(tmp_path, raw)
    assert file.tensors["t"].shape == tuple(dims[::-1])
    np.testing.assert_array_equal(file.tensors["t"].load(), values, strict=True)
    for source in (file.tensors, {"t": file.tensors["t"].load()}):
        gguf.write(tmp_path / "y.gguf", {}, source)
        assert (tmp_path / "y.gguf").read_bytes() == raw


@pytest.mark.parametrize("name", ["I64", "F64"])
def test_64_bit_tensors_need_64_bit_jax_and_are_copied_without(tmp_path, name):
    values = np.array([2**40 + 1, -3], "<i8") if name == "I64" else np.array([1 + 2**-40, 0.1], "<f8")
    gguf.write(tmp_path / "x.gguf", {}, {"t": values})
    (found,) = gguf_py.GGUFReader(tmp_path / "x.gguf").tensors
    assert found.tensor_type.name == name
    np.testing.assert_array_equal(found.data, values, strict=True)
    info = gguf.read(tmp_path / "x.gguf").tensors["t"]
    assert info.data.tobytes() == values.tobytes()
    with pytest.raises(QjaxError, match="JAX_ENABLE_X64"):
        info.load()


def test_bytes_after_the_data_and_no_padding_at_the_end_are_allowed(tmp_path):
    assert len(read_bytes(tmp_path, SMALL + b"more").tensors) == 2
    assert len(read_bytes(tmp_path, SMALL[: len(SMALL) - (96 - 68)]).tensors) == 2


def test_a_file_without_anything_is_valid(tmp_path):
    file = read_bytes(tmp_path, build())
    assert not file.tensors
    assert not file.metadata
    assert "unknown" in repr(file)
    gguf.write(tmp_path / "y.gguf", {}, {})
    assert (tmp_path / "y.gguf").read_bytes() == pad(build())


# --- What must be refused: hostile/gguf_files.py, and ---


def test_no_such_file_and_folders(tmp_path):
    with pytest.raises(QjaxError, match=r"nowhere\.gguf: there is no such file"):
        gguf.read(tmp_path / "nowhere.gguf")
    with pytest.raises(QjaxError, match="a folder, not a file"):
        gguf.read(tmp_path)


def test_cut_short_anywhere(tmp_path):
    needed = len(SMALL) - (96 - 68)
    for length in range(needed):
        with pytest.raises(QjaxError, match=r"cut short|not a GGUF file|is empty"):
            read_bytes(tmp_path, SMALL[:length])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_are_refused_or_read_but_never_crash(tmp_path, data):
    raw = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    try:
        file = read_bytes(tmp_path, bytes(raw))
    except QjaxError:
        return
    for info in file.tensors.values():
        assert info.data.nbytes == info.nbytes


# --- Metadata ---

TYPED = [
    ("u8", ValueType.UINT8, 255), ("i8", ValueType.INT8, -128), ("u16", ValueType.UINT16, 65535),
    ("i16", ValueType.INT16, -(2**15)), ("u32", ValueType.UINT32, 2**32 - 1), ("i32", ValueType.INT32, -99),
    ("f32", ValueType.FLOAT32, 0.5), ("bool", ValueType.BOOL, True), ("str", ValueType.STRING, "héllo\n"),
    ("u64", ValueType.UINT64, 2**64 - 1), ("i64", ValueType.INT64, -(2**63)), ("f64", ValueType.FLOAT64, 0.1),
]  # fmt: skip
ARRAYS = [
    *(("a." + key, kind, [value, value]) for key, kind, value in TYPED),
    ("a.strings", ValueType.STRING, ["a", "", "ü"]),
]


def test_every_type_from_gguf_py(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf_py.GGUFWriter(path, "llama")
    for key, kind, value in TYPED:
        writer.add_key_value(key, value, gguf_py.GGUFValueType(kind))
    for key, kind, values in ARRAYS:
        writer.add_key_value(key, values, gguf_py.GGUFValueType.ARRAY, sub_type=gguf_py.GGUFValueType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    metadata = gguf.read(path).metadata
    assert list(metadata) == [
        "general.architecture",
        *(key for key, *_ in TYPED),
        *(key for key, *_ in ARRAYS),
    ]
    for key, kind, value in TYPED:
        assert metadata.typed[key].type == kind
        assert metadata[key] == value
        assert type(metadata[key]) is type(value)
    for key, kind, values in ARRAYS:
        assert list(metadata[key]) == values
        assert metadata.typed[key].type_name == f"ARRAY[{kind.name}, {len(values)}]"
        assert isinstance(metadata[key], list if kind == ValueType.STRING else np.ndarray)


def test_every_type_to_gguf_py(tmp_path):
    path = tmp_path / "x.gguf"
    dtypes = dict(
        zip((key for key, *_ in TYPED), ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "b1", "", "u8", "i8", "f8"))
    )
    metadata = {key: Value(kind, value) for key, kind, value in TYPED}
    for key, kind, values in ARRAYS:
        metadata[key] = values if kind == ValueType.STRING else np.array(values, dtypes[key[2:]])
    gguf.write(path, metadata, {})

    fields = gguf_py.GGUFReader(path).fields
    for key, kind, value in TYPED:
        assert [int(t) for t in fields[key].types] == [kind]
        assert fields[key].contents() == value
    for key, kind, values in ARRAYS:
        assert [int(t) for t in fields[key].types] == [ValueType.ARRAY, kind]
        assert fields[key].contents() == values


@pytest.mark.parametrize(
    ("value", "type_name"),
    [
        ("x", "STRING"), (True, "BOOL"), (0, "UINT32"), (2**32 - 1, "UINT32"), (-1, "INT32"),
        (2**32, "UINT64"),
        (-(2**31) - 1, "INT64"), (0.5, "FLOAT32"), (np.uint16(3), "UINT16"), (np.float64(3), "FLOAT64"),
        (np.bool_(True), "BOOL"), ([], "ARRAY[STRING, 0]"), (("a",), "ARRAY[STRING, 1]"),
        ([1, -2], "ARRAY[INT32, 2]"), ([2**31], "ARRAY[UINT32, 1]"), ([-1, 2**31], "ARRAY[INT64, 2]"),
        ([2**63], "ARRAY[UINT64, 1]"), ([1, 0.5], "ARRAY[FLOAT32, 2]"), ([True], "ARRAY[BOOL, 1]"),
        ([[1], ["a", "b"]], "ARRAY[ARRAY, 2]"), (np.zeros(3, ">i2"), "ARRAY[INT16, 3]"),
        (np.empty(0, object), "ARRAY[ARRAY, 0]"), (np.array(["a"]), "ARRAY[STRING, 1]"),
        ([np.int64(5)], "ARRAY[INT32, 1]"),
    ],
)  # fmt: skip
def test_natural_types(value, type_name):
    assert Value.of(value).type_name == type_name


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "a NoneType cannot"), ({}, "a dict cannot"), (b"x", "a bytes cannot"), (1j, "complex cannot"),
        (2**64, "does not fit 64 bits"), (-(2**63) - 1, "does not fit 64 bits"), (1e39, "not fit FLOAT32"),
        ([1, "a"], "an array of int, str"), ([True, 2], "an array of bool, int"), ([None], "of NoneType"),
        (np.zeros((2, 2)), r"shape \(2, 2\), expected one axis"), (np.float16(1), "a float16 cannot"),
        (np.zeros(2, "c8"), "an array of complex"), ([[[[[1]]]]], "more than 4 deep"),
        ("\ud800", "not valid Unicode"), (["\udfff"], "not valid Unicode"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(tmp_path, value, message):
    with pytest.raises(QjaxError, match="key 'k': .*" + message):
        gguf.write(tmp_path / "x.gguf", {"k": value}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (ValueType.UINT8, 256), (ValueType.UINT32, -1), (ValueType.INT8, 128), (ValueType.UINT32, 1.0),
        (ValueType.STRING, 1), (ValueType.BOOL, 1), (ValueType.INT32, True), (ValueType.FLOAT32, "1"),
        (ValueType.FLOAT64, False), (ValueType.ARRAY, "abc"), (ValueType.FLOAT64, 10**400),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type(kind, value):
    with pytest.raises(QjaxError, match=r"expected|does not fit"):
        Value(kind, value)


def test_types_stay_with_their_keys(tmp_path):
    metadata = read_bytes(tmp_path, build([entry("a", U16, 1), entry("b", F64, 0.1)])).metadata
    for copy in (Metadata(metadata), metadata | {"c": 1}, Metadata({"a": 5}) | metadata):
        assert copy.typed["a"] == Value(ValueType.UINT16, 1)
        assert copy.typed["b"] == Value(ValueType.FLOAT64, 0.1)
    assert metadata == Metadata({"a": Value(ValueType.UINT16, 1), "b": np.float64(0.1)})
    assert metadata != Metadata({"a": 1, "b": np.float64(0.1)})
    metadata["a"] = 2
    assert metadata.typed["a"] == Value(ValueType.UINT32, 2)
    del metadata["b"]
    assert dict(metadata) == {"a": 2}
    with pytest.raises(QjaxError, match="expected a string that is not empty"):
        metadata[""] = 1


any_string = st.one_of(st.text(st.characters(codec="utf-8")).map(str.encode), st.binary(max_size=20))


def packed_scalar(kind: int):
    """Any bytes of the right size; a bool is 0 or 1."""
    if kind == STR:
        return any_string.map(string)
    if kind == BOOL:
        return st.sampled_from([b"\0", b"\1"])
    size = struct.calcsize("<" + CODES[kind])
    return st.binary(min_size=size, max_size=size)


scalar_kinds = st.sampled_from([*CODES, STR])
flat_array = scalar_kinds.flatmap(
    lambda kind: st.lists(packed_scalar(kind), max_size=6).map(lambda items: array(kind, items))
)
packed_array = flat_array
for _ in range(3):
    packed_array = flat_array | st.lists(packed_array, max_size=3).map(lambda arrays: array(ARR, arrays))
packed_value = st.one_of(
    scalar_kinds.flatmap(lambda kind: packed_scalar(kind).map(lambda raw: u32(kind) + raw)),
    packed_array.map(lambda raw: u32(ARR) + raw),
)


BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "I8": (1, 1), "I32": (1, 4),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
}  # fmt: skip
"""Weights and bytes."""


@st.composite
def canonical_files(draw) -> bytes:
    entries = draw(st.dictionaries(any_string.filter(bool), packed_value, max_size=6))
    entries.pop(b"general.alignment", None)
    alignment = draw(st.sampled_from([1, 2, 16, 32, 128]))
    names = draw(st.lists(any_string.filter(lambda name: len(name) < 64), max_size=4, unique=True))
    tensors, data = [], b""
    for name in names:
        kind = draw(st.sampled_from(list(BLOCKS)))
        block, size = BLOCKS[kind]
        dims = draw(st.lists(st.integers(0, 3), max_size=4))
        dims[:1] = [block * draw(st.integers(0, 2))]
        nbytes = math.prod(dims) // block * size
        tensors.append(tensor(name, dims, IDS[kind], len(data)))
        data += pad(draw(st.binary(min_size=nbytes, max_size=nbytes)), alignment)
    packed = [entry("general.alignment", U32, alignment)]
    packed += [string(key) + value for key, value in entries.items()]
    return pad(build(packed, tensors, alignment=alignment), alignment) + data


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(canonical_files())
def test_canonical_files_come_back_byte_for_byte(tmp_path, raw):
    file = read_bytes(tmp_path, raw)
    repr(file.metadata)
    gguf.write(tmp_path / "y.gguf", file.metadata, file.tensors)
    assert (tmp_path / "y.gguf").read_bytes() == raw
    assert gguf.size_bytes(file.metadata, file.tensors) == len(raw)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0xFFC12345, 0xFFBFFFFF, 0x7F800000, 0x00000001])
def test_float32_bits_survive(tmp_path, bits):
    raw = pad(build([string("k") + u32(F32) + u32(bits)]))
    gguf.write(tmp_path / "y.gguf", read_bytes(tmp_path, raw).metadata, {})
    assert (tmp_path / "y.gguf").read_bytes() == raw


def test_a_double_nan_stays_a_nan_as_float32():
    (low_bits_only,) = struct.unpack("<d", u64(0x7FF0000000000001))
    for nan in (math.nan, low_bits_only):
        assert math.isnan(struct.unpack("<f", Value(ValueType.FLOAT32, nan).pack()[4:])[0])


# --- Tensors, against gguf-py ---


def test_tensors_from_gguf_py(tmp_path):
    path = tmp_path / "x.gguf"
    rng = np.random.default_rng(0)
    writer = gguf_py.GGUFWriter(path, "llama")
    x = rng.standard_normal((3, 64), dtype=np.float32)
    quantized = {}
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"):
        kind = gguf_py.GGMLQuantizationType[name]
        quantized[name] = gguf_py.quants.quantize(x, kind)
        writer.add_tensor(name, quantized[name], raw_dtype=kind)
    plain = {"float32": x, "float16": x.astype(np.float16)}
    plain |= {dtype: np.arange(-6, 6, dtype=dtype).reshape(2, 2, 3) for dtype in ("int8", "int16", "int32")}
    for name, values in plain.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = gguf.read(path)
    for name, values in plain.items():
        np.testing.assert_array_equal(file.tensors[name].load(), values, strict=True)
    assert file.tensors["BF16"].load().dtype == jnp.bfloat16
    for name, data in quantized.items():
        assert file.tensors[name].shape == x.shape
        np.testing.assert_array_equal(file.tensors[name].data, data.view(np.uint8).reshape(3, -1))
        if name != "BF16":
            expected = gguf_py.quants.dequantize(data, gguf_py.GGMLQuantizationType[name])
            np.testing.assert_array_equal(qjax.dequantize(file.tensors[name].load()), expected)

    gguf.write(tmp_path / "y.gguf", file.metadata, {name: info.load() for name, info in file.tensors.items()})
    assert (tmp_path / "y.gguf").read_bytes() == path.read_bytes()


def test_tensors_to_gguf_py(tmp_path):
    x = np.random.default_rng(1).standard_normal((2, 3, 64), dtype=np.float32)
    plain = {
        "numpy": x, "jax": jnp.asarray(x), "half": x.astype(np.float16), "big-endian": x.astype(">f4"),
        "transposed": x.T, "scalar": np.array(3, np.float32), "ints": np.arange(5, dtype=np.int16),
    }  # fmt: skip
    packed = {name: qjax.quantize(x, name) for name in ("Q4_0", "Q8_0")}
    gguf.write(tmp_path / "x.gguf", {}, plain | packed | {"bf16": jnp.asarray(x, jnp.bfloat16)})

    found = {t.name: t for t in gguf_py.GGUFReader(tmp_path / "x.gguf").tensors}
    for name, values in plain.items():
        np.testing.assert_array_equal(found[name].data, values)
    for name, t in packed.items():
        assert found[name].tensor_type.name == name
        assert tuple(reversed(found[name].shape.tolist())) == (2, 3, 64)
        np.testing.assert_array_equal(found[name].data, t.to_bytes())
    bf16 = gguf_py.quants.dequantize(found["bf16"].data, gguf_py.GGMLQuantizationType.BF16)
    np.testing.assert_array_equal(bf16, np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("t", np.zeros(2, np.uint32), "dtype uint32 has no GGUF type"),
        ("t", np.zeros(2, np.complex64), "dtype complex64 has no GGUF type"),
        ("t", np.zeros((1,) * 5, np.float32), "more than the 4 axes"),
        ("n" * 64, np.zeros(2, np.float32), "at most 63 bytes"),
        ("t", qjax.quantize(np.ones((2, 32), np.float32), formats.Affine(bits=3)), "has no GGUF type"),
    ],
)
def test_tensors_that_cannot_be_written(tmp_path, name, values, message):
    with pytest.raises(QjaxError, match=message):
        gguf.write(tmp_path / "x.gguf", {}, {name: values})
    assert not list(tmp_path.iterdir())


def test_copying_decodes_nothing(tmp_path, monkeypatch):
    file = read_bytes(tmp_path, SMALL)
    monkeypatch.setattr(QTensor, "from_bytes", None)
    gguf.write(tmp_path / "x.gguf", file.metadata, file.tensors)
    assert (tmp_path / "x.gguf").read_bytes() == SMALL


# --- Writing whole or not at all ---


class FullDisk:
    """A file that takes 100 bytes, then says that the disk is full."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        if self.file.tell() + len(data) > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


def test_full_disk(tmp_path, monkeypatch):
    target = tmp_path / "x.gguf"
    target.write_bytes(b"precious")
    monkeypatch.setattr(atomic, "open", lambda *args: FullDisk(Path.open(*args)), raising=False)
    with pytest.raises(OSError, match=r"not written \(No space left on device\).*x\.gguf") as full:
        gguf.write(target, {}, {"t": np.zeros(1000, np.float32)})
    assert full.value.errno == errno.ENOSPC
    assert target.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interrupted(tmp_path, stop):
    target = tmp_path / "x"

    def write():
        with atomic.atomic_write(target) as file:
            file.write(b"half")
            raise stop

    with pytest.raises(stop):
        write()
    assert not list(tmp_path.iterdir())


def test_permissions_and_links_stay(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    with atomic.atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert real.stat().st_mode & 0o777 == 0o640


def test_places_that_are_no_files(tmp_path):
    for place, message in [
        (tmp_path, "not a regular file"),
        (tmp_path / "no" / "x", "folder .*no does not exist"),
    ]:
        with pytest.raises(QjaxError, match=message):
            gguf.write(place, {}, {})
    with pytest.raises(QjaxError, match="not a regular file"), atomic.atomic_write("/dev/null"):
        pass


def test_a_file_can_be_written_over_itself(tmp_path, monkeypatch):
    file = read_bytes(tmp_path, SMALL)
    gguf.write(file.paths[0], file.metadata | {"new": 1}, file.tensors)
    assert gguf.read(file.paths[0]).metadata["new"] == 1
    assert gguf.read(file.paths[0]).tensors["b"].data.tobytes() == bytes(range(68))
    monkeypatch.setattr(gguf, "_CAN_REPLACE_MAPPED", False)
    with pytest.raises(QjaxError, match=r"x\.gguf: cannot be replaced while tensor 'a' is mapped"):
        gguf.write(file.paths[0], file.metadata, file.tensors)
    gguf.write(tmp_path / "y.gguf", file.metadata, file.tensors)


def test_pieces_are_the_data_even_of_a_file_that_was_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr("qjax.io.stored.PIECE_BYTES", 50)
    values = np.arange(96, dtype="<f4")
    codes = bytes(range(136))
    tensors = [tensor("a", [96], IDS["F32"], 0), tensor("b", [32, 4], IDS["Q8_0"], 384)]
    file = read_bytes(tmp_path, build([ARCH], tensors, pad(values.tobytes()) + pad(codes)))
    for _ in range(2):
        pieces = {name: [bytes(piece) for piece in info.pieces()] for name, info in file.tensors.items()}
        assert b"".join(pieces["a"]) == values.tobytes()
        assert b"".join(pieces["b"]) == codes
        assert [len(piece) for piece in pieces["a"]] == [48] * 8
        assert [len(piece) for piece in pieces["b"]] == [34] * 4
        if gguf._CAN_REPLACE_MAPPED:
            gguf.write(file.paths[0], {"x" * 999: 1}, {"z": np.ones(999, np.float32)})


# --- Shards ---


def test_shards_are_one_file_whichever_is_named(tmp_path):
    gguf_files.SHARDS.write(tmp_path, gguf_files.SHARDS.sound["three"])
    paths = sorted(tmp_path.iterdir())
    for path in paths:
        file = gguf.read(path)
        assert file.paths == tuple(paths)
        assert dict(file.metadata) == {"general.architecture": "llama"}
        assert list(file.tensors) == ["a", "b", "c"]
        assert list(gguf.read_shard(path).metadata)[-3:] == ["split.no", "split.count", "split.tensors.count"]
        assert file.size_bytes == sum(path.stat().st_size for path in paths)
        assert "m-00001-of-00003.gguf and 2 more" in repr(file)
        for name, info in file.tensors.items():
            np.testing.assert_array_equal(info.load(), np.frombuffer(bytes([ord(name)]) * 32, np.float32))


# --- Real files ---


@pytest.fixture(scope="module")
def smollm2() -> Path:
    path = hub.cache_folder() / "models" / hub.PUBLISHED["smollm2-135m-instruct"].file
    if not path.exists():
        pytest.skip("smollm2-135m-instruct is not in the cache: qjax info smollm2-135m-instruct fetches it")
    return path


def test_a_real_model(tmp_path, smollm2):
    file = gguf.read(smollm2)
    assert file.metadata["llama.block_count"] == 30
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert file.tensors["blk.0.ffn_down.weight"].shape == (576, 1536)
    gguf.write(tmp_path / "copy.gguf", file.metadata, file.tensors)
    assert (tmp_path / "copy.gguf").read_bytes() == smollm2.read_bytes()


def test_shards_from_llama_cpp(tmp_path, llama_cpp):
    source = tmp_path / "whole.gguf"
    tensors = {f"blk.{i}.ffn_up.weight": np.full((3, 5), i, np.float32) for i in range(5)}
    metadata = {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a", "b"], "x": [1.5, 2.5]}
    gguf.write(source, metadata, tensors)
    split = shutil.which("llama-gguf-split", path=llama_cpp)
    assert split
    for options in ([], ["--no-tensor-first-split"]):
        command = [split, "--split", "--split-max-tensors", "2", *options, str(source), str(tmp_path / "m")]
        subprocess.run(command, check=True, capture_output=True)
        shards = sorted(tmp_path.glob("m-*.gguf"))
        assert len(shards) == 3 + len(options)
        file = gguf.read(shards[1])
        gguf.write(tmp_path / "merged.gguf", file.metadata, file.tensors)
        assert (tmp_path / "merged.gguf").read_bytes() == source.read_bytes()
        for path in shards:
            path.unlink()


def test_damaged_files_are_refused_when_llama_cpp_refuses_them(tmp_path):
    path = tmp_path / "x.gguf"
    entries = [ARCH, *(entry(f"k{kind}", kind, "x" if kind == STR else 1) for kind in (*CODES, STR))]
    entries += [string(f"a{kind}") + u32(ARR) + array(kind, [scalar(kind, 1)] * 3) for kind in CODES]
    whole = build(entries, TWO, TWO_DATA)
    rng = np.random.default_rng(0)
    outcomes = Counter()
    for _ in range(1000):
        raw = bytearray(whole)
        for at in rng.integers(0, len(raw) - len(TWO_DATA), rng.integers(1, 4)):
            raw[at] = rng.choice([*range(14), 31, 32, 63, 64, 127, 128, 255])
        path.write_bytes(raw)
        try:
            gguf.read(path)
            refusal = ""
        except QjaxError as error:
            refusal = str(error)
        # llama.cpp checks only the header here, and knows formats that qjax may not have yet.
        if "bytes in all" not in refusal and "unknown tensor type id" not in refusal:
            assert ggml.libggml_reads(path) == (not refusal), refusal or bytes(raw)
            outcomes[bool(refusal)] += 1
    assert min(outcomes[True], outcomes[False]) > 100


# --- The small helpers ---


def test_long_values_are_short_in_messages():
    assert len(cursor.shorten("x" * 10_000)) <= 80
    assert cursor.shorten(np.arange(10_000)) == "[0, 1, 2, 3, 4, 5, ...]"
