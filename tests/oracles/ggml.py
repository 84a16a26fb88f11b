"""The peers that say what the bytes of a GGML format are: PyPI's gguf (numpy), libgguf (ggml's C), and ggml itself."""

import ctypes
import functools
import os
from pathlib import Path

import numpy as np
import pytest

import qjax


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


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def libggml_quantize(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Rows of weights to bytes by ggml itself: by the quantizer without importance, where it has no other."""
    library, format = _libggml(), qjax.formats.get(name)
    data = np.zeros((len(x), format.nbytes(x.shape[1:])), np.uint8)
    if name == "Q8_1":
        library.quantize_row_q8_1_ref(_pointer(x), _pointer(data), ctypes.c_int64(x.size))
        return data
    weight = None if importance is None else _pointer(importance)
    rows = (ctypes.c_int64(n) for n in (0, *x.shape))
    library.ggml_quantize_chunk(format.ggml_id, _pointer(x), _pointer(data), *rows, weight)
    return data


def libggml_dequantize(name: str, data: np.ndarray) -> np.ndarray:
    """Blocks of bytes to float32, one row a block, by ggml itself."""
    format = qjax.formats.get(name)
    weights = np.zeros((len(data), format.block_size), np.float32)
    dequantize = getattr(_libggml(), f"dequantize_row_{name.lower().replace('_k', '_K')}")
    dequantize(_pointer(data), _pointer(weights), ctypes.c_int64(weights.size))
    return weights


# Types that libgguf does not know, or knows by an older search.
NEEDS_LIBGGML = ("Q2_0", "Q8_1")


def reference(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """What ggml's C makes of rows of weights."""
    return (libggml_quantize if name in NEEDS_LIBGGML else _libgguf_quantize)(name, x, importance)


def dequantize(name: str, data: np.ndarray) -> np.ndarray:
    """Rows of bytes to float32, by gguf."""
    gguf = pytest.importorskip("gguf")
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])


def assert_same_bytes(format, ours, theirs, weights=None) -> None:
    """Fails with the block that has most differing bits, its weights, and those bits field by field."""
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
