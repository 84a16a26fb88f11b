"""The peers that say what the bytes of a GGML format are: PyPI's gguf (numpy), libgguf (ggml's C), and ggml itself."""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import qjax

# The formats that have bytes in a file, and what there is to quantize to: (name, with importance).
NAMES = [name for name in qjax.formats.names() if qjax.formats.get(name).ggml_id is not None]
CASES = [
    (format.name, weighted)
    for format in map(qjax.formats.get, NAMES)
    if format.encodable
    for weighted in (False, True)
    if (format.uses_importance if weighted else not format.needs_importance)
]
EACH_CASE = pytest.mark.parametrize(
    ("name", "weighted"),
    [pytest.param(name, weighted, id=f"{name}-{'importance' if weighted else 'plain'}") for name, weighted in CASES],
)


def _gguf_quantize(name: str, x: np.ndarray) -> np.ndarray:
    gguf = pytest.importorskip("gguf")
    with np.errstate(all="ignore"):
        data = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
    return np.ascontiguousarray(data).view(np.uint8)


def _libgguf_quantize(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    libgguf = pytest.importorskip("libgguf", reason="libgguf has no wheel for this platform")
    data = libgguf.quantize_rows_raw(libgguf.GGMLQuantizationType[name], x, *x.shape, importance)
    return np.frombuffer(data, np.uint8).reshape(len(x), -1)


PEERS = {"gguf": _gguf_quantize, "libgguf": _libgguf_quantize}


@functools.cache
def _libggml() -> ctypes.CDLL:
    folder = os.environ.get("QJAX_LLAMA_CPP")
    if not folder:
        pytest.skip("QJAX_LLAMA_CPP does not name a folder with libggml-base.so")
    return ctypes.CDLL(str(Path(folder) / "libggml-base.so"))


def _c_name(name: str) -> str:
    return name.lower().replace("_k", "_K")


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def libggml_quantize_activations(name: str, x: np.ndarray) -> np.ndarray:
    """Rows of activations to bytes by ggml itself."""
    data = np.zeros((len(x), qjax.formats.get(name).nbytes(x.shape[1:])), np.uint8)
    quantize = getattr(_libggml(), f"quantize_row_{_c_name(name)}_ref")
    quantize(_pointer(x), _pointer(data), ctypes.c_int64(x.size))
    return data


def libggml_quantize(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Rows of weights to bytes by ggml itself: by the quantizer without importance, where it has no other."""
    library, format = _libggml(), qjax.formats.get(name)
    data = np.zeros((len(x), format.nbytes(x.shape[1:])), np.uint8)
    if not format.for_weights:  # ggml_quantize_chunk makes no activations
        return libggml_quantize_activations(name, x)
    weight = None if importance is None else _pointer(importance)
    rows = (ctypes.c_int64(n) for n in (0, *x.shape))
    library.ggml_quantize_chunk(format.ggml_id, _pointer(x), _pointer(data), *rows, weight)
    return data


def libggml_validate(name: str, data: np.ndarray) -> bool:
    """Whether blocks are valid, by ggml itself; it writes why not to stderr."""
    validate = _libggml().ggml_validate_row_data
    validate.restype = ctypes.c_bool
    return validate(qjax.formats.get(name).ggml_id, _pointer(data), ctypes.c_size_t(data.nbytes))


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def libggml_reads(path: Path) -> bool:
    """Whether llama.cpp's reader takes a GGUF file, its header alone."""
    library = _libggml()
    library.ggml_log_set(_QUIET, None)
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = (ctypes.c_char_p, _InitParams)
    library.gguf_free.argtypes = (ctypes.c_void_p,)
    context = library.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    if context:
        library.gguf_free(context)
    return bool(context)


# Types that libgguf does not know, or knows by an older search.
NEEDS_LIBGGML = ("IQ1_M", "Q2_0", "Q8_1", "Q8_K")


def reference(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """What ggml's C makes of rows of weights."""
    return (libggml_quantize if name in NEEDS_LIBGGML else _libgguf_quantize)(name, x, importance)


def _gguf_dequantize(name: str, data: np.ndarray) -> np.ndarray:
    gguf = pytest.importorskip("gguf")
    if name == "Q8_1":  # Q8_0 and a sum, in bytes 2 and 3
        blocks = np.delete(data.reshape(len(data), -1, 36), (2, 3), axis=2)
        name, data = "Q8_0", np.ascontiguousarray(blocks.reshape(len(data), -1))
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])


def libggml_dequantize(name: str, data: np.ndarray) -> np.ndarray:
    """Rows of bytes to float32, by ggml itself."""
    format = qjax.formats.get(name)
    weights = np.zeros((len(data), data.shape[1] // format.type_size * format.block_size), np.float32)
    dequantize = getattr(_libggml(), f"dequantize_row_{_c_name(name)}")
    dequantize(_pointer(data), _pointer(weights), ctypes.c_int64(weights.size))
    return weights


_DECODERS = {"gguf": _gguf_dequantize, "libggml": libggml_dequantize}
_NOT_DECODED = {"gguf": ("Q1_0", "Q2_0", "Q8_K"), "libggml": ("F32", "F16", "BF16", "Q8_1")}


def decoders(name: str) -> dict[str, Callable[[str, np.ndarray], np.ndarray]]:
    """The peers that decode a format."""
    return {peer: decode for peer, decode in _DECODERS.items() if name not in _NOT_DECODED[peer]}


def dequantize(name: str, data: np.ndarray) -> np.ndarray:
    """Rows of bytes to float32, by gguf, or by ggml itself what gguf does not decode."""
    return next(iter(decoders(name).values()))(name, data)


def assert_same_bytes(format, ours, theirs, weights=None, kinds: Sequence[str] = ()) -> None:
    """Fails with the block that has most differing bits, its weights, and those bits field by field.

    kinds: the names of the equal parts, one after another, that the weights consist of.
    """
    ours, theirs = (np.asarray(data).reshape(-1, format.type_size) for data in (ours, theirs))
    if ours.shape == theirs.shape and np.array_equal(ours, theirs):
        return
    assert ours.shape == theirs.shape, f"{format.name}: {ours.size} bytes, the peer has {theirs.size}"
    differing = np.bitwise_count(ours ^ theirs).sum(axis=1)
    worst = int(np.argmax(differing))
    lines = [
        f"{format.name}: {np.count_nonzero(ours != theirs)} of {ours.size} bytes differ, "
        f"in {np.count_nonzero(differing)} of {len(ours)} blocks; the worst is block {worst}"
    ]
    if kinds:
        counts = np.bincount(np.flatnonzero(differing) * len(kinds) // len(ours), minlength=len(kinds))
        by_kind = ", ".join(f"{kind} {count}" for kind, count in zip(kinds, counts) if count)
        lines.append(f"  differing blocks: {by_kind}; the worst is of {kinds[worst * len(kinds) // len(ours)]}")
    start = 0
    for field in format.layout:
        mine, peers = (data[worst, start : start + field.nbytes] for data in (ours, theirs))
        bits = " ".join(f"{byte:08b}" if byte else "." for byte in mine ^ peers)
        lines += [f"  {field.name}: ours {mine.tobytes().hex()}", f"      theirs {peers.tobytes().hex()}"]
        lines += [f"      differing bits {bits}"] if bits.strip(". ") else []
        start += field.nbytes
    if weights is not None:
        block = np.asarray(weights).reshape(-1, format.block_size)[worst]
        lines.append(f"  weights {' '.join(map(float.hex, block.tolist()))}")
    pytest.fail("\n".join(lines), pytrace=False)


def assert_same_values(format, ours, theirs) -> None:
    """Fails with the first weight whose bits differ; NaN equals NaN."""
    ours, theirs = (np.asarray(a, np.float32).ravel() for a in (ours, theirs))
    differing = (ours.view(np.uint32) != theirs.view(np.uint32)) & ~(np.isnan(ours) & np.isnan(theirs))
    if differing.any():
        i = int(np.argmax(differing))
        pytest.fail(
            f"{format.name}: {differing.sum()} of {ours.size} values differ; the first is weight "
            f"{i % format.block_size} of block {i // format.block_size}: ours {float(ours[i]).hex()}, "
            f"theirs {float(theirs[i]).hex()}",
            pytrace=False,
        )
