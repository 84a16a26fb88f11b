"""The peers that say what the bytes of a GGML format are: PyPI's gguf (numpy) and libgguf (ggml's C)."""

import numpy as np
import pytest


def _gguf_quantize(name: str, x: np.ndarray) -> np.ndarray:
    gguf = pytest.importorskip("gguf")
    with np.errstate(all="ignore"):
        data = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
    return np.ascontiguousarray(data).view(np.uint8)


def _libgguf_quantize(name: str, x: np.ndarray) -> np.ndarray:
    libgguf = pytest.importorskip("libgguf", reason="libgguf has no wheel for this platform")
    data = libgguf.quantize_rows_raw(libgguf.GGMLQuantizationType[name], x, *x.shape)
    return np.frombuffer(data, np.uint8).reshape(len(x), -1)


PEERS = {"gguf": _gguf_quantize, "libgguf": _libgguf_quantize}


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
