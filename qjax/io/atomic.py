"""Write a file whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qjax.errors import QjaxError


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block ends without an exception.

    The bytes go to a temporary file in the same folder, which is flushed to disk and then renamed.
    If anything fails, it is removed and what was at ``path`` is still there.  Symbolic links are followed.

    Raises QjaxError if ``path`` cannot be a file's place, OSError (full disk, no permission) naming ``path``.
    """
    target = check_target(path)
    # Its own short name, because the target's may already be as long as a name can be.
    temporary = target.with_name(f".qjax-{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        reason = f"not written ({error.strerror or error}); what was there before is unchanged"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def check_target(path: str | os.PathLike[str]) -> Path:
    """The place that `atomic_write` would write to, for what computes long before it writes.  Raises as it does."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        # os.replace would happily put a regular file where a device was.
        raise QjaxError(f"{path}: cannot write: it is not a regular file. Give the name of a file.")
    if not target.parent.is_dir():
        raise QjaxError(f"{path}: cannot write: the folder {target.parent} does not exist. Create it first.")
    return target


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
