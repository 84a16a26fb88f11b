"""Writes the figures under benchmarks/results into benchmarks/README.md:

python benchmarks/table.py
"""

import json
from types import ModuleType

import activations
import decode
import faults
import load
import matmul
import memory
import methods
import perplexity
import quantize
import sliders
from side_by_side import RESULTS, ROOT, table

from qjax.machine import Limits

README = ROOT / "benchmarks" / "README.md"
SCRIPTS = (perplexity, decode, load, matmul, activations, methods, quantize, sliders, memory, faults)


def section(script: ModuleType) -> str:
    """What a script measured, and where."""
    path = RESULTS / f"{script.__name__}.json"
    if not path.exists():
        return "*Not measured yet.*"
    found = json.loads(path.read_text(encoding="utf-8"))
    where = f"{found['device']}, {found['cores']} cores, JAX {found['jax']}, {found['date']}"
    if "turns" in found:
        where += ", a single turn" if found["turns"] == 1 else f", medians of {found['turns']} turns"
    where += f". Measured limits: {Limits(**found['limits'])}." if "limits" in found else "."
    said = [where, table(found["rows"], script.COLUMNS).markdown(), found.get("conclusion")]
    return "\n\n".join(filter(None, said))


def update(text: str) -> str:
    """The page with its tables made anew."""
    for script in SCRIPTS:
        begin, end = f"<!-- {script.__name__}: written by benchmarks/table.py -->", f"<!-- /{script.__name__} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{section(script)}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    README.write_text(update(README.read_text(encoding="utf-8")), encoding="utf-8")
