"""Formats beside each other: the values that codes stand for, and what each format makes of its bits."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Float32
from matplotlib import ticker

from qjax import formats
from qjax.comparison import front
from qjax.formats import Format
from qjax.tensor import dequantize, quantize
from qjax.viz.figure import Figure, canvas, styled
from qjax.viz.names import Point, name_points
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
    colours = {f: colour_and_marker(f.family)[0] for f in gaps}
    name_points(ax, [Point(short(f.name) if f in shown else None, f.bpw, gap, colours[f]) for f, gap in gaps.items()])
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
