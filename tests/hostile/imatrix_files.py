"""Importance matrices, in both formats, that are not what they say."""

import math
import struct

import numpy as np
from hostile.gguf_bytes import build_floats, entry_of
from hostile.kind import Kind

from qjax.io import imatrix


def dat(*entries, tail: bytes = b"") -> bytes:
    """The older format: (name, calls, values) of each entry."""
    packed = [
        struct.pack("<i", len(name)) + name + struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
        for name, calls, values in entries
    ]
    return struct.pack("<i", len(entries)) + b"".join(packed) + tail


def as_gguf(metadata: dict | None = None, tensors: dict | None = None) -> bytes:
    """One of a matrix w, with other metadata or tensors, or without those that are None."""
    keys = {"imatrix.datasets": ["t"], "imatrix.chunk_count": 1, "imatrix.chunk_size": 4} | (metadata or {})
    halves = {"w.in_sum2": np.ones(3), "w.counts": np.ones(1)} | (tensors or {})
    entries = {"general.type": "imatrix"} | keys
    return build_floats(
        [entry_of(key, value) for key, value in entries.items() if value is not None],
        {name: x for name, x in halves.items() if x is not None},
    )


TAIL = struct.pack("<ii", 2, 6) + "ü.txt".encode()
SOUND = {
    "GGUF": as_gguf(),
    "GGUF of experts": as_gguf(tensors={"w.in_sum2": np.ones((2, 3)), "w.counts": np.ones((2, 1))}),
    ".dat": dat((b"a", 2, [0.25, 0.5]), (b"b", 1, [0.5]), tail=TAIL),
    ".dat, the oldest": dat((b"a", 2, [0.25, 0.5])),
}
HALF = as_gguf(tensors={"w.in_sum2": None}).replace(b"w.counts", b"w.in_su2")
BAD = {
    # ── GGUF
    "no key": (as_gguf({"imatrix.chunk_count": None}), r"no key imatrix.chunk_count.*Make one with `qjax imatrix`"),
    "a dataset of text": (as_gguf({"imatrix.datasets": "t"}), "datasets is STRING, expected an array of strings"),
    "a chunk size of 1.5": (as_gguf({"imatrix.chunk_size": 1.5}), "chunk_size is FLOAT32, expected a whole number"),
    "a chunk size of 0": (as_gguf({"imatrix.chunk_size": 0}), "imatrix.chunk_size is 0, expected at least 1"),
    "no counts": (as_gguf(tensors={"w.counts": None}), r"w has no tensor w\.counts"),
    "no sums": (as_gguf(tensors={"w.in_sum2": None}), r"w has no tensor w\.in_sum2"),
    "no entries": (as_gguf(tensors={"w.in_sum2": None, "w.counts": None}), "without entries"),
    "other tensors": (HALF, "without entries"),
    "two counts": (as_gguf(tensors={"w.counts": np.ones(2)}), "w: 3 sums do not divide among 2 counts"),
    "empty counts": (as_gguf(tensors={"w.counts": np.ones(0)}), "w: 3 sums do not divide among 0 counts"),
    "a NaN": (
        as_gguf(tensors={"w.in_sum2": np.array([1, np.nan, 2])}),
        "w: 1 of 3 numbers .* first sum of squares being nan at 1",
    ),
    "-4": (as_gguf(tensors={"w.in_sum2": np.array([1, 2, -4])}), "w: 1 of 3 .* squares being -4.0 at 2"),
    "count -1": (as_gguf(tensors={"w.counts": np.array([-1])}), "w: 1 of 1 .* first count being -1.0 at 0"),
    "count ∞": (as_gguf(tensors={"w.counts": np.array([np.inf])}), "w: 1 of 1 .* first count being inf"),
    "a name that steers": (
        as_gguf(tensors={"\x1b[2J.in_sum2": np.ones(3)}), r"\\x1b\[2J has no tensor \\x1b\[2J.counts"
    ),
    # ── .dat
    "3 bytes": (b"abc", "3 bytes are no importance matrix"),
    "nothing": (b"", "0 bytes are no importance matrix"),
    "no entries in .dat": (struct.pack("<i", 0), "claims 0 entries"),
    "-1 entries": (struct.pack("<i", -1) + bytes(64), "claims -1 entries"),
    "2^31-1 entries": (struct.pack("<i", 2**31 - 1) + bytes(64), "claims 2147483647 entries, expected 1 to 3"),
    "a story": (b"a story about a small red house\n", r"neither a GGUF nor a \.dat"),
    "a name of 2^31-1": (struct.pack("<ii", 1, 2**31 - 1) + bytes(64), "name of entry 0 has 2147483647 bytes"),
    "2^31-1 values": (
        struct.pack("<iisii", 1, 1, b"w", 1, 2**31 - 1) + bytes(8), "values of w needs 8589934588 bytes"
    ),
    "-1 values": (struct.pack("<iisii", 1, 1, b"w", 1, -1) + bytes(8), "'w' has -1 values"),
    "no values": (dat((b"w", 1, [])) + bytes(9), "'w' has 0 values"),
    "a name twice": (dat((b"w", 1, [1]), (b"w", 1, [1])), "'w' occurs twice"),
    "-1 calls": (dat((b"w", -1, [1, 2])), "w: 1 of 1 .* first count being -512"),
    "∞": (dat((b"w", 1, [1, math.inf])), "w: 1 of 2 .* first sum of squares being inf at 1"),
    "more than float32 holds": (dat((b"w", 1, [3e38])), "w: 1 of 1 .* first sum of squares being inf"),
    "a NaN and a name that steers": (dat((b"\x1b[2J\xff", 1, [math.nan])), r"\\x1b\[2J\\udcff: 1 of 1 numbers"),
    "cut in a name that steers": (
        struct.pack("<ii", 1, 5) + b"\x1b\r\n\0x" + struct.pack("<ii", 1, 9) + bytes(32),
        r"the values of \\x1b\\r\\n\\x00x needs 36 bytes",
    ),
    "a dataset of 2^32-1": (
        dat((b"a", 1, [1]), tail=struct.pack("<iI", 1, 2**32 - 1)), "dataset's name needs 4294967295 bytes"
    ),
}  # fmt: skip

KIND = Kind(imatrix.read, "m.imatrix", SOUND, BAD)
