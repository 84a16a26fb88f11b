"""GGUF files byte by byte, after ggml/docs/gguf.md."""

import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
CODES = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", U64: "Q", I64: "q", F32: "f", F64: "d", BOOL: "B",
}  # fmt: skip
IDS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "I8": 24, "I32": 26, "I64": 27,
    "BF16": 30,
}  # fmt: skip
COUNT = 43
"""The first number that is no type (ggml.h GGML_TYPE_COUNT)."""


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n % 2**64)


def string(s: str | bytes) -> bytes:
    data = s.encode() if isinstance(s, str) else s
    return u64(len(data)) + data


def scalar(kind: int, value) -> bytes:
    return string(value) if kind == STR else struct.pack("<" + CODES[kind], value)


def entry(key: str | bytes, kind: int, value) -> bytes:
    return string(key) + u32(kind) + scalar(kind, value)


def array(kind: int, items: list) -> bytes:
    """Type and value of an array entry's payload, without the leading ARR."""
    return u32(kind) + u64(len(items)) + b"".join(items)


def entry_of(key: str, value) -> bytes:
    """An entry of a plain value, in the type that llama.cpp gives such."""
    if isinstance(value, list):
        kind = STR if isinstance(value[0], str) else F32 if isinstance(value[0], float) else I32
        return string(key) + u32(ARR) + array(kind, [scalar(kind, item) for item in value])
    kinds = {str: STR, bool: BOOL, float: F32, int: U32 if value != -1 else I32}
    return entry(key, kinds[type(value)], value)


def tensor(name: str | bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def pad(data: bytes, alignment: int = 32) -> bytes:
    return data + bytes(-len(data) % alignment)


def build(
    entries=(), tensors=(), data=b"", *, magic=b"GGUF", version=3, n_tensors=None, n_entries=None, alignment=32
) -> bytes:
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_entries = len(entries) if n_entries is None else n_entries
    head = magic + u32(version) + u64(n_tensors) + u64(n_entries) + b"".join(entries) + b"".join(tensors)
    return pad(head, alignment) + data if tensors else head


def build_floats(entries: list[bytes], arrays: dict) -> bytes:
    """A file with float32 arrays as tensors."""
    tensors, data = [], b""
    for name, x in arrays.items():
        tensors.append(tensor(name, list(reversed(x.shape)), IDS["F32"], len(data)))
        data += pad(x.astype("<f4").tobytes())
    return build(entries, tensors, data)


ARCH = entry("general.architecture", STR, "llama")
