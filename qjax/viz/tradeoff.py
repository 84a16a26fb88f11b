"""What a format costs against what it saves: the plots of a Comparison."""

import textwrap
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes

from qjax.comparison import Comparison, Row
from qjax.viz.figure import Figure, canvas, styled

_FAMILIES = {
    "plain": ("#000000", "o"),
    "legacy": ("#0072B2", "s"),
    "affine": ("#A86B00", "^"),
    "kquants": ("#D55E00", "D"),
    "iquants": ("#007A59", "v"),
    "ternary": ("#B0578D", "P"),
    "microscaling": ("#2A8FC4", "X"),
    "nf4": ("#777777", "*"),
}
_MEASURES = {"ppl": "perplexity ± standard error", "kld": "KLD ± standard error, nats per token"}


@styled
def plot_tradeoff(comparison: Comparison, measure: str = "ppl") -> Figure:
    """Each format as a point: its bits per weight against its ``measure``, "ppl" or "kld".

    A family has a colour, a marker and a line.  With "ppl" the perplexity of the base model and the lowest
    possible one, where it is known, are levels; with "kld" a format that equals the base exactly is left out.
    """
    figure = canvas(8.6, 4.6, left=0.85)
    figure.alt = f"{_MEASURES[measure]}, by bits per weight: " + ", ".join(
        f"{row.format} at {row.bpw:.2f}" for row in comparison.rows[1:]
    )
    ax = figure.add_subplot()
    _draw(ax, comparison, measure)
    ax.set_title(f"{comparison.settings['model']} on {comparison.settings['text']}")
    return figure


@styled
def plot_budget(comparison: Comparison, budget: float, samples: Mapping[str, str], prompt: str = "") -> Figure:
    """The format closest to the base that a number of bits per weight affords, and how it writes.

    samples: by format, a text that continues ``prompt``.
    """
    figure = canvas(8.6, 5.2, left=0.85, bottom=1.75)
    ax = figure.add_subplot()
    _draw(ax, comparison, "kld")
    ax.axvspan(budget, ax.get_xlim()[1], color="#888888", alpha=0.15, linewidth=0)
    affordable = [row for row in comparison.rows[1:] if row.bpw <= budget]
    if affordable:
        best = min(affordable, key=lambda row: row.kld)
        verdict = f"{budget:g} bits per weight buy {best.format}: KLD {best.kld:.2g}, PPL {best.ppl:.2f}"
        text = textwrap.fill(prompt + samples[best.format], 100, max_lines=5)
        ax.plot(best.bpw, best.kld, "o", markersize=18, fillstyle="none", color="#222222")
    else:
        verdict, text = f"{budget:g} bits per weight buy none of these formats", ""
    ax.set_title(verdict)
    figure.text(0.05, 0.23, text, va="top", linespacing=1.4)
    figure.alt = f"{verdict}. {text}".strip()
    return figure


def _draw(ax: Axes, comparison: Comparison, measure: str) -> None:
    base, *rows = comparison.rows
    if measure == "kld":
        # A logarithmic scale has no place for zero.
        rows = [row for row in rows if row.kld > 0]
    ax.set(xscale="log", yscale="log", xlabel="bits per weight, whole model", ylabel=_MEASURES[measure])
    rows = sorted(rows, key=lambda row: (row.family, row.bpw))
    for i, (family, members) in enumerate(groupby(rows, key=lambda row: row.family)):
        _draw_family(ax, family, list(members), measure, below=i % 2 == 1)
    if measure == "ppl":
        _level(ax, base.ppl, f"not quantized: {base.ppl:.3f}", 4)
        if comparison.floor:
            _level(ax, comparison.floor, f"lowest possible: {comparison.floor:.3f}", -13)
        ax.yaxis.set_major_locator(ticker.MaxNLocator(7))
        ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.margins(y=0.2)
    ax.set_xlim(min((row.bpw for row in rows), default=2) * 0.75, 20)
    ax.set_xticks([x for x in (2, 3, 4, 5, 6, 8, 12, 16) if x > ax.get_xlim()[0]])
    ax.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    # Minor ticks take half of the time to draw.
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.yaxis.set_minor_locator(ticker.NullLocator())


def _draw_family(ax: Axes, family: str, rows: list[Row], measure: str, below: bool) -> None:
    colour, marker = colour_and_marker(family)
    x, y = [row.bpw for row in rows], [getattr(row, measure) for row in rows]
    error = [getattr(row, f"{measure}_stderr") for row in rows]
    ax.errorbar(x, y, yerr=error, color=colour, marker=marker, linewidth=1)
    style: dict[str, Any] = {"color": colour, "textcoords": "offset points", "rotation_mode": "anchor"}
    ax.annotate(family, (x[0], y[0]), (-12, -4), ha="right", weight="bold", **style)
    for i, point in enumerate(zip(x, y)):
        # Slanted, and families by turns above and below: formats of one size stand close together.
        under = below != (i > 0 and x[i] == x[i - 1])
        # Beside the bars of errors where these are long.
        beside = 9 if measure == "ppl" else 3
        offset, ha, va = ((-beside, -7), "right", "top") if under else ((beside, 7), "left", "bottom")
        ax.annotate(short(rows[i].format), point, offset, ha=ha, va=va, rotation=40, **style)


def _level(ax: Axes, y: float, label: str, above: float) -> None:
    ax.axhline(y, color="#555555", linewidth=1, linestyle=":")
    ax.annotate(label, (0.01, y), (0, above), xycoords=("axes fraction", "data"), textcoords="offset points")


def colour_and_marker(family: str) -> tuple[str, str]:
    """How the formats of a family are drawn, in every plot."""
    return _FAMILIES.get(family, ("#777777", "o"))


def short(format: str) -> str:
    """``Affine(4 bits, block 32, symmetric)`` is "4 bits" beside its family's name; other names are short."""
    return format.partition("(")[2].partition(",")[0] or format
