"""Long runs: a process for each target, in which atheris leads mutation by the branches that an input reaches.

What atheris keeps, and every finding, is an `Input` in a file; marshal writes them, which has words for all trees.
Where atheris is not installed, mutation goes on from the seeds without knowing what it reaches.
"""

import hashlib
import importlib.util
import marshal
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from .mutation import Input, Mutator

ROOT = Path(__file__).resolve().parents[2]
MAX_INPUT_BYTES = 1 << 16
MODULES = ("qjax.io", "qjax.models", "qjax.methods.recipes", "qjax.methods.imatrix", "qjax.source")
"""What atheris watches; with all that they import, most of the time would be jax's."""


def available() -> bool:
    return importlib.util.find_spec("atheris") is not None


def encode(given: Input) -> bytes:
    return marshal.dumps(tuple(given))


def decode(data: bytes) -> Input | None:
    """None for what is no input, such as the empty one that atheris begins with."""
    try:
        return Input(*marshal.loads(data)) if data else None
    except (EOFError, ValueError, TypeError):
        return None


class Outcome(NamedTuple):
    """What a process did."""

    executions: int
    seconds: float
    edges: int | None
    """branches reached, those of earlier runs among them"""
    complaint: str
    """its last words if it ended before its time"""


def run(name: str, executions: int, folder: Path) -> Outcome:
    """Run a target in a process of its own; ``folder`` keeps its corpus and findings."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz", "--worker", name, "--executions", str(executions)]
    start = time.monotonic()
    with open(folder / "log.txt", "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.run([*command, "--folder", str(folder)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        log.seek(0)
        text = log.read()
    done = re.findall(r"(?:number_of_executed_units: |^#)(\d+)", text, re.MULTILINE)
    edges = re.findall(r"cov: (\d+)", text)
    last = " ".join(text.split("\n")[-12:]) if process.returncode else ""
    return Outcome(int(done[-1]) if done else 0, time.monotonic() - start, int(edges[-1]) if edges else None, last)


def work(name: str, executions: int, folder: Path) -> None:
    """What the process does; it ends here."""
    if available():
        import atheris

        # Whatever imports these modules first decides whether they are watched.
        with atheris.instrument_imports(include=list(MODULES)):
            from . import running, targets
    else:
        atheris = None
        from . import running, targets

    target = targets.TARGETS[name]
    corpus, findings = folder / "corpus", folder / "findings"
    for path in (corpus, findings, folder / "files"):
        path.mkdir(exist_ok=True)
    seeds = [encode(Input(tree, [])) for tree in target.seeds]
    for data in seeds:
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    havoc = (lambda data: atheris.Mutate(data, len(data) + 64)) if atheris else None
    mutator = Mutator(target.seeds, targets.words(target.modules), havoc)
    found: set[str] = set()

    with running.runner(target) as execute:

        def one(data: bytes) -> None:
            given = decode(data)
            finding = execute(given) if given else None
            if finding and finding.kind not in found:
                found.add(finding.kind)
                (findings / hashlib.sha1(finding.kind.encode()).hexdigest()[:16]).write_bytes(data)
                print(f"FOUND {finding.kind}: {finding.detail[:500]}", flush=True)

        def change(data: bytes, max_size: int, seed: int) -> bytes:
            chance = random.Random(seed)
            changed = encode(mutator(decode(data) or Input(chance.choice(target.seeds), []), chance))
            return changed if len(changed) <= max_size else data

        if atheris:
            options = [f"-runs={executions}", f"-max_len={MAX_INPUT_BYTES}", "-len_control=0", "-timeout=60"]
            options += ["-rss_limit_mb=0", "-print_final_stats=1", f"-artifact_prefix={findings}/crash-", str(corpus)]
            atheris.Setup([sys.argv[0], *options], one, custom_mutator=change)
            atheris.Fuzz()
        for i in range(executions):
            data = seeds[i % len(seeds)]
            for round in range(1 + i % 7):
                data = change(data, MAX_INPUT_BYTES, 8 * i + round)
            one(data)
        print(f"#{executions} DONE")
