"""The multiple-choice knapsack: one option of each group, the least cost that a budget of bytes allows.

The relaxed problem, in which options may be mixed, is solved by steps along the convex hull of each group, the best
saving per byte first (Sinha and Zoltners 1979, *The multiple-choice knapsack problem*); in theory of bit allocation the
same rule says that slopes are equal everywhere.  Its optimum bounds what any choice can reach.  Between that bound and
the best choice known, dynamic programming keeps every partial choice that could still win, so that the result is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

MAX_STATES = 2**20
"""Partial choices kept at a time.  Beyond it the least promising go; `Packing.bound` says what that may cost."""


class Option(NamedTuple):
    """A size in bytes and a cost."""

    size: int
    cost: float


@dataclass(frozen=True)
class Packing:
    """One option of each group.

    chosen: its number in each group.  size, cost: of all together.  bound: no choice within the budget costs less.
    """

    chosen: tuple[int, ...]
    size: int
    cost: float
    bound: float


def undominated(options: Sequence[Option]) -> list[int]:
    """The numbers of the options that no other beats in size and cost, by size; of equal ones the first."""
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: options[i]):
        if not kept or options[i].cost < options[kept[-1]].cost:
            kept.append(i)
    return kept


def hull(options: Sequence[Option]) -> list[int]:
    """Those of them on the lower convex hull: each further byte saves less than the one before."""
    kept: list[int] = []
    for i in undominated(options):
        while len(kept) > 1 and _saving(options[kept[-2]], options[kept[-1]]) <= _saving(options[kept[-2]], options[i]):
            kept.pop()
        kept.append(i)
    return kept


def _saving(a: Option, b: Option) -> float:
    """Cost saved per byte."""
    return (a.cost - b.cost) / (b.size - a.size)


class _Step(NamedTuple):
    """An upgrade of one group along its hull."""

    saving: float
    group: int
    option: int
    size: int
    cost: float
    """both of the upgrade: bytes more, cost less"""


def _steps(groups: Sequence[Sequence[Option]]) -> list[_Step]:
    """All upgrades, the best saving per byte first; those of a group in order, for its savings fall."""
    found = []
    for g, options in enumerate(groups):
        on_hull = hull(options)
        for a, b in pairwise(on_hull):
            size, cost = options[b].size - options[a].size, options[a].cost - options[b].cost
            found.append(_Step(cost / size, g, b, size, cost))
    return sorted(found, key=lambda step: -step.saving)


def front(groups: Sequence[Sequence[Option]]) -> list[Packing]:
    """Choices from the smallest to the best, none of which another of its size beats: those that the relaxed problem
    reaches without mixing."""
    chosen = [hull(options)[0] for options in groups]
    size, cost = _totals(groups, chosen)
    made = [Packing(tuple(chosen), size, cost, cost)]
    for step in _steps(groups):
        chosen[step.group] = step.option
        size, cost = size + step.size, cost - step.cost
        made.append(Packing(tuple(chosen), size, cost, cost))
    return made


def solve(groups: Sequence[Sequence[Option]], budget: int) -> Packing | None:
    """The choice of least cost whose size is at most ``budget``; None if there is none.

    groups: of options with sizes of at least 0 and finite costs.
    """
    kept = [undominated(options) for options in groups]
    sizes = [np.array([groups[g][i].size for i in of], np.int64) for g, of in enumerate(kept)]
    costs = [np.array([groups[g][i].cost for i in of], np.float64) for g, of in enumerate(kept)]
    chosen = [hull(options)[0] for options in groups]
    size, _ = _totals(groups, chosen)
    if size > budget:
        return None
    price, size, relaxed = 0.0, size, None
    for step in _steps(groups):
        if size + step.size <= budget:
            # Also after the first that does not fit: a choice to beat.
            if chosen[step.group] == _before(groups[step.group], step.option):
                chosen[step.group], size = step.option, size + step.size
        elif relaxed is None:
            price = step.saving
            relaxed = _totals(groups, chosen)[1] - price * (budget - size)
    size, cost = _totals(groups, chosen)
    bound = cost if relaxed is None else relaxed
    best = Packing(tuple(chosen), size, cost, bound)
    if relaxed is None:
        return best
    found = _search(sizes, costs, budget, price, cost)
    if found is None:
        return best
    chosen = [kept[g][i] for g, i in enumerate(found)]
    return Packing(tuple(chosen), *_totals(groups, chosen), bound)


def _before(options: Sequence[Option], option: int) -> int:
    """The one before ``option`` on the hull."""
    on_hull = hull(options)
    return on_hull[on_hull.index(option) - 1]


def _totals(groups: Sequence[Sequence[Option]], chosen: Sequence[int]) -> tuple[int, float]:
    picked = [options[i] for options, i in zip(groups, chosen)]
    return sum(option.size for option in picked), float(sum(option.cost for option in picked))


def _search(
    sizes: list[Int64[np.ndarray, " _"]],
    costs: list[Float64[np.ndarray, " _"]],
    budget: int,
    price: float,
    to_beat: float,
) -> list[int] | None:
    """Group by group, all partial choices that could end below ``to_beat``; None if none does.

    price: cost of a byte (the Lagrange multiplier).  What is left of the budget is worth no more than that, so each
    partial choice has a lower bound: its cost, plus the least of cost + price × size that later groups can add, minus
    the budget at its price.
    """
    least = np.array([(c + price * s).min() for s, c in zip(sizes, costs)])
    smallest = np.array([s.min() for s in sizes])
    later_least = np.append(np.cumsum(least[::-1])[::-1], 0.0)
    later_smallest = np.append(np.cumsum(smallest[::-1])[::-1], 0)
    total_size, total_cost = np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for g, (s, c) in enumerate(zip(sizes, costs)):
        size = (total_size[:, None] + s).reshape(-1)
        cost = (total_cost[:, None] + c).reshape(-1)
        bound = cost + price * (size - budget) + later_least[g + 1]
        alive = np.flatnonzero((size + later_smallest[g + 1] <= budget) & (bound < to_beat))
        # By size, and of equal sizes by cost; what is neither smaller nor cheaper than one before is beaten.
        alive = alive[np.lexsort((cost[alive], size[alive]))]
        lowest = np.minimum.accumulate(cost[alive])
        alive = alive[np.append(True, lowest[1:] < lowest[:-1])[: alive.size]]
        if alive.size > MAX_STATES:
            alive = np.sort(alive[np.argpartition(bound[alive], MAX_STATES)[:MAX_STATES]])
        if not alive.size:
            return None
        history.append((alive // s.size, alive % s.size))
        total_size, total_cost = size[alive], cost[alive]
    at = int(np.argmin(total_cost))
    if total_cost[at] >= to_beat:
        return None
    chosen = []
    for parents, options in reversed(history):
        chosen.append(int(options[at]))
        at = int(parents[at])
    return chosen[::-1]
