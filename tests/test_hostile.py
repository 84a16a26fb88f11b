"""Files that are not what they say: each is refused, with its own message, at once, and in little memory.

The corpus is in hostile/, one table for each kind of file; a case more is a line there.
"""

import json
import re
import subprocess
import sys

import pytest
from conftest import TESTS
from hostile import corpus
from hostile.measure import Outcome

MAX_TIME_S = 1
MAX_MEMORY = 64 * 2**20
"""Beyond the size of the file."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def outcomes(paths) -> dict[tuple[str, str], Outcome]:
    """Of all cases; the sound ones are read first, whereby all is loaded and compiled that a reader needs."""
    ordered = [*corpus.SOUND, *corpus.BAD]
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
    assert len(found.message) < 4100
    assert found.time_s < MAX_TIME_S
    if found.memory_bytes is not None:
        folder = path if path.is_dir() else path.parent
        size = sum(file.stat().st_size for file in folder.iterdir())
        assert found.memory_bytes < size + MAX_MEMORY
