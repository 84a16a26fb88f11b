"""Formats beside each other: the values that codes stand for, and what each format makes of its bits."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Float32
from matplotlib import ticker
from matplotlib.axes import Axes

from qjax import formats
from qjax.comparison import front
from qjax.formats import Format
from qjax.tensor import dequantize, quantize
from qjax.viz.figure import Figure, canvas, styled
from qjax.viz.tradeoff import colour_and_marker, short

DB_PER_BIT = 20 * math.log10(2)
"""What halving every error adds to the SQNR: 6.02 dB."""

_BPW_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8)


# ── codes ──────────────────────────────────────────────────────────────────────────────────────────────────


def levels(format: str | Format) -> Float32[np.ndarray, " n"]:
    """What 32 evenly spaced weights become, each value once, the largest magnitude being 1.

    These are all values of a block whose codes have up to 4 bits and share a scale in 32s or more.
    """
    format = formats.get(format)
    ramp = np.tile(np.linspace(-1, 1, 32, dtype=np.float32), max(format.block_size // 32, 1))
    values = np.asarray(dequantize(quantize(ramp[None], format)))
    return np.unique(np.round(values / np.abs(values).max(), 3))


@styled
def plot_levels(names: Sequence[str], weights: Float[ArrayLike, "..."]) -> Figure:
    """The values that the codes of each format stand for, on a line from -1 to 1, and how weights lie among them.

    weights: their distribution is drawn above, each divided by the largest magnitude of its 32.
    """
    blocks = np.asarray(weights, np.float32).reshape(-1, 32)
    share, edges = np.histogram(blocks / np.abs(blocks).max(axis=1, keepdims=True), bins=np.linspace(-1, 1, 65))
    lines = {name: levels(name) for name in names}
    figure = canvas(8.6, 1.5 + 0.36 * len(names), left=1.0, right=1.0)
    figure.alt = "the values of " + ", ".join(f"{name} ({len(values)} of them)" for name, values in lines.items())
    ax = figure.add_subplot()
    ax.stairs(-0.6 - 1.2 * share / share.max(), edges, baseline=-0.6, fill=True, color="#BBB7AC")
    for y, (name, values) in enumerate(lines.items()):
        colour, _ = colour_and_marker(formats.get(name).family)
        ax.axhline(y, color="#DDDAD2", linewidth=0.7)
        ax.plot(values, np.full(len(values), y), "|", color=colour, markersize=13, markeredgewidth=2)
        ax.text(1.06, y, f"{len(values)} values", va="center")
    ax.set(xlim=(-1.04, 1.04), ylim=(len(lines) - 0.5, -2), xlabel="weight / largest weight of its block")
    ax.set_yticks(range(-1, len(lines)), ["weights", *lines])
    ax.grid(False)
    return figure


@styled
def plot_grids(names: Sequence[str]) -> Figure:
    """The code books of i-quants: each column is a point, the magnitudes of so many weights at once."""
    figure = canvas(8.6, 1.7 * len(names), left=0.75, top=0.35, bottom=0.5)
    figure.subplots_adjust(hspace=0.9)
    described = []
    for ax, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names):
        grid = formats.get(name).grid  # pyright: ignore[reportAttributeAccessIssue]
        n_points, n = grid.points.shape
        in_order = np.lexsort((*grid.points.T, grid.points.sum(axis=1)))
        ax.imshow(grid.points[in_order].T, "viridis", aspect="auto", interpolation="nearest")
        ax.set_title(f"{name}: {n_points} of the {grid.n_levels}$^{n}$ = {grid.n_levels**n:,} tuples of {n} levels")
        ax.set(xlabel="point", ylabel="weight", yticks=[0, n - 1], yticklabels=["1", f"{n}"])
        ax.grid(False)
        described.append(f"{name}, {n_points} points of {n} weights with {grid.n_levels} levels")
    figure.alt = "code books: " + "; ".join(described)
    return figure


# ── what the bits buy ──────────────────────────────────────────────────────────────────────────────────────


@styled
def plot_rate(sqnr_db: Mapping[Format, float], title: str) -> Figure:
    """SQNR by bits per weight, one point a format, and the bound for Gaussian weights: 6.02 dB for each bit.

    A band joins the formats that nothing beats.
    """
    figure = canvas(8.6, 4.6, right=1.3)
    ax = figure.add_subplot(xlabel="bits per weight", ylabel="SQNR, dB", title=title)
    ends = np.array([0, max(f.bpw for f in sqnr_db) + 0.3])
    ax.plot(ends, DB_PER_BIT * ends, color="#555555", linestyle=":", linewidth=1)
    ax.annotate("bound: 6.02 dB\nper bit", (ends[1], DB_PER_BIT * ends[1]), (4, -4), textcoords="offset points")
    best = _best(sqnr_db)
    ax.plot([f.bpw for f in best], [sqnr_db[f] for f in best], color="#BBB7AC", linewidth=6, alpha=0.5)
    for family in sorted({f.family for f in sqnr_db}):
        colour, marker = colour_and_marker(family)
        members = [f for f in sqnr_db if f.family == family]
        ax.plot([f.bpw for f in members], [sqnr_db[f] for f in members], marker, color=colour, label=family)
    ax.set(xlim=ends, ylim=(0, DB_PER_BIT * ends[1]))
    ax.legend(loc="lower right")
    figure.alt = f"{title}: SQNR by bits per weight; nothing beats " + ", ".join(
        f"{short(f.name)} ({f.bpw:.3g} bpw, {sqnr_db[f]:.0f} dB)" for f in best
    )
    return figure


@styled
def plot_gap(sqnr_db: Mapping[Format, float], title: str, family: str | None = None) -> Figure:
    """How far below 6.02 dB per bit each format stays: the higher a point, the better its bits are used.

    family: only its formats have colours and names; None: all.  Circled is what nothing beats, as in `plot_rate`.
    """
    gaps = {f: DB_PER_BIT * f.bpw - sqnr_db[f] for f in sorted(sqnr_db, key=lambda f: (f.bpw, f.name))}
    shown = [f for f in gaps if family in (None, f.family)]
    figure = canvas(8.6, 4.8)
    ax = figure.add_subplot(xscale="log", xlabel="bits per weight", ylabel="dB below the bound of 6.02 dB per bit")
    for format, gap in gaps.items():
        colour, marker = colour_and_marker(format.family)
        ax.plot(format.bpw, gap, marker, color=colour if format in shown else "#D5D2CA", zorder=2 + (format in shown))
    best = _best(sqnr_db)
    ax.plot(
        [f.bpw for f in best], [gaps[f] for f in best], "o", markersize=13, fillstyle="none", color="#222222", zorder=4
    )
    ax.axhline(0, color="#555555", linestyle=":", linewidth=1)
    ax.set(xlim=(0.95, max(f.bpw for f in gaps) * 1.12), ylim=(max(gaps.values()) + 1.2, min(-0.6, *gaps.values())))
    ax.set_xticks(_BPW_TICKS)
    ax.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    _name_points(ax, gaps, shown)
    nearest = min(shown, key=lambda f: gaps[f])
    ax.set_title(f"{title}: nearest to the bound is {short(nearest.name)}, {gaps[nearest]:.1f} dB below")
    figure.alt = f"{title}, decibels below the bound: " + ", ".join(f"{short(f.name)} {gaps[f]:.1f}" for f in shown)
    return figure


@styled
def plot_gains(before: Mapping[Format, float], after: Mapping[Format, float], label: str) -> Figure:
    """SQNR of formats before and after a change, an arrow a format, by bits per weight.

    label: what ``after`` has that ``before`` has not.
    """
    order = sorted(after, key=lambda f: (f.bpw, after[f]))
    figure = canvas(8.6, 3.4, bottom=0.8)
    gains = [after[f] - before[f] for f in order]
    figure.alt = f"decibels that {label} adds: " + ", ".join(
        f"{short(f.name)} {gain:+.1f}" for f, gain in zip(order, gains)
    )
    ax = figure.add_subplot(ylabel="dB", title=f"What {label} adds to the SQNR")
    colours = [colour_and_marker(f.family)[0] for f in order]
    ax.bar(range(len(order)), gains, color=colours)
    for x, gain in enumerate(gains):
        ax.annotate(f"{gain:.1f}", (x, gain), (0, 3), textcoords="offset points", ha="center")
    ax.set_xticks(range(len(order)), [f"{short(f.name)}\n{f.bpw:.3g}" for f in order])
    ax.set_xlabel("format, bits per weight")
    ax.margins(y=0.15)
    ax.grid(False, axis="x")
    return figure


def _best(sqnr_db: Mapping[Format, float]) -> list[Format]:
    """The formats that nothing beats, by size."""
    known = list(sqnr_db)
    return sorted((known[i] for i in front([(f.bpw, -sqnr_db[f]) for f in known])), key=lambda f: f.bpw)


# ── names of points ────────────────────────────────────────────────────────────────────────────────────────

# Of a letter of the 10-point font, on average, and of a line; all lengths are in points.
_LETTER, _LINE = 6.4, 12.0
_NEAR = 40.0
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))

Box = tuple[float, float, float, float]


def _name_points(ax: Axes, points: Mapping[Format, float], named: Iterable[Format]) -> None:
    """Writes the names of some formats beside their points, where they cover neither a point nor another name.

    points: y of every format in the axes, bits per weight being x.
    """
    to_points = 72 / ax.figure.dpi
    (left, bottom), (right, top) = ax.transAxes.transform([(0, 0), (1, 1)]).tolist()
    frame = left * to_points, bottom * to_points, right * to_points, top * to_points
    at = {f: (ax.transData.transform((f.bpw, y)) * to_points).tolist() for f, y in points.items()}
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in at.values()]

    def neighbours(format: Format) -> int:
        return sum(math.dist(at[format], other) < _NEAR for other in at.values())

    # Where it is crowded first, for the others find a place anywhere.
    for format in sorted(named, key=neighbours, reverse=True):
        text, (x, y) = short(format.name), at[format]
        width = _LETTER * len(text)

        def box(place: Place, x: float = x, y: float = y, width: float = width) -> Box:
            middle, height = x + place.across, y + place.up
            return middle - width / 2, height - _LINE / 2, middle + width / 2, height + _LINE / 2

        places = list(_places(width))
        free = (p for p in places if _inside(box(p), frame) and not any(_overlap(box(p), other) for other in taken))
        place = next(free, places[-1])
        taken.append(box(place))
        line: dict[str, Any] = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 0}
        ax.annotate(
            text, (format.bpw, points[format]), (place.across, place.up), textcoords="offset points", ha="center",
            va="center", color=colour_and_marker(format.family)[0], arrowprops=None if place.beside else line,
        )  # fmt: skip


class Place(NamedTuple):
    """Where the middle of a name lies from its point, and whether that is so near that no line has to join them."""

    across: float
    up: float
    beside: bool


def _places(width: float) -> Iterator[Place]:
    """Around a point, the nearest first."""
    for distance, (dx, dy) in itertools.product((9, 16, 26, 38, 50), _DIRECTIONS):
        across = dx * (distance / (1 + abs(dy)) + width / 2)
        yield Place(across, dy * distance, beside=distance == 9 and dx * dy == 0)


def _inside(box: Box, frame: Box) -> bool:
    return frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
