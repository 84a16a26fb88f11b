"""GGUF metadata: plain Python values that remember which of the file's types they have.

Between file and Python:

    UINT8 ... INT64   int     ARRAY of numbers or bools   np.ndarray, one axis; the dtype is the element type
    FLOAT32, FLOAT64  float   ARRAY of strings            list[str]
    BOOL              bool    ARRAY of arrays             np.ndarray of dtype object, one axis
    STRING            str, in which bytes that are not UTF-8 are surrogate escapes

so only a number alone needs a type beside it, and `Value` holds the two together.
Source: ggml/docs/gguf.md, and gguf.cpp for what is refused.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from qjax.errors import QjaxError
from qjax.io.cursor import Cursor, shorten

MAX_DEPTH = 4
"""Arrays in arrays are followed this deep: llama.cpp reads one level, gguf-py any."""


class ValueType(IntEnum):
    """The types a metadata value can have, with their numbers in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


class _Number(NamedTuple):
    code: str
    """The struct module's."""
    dtype: str
    """numpy's."""


_NUMBERS = {
    ValueType.UINT8: _Number("B", "u1"),
    ValueType.INT8: _Number("b", "i1"),
    ValueType.UINT16: _Number("H", "u2"),
    ValueType.INT16: _Number("h", "i2"),
    ValueType.UINT32: _Number("I", "u4"),
    ValueType.INT32: _Number("i", "i4"),
    ValueType.UINT64: _Number("Q", "u8"),
    ValueType.INT64: _Number("q", "i8"),
    ValueType.FLOAT32: _Number("f", "f4"),
    ValueType.FLOAT64: _Number("d", "f8"),
    ValueType.BOOL: _Number("?", "b1"),
}
_BY_DTYPE = {np.dtype(number.dtype): vtype for vtype, number in _NUMBERS.items()}
_KINDS: dict[type, tuple[type, ...]] = {
    str: (str,),
    bool: (bool, np.bool_),
    int: (int, np.integer),
    float: (float, np.floating),
    list: (list, tuple, np.ndarray),
}
# What Python ints become, the first that holds them: llama.cpp wants scalars unsigned, arrays signed.
_NATURAL_SCALAR = (ValueType.UINT32, ValueType.INT32, ValueType.UINT64, ValueType.INT64)
_NATURAL_ARRAY = (ValueType.INT32, ValueType.UINT32, ValueType.INT64, ValueType.UINT64)
# From the text of a command line.
_READERS: dict[type, Callable[[str], Any]] = {
    str: str,
    bool: lambda text: bool(("false", "true").index(text.lower())),
    int: lambda text: int(text, 0),
    float: float,
}


@dataclass(frozen=True, eq=False, repr=False)
class Value:
    """A metadata value and its GGUF type: ``Value(ValueType.UINT16, 3)``.

    Where the type need not be chosen, `Value.of` finds the natural one.  Two are equal if their bytes are.
    Raises QjaxError if the value does not fit the type.
    """

    type: ValueType
    value: Any

    def __post_init__(self):
        object.__setattr__(self, "value", _checked(ValueType(self.type), self.value))

    @classmethod
    def of(cls, value: Any) -> "Value":
        """``value`` with its natural type.

        str STRING, bool BOOL, float FLOAT32, numpy scalars their own, int the first of UINT32, INT32, UINT64
        and INT64 that holds it; sequences ARRAY of these, of ints INT32, UINT32, INT64 or UINT64.
        """
        match value:
            case Value():
                return value
            case str():
                return cls(ValueType.STRING, value)
            case bool():
                return cls(ValueType.BOOL, value)
            case np.generic() if value.dtype in _BY_DTYPE:
                return cls(_BY_DTYPE[value.dtype], value.item())
            case int():
                return cls(_smallest(_NATURAL_SCALAR, value, value), value)
            case float():
                return cls(ValueType.FLOAT32, value)
            case list() | tuple() | np.ndarray():
                return cls(ValueType.ARRAY, value)
        raise QjaxError(
            f"a {type(value).__name__} cannot be stored in GGUF metadata. "
            "Use str, bool, int, float, or a list or numpy array of one of them."
        )

    @classmethod
    def parse(cls, type_name: str, text: str) -> "Value":
        """The value that ``text`` spells, of a type written as ``UINT32`` or ``ARRAY[UINT32]``; arrays as JSON.

        Raises QjaxError for an unknown type, and for a text that is no such value.
        """
        match = re.fullmatch(r"(?:(ARRAY)\[)?(\w+)(?(1)(?:, *\d+)?\])", type_name.upper())
        of = ValueType.__members__.get(match[2]) if match else None
        if match is None or of in (None, ValueType.ARRAY):
            known = ", ".join(known for known in ValueType.__members__ if known != "ARRAY")
            raise QjaxError(f"unknown metadata type {shorten(type_name)}, expected ARRAY[...] or one of {known}")
        try:
            if not match[1]:
                return cls(of, _READERS[_python_type(of)](text))
            items = json.loads(text)
            if not isinstance(items, list):
                raise TypeError("no list")
            items = [cls(of, item).value for item in items]
        except QjaxError:
            raise
        except (ValueError, TypeError, RecursionError) as error:
            expected = f"a JSON list of {of.name}" if match[1] else f"a value of type {of.name}"
            raise QjaxError(f"{shorten(text)} is not {expected}") from error
        return cls(ValueType.ARRAY, items if of == ValueType.STRING else np.array(items, _NUMBERS[of].dtype))

    @property
    def type_name(self) -> str:
        """As in ``UINT32`` or ``ARRAY[STRING, 49152]``."""
        if self.type != ValueType.ARRAY:
            return self.type.name
        return f"ARRAY[{self.element_type.name}, {len(self.value)}]"

    @property
    def element_type(self) -> ValueType:
        """Of the elements of an ARRAY."""
        return _element_type(self.value)

    @property
    def text(self) -> str:
        """The value to be read by people: shortened, and a FLOAT32 with no more digits than it has."""
        return str(np.float32(self.value)) if self.type == ValueType.FLOAT32 else shorten(self.value)

    def pack(self) -> bytes:
        """The bytes after the key: type, then value.  Raises QjaxError for a str that no bytes decode to."""
        return struct.pack("<I", self.type) + _pack(self.type, self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self.pack() == other.pack()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Value({self.type_name}: {self.text})"


class Metadata(MutableMapping[str, Any]):
    """An ordered mapping from key to plain Python value that knows the GGUF type of each.

    ``metadata["llama.block_count"]`` is 30 and ``metadata.typed["llama.block_count"]`` is Value(UINT32: 30).
    A plain value assigned to a key gets its natural type (`Value.of`), a Value keeps its own, and so do the
    entries of another Metadata: ``Metadata(other)``, ``update(other)`` and ``metadata | {...}``.
    """

    def __init__(self, entries: "Mapping[str, Any] | Iterable[tuple[str, Any]]" = ()):
        self._entries: dict[str, Value] = {}
        self.update(entries)

    @property
    def typed(self) -> Mapping[str, Value]:
        """The same entries as Values."""
        return MappingProxyType(self._entries)

    def update(self, entries: "Mapping[str, Any] | Iterable[tuple[str, Any]]" = (), /, **more: Any) -> None:
        super().update(entries.typed if isinstance(entries, Metadata) else entries, **more)

    def __or__(self, entries: Mapping[str, Any]) -> "Metadata":
        merged = Metadata(self)
        merged.update(entries)
        return merged

    def __getitem__(self, key: str) -> Any:
        return self._entries[key].value

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str) or not key:
            raise QjaxError(f"metadata key {key!r}: expected a string that is not empty")
        try:
            self._entries[key] = Value.of(value)
        except QjaxError as error:
            raise QjaxError(f"metadata key {key!r}: {error}") from error

    def __delitem__(self, key: str) -> None:
        del self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Metadata) and self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        lines = (f"  {key}: {v.type_name} = {v.text}" for key, v in self._entries.items())
        return "\n".join([f"Metadata({len(self)} entries)", *lines])

    def pack(self) -> bytes:
        """All entries as they stand in the file.  Raises QjaxError naming the key that cannot be stored."""
        parts = []
        for key, value in self._entries.items():
            try:
                parts += [pack_string(key), value.pack()]
            except QjaxError as error:
                raise QjaxError(f"metadata key {key!r}: {error}") from error
        return b"".join(parts)


def unpack_metadata(cursor: Cursor, count: int) -> Metadata:
    """Read ``count`` entries.  Raises QjaxError for a bad or repeated key, an unknown type, a short file."""
    metadata = Metadata()
    for i in range(count):
        start = cursor.at
        key = cursor.string(f"the key of metadata entry {i}")
        if not key:
            cursor.fail(f"metadata entry {i} has an empty key. The file is damaged.", at=start)
        what = f"metadata key {shorten(key)}"
        if key in metadata:
            cursor.fail(f"{what} occurs twice, expected once. The file is damaged.", at=start)
        vtype = _unpack_type(cursor, what)
        metadata[key] = Value(vtype, _unpack(cursor, vtype, what))
    return metadata


def pack_string(string: str) -> bytes:
    """Length and bytes, as `Cursor.string` reads them.  Raises QjaxError for what no bytes decode to."""
    try:
        data = string.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise QjaxError(f"{shorten(string)} is not valid Unicode: {error.reason}") from error
    return struct.pack("<Q", len(data)) + data


def _unpack_type(cursor: Cursor, what: str) -> ValueType:
    start = cursor.at
    number = cursor.number("I", f"the type of {what}")
    try:
        return ValueType(number)
    except ValueError:
        known = ", ".join(f"{known.value} {known.name}" for known in ValueType)
        cursor.fail(f"{what} has unknown type {number}, expected one of {known}. The file is damaged.", at=start)


def _unpack(cursor: Cursor, vtype: ValueType, what: str, depth: int = 0) -> Any:
    if vtype == ValueType.STRING:
        return cursor.string(what)
    if vtype != ValueType.ARRAY:
        raw = cursor.take(np.dtype(_NUMBERS[vtype].dtype).itemsize, what)
        (number,) = struct.unpack("<" + _NUMBERS[vtype].code, raw)
        return _widen_nan(raw) if vtype == ValueType.FLOAT32 and math.isnan(number) else number

    if depth == MAX_DEPTH:
        cursor.fail(f"{what} nests arrays more than {MAX_DEPTH} deep, which no known model does.")
    element = _unpack_type(cursor, f"the elements of {what}")
    if element == ValueType.STRING:
        return cursor.strings(cursor.count(f"strings in {what}", each=8), what)
    if element == ValueType.ARRAY:
        nested = np.empty(cursor.count(f"arrays in {what}", each=12), object)
        for i in range(len(nested)):
            nested[i] = _unpack(cursor, element, what, depth + 1)
        return nested
    dtype = np.dtype("<" + _NUMBERS[element].dtype)
    count = cursor.count(f"elements in {what}", each=dtype.itemsize)
    raw = cursor.take(count * dtype.itemsize, what)
    # Any byte but 0 is true, as in C.
    return (
        np.frombuffer(raw, np.uint8) != 0 if element is ValueType.BOOL else np.frombuffer(raw, dtype).astype(dtype.type)
    )


def _pack(vtype: ValueType, value: Any) -> bytes:
    if vtype == ValueType.STRING:
        return pack_string(value)
    if vtype != ValueType.ARRAY:
        narrow = vtype == ValueType.FLOAT32 and math.isnan(value)
        return _narrow_nan(value) if narrow else struct.pack("<" + _NUMBERS[vtype].code, value)
    element = _element_type(value)
    head = struct.pack("<IQ", element, len(value))
    if element == ValueType.STRING:
        return head + b"".join(map(pack_string, value))
    if element == ValueType.ARRAY:
        return head + b"".join(_pack(element, item) for item in value)
    return head + value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()


# C's conversion between float and double sets the quiet bit of a NaN; here its bits are kept.


def _widen_nan(raw: memoryview) -> float:
    (bits,) = struct.unpack("<I", raw)
    wide = (bits >> 31) << 63 | 0x7FF << 52 | (bits & 0x7FFFFF) << 29
    return struct.unpack("<d", struct.pack("<Q", wide))[0]


def _narrow_nan(value: float) -> bytes:
    (wide,) = struct.unpack("<Q", struct.pack("<d", value))
    mantissa = (wide >> 29 & 0x7FFFFF) or 0x400000  # Without a bit left it would be infinity.
    return struct.pack("<I", (wide >> 63) << 31 | 0xFF << 23 | mantissa)


def _element_type(array: np.ndarray | list) -> ValueType:
    if isinstance(array, list):
        return ValueType.STRING
    return ValueType.ARRAY if array.dtype.hasobject else _BY_DTYPE[array.dtype]


def _kind(cls: type) -> type:
    """Which of str, bool, int, float, list instances of ``cls`` stand for; ``cls`` itself if for none."""
    return next((kind for kind, classes in _KINDS.items() if issubclass(cls, classes)), cls)


def _python_type(vtype: ValueType) -> type:
    """What a scalar of this type is in Python."""
    return str if vtype == ValueType.STRING else _kind(np.dtype(_NUMBERS[vtype].dtype).type)


def _checked(vtype: ValueType, value: Any) -> Any:
    """``value`` in the form that the table at the top of this module gives."""
    if vtype == ValueType.ARRAY:
        return _array(value)
    if isinstance(value, np.generic):
        value = value.item()
    expected = _python_type(vtype)
    kind = _kind(type(value))
    if kind != expected and (kind, expected) != (int, float):
        raise QjaxError(f"{shorten(value)} is of type {kind.__name__}, expected {expected.__name__} for {vtype.name}")
    if expected is str:
        return value
    try:
        value = expected(value)
        _pack(vtype, value)
    except (struct.error, OverflowError) as error:
        raise QjaxError(f"{shorten(value)} does not fit {vtype.name}") from error
    return value


def _array(items: Any, depth: int = 0) -> np.ndarray | list[str]:
    if depth == MAX_DEPTH:
        raise QjaxError(f"arrays nested more than {MAX_DEPTH} deep")
    if isinstance(items, np.ndarray):
        if items.ndim != 1:
            raise QjaxError(f"an array of shape {items.shape}, expected one axis: use ravel() or a list of arrays")
        native = items.dtype.newbyteorder("=")
        if native in _BY_DTYPE:
            return items.astype(native, copy=False)
        if native.hasobject and not len(items):
            return items
    elif not isinstance(items, list | tuple):
        raise QjaxError(f"{shorten(items)} is not an array, expected a list, tuple or numpy array")
    kinds = {_kind(cls) for cls in set(map(type, items))}
    if kinds <= {str}:
        return list(items)
    if kinds == {list}:
        nested = np.empty(len(items), object)
        for i, item in enumerate(items):
            nested[i] = _array(item, depth + 1)
        return nested
    if kinds == {bool}:
        return np.array(items, np.bool_)
    if kinds == {int}:
        return np.array(items, _NUMBERS[_smallest(_NATURAL_ARRAY, int(min(items)), int(max(items)))].dtype)
    if kinds <= {int, float}:
        with np.errstate(over="ignore"):
            return np.array(items, np.float64).astype(np.float32)
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise QjaxError(f"an array of {found}: expected all to be str, or bool, or int, or float, or arrays of these")


def _smallest(candidates: tuple[ValueType, ...], low: int, high: int) -> ValueType:
    """The first of ``candidates`` that holds ``low`` and ``high``."""
    for vtype in candidates:
        limits = np.iinfo(_NUMBERS[vtype].dtype)
        if limits.min <= low and high <= limits.max:
            return vtype
    raise QjaxError(f"{low if low < 0 else high} does not fit 64 bits")
