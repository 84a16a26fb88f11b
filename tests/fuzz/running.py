"""One execution: a reader of the package on one input, within bounds; and what counts as a finding."""

import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import qjax
from qjax import QjaxError

from .mutation import Input, patch
from .packing import pack
from .targets import Target

try:
    import resource
except ImportError:  # Windows
    resource = None

MAX_SECONDS = 1.0
"""of the processor's time"""
MAX_BYTES = 64 << 20
"""beside what the process has already"""
MAX_MESSAGE = 50_000
"""characters of what is said to the user"""

_PACKAGE = Path(qjax.__file__).parent
# Not everywhere; where not, only exceptions count.
_HAS_CLOCK = hasattr(signal, "setitimer")
_CAN_LIMIT_MEMORY = resource is not None and Path("/proc/self/statm").exists()
_REFRESH = 256  # Executions after which the limit follows what the process itself has come to hold.


class Finding(NamedTuple):
    """Something that a reader may not do."""

    kind: str
    """what it did and where: the same for inputs that find the same"""
    detail: str


class TooLong(BaseException):
    """The time is over."""


class Runner:
    """Runs the reader of a target on inputs, in a folder of its own."""

    def __init__(self, target: Target, folder: Path):
        self._target, self.folder = target, folder
        self._there: dict[str, bytes] = {}
        self._n = 0

    def read(self, given: Input) -> None:
        """Any input, without bounds.  Raises whatever the reader does."""
        self._place(patch(pack(given.files), given.patches))
        self._target.read(self.folder)

    def __call__(self, given: Input) -> Finding | None:
        """Any input, within bounds."""
        if self._n % _REFRESH == 0:
            _limit_memory()
        self._n += 1
        try:
            files = patch(pack(given.files), given.patches)
        except (ValueError, RecursionError, MemoryError):
            return None  # JSON cannot say it, or it is larger than what a reader may take.
        self._place(files)
        try:
            try:
                _start_clock(MAX_SECONDS)
                self._target.read(self.folder)
            finally:
                _start_clock(0)
        except QjaxError as error:
            return _complaint(error)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            lines = traceback.format_exception_only(error)
            return Finding(f"{type(error).__name__} in {_place_of(error)}", " ".join(lines).strip()[:MAX_MESSAGE])
        return None

    def _place(self, files: dict[str, bytes]) -> None:
        """These files and no others."""
        for name in self._there.keys() - files.keys():
            os.unlink(self.folder / name)
        for name, data in files.items():
            if self._there.get(name) != data:
                with open(self.folder / name, "wb", buffering=0) as file:
                    file.write(data)
        self._there = files


@contextmanager
def runner(target: Target, folder: Path | None = None) -> Iterator[Runner]:
    """A Runner that has read all seeds, so that what is imported and compiled at first use is.

    folder: an empty one; by default one in memory where the system has that.
    """
    shared_memory = Path("/dev/shm")
    at = shared_memory if shared_memory.is_dir() else None
    with tempfile.TemporaryDirectory(dir=folder or at) as path, warnings.catch_warnings():
        # Readers warn of what they do without; other warnings are a library's, of what should have been checked.
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", UserWarning)
        run = Runner(target, Path(path))
        for tree in target.seeds:
            run.read(Input(tree, []))
        before = signal.signal(signal.SIGPROF, _stop) if _HAS_CLOCK else None
        unlimited = resource.getrlimit(resource.RLIMIT_DATA) if _CAN_LIMIT_MEMORY else None
        try:
            yield run
        finally:
            if _HAS_CLOCK:
                signal.signal(signal.SIGPROF, before)
            if _CAN_LIMIT_MEMORY:
                resource.setrlimit(resource.RLIMIT_DATA, unlimited)


def _complaint(error: QjaxError) -> Finding | None:
    """What is wrong with a message, if anything: it should be one line that a terminal can take."""
    message = str(error)
    if message and message.isprintable() and len(message) <= MAX_MESSAGE:
        return None
    wrong = "long" if len(message) > MAX_MESSAGE else "unprintable" if message else "empty"
    return Finding(f"{wrong} message from {_place_of(error)}", repr(message[:MAX_MESSAGE]))


def _place_of(error: BaseException) -> str:
    """Where in the package it was raised, or what was called that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _PACKAGE in Path(frame.filename).parents]
    if not frames:
        return "the harness"
    path = Path(frames[-1].filename).relative_to(_PACKAGE).as_posix()
    return f"{path}, {frames[-1].name}, line {frames[-1].lineno}"


def _start_clock(seconds: float) -> None:
    """TooLong is raised when the process has computed for so long; 0 stops the clock."""
    if _HAS_CLOCK:
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    """MemoryError is raised where the process would take `MAX_BYTES` more than it has now."""
    if _CAN_LIMIT_MEMORY:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            data_pages = int(file.read(256).split()[5])
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (data_pages * resource.getpagesize() + MAX_BYTES, hard))


def _stop(*_: object) -> None:
    raise TooLong(f"more than {MAX_SECONDS} s")
