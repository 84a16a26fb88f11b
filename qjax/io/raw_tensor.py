"""Tensors of a safetensors file as they lie there: of some weights there are several."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from qjax.errors import QjaxError

# What safetensors' reader for numpy has no name for.
_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn}


@dataclass(frozen=True)
class RawTensor:
    """One that is not read yet.  dtype: what safetensors calls its type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path

    def read(self) -> np.ndarray:
        """Its values."""
        from safetensors import safe_open

        if self.dtype in _FLOAT8:
            return self._bytes().view(_FLOAT8[self.dtype]).reshape(self.shape)
        with safe_open(self.path, framework="numpy") as file:
            return file.get_tensor(self.name)

    def _bytes(self) -> np.ndarray:
        """As they lie in the file: u64 size of the header, the header in JSON, data.

        Raises QjaxError if the file is not what it was when it was opened, which checked its header.
        """
        try:
            with open(self.path, "rb") as file:
                header_size = int.from_bytes(file.read(8), "little")
                start, stop = json.loads(file.read(header_size))[self.name]["data_offsets"]
            if stop - start == math.prod(self.shape):
                return np.memmap(self.path, np.uint8, mode="r", offset=8 + header_size + start, shape=(stop - start,))
        except (ValueError, KeyError, TypeError, OSError, OverflowError) as error:
            raise QjaxError(f"{self.path}: {self.name}: the file has changed since it was opened ({error})") from None
        raise QjaxError(f"{self.path}: {self.name}: the file has changed since it was opened")
