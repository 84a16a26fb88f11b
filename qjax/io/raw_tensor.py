"""Tensors of a safetensors file as they lie there, read, because the library maps them (see `mapped`).

The first 8 bytes are the size n of the header, the next n the header in JSON, {name: {"dtype", "shape",
"data_offsets": [begin, end]}, ...}, and offsets count from its end.
"""

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qjax.errors import QjaxError
from qjax.io.mapped import MappedFile
from qjax.io.stored import piece_bounds

_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "F8_E4M3": ml_dtypes.float8_e4m3fn, "I16": np.int16,
    "U16": np.uint16, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I32": np.int32, "U32": np.uint32,
    "F32": np.float32, "I64": np.int64, "U64": np.uint64, "F64": np.float64,
}  # fmt: skip


@dataclass(frozen=True)
class RawTensor:
    """One that is not read yet.  dtype: what safetensors calls its type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path

    def read(self) -> np.ndarray:
        """Its values.  Raises QjaxError if the file is not what it was when it was opened, which checked its header."""
        file, start, stop = self._place()
        return file.read(start, stop).view(_DTYPES[self.dtype]).reshape(self.shape)

    def pieces(self) -> Iterator[np.ndarray]:
        """Its bytes, flat, in pieces of whole numbers.  Raises as `read`."""
        file, begin, end = self._place()
        for start, stop in piece_bounds(end - begin, np.dtype(_DTYPES[self.dtype]).itemsize):
            yield file.read(begin + start, begin + stop)

    def _place(self) -> tuple[MappedFile, int, int]:
        """The file, and where in it the tensor begins and ends."""
        try:
            file, status = MappedFile(self.path), self.path.stat()
            start, header = _header(self.path, status.st_size, status.st_mtime_ns)
            found = header[self.name]
            begin, end = found["data_offsets"]
            n_bytes = math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize
            if (found["dtype"], tuple(found["shape"]), end - begin) == (self.dtype, self.shape, n_bytes) and begin >= 0:
                return file, start + begin, start + end
            error = f"found {found}, expected {self.dtype} {list(self.shape)}"
        except (ValueError, KeyError, TypeError, OSError, OverflowError, MemoryError) as caught:
            error = caught
        raise QjaxError(f"{self.path}: {self.name}: the file has changed since it was opened ({error})")


@functools.lru_cache(maxsize=4)
def _header(path: Path, size: int, mtime_ns: int) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and what the header says of them: read once for all of a file, as long as that has this
    size and this time of its last change."""
    file = MappedFile(path)
    start = 8 + int.from_bytes(file.read(0, 8).tobytes(), "little")
    return start, json.loads(file.read(8, start).tobytes())
