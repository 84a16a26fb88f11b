"""Pictures of what quantization does, and controls to play with them."""

from qjax.viz.blocks import plot_block_sizes, plot_channels, plot_clip, plot_comb, plot_outlier, plot_reach
from qjax.viz.bytemap import byte_map
from qjax.viz.depth import (
    Mixture,
    common_share,
    depth_errors,
    mixtures,
    plot_activation,
    plot_depth,
    plot_mixture,
    plot_offload,
    plot_roofline,
    plot_sources,
    relative_error,
)
from qjax.viz.figure import Figure
from qjax.viz.filemap import file_regions, plot_file_map, plot_tensor
from qjax.viz.html import Html
from qjax.viz.landscape import levels, plot_gains, plot_gap, plot_grids, plot_levels, plot_rate
from qjax.viz.numbers import (
    bit_table,
    plot_bound,
    plot_coverage,
    plot_number_lines,
    plot_splits,
    plot_staircase,
    plot_steps,
    plot_weights,
)
from qjax.viz.playground import Playground
from qjax.viz.plots import (
    codes,
    plot_divergences,
    plot_dot_error,
    plot_error_histogram,
    plot_panels,
    plot_rounding,
)
from qjax.viz.sensitivity import (
    Allocation,
    plot_allocation,
    plot_allocations,
    plot_formats,
    plot_importance,
    plot_losses,
    plot_sensitivity,
)
from qjax.viz.tradeoff import plot_budget, plot_tradeoff
from qjax.viz.trial import Settings, Trial, plot_certainty, trial_page, try_out
from qjax.viz.widgets import Typed, explore
from qjax.viz.wiring import wires

__all__ = [
    "Allocation",
    "Figure",
    "Html",
    "Mixture",
    "Playground",
    "Settings",
    "Trial",
    "Typed",
    "bit_table",
    "byte_map",
    "codes",
    "common_share",
    "depth_errors",
    "explore",
    "file_regions",
    "levels",
    "mixtures",
    "plot_activation",
    "plot_allocation",
    "plot_allocations",
    "plot_block_sizes",
    "plot_bound",
    "plot_budget",
    "plot_certainty",
    "plot_channels",
    "plot_clip",
    "plot_comb",
    "plot_coverage",
    "plot_depth",
    "plot_divergences",
    "plot_dot_error",
    "plot_error_histogram",
    "plot_file_map",
    "plot_formats",
    "plot_gains",
    "plot_gap",
    "plot_grids",
    "plot_importance",
    "plot_levels",
    "plot_losses",
    "plot_mixture",
    "plot_number_lines",
    "plot_offload",
    "plot_outlier",
    "plot_panels",
    "plot_rate",
    "plot_reach",
    "plot_roofline",
    "plot_rounding",
    "plot_sensitivity",
    "plot_sources",
    "plot_splits",
    "plot_staircase",
    "plot_steps",
    "plot_tensor",
    "plot_tradeoff",
    "plot_weights",
    "relative_error",
    "trial_page",
    "try_out",
    "wires",
]
