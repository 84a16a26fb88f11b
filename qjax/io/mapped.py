"""A file that others may write to while it is read."""

import os
import threading
from pathlib import Path
from typing import NoReturn

import numpy as np
from jaxtyping import UInt8

from qjax.errors import QjaxError
from qjax.io.stored import aligned


class MappedFile:
    """The bytes of the file at ``path``, of that very file even if another is put in its place.

    A process that touches a map of bytes that are no longer there, because the file was cut short, is killed by the
    system (SIGBUS), without a word.  So the package takes headers from the map, once, at the start, and reads the rest;
    those who look at a few bytes of a large tensor have the map, too (`gguf.TensorInfo.data`).

    Raises QjaxError if there is no such file, or nothing in it.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise QjaxError(f"{path}: there is {'a folder, not a file' if path.is_dir() else 'no such file'}")
        self.path, self._turn = path, threading.Lock()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  as long as this object lives
        self.size = self._size()
        """In bytes, when it was opened."""
        if not self.size:
            raise QjaxError(f"{path}: the file is empty: probably a failed download, fetch it again")
        self.mapped = np.memmap(self._file, np.uint8, mode="r", shape=(self.size,))
        """All of them."""

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def read(self, start: int, stop: int) -> UInt8[np.ndarray, " n_bytes"]:
        """The bytes from ``start`` to ``stop``, copied.  Raises QjaxError if they are not all there."""
        if self._size() < stop:
            self._fail(stop)
        data = aligned(stop - start)
        left = data.data
        with self._turn:
            self._file.seek(start)
            while left and (n := self._file.readinto(left)):
                left = left[n:]
        if left:
            self._fail(stop)
        return data

    def _fail(self, stop: int) -> NoReturn:
        raise QjaxError(
            f"{self.path}: it has {self._size()} bytes by now, expected {stop} at least: something else writes to it. "
            "Start again when that is done."
        )
