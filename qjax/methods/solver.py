"""Which matrix gets which format: the mixture that loses least among those that fit into so many bytes.

    costs (sensitivity.py) ─► knapsack (knapsack.py) ─► mixture ─► its own costs ─► knapsack ─► ... ─► recipe

Costs of single matrices are added up, but the errors of one matrix make those of another better or worse, by chance.
So costs are then looked at anew from the mixture found, and the knapsack is solved again, with a price on each change:
many changes at once would bring as many new chances.  A mixture is taken only if it is measured to be better, by more
than twice the standard error of the difference, for near the best much is chance; otherwise the price is raised.

Bits were given to the parts of a signal by what they cost before (Huang and Schultheiss 1963); the same problem with
layers of a network and levels of compression is solved by dynamic programming in Frantar and Alistarh 2022 (*Optimal
Brain Compression*), with formats and Hessian traces by integer programming in HAWQ-V3 (Yao et al. 2021).
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.io import gguf
from qjax.io.atomic import atomic_write
from qjax.methods import knapsack, recipes
from qjax.methods.knapsack import Option, Packing
from qjax.methods.plan import Plan
from qjax.methods.recipes import Recipe
from qjax.methods.sensitivity import WAYS, Costs, Mixture, Trial
from qjax.metrics._record import mean_and_stderr
from qjax.table import Table

TRIES = 8
"""How many mixtures are measured to improve the first."""

# The price of a change, as a part of the mixture's KLD, at first, and by what it grows after each failure.
_PRICE, _DEARER = 1 / 16, 2.0

_REACH = 2
"""How many sizes of format up or down a matrix may go at a time when a mixture is improved."""


@dataclass(frozen=True, repr=False, eq=False)
class Solution:
    """A mixture, what it costs, and what else there was.

    mixture: the format of each matrix.  size_bytes: of the matrices, and of those within ``budget``.
    expected: KLD in nats per token if the costs of matrices add up.  bound: less is not possible then.
    kld: what was measured, on the calibration text.
    costs: from the float model.  shapes: of the matrices.  improved: how often another mixture was better.
    """

    mixture: Mixture
    budget: int
    size_bytes: int
    expected: float
    bound: float
    kld: float
    improved: int
    costs: Costs
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def bpw(self) -> float:
        """Bits per weight of the matrices."""
        return 8 * self.size_bytes / sum(map(math.prod, self.shapes.values()))

    @property
    def front(self) -> tuple[Packing, ...]:
        """The Pareto front of sizes and expected costs, from the smallest mixture to the best; see `knapsack.front`."""
        return tuple(knapsack.front(list(_options(self.costs, self.shapes).values())))

    def recipe(self) -> Recipe:
        """Names each matrix; called after what most weights are in, which is the file type as well."""
        return recipe_of(self.mixture, self.shapes)

    def to_json(self) -> dict[str, Any]:
        """For the command line and `write`."""
        numbers = {key: getattr(self, key) for key in ("budget", "size_bytes", "bpw", "expected", "bound", "kld")}
        front = [{"size_bytes": made.size, "expected": made.cost} for made in self.front]
        how = {"sensitivity": self.costs.how, "n_tokens": self.costs.n_tokens, "improved": self.improved}
        return numbers | how | {"formats": {n: f.name for n, f in self.mixture.items()}, "front": front}

    def write(self, path: str | os.PathLike[str]) -> None:
        """The mixture as a file: .json with all that is known, else the text of `tensor_type_file`."""
        path = Path(path)
        text = json.dumps(self.to_json(), indent=1) + "\n" if path.suffix == ".json" else tensor_type_file(self.mixture)
        with atomic_write(path) as file:
            file.write(text.encode())

    def table(self, rows: int = 16) -> Table:
        """So many points of the front, evenly spread over its sizes."""
        made = self.front
        n_weights = sum(map(math.prod, self.shapes.values()))
        at = np.linspace(made[0].size, made[-1].size, rows)
        picked = dict.fromkeys(int(np.argmin([abs(m.size - size) for m in made])) for size in at)
        cells = [(f"{8 * made[i].size / n_weights:.3f}", f"{made[i].size:,}", f"{made[i].cost:.3g}") for i in picked]
        return Table({"bpw": ">", "bytes": ">", "expected KLD": ">"}, cells)

    def __str__(self) -> str:
        formats_used = Counter(format.name for format in self.mixture.values())
        used = ", ".join(f"{n} {name}" for name, n in formats_used.most_common())
        return (
            f"{self.table()}\n{used}: {self.bpw:.3f} bpw in {self.size_bytes:,} of {self.budget:,} bytes, "
            f"KLD {self.kld:.3g} on {self.costs.n_tokens:,} calibration tokens, {self.costs.how} {self.expected:.3g}"
        )


def solve(
    trial: Trial,
    matrices: Sequence[str],
    budget: int,
    *,
    candidates: Sequence[str | Format] | None = None,
    sensitivity: str = "estimated",
    tries: int = TRIES,
) -> Solution:
    """The mixture of least KLD whose matrices take at most ``budget`` bytes in a file.

    matrices: the names of the tensors to choose for, see `plan.matrices`; `budget_of` says what is left for them.
    candidates: formats, of which each matrix takes those that fit it; default `Trial.candidates`.
    sensitivity: "measured", with one run of the model for each format of each matrix, or "estimated".
    tries: how many other mixtures are measured, near the one found, to improve it.

    Raises QjaxError for a budget that the smallest formats exceed, for a matrix without candidates or with a cost that
    is not finite, naming it, and for an unknown sensitivity.
    """
    if sensitivity not in WAYS:
        raise QjaxError(f"sensitivity is {sensitivity!r}, expected {' or '.join(WAYS)}")
    allowed = {name: _allowed(trial, name, candidates) for name in matrices}
    shapes = {name: tuple(trial.floats[name].shape) for name in matrices}
    smallest = sum(min(padded(format, shapes[name]) for format in of) for name, of in allowed.items())
    if smallest > budget:
        raise QjaxError(
            f"the target leaves {budget:,} bytes for the matrices ({_bpw(budget, shapes):.3f} bits per weight), but in "
            f"their smallest formats they take {smallest:,} ({_bpw(smallest, shapes):.3f}). Give a larger target, or "
            "smaller formats (--formats)."
        )
    costs = WAYS[sensitivity](trial, allowed)
    mixture, packed = _packed(costs, shapes, budget)
    mixture, kld, improved = _improved(trial, costs, shapes, budget, mixture, tries)
    size = sum(padded(format, shapes[name]) for name, format in mixture.items())
    return Solution(mixture, budget, size, costs.of(mixture), packed.bound, kld, improved, costs, shapes)


def _improved(
    trial: Trial, costs: Costs, shapes: Mapping[str, tuple[int, ...]], budget: int, mixture: Mixture, tries: int
) -> tuple[Mixture, float, int]:
    """A mixture at least as good, its KLD, and how many steps led there."""
    klds, steps, price, around = trial.klds(mixture), 0, _PRICE * trial.kld(mixture), None
    for _ in range(tries):
        if around is None:
            near = {name: _near(costs, shapes, name, format) for name, format in mixture.items()}
            around = WAYS["estimated"](trial, near, mixture)
        changed = {
            name: {format: cost + price * (format != mixture[name]) for format, cost in of.items()}
            for name, of in around.kld.items()
        }
        other, _ = _packed(replace(around, kld=changed), shapes, budget)
        if other == mixture:
            break
        found = trial.klds(other)
        gain, error = mean_and_stderr(klds - found)
        if gain > 2 * error:
            mixture, klds, steps, around = other, found, steps + 1, None
        else:
            price *= _DEARER
    return mixture, float(klds.mean(dtype=np.float64)), steps


def padded(format: Format, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in a GGUF file."""
    return -(-format.nbytes(shape) // gguf.DEFAULT_ALIGNMENT) * gguf.DEFAULT_ALIGNMENT


def _allowed(trial: Trial, name: str, wanted: Sequence[str | Format] | None) -> tuple[Format, ...]:
    fitting = trial.candidates(name)
    if wanted is None:
        return fitting
    chosen = tuple(format for format in fitting if format in {formats.get(f) for f in wanted})
    if not chosen:
        raise QjaxError(
            f"{name}: none of the formats given fits its shape {trial.floats[name].shape}, what is known of its "
            f"importance and the method, expected one of {', '.join(format.name for format in fitting)}. Add one "
            "(--formats)."
        )
    return chosen


def _options(costs: Costs, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Option]]:
    return {
        name: [Option(padded(format, shapes[name]), cost) for format, cost in of.items()]
        for name, of in costs.kld.items()
    }


def _packed(costs: Costs, shapes: Mapping[str, tuple[int, ...]], budget: int) -> tuple[dict[str, Format], Packing]:
    packed = knapsack.solve(list(_options(costs, shapes).values()), budget)
    assert packed is not None  # for the smallest formats fit
    return {name: list(of)[i] for (name, of), i in zip(costs.kld.items(), packed.chosen)}, packed


def _near(costs: Costs, shapes: Mapping[str, tuple[int, ...]], name: str, format: Format) -> list[Format]:
    """The formats of a matrix that none beats, and which are within reach of ``format``, which is one."""
    of = list(costs.kld[name])
    kept = [of[i] for i in knapsack.undominated(_options(costs, shapes)[name])]
    at = kept.index(format)
    return kept[max(0, at - _REACH) : at + _REACH + 1]


def _bpw(n_bytes: int, shapes: Mapping[str, tuple[int, ...]]) -> float:
    return 8 * n_bytes / sum(map(math.prod, shapes.values()))


# ── budgets and files ────────────────────────────────────────────────────────────────────────────────


def budget_of(
    plan: Plan, matrices: Sequence[str], *, bpw: float | None = None, file_bytes: int | None = None, header: int = 0
) -> int:
    """The bytes that a target leaves for ``matrices``.

    plan: of the model, whatever it gives the matrices; the other tensors take what it says.
    bpw: bits per weight over all tensors, or file_bytes: of the whole file, of which ``header`` are no tensors.
    Raises QjaxError for neither or both, and for a target that is no smaller than the model.
    """
    if (bpw is None) == (file_bytes is None):
        raise QjaxError("expected one target, bits per weight or bytes of a file (--target-bpw, --target-size)")
    if bpw is not None and not 0 < bpw < math.inf:
        raise QjaxError(f"target of {bpw} bits per weight, expected a positive number")
    others = sum(padded(step.format, step.shape) for step in plan.steps if step.name not in matrices)
    total = int(bpw * plan.n_weights / 8) if bpw is not None else (file_bytes or 0) - header
    if total >= plan.source_bytes:
        raise QjaxError(
            f"the target is {total:,} bytes for all tensors ({8 * total / plan.n_weights:.3f} bits per weight), but "
            f"they have {plan.source_bytes:,} ({plan.source_bpw:.3f}) as they are. Give a smaller target, or COPY."
        )
    return total - others


def exactly(mixture: Mixture) -> dict[str, Format]:
    """Formats by regular expressions, each of which matches one name."""
    return {f"^{re.escape(name)}$": format for name, format in mixture.items()}


def recipe_of(mixture: Mixture, shapes: Mapping[str, tuple[int, ...]]) -> Recipe:
    """What gives each matrix its format, called after what most weights are in."""
    weights: Counter[Format] = Counter()
    for name, format in mixture.items():
        weights[format] += math.prod(shapes[name]) * (format.block_size > 1)
    size_bytes = sum(padded(format, shapes[name]) for name, format in mixture.items())
    most = recipes.recipe(weights.most_common(1)[0][0])
    return replace(
        most, name=f"mixture-{_bpw(size_bytes, shapes):.2f}bpw", tensor_types=tuple(exactly(mixture).items())
    )


def longest_recipe(shapes: Mapping[str, tuple[int, ...]]) -> Recipe:
    """One of formats with names as long as any, so that no mixture's takes more room in metadata."""
    known = [
        format for format in map(formats.get, formats.names()) if format.ggml_id is not None and format.for_weights
    ]
    return recipe_of(dict.fromkeys(shapes, max(known, key=lambda format: len(format.name))), shapes)


def tensor_type_file(mixture: Mixture) -> str:
    """What --tensor-type-file of llama-quantize and of qjax quantize reads: REGEX=TYPE, a line for each matrix.

    It also names the head, and the embedding, which llama-quantize otherwise takes from other options.  The file type
    to give with it may be any quantized one.  Raises QjaxError for names and formats that cannot stand there.
    """
    for name, format in mixture.items():
        if re.search(r"[=\s]", name) or format.ggml_id is None:
            raise QjaxError(f"{name!r} in {format.name}: cannot be said in REGEX=TYPE; write the recipe as .json")
    return "".join(f"{pattern}={format.name}\n" for pattern, format in exactly(mixture).items())
