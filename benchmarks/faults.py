"""Kills the commands that write files, again and again, and looks at what is left.

    python benchmarks/faults.py [COMMAND...] [--kills 100] [--seed 0] [--json benchmarks/results/faults.json]

Each command runs as a process of its own, on the tiny model, and ends by SIGKILL: half of the times at any moment of
its run, half of the times while its output has a temporary name, or the moment after.  Each kill has to leave the
target as it was before or as a run to the end writes it, to the byte.  Temporary files may be left by the last kill
alone, and none after a run to the end, which follows.  A killed training goes on from its checkpoint, and writes the
same bytes.  The exit code is 1 if any of this is not so.

So that nearly all kills come while a command works, the processes are forked from one that has imported everything
(and has not run anything), and compiled programs come from the disk.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path

import jax
import side_by_side
from side_by_side import Row

from qjax.cli import main as main_of_qjax
from qjax.data import tales
from qjax.errors import QjaxError

COLUMNS = {
    "command": ("command", ""),
    "run_s": ("a run, s", ".1f"),
    "writing_s": ("of it writing, s", ".3f"),
    "kills": ("kills", "d"),
    "writing": ("of them while writing", "d"),
    "old": ("target as before", "d"),
    "new": ("the new one", "d"),
    "between": ("neither", "d"),
    "left": ("most files left", "d"),
    "left_after": ("after a run", "d"),
}
OLD = b"what was there before" * 1000
_POLL_S = 0.0005
TRAIN = ("--steps", "3", "-b", "1", "-c", "32", "-f", "tales", "--save-every", "1", "--resume", "--checkpoint")


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "optax", "tokenizers", "qjax.convert", "qjax.evaluate", "qjax.train"])


def command(folder: Path, arguments: Sequence[str]) -> None:
    """What a forked process does."""
    os.chdir(folder)
    for descriptor, path in ((1, os.devnull), (2, folder.parent / "log")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    sys.argv = ["qjax", *arguments]
    main_of_qjax()


@dataclass
class Case:
    """A command that writes ``target``, in a folder of its own, which it takes from there."""

    name: str
    arguments: Sequence[str]
    target: Path

    @property
    def state(self) -> bytes | None:
        """The bytes of the target, of a folder those of its files; None where there is none."""
        if self.target.is_dir():
            return b"".join(path.name.encode() + path.read_bytes() for path in sorted(self.target.iterdir()))
        return self.target.read_bytes() if self.target.exists() else None

    @property
    def temporary(self) -> list[str]:
        """What is beside the target."""
        return [entry.name for entry in os.scandir(self.target.parent) if entry.name.startswith(".qjax-")]

    @property
    def checkpoint(self) -> Path:
        return self.target.parent / "checkpoint"

    def begin(self) -> None:
        """As before any run."""
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        if self.target.is_dir():
            shutil.rmtree(self.target)
        elif self.target.suffix:
            self.target.write_bytes(OLD)

    def start(self) -> Process:
        process = FORKS.Process(target=command, args=(self.target.parent, self.arguments))
        process.start()
        return process

    def run(self) -> tuple[float, float]:
        """To the end: how long it took, and how long its output had a temporary name.  Raises QjaxError if it fails."""
        start, first, last = time.monotonic(), None, 0.0
        process = self.start()
        before = set(self.temporary)
        while process.exitcode is None:
            if set(self.temporary) - before:
                last = time.monotonic()
                first = first or last
            time.sleep(_POLL_S)
        end = time.monotonic()
        self._check(process)
        return end - start, last - first if first else 0.0

    def kill(self, moment_s: float, while_writing: bool) -> tuple[bool, bool]:
        """Whether it was killed so long after its start, or after its output began, or ended before; and whether it
        left something."""
        before = set(self.temporary)
        process = self.start()
        while while_writing and process.exitcode is None and not set(self.temporary) - before:
            time.sleep(_POLL_S)
        process.join(moment_s)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            self._check(process)
        return process.exitcode == -signal.SIGKILL, bool(set(self.temporary) - before)

    def _check(self, process: Process) -> None:
        if process.exitcode:
            said = (self.target.parent.parent / "log").read_text()
            raise QjaxError(f"{self.name} ended with {process.exitcode}: {said[-500:]}")


def cases(folder: Path) -> list[Case]:
    """All that are killed, each in a folder below this one."""
    text = folder / "text"
    text.write_text("".join(tale.text for tale in tales.generate(1, 40)), encoding="utf-8")
    imatrix = ("imatrix", "tiny", "-f", str(text), "-c", "64", "--chunks", "4", "-o", "out.gguf")
    commands = {
        "quantize": (("quantize", "tiny", "out.gguf", "Q4_K_M"), "out.gguf"),
        "convert": (("convert", "tiny", "out.gguf", "--outtype", "q8_0"), "out.gguf"),
        "convert, a folder": (("convert", "tiny", "out", "--outtype", "f16", "--max-shard-size", "1M"), "out"),
        "imatrix": (imatrix, "out.gguf"),
        "train": (("train", "tiny", "out.gguf", "--qat", "Q4_0", *TRAIN, "checkpoint"), "out.gguf"),
    }
    made = []
    for name, (arguments, target) in commands.items():
        (place := folder / name).mkdir()
        made.append(Case(name, arguments, place / target))
    return made


def measure(case: Case, n_kills: int, draw: random.Random) -> Row:
    """Kills a command so many times.  Raises QjaxError if it fails by itself."""
    case.run()  # compiles
    case.begin()
    old = case.state
    run_s, writing_s = case.run()
    new, found, left, writing = case.state, Counter(), 0, 0
    assert new != old
    case.begin()
    kills = 0
    while kills < n_kills:
        while_writing = kills % 2 == 1
        # A little longer, for whoever is late.
        killed, left_some = case.kill(draw.uniform(0, 1.2 * writing_s if while_writing else run_s), while_writing)
        kills += killed
        writing += left_some
        state = case.state
        found["old" if state == old else "new" if state == new else "between"] += killed or state not in (old, new)
        left = max(left, len({Path(name).stem for name in case.temporary}))
        if state != old:
            case.begin()
    case.run()
    found["between"] += case.state != new
    counts = {key: found[key] for key in ("old", "new", "between")}
    left_after = len(case.temporary) + len(list(case.checkpoint.glob(".qjax-*")))
    return {
        "command": case.name, "run_s": run_s, "writing_s": writing_s, "kills": kills, "writing": writing, **counts,
        "left": left, "left_after": left_after,
    }  # fmt: skip


def is_sound(row: Row) -> bool:
    return row["between"] == row["left_after"] == 0 and row["left"] <= 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", help="only these")
    parser.add_argument("--kills", type=int, default=100, help="of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    draw, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder)):
            if arguments.commands and case.name not in arguments.commands:
                continue
            rows.append(measure(case, arguments.kills, draw))
            print(f"\n{side_by_side.table(rows, COLUMNS)}", flush=True)
    side_by_side.write(arguments.json, rows, seed=arguments.seed)
    return int(not all(map(is_sound, rows)))


if __name__ == "__main__":
    sys.exit(main())
