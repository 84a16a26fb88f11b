"""Where downloads are kept, and programs that download, watched from here and ended where `progress` is stopped."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qjax.errors import QjaxError
from qjax.progress import progress

_POLL_S = 0.2


def cache_folder() -> Path:
    """Where downloads and compiled programs are kept: the environment variable QJAX_CACHE, or the user's cache."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("QJAX_CACHE")
    return Path(chosen) if chosen else user_cache_path("qjax", appauthor=False)


def download(
    command: Sequence[str], folder: Path, name: str, size_bytes: int | None, environment: Mapping[str, str]
) -> str:
    """The last line that a program prints, which downloads about ``size_bytes`` into ``folder``.

    It is ended where `progress` is stopped.  Raises QjaxError with its last words if it fails.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **environment}
        )
        try:
            growth = _growth(child, folder, size_bytes)
            for _ in progress(growth, desc=f"downloading {name}", total=size_bytes, unit="B", size=int):
                pass
        finally:
            child.kill()
            child.wait()
        for file in (out, err):
            file.seek(0)
        if child.returncode:
            raise QjaxError((err.read().strip().splitlines() or ["it ended without a word"])[-1])
        return (out.read().strip().splitlines() or [""])[-1]


def _growth(child: subprocess.Popen, folder: Path, most: int | None) -> Iterator[int]:
    """Bytes that have come since the last time, at most so many together, until the program has ended."""
    start, seen, running = _nbytes(folder), 0, True
    while running:
        try:
            child.wait(_POLL_S)
            running = False
        except subprocess.TimeoutExpired:
            pass
        now = max(seen, _nbytes(folder) - start)
        now = now if most is None else min(now, most)
        yield now - seen
        seen = now


def _nbytes(folder: Path) -> int:
    """Of all files below ``folder``, some of which may vanish at any moment."""
    total = 0
    for where, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(where, file)).st_size
    return total
