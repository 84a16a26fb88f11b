"""Commands on systems that fail: killed, interrupted, on full disks and in read-only folders, with inputs that shrink.

The commands are processes, as for users.  `benchmarks/faults.py` kills them hundreds of times.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import ROOT

from qjax.io import gguf

pytestmark = pytest.mark.exact

QJAX = (sys.executable, "-m", "qjax")
# Says when Python has imported itself and the package, from where on the command answers.
BEGUN = "import sys, qjax.cli; sys.argv[0] = 'qjax'; print('begun', file=sys.stderr, flush=True); qjax.cli.main()"
TEXT = "The fox found a red ball. " * 400
TRAIN = ("--qat", "Q4_0", "-f", "tales", "-b", "1", "-c", "32")
COMMANDS = {
    "quantize": ("quantize", "tiny", "out.gguf", "Q4_K_M"),
    "convert": ("convert", "tiny", "out.gguf", "--outtype", "q8_0"),
    "imatrix": ("imatrix", "tiny", "-f", "text", "-o", "out.gguf", "-c", "64"),
    "train": ("train", "tiny", "out.gguf", *TRAIN, "--steps", "20"),
    "perplexity": ("perplexity", "tiny", "-f", "text", "-c", "64", "--kl-divergence-base", "out.gguf"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the commands run, with a text and a target that is there already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "out.gguf").write_bytes(b"precious")
    return tmp_path


def start(*arguments, command=QJAX):
    command = [*command, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """(exit code, stdout, stderr)"""
    out, err = process.communicate()
    return process.returncode, out, err


def run(*arguments):
    return finish(start(*arguments))


def is_one_line(result, code, message):
    assert result[0] == code, result
    assert result[1] == ""
    assert message in result[2]
    assert len(result[2].splitlines()) == 1, result[2]


def wait_for(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def temporary(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".qjax-")]


@contextmanager
def mounted(folder, *options):
    """A file system in memory."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a file system, on Linux")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ── killed ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_few_kills_of_each_command(tmp_path):
    table = tmp_path / "faults.json"
    command = [sys.executable, ROOT / "benchmarks" / "faults.py", "--kills", "4", "--json", table]
    said = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert said.returncode == 0, said
    rows = json.loads(table.read_text())["rows"]
    assert [row["kills"] for row in rows] == [4] * 5
    assert sum(row["writing"] for row in rows) > 3
    assert all(row["old"] + row["new"] == 4 for row in rows)


def test_training_goes_on_to_the_same_bytes(folder):
    """Killed twice after a checkpoint, between them with another state of the optimizer."""
    command = ("train", "tiny", "out.gguf", *TRAIN, "--steps", 12, "--save-every", 2)
    assert run(*command)[0] == 0
    expected = (folder / "out.gguf").read_bytes()
    (folder / "out.gguf").write_bytes(b"precious")
    saved = folder / "saved" / "checkpoint.safetensors"
    seen = [0]
    for _ in range(2):
        process = start(*command, "--checkpoint", "saved", "--resume")
        wait_for(lambda: saved.exists() and saved.stat().st_mtime_ns > seen[-1])
        seen.append(saved.stat().st_mtime_ns)
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
        assert (folder / "out.gguf").read_bytes() == b"precious"
    code, out, _ = run(*command, "--checkpoint", "saved", "--resume", "--json")
    assert code == 0
    assert '"first_step": 0' not in out
    assert (folder / "out.gguf").read_bytes() == expected
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


# ── interrupted ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", COMMANDS)
def test_interrupted(folder, name):
    """One line and 130, whatever it was doing; what was there is there, and no temporary file."""
    start_s = time.monotonic()
    process = start(*COMMANDS[name], command=(sys.executable, "-c", BEGUN))
    assert process.stderr.readline() == "begun\n"
    begun_s = time.monotonic()
    assert finish(process)[0] == 0
    run_s, draw = time.monotonic() - begun_s, random.Random(0)
    assert begun_s > start_s
    for share in (0.05, 0.2, 0.4, 0.6, 0.8):
        (folder / "out.gguf").write_bytes(b"precious")
        process = start(*COMMANDS[name], command=(sys.executable, "-c", BEGUN))
        assert process.stderr.readline() == "begun\n"
        time.sleep(run_s * (share + draw.uniform(0, 0.1)))
        process.send_signal(signal.SIGINT)
        result = finish(process)
        if result[0] == 0:
            continue  # it was quicker this time
        is_one_line(result, 130, "qjax: interrupted")
        assert (folder / "out.gguf").read_bytes() == b"precious"
        assert temporary(folder) == []


# ── the system says no ───────────────────────────────────────────────────────────────────────────────


def test_full_disk(folder):
    disk = folder / "disk"
    disk.mkdir()
    with mounted(disk, "size=400k"):
        (disk / "out.gguf").write_bytes(b"precious")
        for arguments in (
            ("quantize", "tiny", "disk/out.gguf", "Q8_0"),
            ("convert", "tiny", "disk/folder", "--outtype", "f16"),
            ("convert", "tiny", "disk/out.gguf", "--split-max-tensors", "10"),
            ("perplexity", "tiny", "-f", "text", "-c", "64", "--kl-divergence-base", "disk/out.gguf"),
        ):
            is_one_line(run(*arguments), 1, "not written (No space left on device)")
            assert [path.name for path in disk.iterdir()] == ["out.gguf"], arguments
        assert (disk / "out.gguf").read_bytes() == b"precious"


def test_read_only_folder(folder):
    disk = folder / "disk"
    disk.mkdir()
    with mounted(disk, "size=400k", "ro"):
        for arguments in (COMMANDS["quantize"], COMMANDS["imatrix"], ("convert", "tiny", "out.gguf")):
            arguments = ["disk/out.gguf" if part == "out.gguf" else part for part in arguments]
            is_one_line(run(*arguments), 2, "disk/out.gguf: not written (Read-only file system)")


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_an_input_that_shrinks(folder, kind):
    """While it is quantized.  A process that touched a map of it would be killed."""
    source = folder / "large.gguf"
    values = np.random.default_rng(0).standard_normal((2**14, 2**10), np.float32)
    names = {"token_embd.weight": values, "output.weight": values[:1024]}
    if kind == "gguf":
        gguf.write(source, {"general.architecture": "llama", "llama.block_count": 1}, names)
        shrinking = source
    else:
        assert run("convert", "tiny", "source", "--outtype", "f32")[0] == 0
        source, shrinking = folder / "source", folder / "source" / "model.safetensors"
    process = start("quantize", source, "out.gguf", "Q4_K", "--pure")
    wait_for(lambda: temporary(folder))
    os.truncate(shrinking, 8192)
    is_one_line(finish(process), 2, f"{shrinking.name}: ")
    assert (folder / "out.gguf").read_bytes() == b"precious"
    assert temporary(folder) == []


def test_two_writers_of_one_target(folder):
    """Both succeed, and what is there is what one of them writes."""
    expected = []
    for type in ("Q4_0", "Q8_0"):
        assert run("quantize", "tiny", f"{type}.gguf", type)[0] == 0
        expected.append((folder / f"{type}.gguf").read_bytes())
    writers = [start("quantize", "tiny", "out.gguf", type) for type in ("Q4_0", "Q8_0")]
    assert [finish(writer)[0] for writer in writers] == [0, 0]
    assert (folder / "out.gguf").read_bytes() in expected
    assert temporary(folder) == []
