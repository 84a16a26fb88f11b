"""A tensor that is not in memory yet: what GGUF files, safetensors folders and pending quantizations have in common."""

from abc import ABC, abstractmethod

import numpy as np
from jax import Array

from qjax.formats import Format
from qjax.tensor import QTensor


class Stored(ABC):
    """Shape and format are known, the rest is read or computed when asked for."""

    shape: tuple[int, ...]
    """Row-major, the contraction axis last."""
    format: Format

    @property
    @abstractmethod
    def data(self) -> np.ndarray:
        """The bytes of `format`, uint8, one row of the tensor after another."""

    @abstractmethod
    def load(self) -> Array | QTensor:
        """The tensor in memory: an Array of the file's dtype for plain formats, a QTensor for the others."""
