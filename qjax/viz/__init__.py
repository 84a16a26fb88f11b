"""Pictures of what quantization does, and controls to play with them."""

from qjax.viz.figure import Figure
from qjax.viz.plots import plot_panels, plot_rounding
from qjax.viz.widgets import explore

__all__ = ["Figure", "explore", "plot_panels", "plot_rounding"]
