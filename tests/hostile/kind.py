"""What all kinds of hostile files have in common."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

Content = bytes | Mapping[str, bytes]
"""Of the file, or of files by name; a function makes what is large."""
Files = Content | Callable[[], Content]


class Kind(NamedTuple):
    """A kind of file (or folder) that strangers write."""

    read: Callable[[Path], object]
    """what is put to the test"""
    opened: str
    """which file of a case is read, by its name; "" for the folder"""
    sound: Mapping[str, Files]
    """what is read; each bad case is one of these, and damaged"""
    bad: Mapping[str, tuple[Files, str]]
    """what is refused, with a message that this regular expression finds"""

    def write(self, folder: Path, files: Files) -> Path:
        """Write a case into an empty folder; gives the path to read."""
        content = files() if callable(files) else files
        for name, data in ({self.opened: content} if isinstance(content, bytes) else content).items():
            (folder / name).write_bytes(data)
        return folder / self.opened
