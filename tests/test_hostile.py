"""Files that are not what they say: each is refused, with its own message, at once, and in little memory.

The corpus is in hostile/, one table for each kind of file; a case more is a line there.
"""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TESTS
from hostile import corpus, gguf_bytes, gguf_files
from hostile.measure import Outcome, outcome
from oracles import ggml, programs

from qjax import QjaxError

MAX_TIME_S = 1
MAX_MEMORY = 64 * 2**20
"""Beyond the size of the file."""


LARGE = "check", "a large file"
"""It is sound; that it is looked at whole takes little memory too."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("hostile")
    header = gguf_bytes.build([], [gguf_bytes.tensor("t", [2**28], gguf_bytes.IDS["I8"], 0)])
    (folder / "large.gguf").write_bytes(header)
    os.truncate(folder / "large.gguf", len(header) + 2**28)
    return corpus.write(folder) | {LARGE: folder / "large.gguf"}


@pytest.fixture(scope="module")
def outcomes(paths) -> dict[tuple[str, str], Outcome]:
    """Of all cases; the sound ones are read first, whereby all is loaded and compiled that a reader needs."""
    ordered = [*corpus.SOUND, LARGE, *corpus.BAD]
    asked = json.dumps([(kind, str(paths[kind, name])) for kind, name in ordered])
    command = [sys.executable, TESTS / "hostile" / "measure.py"]
    ran = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return {case: Outcome(**found) for case, found in zip(ordered, json.loads(ran.stdout), strict=True)}


@pytest.mark.parametrize(("kind", "name"), corpus.SOUND, ids=map(": ".join, corpus.SOUND))
def test_sound_files_are_read(outcomes, kind, name):
    found = outcomes[kind, name]
    assert (found.message, found.crash) == (None, None)


@pytest.mark.parametrize(("kind", "name"), corpus.BAD, ids=map(": ".join, corpus.BAD))
def test_refused(outcomes, paths, kind, name):
    found, path, message = outcomes[kind, name], paths[kind, name], corpus.KINDS[kind].bad[name][1]
    assert found.crash is None, found.crash
    assert found.message is not None, "it was read"
    assert re.search(message, found.message), found.message
    assert found.message.isprintable()
    if kind != "tokenizer.gguf":  # whose metadata no longer know where they are from
        assert str(path.parent) in found.message
    assert len(found.message) < 4100
    assert found.time_s < MAX_TIME_S
    if found.memory_bytes is not None:
        folder = path if path.is_dir() else path.parent
        size = sum(file.stat().st_size for file in folder.iterdir())
        assert found.memory_bytes < size + MAX_MEMORY


def test_a_large_file_is_looked_at_in_little_memory(outcomes):
    found = outcomes[LARGE]
    assert (found.message, found.crash) == (None, None)
    if found.memory_bytes is not None:
        assert found.memory_bytes < MAX_MEMORY


def test_the_measure_sees_what_is_taken(tmp_path):
    def greedy(path: Path) -> None:
        taken = b"x" * 2**28
        raise QjaxError(f"{path}: {len(taken)}")

    def broken(path: Path) -> None:
        raise ZeroDivisionError(path)

    found = outcome(greedy, tmp_path)
    assert found.message == f"{tmp_path}: {2**28}"
    assert found.time_s > 0
    if found.memory_bytes is not None:
        assert 0.9 * 2**28 < found.memory_bytes < 1.1 * 2**28
    found = outcome(broken, tmp_path)
    assert found.message is None
    assert f"ZeroDivisionError: {tmp_path}" in found.crash
    gc.unfreeze()


# ── llama.cpp's reader ───────────────────────────────────────────────────────────────────────────────


def test_every_case_of_llama_cpps_own_test_is_here():
    path = programs.source() / "tests" / "test-gguf.cpp"
    if not path.exists():
        pytest.skip("the sources are without tests")
    cases = {*re.findall(r"HANDCRAFTED_(\w+) *=", path.read_text(encoding="utf-8"))}
    assert len(cases) > 30
    assert cases - gguf_files.SOUND.keys() - gguf_files.BAD.keys() == set()


def test_llama_cpp_reads_what_is_read_here(paths):
    taken = {name for name in (*gguf_files.SOUND, *gguf_files.BAD) if ggml.libggml_reads(paths["gguf", name])}
    assert taken == gguf_files.SOUND.keys() | gguf_files.READ_BY_LLAMA_CPP
