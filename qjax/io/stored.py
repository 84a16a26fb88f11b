"""A tensor that is not in memory yet: what GGUF files, safetensors folders and pending quantizations have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float32, UInt8

from qjax.formats import Format, get
from qjax.tensor import QTensor

PIECE_BYTES = 2**24


class Stored(ABC):
    """Shape and format are known, the rest is read or computed when asked for."""

    shape: tuple[int, ...]
    """Row-major, the contraction axis last."""
    format: Format

    @property
    @abstractmethod
    def data(self) -> np.ndarray:
        """The bytes of `format`, uint8, one row of the tensor after another."""

    def pieces(self) -> Iterator[np.ndarray]:
        """`data` in pieces of whole blocks, flat, one after another: a large tensor need not be in memory."""
        data = self.data.reshape(-1)
        for start, stop in piece_bounds(data.size, self.format.type_size):
            yield data[start:stop]

    @abstractmethod
    def load(self) -> Array | QTensor:
        """The tensor in memory: an Array of the file's dtype for plain formats, a QTensor for the others."""


class Held(Stored):
    """A float32 tensor that is in memory already."""

    def __init__(self, values: Float32[np.ndarray, "..."]):
        self.values, self.shape, self.format = values, values.shape, get("F32")

    @property
    def data(self) -> np.ndarray:
        return self.values.reshape(-1).view(np.uint8)

    def load(self) -> Array:
        return jnp.asarray(self.values)


def recut(pieces: Iterable[np.ndarray], dtype: DTypeLike, step: int) -> Iterator[np.ndarray]:
    """``pieces`` one after another, ``step`` elements at a time; at the end what is left."""
    data = np.empty(0, dtype)
    for piece in pieces:
        data = np.concatenate((data, piece.astype(dtype, copy=False)))
        whole = data.size // step * step
        yield from data[:whole].reshape(-1, step)
        data = data[whole:]
    if data.size:
        yield data


def aligned(n_bytes: int) -> UInt8[np.ndarray, " n_bytes"]:
    """Bytes of no particular value, which JAX on CPU takes as they are: it copies what does not begin at a multiple of
    64."""
    buffer = np.empty(n_bytes + 63, np.uint8)
    return buffer[-buffer.ctypes.data % 64 :][:n_bytes]


def piece_bounds(n: int, unit: int) -> Iterator[tuple[int, int]]:
    """Start and stop of the pieces that ``n`` bytes are worked in, multiples of ``unit`` bytes."""
    step = max(1, PIECE_BYTES // unit) * unit
    for start in range(0, n, step):
        yield start, min(start + step, n)
