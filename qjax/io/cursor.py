"""Reading numbers and strings from bytes nobody vouches for: every size is checked before it is believed."""

import reprlib
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qjax.errors import QjaxError

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def shorten(value: Any) -> str:
    """A repr for messages: long values elided, control characters and undecodable bytes escaped."""
    return _repr.repr(value[:7].tolist() if isinstance(value, np.ndarray) else value)


class Cursor:
    """A position in the little-endian bytes of the file at ``path``.

    All methods raise QjaxError naming the file, the byte, and what was being read.
    """

    def __init__(self, data: np.ndarray, path: Path):
        self._data = data.data
        self.path = path
        self.at = 0

    @property
    def left(self) -> int:
        """Bytes from here to the end."""
        return len(self._data) - self.at

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        raise QjaxError(f"{self.path}: byte {self.at if at is None else at}: {message}")

    def need(self, size: int, what: str) -> None:
        """Make sure that ``size`` more bytes are there."""
        if size > self.left:
            self.fail(
                f"{what} needs {size} bytes, the file has {self.left} left. It is cut short or damaged: "
                "probably an incomplete download, fetch it again."
            )

    def take(self, size: int, what: str) -> memoryview:
        """The next ``size`` bytes, not copied."""
        self.need(size, what)
        self.at += size
        return self._data[self.at - size : self.at]

    def number(self, code: str, what: str) -> Any:
        """The next number; ``code`` is one of the struct module's."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, what: str, each: int) -> int:
        """A 64-bit count of things that take at least ``each`` bytes, so that a false one costs no memory."""
        start = self.at
        count = self.number("q", f"the number of {what}")
        if not 0 <= count * each <= self.left:
            self.fail(
                f"it claims {count} {what}, expected 0 to {self.left // each} (at least {each} bytes each, "
                f"{self.left} left). The file is cut short or damaged, fetch it again.",
                at=start,
            )
        return count

    def string(self, what: str) -> str:
        """A string with its 64-bit length before it; bytes that are not UTF-8 become surrogate escapes."""
        return str(self.take(self.number("Q", f"the length of {what}"), what), "utf-8", "surrogateescape")

    def strings(self, count: int, what: str) -> list[str]:
        """``count`` strings, as `string` reads them; no call for each, because vocabularies are large."""
        data, end, at = self._data, len(self._data), self.at
        length_at = struct.Struct("<Q").unpack_from
        strings = []
        for i in range(count):
            start = at + 8
            stop = start + length_at(data, at)[0] if start <= end else end + 1
            if stop > end:
                self.at = at
                self.string(f"string {i} of {what}")  # Raises, in the words of all the others.
            strings.append(str(data[start:stop], "utf-8", "surrogateescape"))
            at = stop
        self.at = at
        return strings
