"""Files whole or not at all: writers that are killed, several at once, folders, and inputs that shrink.

The children import the writer without the package around it, for that starts in a moment.
"""

import os
import random
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT

from qjax.errors import QjaxError
from qjax.io import atomic, gguf
from qjax.io.atomic import atomic_folder, atomic_write
from qjax.io.mapped import MappedFile

START = """
import sys, types
package = types.ModuleType("qjax")
package.__path__ = [sys.argv[1]]
sys.modules["qjax"] = package
from qjax.io.atomic import atomic_folder, atomic_write
target, letter = sys.argv[2], sys.argv[3].encode()
"""
SIZE, PIECES = 20_000, 25
FOREVER = """
while True:
    with atomic_write(target) as file:
        for _ in range(25):
            file.write(letter * 20_000)
    letter = letter.swapcase()
"""
ONCE = """
with atomic_write(target) as file:
    file.write(letter)
    print("begun", flush=True)
    sys.stdin.read(1)
"""
A_FOLDER = """
with atomic_folder(target, last="b") as folder:
    for name in ("a", "b"):
        with atomic_write(folder / name) as file:
            file.write(letter)
    print("begun", flush=True)
    sys.stdin.read(1)
"""


@pytest.fixture
def child():
    """Starts a child that runs code; whatever happens, it ends with the test."""
    children = []

    def start(code, target, letter="a"):
        command = [sys.executable, "-c", START + code, ROOT / "qjax", target, letter]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        return children[-1]

    yield start
    for one in children:
        one.kill()
        one.communicate()


def begun(child):
    assert child.stdout.readline() == b"begun\n"
    return child


def killed(child):
    child.kill()
    child.wait()


def temporary(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".qjax-"))


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_killed_at_any_moment(tmp_path, child):
    """What is there is old or new, never between; what is left is gone with the next one who writes."""
    target, draw = tmp_path / "x", random.Random(0)
    whole = {bytes([letter]) * SIZE * PIECES for letter in b"aA"} | {b"old"}
    left = 0
    for _ in range(12):
        target.write_bytes(b"old")
        writer = child(FOREVER, target)
        wait_for(lambda: temporary(tmp_path) or target.read_bytes() != b"old")
        time.sleep(draw.uniform(0, 0.02))
        killed(writer)
        assert target.read_bytes() in whole
        left += len(temporary(tmp_path))
        with atomic_write(tmp_path / "another") as file:
            file.write(b"y")
        assert temporary(tmp_path) == []
    assert left, "no kill came while something was written"


def test_two_writers_of_one_target(tmp_path, child):
    """Each sees its own, readers one of both, and neither takes the other's for a dead one's."""
    target = tmp_path / "x"
    target.write_bytes(b"a")
    writers = [child(FOREVER, target, letter) for letter in "ab"]
    seen, end = Counter(), time.monotonic() + 20
    while (len(seen) < 4 or min(seen.values()) < 20) and time.monotonic() < end:
        if (data := target.read_bytes()) != b"a":
            assert data == data[:1] * SIZE * PIECES
            seen[data[:1]] += 1
    assert seen.keys() == {b"a", b"A", b"b", b"B"}
    assert [writer.poll() for writer in writers] == [None, None]


def test_who_lives_is_left_alone(tmp_path, child):
    """However long he waits, and be he in this very process."""
    other = begun(child(ONCE, tmp_path / "x"))
    folder = begun(child(A_FOLDER, tmp_path / "f"))
    with atomic_write(tmp_path / "y") as file:
        file.write(b"y")
        with atomic_write(tmp_path / "z") as inner:
            inner.write(b"z")
    other.communicate(b"\n")
    folder.communicate(b"\n")
    assert (other.returncode, folder.returncode) == (0, 0)
    found = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"x": b"a", "y": b"y", "z": b"z", "f/a": b"a", "f/b": b"a"}


@pytest.mark.skipif(not atomic.fcntl, reason="where files are not locked, only old ones are taken for abandoned")
def test_what_is_left_is_removed(tmp_path, child):
    """A file, a folder, and one whose lock is gone already."""
    for one in [begun(child(code, tmp_path / name)) for name, code in {"x": ONCE, "f": A_FOLDER}.items()]:
        killed(one)
    (tmp_path / ".qjax-0.d").mkdir()
    (tmp_path / ".qjax-0.d" / "x").write_bytes(b"x")
    assert len(temporary(tmp_path)) == 4
    with atomic_write(tmp_path / "y"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


def test_a_file_that_was_taken_for_abandoned(tmp_path, monkeypatch):
    """Between being made and being locked another writer removes it; so a new one is made."""
    made = []

    def flock(*_):
        made.append(temporary(tmp_path)[-1])
        if len(made) == 1:
            (tmp_path / made[0]).unlink()

    monkeypatch.setattr(atomic, "fcntl", type("fcntl", (), {"flock": flock, "LOCK_EX": 0, "LOCK_NB": 0}))
    with atomic_write(tmp_path / "x") as file:
        file.write(b"x")
    assert len({*made}) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"x"}


def test_without_locks(tmp_path, monkeypatch):
    """As on Windows: the file is closed before it is renamed, and what is left is removed when it is old."""
    monkeypatch.setattr(atomic, "fcntl", None)
    left = tmp_path / ".qjax-0.tmp"
    for age_s, is_there in ((0, True), (100, False)):
        left.write_bytes(b"x")
        os.utime(left, (time.time() - age_s,) * 2)
        with atomic_write(tmp_path / "x") as file:
            file.write(b"x")
        assert file.closed
        assert left.exists() == is_there
    assert (tmp_path / "x").read_bytes() == b"x"


@pytest.mark.parametrize("error", ["Read-only file system", "Permission denied"])
def test_a_folder_that_takes_no_files(tmp_path, monkeypatch, error):
    number = next(n for n in range(200) if os.strerror(n) == error)

    def refuse(*_):
        raise OSError(number, error)

    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(atomic, "open", refuse, raising=False)
    for write in (lambda: atomic_write(tmp_path / "x"), lambda: atomic_folder(tmp_path / "f", "b")):
        with pytest.raises(OSError, match=rf"not written \({error}\); what was there before is unchanged"), write():
            pass
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"old"}


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────


def write_folder(path, letter):
    with atomic_folder(path, last="b") as folder:
        for name in "abc":
            (folder / name).write_bytes(letter)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_appears_at_once(tmp_path):
    target = tmp_path / "new" / "f"
    with atomic_folder(target, last="b") as folder:
        (folder / "b").write_bytes(b"1")
        assert not target.exists()
    assert contents(target) == {"b": b"1"}
    assert [path.name for path in target.parent.iterdir()] == ["f"]


def test_a_folder_that_is_there_keeps_its_other_files(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    for letter in (b"1", b"2"):
        write_folder(tmp_path, letter)
        assert contents(tmp_path) == dict.fromkeys("abc", letter) | {"mine": b"mine"}


def test_no_mixture_of_old_and_new_passes_for_whole(tmp_path, monkeypatch):
    """Whatever renaming is the last before the process is killed."""
    for n in range(4):
        write_folder(target := tmp_path / str(n), b"1")
        left = n

        def replace(self, *arguments, replace=os.replace):
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            replace(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.replace", replace)
            if n < 3:
                with pytest.raises(KeyboardInterrupt):
                    write_folder(target, b"2")
                assert "b" not in contents(target)
            else:
                write_folder(target, b"2")
        write_folder(target, b"3")
        assert contents(target) == dict.fromkeys("abc", b"3")


def test_a_folder_that_failed_leaves_nothing(tmp_path):
    write_folder(tmp_path / "f", b"1")

    def fail(target):
        with atomic_folder(target, last="b") as folder:
            (folder / "b").write_bytes(b"2")
            raise RuntimeError

    for target in ("f", "g"):
        with pytest.raises(RuntimeError):
            fail(tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert contents(tmp_path / "f") == dict.fromkeys("abc", b"1")


# ── inputs that shrink ───────────────────────────────────────────────────────────────────────────────


def test_a_file_that_shrinks(tmp_path, monkeypatch):
    """It is said, where a map, as `tensor.data` is, would have the process killed."""
    monkeypatch.setattr("qjax.io.stored.PIECE_BYTES", 2**12)
    path = tmp_path / "x.gguf"
    gguf.write(path, {}, {"t": np.ones(2**14, np.float32)})
    tensor = gguf.read(path).tensors["t"]
    pieces = tensor.pieces()
    next(pieces)
    os.truncate(path, 2**13)
    message = r"x\.gguf: it has 8192 bytes by now, expected \d+ at least: something else writes to it"
    for read in (lambda: [*pieces], tensor.load):
        with pytest.raises(QjaxError, match=message):
            read()


def test_the_file_that_was_opened_is_read(tmp_path):
    """Even if another was put in its place."""
    (tmp_path / "x").write_bytes(b"old, and longer")
    file = MappedFile(tmp_path / "x")
    with atomic_write(tmp_path / "x") as new:
        new.write(b"new")
    assert file.read(0, 3).tobytes() == b"old"
    assert file.mapped[5:].tobytes() == b"and longer"
    assert file.read(3, 3).size == 0
