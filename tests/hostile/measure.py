"""Reads files one after another and says what came of each: a program of its own, whose memory nothing else moves.

On stdin a list of [kind, path] in JSON, on stdout a list of `Outcome` as objects, in the same order.
"""

import contextlib
import ctypes
import gc
import json
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))


class Outcome(NamedTuple):
    """message: of the QjaxError, None if the file was read.  crash: the traceback of any other error.
    time_s: of the processor.  memory_bytes: by which resident memory grew at its peak; None where Linux does not say
    so."""

    message: str | None
    crash: str | None
    time_s: float
    memory_bytes: int | None


def resident(name: str) -> int | None:
    """VmRSS, or VmHWM, its peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def forget_the_peak() -> None:
    """And what was freed is given back, so that the next file can not be read in it unseen."""
    gc.collect()
    gc.freeze()  # What is left is there to stay, and need not be looked at again.
    with contextlib.suppress(OSError, AttributeError, TypeError):  # where the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# A file that is read without end, or into memory without end, is to spoil its own outcome alone.


def limit_memory(beyond: int) -> None:
    """Of the process, to what it has now and so many bytes; where Linux can do that."""
    if (size := resident("VmSize")) is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size + beyond, -1))


def limit_time(time_s: float) -> None:
    """Of the processor, from now on; 0: there is no limit.  Beyond it a TimeoutError is raised."""

    def stop(*_):
        raise TimeoutError

    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, time_s)


def outcome(read, path: Path) -> Outcome:
    from qjax import QjaxError

    forget_the_peak()
    message = crash = None
    before, begun = resident("VmRSS"), time.thread_time()
    limit_time(20)
    try:
        read(path)
    except QjaxError as error:
        message = str(error)
    except Exception:
        crash = traceback.format_exc()
    time_s, peak = time.thread_time() - begun, resident("VmHWM")
    limit_time(0)
    return Outcome(message, crash, time_s, None if before is None or peak is None else peak - before)


if __name__ == "__main__":
    from hostile.corpus import KINDS

    asked = json.load(sys.stdin)
    limit_memory(2**31)
    outcomes = [outcome(KINDS[kind].read, Path(path))._asdict() for kind, path in asked]
    json.dump(outcomes, sys.stdout)
