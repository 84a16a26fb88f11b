"""Files and folders written whole or not at all.

What is written has a temporary name, .qjax-….tmp, beside its target until it is complete and on the disk, and is then
renamed.  As long as it has that name its writer holds a lock on it, which the system takes from a process that ends, in
whatever way: by that the next one to write in this folder tells what a killed process left from what is being written,
and removes it.  Several may write one target at once: the last to rename wins.
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qjax.errors import QjaxError

try:
    import fcntl
except ImportError:
    # Windows removes and renames no file that is open, so there an open file is as good as a lock.
    fcntl = None

_UNLOCKED_S = 60
"""On Windows: so long at most a file is closed and not yet renamed."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block ends without an exception.

    If anything fails, or the process is killed, what was at ``path`` is still there.  Symbolic links are followed.

    Raises QjaxError if ``path`` cannot be a file's place, OSError (full disk, no permission) naming ``path``.
    """
    target = check_target(path)
    with _named(path), _temporary(target.parent) as (temporary, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        if fcntl is None:
            file.close()
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    _sync_folder(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """An empty folder, whose files take their places in the folder ``path`` when the block ends without an exception.

    If there is no such folder, it appears with all of them at once.  In one that is there they take the places of those
    of the same names one by one, at once but for the time of some renamings; whoever is killed in it leaves no mixture
    of old and new that passes for a whole: ``last`` is the file without which nobody takes the others for one; the old
    one is removed first, and the new one comes last.

    Raises OSError (full disk, no permission) naming ``path``.
    """
    folder = Path(os.path.realpath(path))
    with _named(path):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Inside, because the folder may be a file system of its own.
        with _temporary(folder if folder.exists() else folder.parent) as (temporary, _):
            # The lock of the file is the folder's too.
            made = temporary.with_suffix(".d")
            try:
                made.mkdir()
                yield made
                if folder.exists():
                    _move(made, folder, last)
                else:
                    made.rename(folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        _sync_folder(folder)
        _sync_folder(folder.parent)


def check_target(path: str | os.PathLike[str]) -> Path:
    """The place that `atomic_write` would write to, for what computes long before it writes.  Raises as it does."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        # os.replace would happily put a regular file where a device was.
        raise QjaxError(f"{path}: cannot write: it is not a regular file. Give the name of a file.")
    if not target.parent.is_dir():
        raise QjaxError(f"{path}: cannot write: the folder {target.parent} does not exist. Create it first.")
    return target


def _move(made: Path, folder: Path, last: str) -> None:
    """All files of one folder into another."""
    (folder / last).unlink(missing_ok=True)
    for path in sorted(made.iterdir(), key=lambda path: path.name == last):
        path.replace(folder / path.name)


@contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system says against writing, said of ``path``."""
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise OSError(error.errno, f"not written ({why}); what was there before is unchanged", str(path)) from error


# ── temporary files ──────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _temporary(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new locked file in ``folder``; at the end it is closed, and gone if it has no other name by then."""
    _remove_abandoned(folder)
    while True:
        # Its own short name, because the target's may already be as long as a name can be.
        path = folder / f".qjax-{secrets.token_hex(6)}.tmp"
        try:
            with open(path, "xb") as file:
                if fcntl is not None:
                    # A file system without locks takes none, and of its files none passes for abandoned.
                    with contextlib.suppress(OSError):
                        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
                if path.exists():
                    yield path, file
                    return
                # Another writer took the lock first, and the file for abandoned.
        finally:
            path.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed processes left in ``folder``, of whatever target; what cannot be removed stays."""
    for path in folder.glob(".qjax-*.tmp"):
        with contextlib.suppress(OSError):
            if fcntl is not None:
                with open(path, "rb+") as file:
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where its writer lives
                    path.unlink()
            elif time.time() - path.stat().st_mtime > _UNLOCKED_S:
                path.unlink()
    for path in folder.glob(".qjax-*.d"):
        # A writer's is there before its folder is, and longer.
        if not path.with_suffix(".tmp").exists():
            shutil.rmtree(path, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can (Windows cannot open folders)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # Some network file systems refuse; the file is complete either way.
    finally:
        os.close(descriptor)
