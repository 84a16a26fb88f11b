"""What a format costs against what it saves: the plots of a Comparison."""

import math
import textwrap
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes

from qjax.comparison import Comparison, Row
from qjax.viz.figure import Figure, canvas, styled
from qjax.viz.names import Point, name_points

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
# A perplexity of more times that of the base is not drawn to scale: what differs lies far below.
_MOST_PPL = 1.5
_LEAST_KLD = 1e-6
_MEASURES = {"ppl": "perplexity ± standard error", "kld": "KLD ± standard error, nats per token"}


@styled
def plot_tradeoff(comparison: Comparison, measure: str = "ppl") -> Figure:
    """Each format as a point: its bits per weight against its ``measure``, "ppl" or "kld".

    A family has a colour, a marker and a line.  With "ppl" the perplexity of the base model and the lowest
    possible one, where it is known, are levels, and a format far above has its value beside its name; with "kld" a
    format that equals the base, but for rounding, is left out.
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
        # A logarithmic scale has no place for zero, and little to say where only rounding differs.
        rows = [row for row in rows if row.kld > _LEAST_KLD]
    ax.set(xscale="log", yscale="log", xlabel="bits per weight, whole model", ylabel=_MEASURES[measure])
    top = _MOST_PPL * base.ppl if measure == "ppl" else math.inf
    points = [_point(row, measure, top) for row in rows]
    for family, members in groupby(sorted(zip(rows, points), key=lambda pair: (pair[0].family, pair[1].x)), _family):
        _draw_family(ax, family, [point for _, point in members])
    ax.margins(y=0.12)
    ax.set_xlim(min((row.bpw for row in rows), default=2) * 0.75, 20)
    if measure == "ppl":
        _level(ax, base.ppl, f"not quantized: {base.ppl:.3f}", 4)
        if comparison.floor:
            _level(ax, comparison.floor, f"lowest possible: {comparison.floor:.3f}", -13)
        ax.yaxis.set_major_locator(ticker.MaxNLocator(7))
    ax.set_xticks([x for x in (1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16) if x > ax.get_xlim()[0]])
    ax.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    # Powers of ten, written as such, and minor ticks would each take half of the time to draw.
    ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    if points:
        ax.legend(loc="upper right")
    # The heights on the page depend on it.
    ax.autoscale_view()
    name_points(ax, points)


def _family(pair: tuple[Row, Point]) -> str:
    return pair[0].family


def _point(row: Row, measure: str, top: float) -> Point:
    """A format that lies above ``top`` stands there, and its name says by how much."""
    colour, y, error = colour_and_marker(row.family)[0], getattr(row, measure), getattr(row, f"{measure}_stderr")
    if y > top:
        return Point(f"{short(row.format)} ↑ {y:,.{0 if y >= 100 else 1}f}", row.bpw, top, colour)
    return Point(short(row.format), row.bpw, y, colour, max(y - error, y / 10), y + error)


def _draw_family(ax: Axes, family: str, points: list[Point]) -> None:
    colour, marker = colour_and_marker(family)
    style: dict[str, Any] = {"color": colour, "marker": marker}
    drawn = [(p.x, p.y, p.y - p.low, p.high - p.y) for p in points if p.low is not None and p.high is not None]
    x, y, below, above = zip(*drawn) if drawn else ((), (), (), ())
    ax.errorbar(x, y, yerr=(below, above), linewidth=0.8, capsize=2, label=family, **style)
    far = [p for p in points if p.low is None]
    ax.plot([p.x for p in far], [p.y for p in far], linestyle="none", **style)


def _level(ax: Axes, y: float, label: str, above: float) -> None:
    ax.axhline(y, color="#555555", linewidth=1, linestyle=":")
    ax.annotate(label, (0.01, y), (0, above), xycoords=("axes fraction", "data"), textcoords="offset points")


def colour_and_marker(family: str) -> tuple[str, str]:
    """How the formats of a family are drawn, in every plot."""
    return _FAMILIES.get(family, ("#777777", "o"))


def short(format: str) -> str:
    """``Affine(4 bits, block 32, symmetric)`` is "4 bits" beside its family's name; other names are short."""
    return format.partition("(")[2].partition(",")[0] or format
