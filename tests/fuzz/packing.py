"""Trees to the bytes of files: {"model.gguf": {"metadata": [...], "tensors": [...]}} and the like.

The ending of a file's name says how it is packed (`PACKERS`); bytes are taken as they are, texts as UTF-8.  A tree that
was mutated packs as well, whatever stands in it: numbers wrap around, a list in the place of a number counts as its
length.  So what a packer makes may be wrong in any of its values, but lengths, counts and offsets fit them.
"""

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

from qjax import formats

Tree = Any

MAX_FILL = 1 << 16
"""Bytes that a packer makes up for tensors at most: shapes may claim anything."""
ALIGNMENT = 32
# struct's codes of GGUF's types; 8 is a string, 9 an array.
_GGUF_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SIZES = {code: struct.calcsize("<" + code) for code in "bBhHiIqQfd?"}
_BLOCKS = {f.ggml_id: (f.block_size, f.type_size) for f in map(formats.get, formats.names()) if f.ggml_id is not None}
_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1}


# ── values of any kind in any place ──────────────────────────────────────────────────────────────────


def entry(tree: Tree, key: str, default: Any = None) -> Any:
    return tree.get(key, default) if isinstance(tree, dict) else default


def items(tree: Tree) -> list:
    if isinstance(tree, dict):
        return list(tree.items())
    return tree if isinstance(tree, list) else []


def fields(tree: Tree, n: int) -> list:
    """The first ``n`` items, None for those that are missing."""
    return [*items(tree)[:n], *[None] * (n - len(items(tree)))]


def integer(value: Any) -> int:
    if isinstance(value, float):
        return int(value) if abs(value) < 2**64 else 2**63
    return value if isinstance(value, int) else len(value) if isinstance(value, (str, bytes, list, dict)) else 0


def text(value: Any) -> str:
    return value if isinstance(value, str) else value.decode("latin-1") if isinstance(value, bytes) else str(value)


def raw(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        return b"".join(map(raw, value))
    # Surrogate escapes are the bytes that they stand for, other surrogates are what no decoder takes.
    return text(value).encode("utf-8", "surrogatepass")


def number(code: str, value: Any) -> bytes:
    """``value`` as struct's ``code``, wrapped around if it does not fit."""
    if code not in "fd":
        size = _SIZES[code]
        return ((value if type(value) is int else integer(value)) & (1 << 8 * size) - 1).to_bytes(size, "little")
    value = value if isinstance(value, float) else float(max(min(integer(value), 2**1000), -(2**1000)))
    try:
        return struct.pack("<" + code, value)
    except OverflowError:
        return struct.pack("<" + code, float("inf"))


def sized(code: str, value: Any) -> bytes:
    """A text or bytes behind their length."""
    data = raw(value)
    return number(code, len(data)) + data


def product(dims: Tree) -> int:
    n = 1
    for dim in items(dims):
        n = min(n * max(integer(dim), 0), 2**64)
    return n


# ── formats ──────────────────────────────────────────────────────────────────────────────────────────


def gguf(tree: Tree) -> bytes:
    """{"version": 3, "metadata": [[key, type, value]], "tensors": [[name, dims, type, offset]], "data": bytes}

    The value of an array is [type, values]; dims begin with the contraction axis.  Without offset and data, tensors
    follow one another and are zeros.
    """
    metadata, tensors = items(entry(tree, "metadata")), items(entry(tree, "tensors"))
    out = bytearray(raw(entry(tree, "magic", b"GGUF")))
    out += number("I", entry(tree, "version", 3)) + number("q", len(tensors)) + number("q", len(metadata))
    for item in metadata:
        key, kind, value = fields(item, 3)
        out += sized("Q", key) + number("I", kind) + _gguf_value(integer(kind), value)
    at = 0
    for item in tensors:
        name, dims, kind, offset = fields(item, 4)
        out += sized("Q", name) + number("I", len(items(dims)))
        out += b"".join(number("q", dim) for dim in items(dims))
        out += number("I", kind) + number("Q", at if offset is None else offset)
        at = min(at + _aligned(_ggml_bytes(dims, kind)), MAX_FILL)
    data = entry(tree, "data")
    return bytes(out) + bytes(-len(out) % ALIGNMENT) + (bytes(at) if data is None else raw(data))


def _gguf_value(kind: int, value: Any) -> bytes:
    if kind == 9:
        element, values = fields(value, 2)
        packed = b"".join(_gguf_value(integer(element), each) for each in items(values))
        return number("I", element) + number("Q", len(items(values))) + packed
    return number(_GGUF_CODES[kind], value) if kind in _GGUF_CODES else sized("Q", value)


def _ggml_bytes(dims: Tree, kind: Any) -> int:
    block_size, type_size = _BLOCKS.get(integer(kind), (1, 0))
    return product(dims) // block_size * type_size


def _aligned(n: int) -> int:
    return n + -n % ALIGNMENT


def ggml(tree: Tree) -> bytes:
    """{"magic": b"tjgg", "version": 3, "sizes": [numbers], "tokens": [[text, score]], "tensors": [[name, dims, type]]}

    sizes: but for that of the vocabulary.  No version and no scores (None) where the file has none.
    """
    tokens = items(entry(tree, "tokens"))
    out = bytearray(raw(entry(tree, "magic", b"tjgg")))
    out += b"" if (version := entry(tree, "version")) is None else number("I", version)
    sizes = [len(tokens), *items(entry(tree, "sizes"))]
    out += b"".join(number("I", size) for size in sizes)
    for token in tokens:
        word, score = fields(token, 2)
        out += sized("I", word) + (b"" if score is None else number("f", score))
    for tensor in items(entry(tree, "tensors")):
        name, dims, kind = fields(tensor, 3)
        out += b"".join(number("I", n) for n in (len(items(dims)), len(raw(name)), kind, *items(dims))) + raw(name)
        out += bytes(-len(out) % 32 if version is not None and integer(version) > 0 and out[:4] == b"tjgg" else 0)
        out += bytes(min(_ggml_bytes(dims, kind), MAX_FILL))
    return bytes(out)


def dat(tree: Tree) -> bytes:
    """{"entries": [[name, n_calls, [values]]], "chunks": n, "dataset": text}, the last two or one of them left out."""
    entries = items(entry(tree, "entries"))
    out = number("i", len(entries))
    for item in entries:
        name, n_calls, values = fields(item, 3)
        out += sized("i", name) + number("i", n_calls) + number("i", len(items(values)))
        out += b"".join(number("f", value) for value in items(values))
    out += b"" if (chunks := entry(tree, "chunks")) is None else number("i", chunks)
    return out + (b"" if (dataset := entry(tree, "dataset")) is None else sized("i", dataset))


def logits(tree: Tree) -> bytes:
    """{"vocab": n, "tokens": [[ids of a chunk]], "scales": [[scale, minimum]], ...}, the last for each row."""
    chunks, vocab = items(entry(tree, "tokens")), integer(entry(tree, "vocab"))
    n_ctx = len(items(chunks[0])) if chunks else 0
    out = raw(entry(tree, "magic", b"_logits_")) + b"".join(number("i", n) for n in (n_ctx, vocab, len(chunks)))
    out += b"".join(number("i", id) for chunk in chunks for id in fields(chunk, n_ctx))
    scales, n_rows = items(entry(tree, "scales")), max(len(chunks) * (n_ctx - n_ctx // 2 - 1), 0)
    codes = bytes(max(min(2 * (vocab + vocab % 2), MAX_FILL // max(n_rows, 1)), 0))
    for i in range(n_rows):
        scale, minimum = fields(scales[i] if i < len(scales) else [1.0, -9.0], 2)
        out += number("f", scale) + number("f", minimum) + codes
    return out


def choices(tree: Tree) -> bytes:
    """[[question, [[answers], [labels]], [[answers], [labels]]]], llama-perplexity's --multiple-choice."""
    out = number("I", len(items(tree))) + b"".join(number("I", 0) for _ in items(tree))
    for task in items(tree):
        question, *lists = fields(task, 3)
        out += sized("I", question)
        for answers, labels in (fields(each, 2) for each in lists):
            out += number("I", len(items(answers))) + b"".join(sized("I", answer) for answer in items(answers))
            out += b"".join(number("i", label) for label in items(labels))
    return out


def protobuf(tree: Tree) -> bytes:
    """[[field, value]]: a list is a message, a text or bytes are themselves, a float is 32 bits, an int a varint."""
    out = bytearray()
    for item in items(tree):
        field, value = fields(item, 2)
        kind = 5 if isinstance(value, float) else 2 if isinstance(value, (str, bytes, list)) else 0
        out += _varint(integer(field) << 3 | kind)
        if kind == 5:
            out += number("f", value)
        elif kind == 2:
            data = protobuf(value) if isinstance(value, list) else raw(value)
            out += _varint(len(data)) + data
        else:
            out += _varint(integer(value))
    return bytes(out)


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def safetensors(tree: Tree) -> bytes:
    """{"tensors": {name: [dtype, shape, bytes or None for zeros]}, "metadata": {...}}, or "header": any JSON."""
    header, data = {}, bytearray()
    for name, item in items(entry(tree, "tensors")) if isinstance(entry(tree, "tensors"), dict) else []:
        dtype, shape, values = fields(item, 3)
        size = min(product(shape) * _DTYPE_BYTES.get(text(dtype), 1), MAX_FILL)
        begin = len(data)
        data += bytes(size) if values is None else raw(values)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, len(data)]}
    if (metadata := entry(tree, "metadata")) is not None:
        header["__metadata__"] = metadata
    packed = to_json(entry(tree, "header", header))
    return number("Q", len(packed)) + packed + bytes(data)


def to_json(tree: Tree) -> bytes:
    return json.dumps(tree, default=text).encode()


def json_lines(tree: Tree) -> bytes:
    return b"\n".join(map(to_json, items(tree)))


PACKERS: Mapping[str, Callable[[Tree], bytes]] = {
    "gguf": gguf,
    "ggml": ggml,
    "dat": dat,
    "logits": logits,
    "choices": choices,
    "model": protobuf,
    "safetensors": safetensors,
    "json": to_json,
    "jsonl": json_lines,
}


def pack(files: Tree) -> dict[str, bytes]:
    """The bytes of each file, by names that stay in their folder.

    Raises ValueError and RecursionError for what JSON cannot say.
    """
    packed = {}
    for name, tree in items(files) if isinstance(files, dict) else []:
        safe = text(name).replace("/", "_").replace("\0", "_").encode("utf-8", "replace")[:200].decode(errors="replace")
        if safe.strip("."):
            as_it_is = isinstance(tree, (str, bytes))
            packed[safe] = raw(tree) if as_it_is else PACKERS.get(safe.rpartition(".")[2], raw)(tree)
    return packed
