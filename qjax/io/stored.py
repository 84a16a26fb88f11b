"""A tensor that is not in memory yet: what GGUF files, safetensors folders and pending quantizations have in common."""

from typing import Protocol, runtime_checkable

import numpy as np
from jax import Array

from qjax.formats import Format
from qjax.tensor import QTensor


@runtime_checkable
class Stored(Protocol):
    """Shape and format are known, the rest is read or computed when asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major, the contraction axis last."""
        ...

    @property
    def format(self) -> Format: ...

    @property
    def data(self) -> np.ndarray:
        """The bytes of `format`, uint8, one row of the tensor after another."""
        ...

    def load(self) -> Array | QTensor:
        """The tensor in memory: an Array of the file's dtype for plain formats, a QTensor for the others."""
        ...
