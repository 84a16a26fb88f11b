"""Runs llama.cpp's programs."""

import re
import subprocess
from pathlib import Path

import pytest


def output(*command, last: str = "", tries: int = 8) -> str:
    """What the program prints, up to a line with ``last`` in it.

    Its log is written by a thread that is not waited for, so that the end may be missing; then it is run again.
    """
    for _ in range(tries):
        done = subprocess.run(
            list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed[-2000:]
        if last in printed:
            return printed
    raise AssertionError(f"{Path(command[0]).name} printed no {last!r} in {tries} runs, but {printed[-2000:]}")


def source(programs: Path) -> Path:
    """The source folder that ``programs`` were built from, with llama.cpp's scripts; skips where it is gone."""
    cache = next(
        (parent / "CMakeCache.txt" for parent in programs.parents if (parent / "CMakeCache.txt").exists()), None
    )
    found = cache and re.search(
        r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", cache.read_text(encoding="utf-8"), re.MULTILINE
    )
    if not found or not Path(found[1]).exists():
        pytest.skip(f"{programs} was not built beside llama.cpp's sources")
    return Path(found[1])
