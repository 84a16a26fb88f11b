"""Pictures of what quantization does, and controls to play with them."""

from qjax.viz.figure import Figure
from qjax.viz.landscape import levels, plot_gains, plot_gap, plot_grids, plot_levels, plot_rate
from qjax.viz.plots import (
    codes,
    plot_dot_error,
    plot_error_histogram,
    plot_panels,
    plot_perplexities,
    plot_rounding,
)
from qjax.viz.tradeoff import plot_budget, plot_tradeoff
from qjax.viz.widgets import explore

__all__ = [
    "Figure",
    "codes",
    "explore",
    "levels",
    "plot_budget",
    "plot_dot_error",
    "plot_error_histogram",
    "plot_gains",
    "plot_gap",
    "plot_grids",
    "plot_levels",
    "plot_panels",
    "plot_perplexities",
    "plot_rate",
    "plot_rounding",
    "plot_tradeoff",
]
