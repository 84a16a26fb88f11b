"""Runs llama.cpp's programs."""

import os
import re
import subprocess
import sys
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


def source() -> Path:
    """llama.cpp's source folder, with its scripts and vocabularies: the one that QJAX_LLAMA_CPP_SRC names, or else from
    which the programs in QJAX_LLAMA_CPP were built; skips without."""
    if named := os.environ.get("QJAX_LLAMA_CPP_SRC"):
        return Path(named)
    programs = Path(os.environ.get("QJAX_LLAMA_CPP", ""))
    caches = (parent / "CMakeCache.txt" for parent in programs.parents)
    cache = next((cache for cache in caches if cache.exists()), None)
    found = cache and re.search(
        r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", cache.read_text(encoding="utf-8"), re.MULTILINE
    )
    if not found or not Path(found[1]).exists():
        pytest.skip("QJAX_LLAMA_CPP_SRC does not name llama.cpp's source folder")
    return Path(found[1])


def converted(script: Path, folder: Path, target: Path, *flags) -> None:
    """Runs one of llama.cpp's converters, which are programs in Python."""
    command = [sys.executable, script, folder, "--outfile", target, *map(str, flags)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
