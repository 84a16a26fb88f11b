"""What a format costs against what it saves: the plots of a Comparison."""

import textwrap
from collections.abc import Mapping
from itertools import groupby

from matplotlib import ticker
from matplotlib.axes import Axes

from qjax.compare import Comparison, Row
from qjax.viz.figure import Figure, canvas, styled

# Colour and marker of a family of formats, the same in every plot.
_FAMILIES = {
    "plain": ("#000000", "o"),
    "legacy": ("#0072B2", "s"),
    "affine": ("#B37A00", "^"),
    "kquants": ("#D55E00", "D"),
    "iquants": ("#009E73", "v"),
    "ternary": ("#CC79A7", "P"),
    "microscaling": ("#2A8FC4", "X"),
    "nf4": ("#777777", "*"),
}
_MEASURES = {
    "ppl": "perplexity (± standard error)",
    "kld": "KL divergence, nats per token (± standard error)",
}


@styled
def plot_tradeoff(comparison: Comparison, measure: str = "ppl") -> Figure:
    """Each format as a point, its bits per weight against its ``measure``: "ppl" or "kld".

    A family has a colour, a marker and a line.  With "ppl" the base model's and, where it is known, the lowest
    reachable perplexity are lines; with "kld" formats that differ from the base by nothing measurable are left out.
    """
    figure = canvas(8.6, 4.6, left=0.85)
    figure.alt = f"{_MEASURES[measure]} by bits per weight: " + ", ".join(
        f"{row.format} at {row.bpw:.2f}" for row in comparison.rows[1:]
    )
    ax = figure.add_subplot()
    _draw(ax, comparison, measure)
    ax.set_title(f"{comparison.settings['model']} on {comparison.settings['text']}")
    return figure


@styled
def plot_budget(
    comparison: Comparison, budget: float, samples: Mapping[str, str], prompt: str = ""
) -> Figure:
    """The closest format that a number of bits per weight affords, in the trade-off plot, and how it writes.

    samples: a text by each format, in continuation of ``prompt``.
    """
    affordable = [row for row in comparison.rows[1:] if row.bpw <= budget]
    figure = canvas(8.6, 5.2, left=0.85, bottom=1.75)
    ax = figure.add_subplot()
    _draw(ax, comparison, "kld")
    ax.axvspan(budget, ax.get_xlim()[1], color="#888888", alpha=0.15, linewidth=0)
    if affordable:
        best = min(affordable, key=lambda row: row.kld)
        ax.plot(best.bpw, best.kld, "o", markersize=16, fillstyle="none", color="#222222")
        verdict = f"{budget:g} bits per weight buy {best.format}: KLD {best.kld:.2g}, PPL {best.ppl:.2f}"
        text = prompt + samples[best.format]
    else:
        verdict, text = f"{budget:g} bits per weight buy none of these formats", ""
    ax.set_title(verdict)
    figure.text(0.05, 0.23, textwrap.fill(text, 105, max_lines=5), va="top", linespacing=1.4)
    figure.alt = f"{verdict}. It writes: {text}"
    return figure


def _draw(ax: Axes, comparison: Comparison, measure: str) -> None:
    base, *rows = comparison.rows
    if measure == "kld":
        rows = [row for row in rows if row.kld > 0]
    ax.set(xscale="log", yscale="log", xlabel="bits per weight, whole model", ylabel=_MEASURES[measure])
    by_family = groupby(sorted(rows, key=lambda row: (row.family, row.bpw)), key=lambda row: row.family)
    for below, (family, members) in enumerate(by_family):
        _draw_family(ax, family, list(members), measure, below % 2 == 1)
    if measure == "ppl":
        levels = {"not quantized": base.ppl} | (
            {"floor: the author": comparison.floor} if comparison.floor else {}
        )
        for name, y in levels.items():
            ax.axhline(y, color="#555555", linewidth=1, linestyle=":")
            ax.annotate(
                f"{name} {y:.3f}",
                (1, y),
                (0, 3),
                xycoords=("axes fraction", "data"),
                ha="right",
                textcoords="offset points",
            )
    ax.set_xticks([2, 3, 4, 5, 6, 8, 12, 16])
    for axis in (ax.xaxis, ax.yaxis) if measure == "ppl" else (ax.xaxis,):
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.xaxis.set_minor_locator(ticker.NullLocator())


def _draw_family(ax: Axes, family: str, rows: list[Row], measure: str, below: bool) -> None:
    colour, marker = _FAMILIES.get(family, ("#777777", "o"))
    x, y = [row.bpw for row in rows], [getattr(row, measure) for row in rows]
    error = [getattr(row, f"{measure}_stderr") for row in rows]
    ax.errorbar(x, y, yerr=error, color=colour, marker=marker, linewidth=1, label=family)
    side, vertical = ((-8, -6), "top") if below else ((8, 6), "bottom")
    for row, height in zip(rows, y):
        ax.annotate(
            _short(row.format),
            (row.bpw, height),
            side,
            textcoords="offset points",
            color=colour,
            va=vertical,
            ha="right" if below else "left",
        )
    ax.annotate(
        family, (x[0], y[0]), (-10, 10), textcoords="offset points", color=colour, weight="bold", ha="right"
    )


def _short(format: str) -> str:
    """``Affine(4 bits, block 32, symmetric)`` is 4 bits, beside its family's name; other names are short."""
    return format.partition("(")[2].partition(",")[0] or format
