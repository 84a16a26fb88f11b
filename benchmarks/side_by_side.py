"""What the benchmarks share: taking turns with llama.cpp, the table and the JSON."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from qjax.errors import QjaxError
from qjax.io.atomic import atomic_write
from qjax.machine import Limits, cpu_info, gpu_info, limits, memory_status, n_threads
from qjax.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QJAX = (sys.executable, "-m", "qjax")

Row = dict[str, Any]
Columns = Mapping[str, tuple[str, str]]
"""key of a row -> heading, how format() writes it"""


def parser(
    description: str | None, what: str = "MODEL", about_it: str = "GGUF files, as benchmarks/models.py makes"
) -> argparse.ArgumentParser:
    """With what all have in common."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("models", nargs="+", type=Path, metavar=what, help=about_it)
    made.add_argument("--turns", type=int, default=3, help="runs of each side, one after the other; medians count")
    made.add_argument("--json", type=Path, help="write the rows there, with the device's name")
    return made


# ── turns ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Run:
    """A program that ran to its end.  anonymous: the most bytes of memory with no file behind them, as far as seen;
    resident: the most of all, pages of mapped files among them."""

    wall_s: float
    output: str
    log: str
    anonymous: int
    resident: int


def run(command: Sequence[str | os.PathLike[str]]) -> Run:
    """Runs a program, watching its memory.  Raises QjaxError with its last words if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [os.fspath(part) for part in command], stdin=subprocess.DEVNULL, stdout=output, stderr=log, env=environment
        )
        anonymous = resident = 0
        while process.poll() is None:
            status = memory_status(process.pid)
            anonymous, resident = max(anonymous, status.get("RssAnon", 0)), max(resident, status.get("VmHWM", 0))
            time.sleep(0.01)
        wall_s = time.perf_counter() - start
        for file in (output, log):
            file.seek(0)
        made = Run(wall_s, output.read(), log.read(), anonymous, resident)
    if process.returncode:
        last_words = (made.log or made.output)[-500:]
        raise QjaxError(f"{Path(command[0]).name} ended with {process.returncode}: {last_words}")
    return made


def turns(n: int, *sides: Callable[[], Any]) -> list[list[Any]]:
    """What each of ``sides`` returns in ``n`` runs that alternate, after one that is not counted: it fills the caches
    of files and of compiled programs."""
    found: list[list[Any]] = [[] for _ in sides]
    for turn in range(n + 1):
        for values, side in zip(found, sides):
            value = side()
            values += [value] * (turn > 0)
    return found


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def llama_cpp(program: str) -> Path:
    """A program of llama.cpp.  Raises QjaxError if there is none."""
    path = Path(os.environ.get("QJAX_LLAMA_CPP", "")) / program
    if "QJAX_LLAMA_CPP" not in os.environ or not path.exists():
        raise QjaxError(f"{program}: not found; QJAX_LLAMA_CPP has to name the folder with llama.cpp's programs")
    return path


# ── the table and the JSON ───────────────────────────────────────────────────────────────────────────


def table(rows: Sequence[Row], columns: Columns) -> Table:
    cells = [
        ["–" if row.get(key) is None else format(row[key], how) for key, (_, how) in columns.items()] for row in rows
    ]
    return Table({heading: "<" if not how else ">" for heading, how in columns.values()}, cells)


def about() -> dict[str, Any]:
    """The machine."""
    return {
        "device": gpu_info() or cpu_info(),
        "cores": n_threads(),
        "machine": platform.machine(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def write(path: Path | None, rows: Sequence[Row], **more: Any) -> None:
    """``rows`` with the machine and ``more``, if there is a place for them."""
    if path:
        with atomic_write(path) as file:
            file.write((json.dumps(about() | more | {"rows": rows}, indent=1) + "\n").encode())


def measure(
    arguments: argparse.Namespace,
    columns: Columns,
    row: Callable[[Path, Limits], Row],
    conclude: Callable[[Sequence[Row]], str] | None = None,
) -> int:
    """Limits of the machine, a row for each model, what three rows or more say together: all printed and written.

    Returns the exit code.
    """
    try:
        found = limits()
        print(found, flush=True)
        rows: list[Row] = []
        for path in arguments.models:
            rows.append(row(path, found))
            # So far, for who does not want to wait.
            print(f"\n{table(rows, columns)}", flush=True)
    except QjaxError as error:
        print(error, file=sys.stderr)
        return 2
    conclusion = conclude(rows) if conclude and len(rows) > 2 else ""
    print(conclusion)
    write(arguments.json, rows, limits=found._asdict(), turns=arguments.turns, conclusion=conclusion)
    return 0
