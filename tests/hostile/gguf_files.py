"""GGUF files that are not what they say.

Names in capitals are those of llama.cpp's own test of its reader (tests/test-gguf.cpp, enum handcrafted_file_type),
each for the same thing.  What is said of llama.cpp is tested in test_hostile.py.
"""

from hostile.gguf_bytes import (
    ARCH,
    ARR,
    BOOL,
    CODES,
    COUNT,
    F64,
    I32,
    IDS,
    STR,
    U8,
    U16,
    U32,
    U64,
    array,
    build,
    entry,
    pad,
    scalar,
    string,
    tensor,
    u32,
    u64,
)  # fmt: skip
from hostile.kind import Kind

from qjax.io import gguf

F = IDS["F32"]
TWO = [tensor("a", [3], F, 0), tensor("b", [32, 2], IDS["Q8_0"], 32)]
TWO_DATA = pad(bytes(range(12))) + pad(bytes(range(68)))
EVERY_TYPE = [entry(f"k{kind}", kind, "x" if kind == STR else 1) for kind in (*CODES, STR)] + [
    string(f"a{kind}") + u32(ARR) + array(kind, [scalar(kind, "x" if kind == STR else 1)] * 3) for kind in (*CODES, STR)
]
INT32_MAX = 2**31 - 1


def aligned(to: int) -> bytes:
    return entry("general.alignment", U32, to)


def one(dims: list[int], kind: int = F, offset: int = 0, n_bytes: int = 32, name="t") -> bytes:
    """A file with one tensor."""
    return build([], [tensor(name, dims, kind, offset)], bytes(n_bytes))


def claims(*parts: bytes) -> bytes:
    """A file with one entry, of key k."""
    return build([string("k") + b"".join(parts)])


SOUND = {
    "HEADER_EMPTY": build(),
    "KV_SUCCESS": build(EVERY_TYPE),
    "TENSORS_SUCCESS": build([ARCH], [tensor("t", [0], F, 0)]),
    "TENSORS_ZERO_DIM": one([32, 0], IDS["Q8_0"], n_bytes=0),
    "TENSORS_CUSTOM_ALIGN": build([aligned(1)], [tensor("t", [0], F, 0)], alignment=1),
    "DATA_SUCCESS": build([ARCH, *EVERY_TYPE], TWO, TWO_DATA),
    "DATA_CUSTOM_ALIGN": build([aligned(1)], [tensor("a", [3], F, 0), tensor("b", [5], F, 12)], bytes(32), alignment=1),
    "extra bytes after it": build([ARCH], TWO, TWO_DATA) + b"more",
    "no padding after the last tensor": build([ARCH], TWO, TWO_DATA)[:-28],
    "version 2": build([ARCH], TWO, TWO_DATA, version=2),
    "a name of 63 bytes": one([1], name="n" * 63),
    "no axes": one([], n_bytes=4),
    "bytes that are no text": build(
        [entry(b"\xff\0\x1b[2J", STR, b"\xfe\n")], [tensor(b"\x1b\xff", [8], F, 0)], bytes(32)
    ),
}

BAD = {
    # ── header
    "HEADER_BAD_MAGIC": (build([ARCH], magic=b"FUGG"), "not a GGUF file: it begins with b'FUGG'"),
    "an old GGML file": (b"tjgg" + bytes(40), "from before GGUF.*qjax quantize FILE OUT.gguf COPY"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html></html>", "a web page"),
    "a zip archive": (b"PK\x03\x04" + bytes(40), "a zip archive"),
    "nothing": (b"", "the file is empty"),
    "three bytes": (b"GGU", "the magic number of a GGUF file needs 4 bytes"),
    "HEADER_BAD_VERSION_0": (build([ARCH], version=0), "version 0, expected 2 or 3"),
    "HEADER_BAD_VERSION_1": (build([ARCH], version=1), "version 1, expected 2 or 3.*older"),
    "HEADER_BAD_VERSION_FUTURE": (build([ARCH], version=4), "version 4, expected 2 or 3.*update"),
    "version 2^32-1": (build([ARCH], version=2**32 - 1), "version 4294967295, expected 2 or 3"),
    "other byte order": (build([ARCH], version=3 << 24), "big-endian.*gguf-convert-endian"),
    "HEADER_BAD_N_TENSORS": (build([ARCH], n_tensors=-1), "claims -1 tensors"),
    "n_tensors 2^62": (build([ARCH], n_tensors=2**62), f"claims {2**62} tensors"),
    "HEADER_BAD_N_KV": (build([ARCH], n_entries=-1), "claims -1 metadata entries"),
    "n_kv 2^62": (build([ARCH], n_entries=2**62), f"claims {2**62} metadata entries"),
    # ── metadata
    "KV_BAD_KEY_SIZE": (build([u64(-1) + bytes(30)]), f"the key of metadata entry 0 needs {2**64 - 1} bytes"),
    "key size 2^62": (build([u64(2**62) + bytes(30)]), f"the key of metadata entry 0 needs {2**62} bytes"),
    "KV_EMPTY_KEY": (build([entry("", U32, 1)]), "entry 0 has an empty key"),
    "KV_BAD_TYPE": (claims(u32(13), bytes(8)), r"byte 33: metadata key 'k' has unknown type 13, expected one of 0 U"),
    "type -1": (claims(u32(2**32 - 1), bytes(8)), "unknown type 4294967295"),
    "element type": (claims(u32(ARR), u32(99), bytes(20)), "elements of .* unknown type 99"),
    "KV_BAD_VALUE_SIZE": (claims(u32(STR), u64(2**40)), f"'k' needs {2**40} bytes.* has 0 left"),
    "array size": (claims(u32(ARR), u32(U8), u64(2**40)), f"claims {2**40} elements"),
    "array size that wraps": (claims(u32(ARR), u32(U64), u64(2**61)), f"claims {2**61} elements"),
    "array size -1": (claims(u32(ARR), u32(U8), u64(-1)), "claims -1 elements"),
    "strings": (claims(u32(ARR), u32(STR), u64(2**40)), f"claims {2**40} strings"),
    "a string in an array": (
        claims(u32(ARR), array(STR, [string("ok"), u64(2**63) + bytes(9)])),
        f"string 1 of metadata key 'k' needs {2**63} bytes, the file has 9 left",
    ),
    "arrays": (claims(u32(ARR), u32(ARR), u64(2**40)), f"claims {2**40} arrays"),
    "arrays 50 deep": (claims(u32(ARR), (u32(ARR) + u64(1)) * 50, array(U8, [])), "than 4 deep"),
    "arrays a million deep": (lambda: claims(u32(ARR), (u32(ARR) + u64(1)) * 10**6), "than 4 deep"),
    "arrays that fan out": (
        lambda: claims(u32(ARR), array(ARR, [array(ARR, [array(U8, [])] * 300)] * 100), b"x")[:-300],
        "claims 300 arrays|claims 0|needs",
    ),
    **{
        f"10^9 of type {kind}": (claims(u32(ARR), u32(kind), u64(10**9), bytes(10**4)), f"claims {10**9} ")
        for kind in (U8, U64, STR, ARR)
    },
    "KV_DUPLICATE_KEY": (build([ARCH, ARCH]), "'general.architecture' occurs twice"),
    "a long key twice": (lambda: build([entry("k" * 2**22, U8, 1)] * 2), r"key 'kkk[k.]{70,90}' occurs twice"),
    "a key that steers": (build([entry("\x1b[2J\n", U8, 1)] * 2), r"key '\\x1b\[2J\\n' occurs twice"),
    "a giant string": (
        lambda: build([entry("k", STR, "x" * 2**23)], n_entries=2),
        "the length of the key of metadata entry 1 needs 8 bytes|claims",
    ),
    "half a million strings, the last too long": (
        lambda: claims(u32(ARR), u32(STR), u64(500_001), string("ab") * 500_000, u64(2**40)),
        f"string 500000 of metadata key 'k' needs {2**40} bytes",
    ),
    "KV_BAD_ALIGN": (build([aligned(13)]), "UINT32 13, expected a UINT32 power "),
    "alignment 0": (build([aligned(0)]), "UINT32 0, expected"),
    "KV_WRONG_TYPE_ALIGN": (build([entry("general.alignment", I32, 32)]), "INT32 32, expected a UINT32"),
    "alignment of an array": (
        build([string("general.alignment") + u32(ARR) + array(U32, [u32(32)])]),
        r"ARRAY\[UINT32, 1\] \[32\], expected a UINT32",
    ),
    "alignment of a long string": (
        lambda: build([entry("general.alignment", STR, "32" * 10**6)]),
        r"STRING '32[32.]{60,90}', expected a UINT32",
    ),
    "alignment 2^31": (
        build([aligned(2**31)], TWO, TWO_DATA),
        f"'b' has offset 32, expected {2**31}|needs .* bytes from byte {2**31}",
    ),
    # ── tensors
    "TENSORS_BAD_NAME_SIZE": (one([1], name="n" * 64), "has 64 bytes, expected at most 63"),
    "name size 2^62": (build([], [u64(2**62) + bytes(50)]), f"the name of tensor 0 needs {2**62} bytes"),
    "a name of 4 MB": (lambda: one([1], name="n" * 2**22), f"has {2**22} bytes, expected at most 63"),
    "TENSORS_BAD_N_DIMS": (one([1] * 5), "'t' has 5 dimensions, expected at most"),
    "n_dims 2^32-1": (build([], [string("t") + u32(2**32 - 1) + bytes(60)]), "'t' has 4294967295 dimensions"),
    "TENSORS_BAD_SHAPE": (one([-1]), r"\[-1\], expected none negative"),
    "shape 4 × -1": (one([4, -1]), r"\[4, -1\], expected none negative"),
    "TENSORS_NE_TOO_BIG": (one([4 * INT32_MAX] * 2), "more weights than 64 bits"),
    "shape 2^63": (one([2**32, 2**31]), "more weights than 64 bits"),
    "shape 2^63, then 0": (one([2**32, 2**31, 0]), "more weights than 64 bits"),
    "TENSORS_NBYTES_TOO_BIG": (one([1533916891] * 2, IDS["I64"]), f"needs {8 * 1533916891**2} bytes"),
    "TENSORS_NBYTES_PAD_WRAP": (one([4, 2**30 - 1, 2**30 + 1]), f"needs {2**64 - 16} bytes"),
    "bytes 2^64": (one([2**62]), f"needs {2**64} bytes"),
    "TENSORS_BAD_TYPE": (one([4], COUNT), f"'t': unknown tensor type id {COUNT}.*Q4_0 2"),
    "tensor type -1": (one([4], 2**32 - 1), "'t': unknown tensor type id 4294967295"),
    **{f"type {i}, removed": (one([32], i), f"'t': unknown tensor type id {i};") for i in (4, 5, 31, 36)},
    "row of no whole blocks": (one([33], 8, n_bytes=64), "'t': row length 33 is not a multiple of 32"),
    "row of a scalar": (one([], 8, n_bytes=64), "'t': row length 1 is not a multiple"),
    "TENSORS_BAD_OFFSET": (one([4], offset=-1), f"'t' has offset {2**64 - 1}, expected 0 .after the"),
    "a gap": (one([4], offset=32, n_bytes=64), "'t' has offset 32, expected 0 .after the"),
    "overlap": (
        build([], [tensor("a", [9], F, 0), tensor("b", [9], F, 32)], bytes(128)),
        "'b' has offset 32, expected 64 .after tensor 'a'",
    ),
    "one behind another": (build([], [tensor("a", [8], F, 0), tensor("b", [8], F, 0)], bytes(64)), "'b' has offset 0"),
    "out of order": (
        build([], [tensor("a", [8], F, 32), tensor("b", [8], F, 0)], bytes(64)),
        "'a' has offset 32, expected 0",
    ),
    "TENSORS_DUPLICATE_NAME": (build([], [tensor("t", [8], F, 0)] * 2, bytes(64)), "'t' occurs twice"),
    "a name that steers": (
        build([], [tensor("\x1b[2J\r\n", [8], F, 0)] * 2, bytes(64)), r"tensor '\\x1b\[2J\\r\\n' occurs twice"
    ),
    "TENSORS_BAD_ALIGN": (build([aligned(13)], TWO, TWO_DATA), "UINT32 13, expected a UINT32 power "),
    "TENSORS_INCONSISTENT_ALIGN": (
        build([], [tensor("a", [3], F, 0), tensor("b", [3], F, 12)], bytes(64)),
        "'b' has offset 12, expected 32 .after tensor 'a', aligned to 32",
    ),
    "ten thousand tensors, the last at a wrong place": (
        lambda: build([], [tensor(f"t{i}", [0], F, 0) for i in range(10_000)] + [tensor("z", [8], F, 32)], bytes(64)),
        "'z' has offset 32, expected 0",
    ),
    # ── data
    "DATA_NOT_ENOUGH_DATA": (one([9], n_bytes=35), "needs 36 bytes from byte 64, the file has 99"),
    "no data": (one([8], n_bytes=0), "needs 32 bytes from byte 64, the file has 64"),
    "cut before the data": (one([0], n_bytes=0)[:60], "needs 0 bytes from byte 64, the file has 60"),
    "DATA_BAD_ALIGN": (build([ARCH, aligned(13)], TWO, TWO_DATA), "UINT32 13, expected a UINT32 power "),
    "DATA_INCONSISTENT_ALIGN": (
        build([aligned(64)], TWO, bytes(200)), "'b' has offset 32, expected 64 .after tensor 'a', aligned to 64"
    ),
    "DATA_MEM_SIZE_OVERFLOW": (
        build(
            [],
            [tensor("a", [2**63 - 64], IDS["I8"], 0), tensor("b", [2**63 - 64], IDS["I8"], 2**63 - 64)],
            bytes(32),
        ),
        f"'a' needs {2**63 - 64} bytes",
    ),
}  # fmt: skip

KIND = Kind(gguf.read, "x.gguf", SOUND, BAD)

READ_BY_LLAMA_CPP = {"DATA_NOT_ENOUGH_DATA", "no data", "DATA_MEM_SIZE_OVERFLOW"}
"""Where it is not asked for the data, it does not look whether they are there."""

# ── shards ───────────────────────────────────────────────────────────────────────────────────────────


def shard(no: int, count: int, tensors, total=3, extra=()) -> bytes:
    """One of tensors that are called by a letter each."""
    split = [entry("split.no", U16, no), entry("split.count", U16, count), entry("split.tensors.count", I32, total)]
    offsets = [tensor(name, [8], F, 32 * i) for i, name in enumerate(tensors)]
    data = b"".join(pad(bytes([ord(name)]) * 32) for name in tensors)
    return build([*extra, *split], offsets, data)


def shards(*data: bytes | None) -> dict[str, bytes]:
    return {f"m-{i:05}-of-00003.gguf": raw for i, raw in enumerate(data, 1) if raw is not None}


FIRST, SECOND, THIRD = THREE = shard(0, 3, [], extra=[ARCH]), shard(1, 3, "ab"), shard(2, 3, "c")
BAD_SHARDS = {
    "missing": (shards(FIRST, None, None), r"2 of 3 shards are missing beside it: \['m-00002-of-00003.gguf', 'm-00003"),
    "swapped": (shards(FIRST, THIRD, SECOND), "m-00002.* split.no is 2, expected 1"),
    "another count": (shards(FIRST, shard(1, 4, "ab"), THIRD), "m-00002.* split.count is 4, expected 3"),
    "another number of tensors": (
        shards(FIRST, shard(1, 3, "ab", total=4), THIRD), "split.tensors.count is 4, expected 3"
    ),
    "a tensor too few": (shards(FIRST, SECOND, shard(2, 3, "")), "split.tensors.count is 3, found 2 tensors"),
    "a tensor twice": (shards(FIRST, SECOND, shard(2, 3, "b")), r"tensors that an earlier shard has too: \['b'\]"),
    "one of another model": (
        shards(FIRST, build([ARCH]), THIRD), "m-00002.* split.no is missing, expected an integer"
    ),
    "one cut short": (shards(FIRST, SECOND[:-1], THIRD), "m-00002.* cut short"),
    "one that is no GGUF": (shards(FIRST, b"PK\3\4", THIRD), "m-00002.* not a GGUF file"),
    "another name": (shards(shard(0, 2, "")), "one of 2 shards, expected a name like NAME-00001-of-00002.gguf"),
    "65535 of them": (shards(shard(0, 65535, "")), "one of 65535 shards, expected a name like NAME-00001-of-65535"),
    "a count of text": (shards(build([entry("split.count", STR, "3")])), "split.count is STRING, expected an integer"),
    "a count of NaN": (
        shards(build([entry("split.count", F64, float("nan"))])), "split.count is FLOAT64, expected an integer"
    ),
    "a count of an array": (
        shards(build([string("split.count") + u32(ARR) + array(U8, [b"\1", b"\2"])])), "split.count is ARRAY.UINT8, 2."
    ),
    "-1 tensors": (
        shards(*(shard(i, 3, "", total=-1) for i in range(3))), "split.tensors.count is -1, found 0 tensors"
    ),
    "a total of true": (
        shards(
            build([entry("split.no", BOOL, 0), entry("split.count", U16, 3), entry("split.tensors.count", BOOL, 1)]),
            *THREE[1:],
        ),
        "split.tensors.count is BOOL, expected an integer|split.no is BOOL|split.tensors.count is 3, expected",
    ),
}  # fmt: skip

SHARDS = Kind(gguf.read, "m-00001-of-00003.gguf", {"three": shards(*THREE)}, BAD_SHARDS)
