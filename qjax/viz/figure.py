"""Figure: matplotlib's, in the house style, described in words, and able to show itself in a notebook."""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

import matplotlib.figure
import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

_STYLE = Path(__file__).with_name("style.mplstyle")
# CSS pixels to an inch: how large a figure stands on the page does not depend on how finely it is drawn.
_CSS_DPI = 96

P = ParamSpec("P")


class Figure(matplotlib.figure.Figure):
    """A figure made without pyplot, so that nothing outlives it.

    ``alt`` says what it shows, for those who cannot see it: screen readers, text-only pages, and nbval, which
    compares it and not the picture.
    """

    alt: str = "a figure"

    def _repr_png_(self) -> tuple[bytes, dict]:
        width, height = css_size(self)
        return png(self), {"alt": self.alt, "width": width, "height": height}

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"

    __str__ = __repr__


def canvas(width: float, height: float, **margins: float) -> Figure:
    """A figure of so many inches with margins in inches: left, right, top, bottom.

    Fixed margins, because a constrained layout costs half of the 200 ms that a slider may take.
    """
    room = {"left": 0.75, "right": 0.2, "top": 0.45, "bottom": 0.6} | margins
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=room["left"] / width,
        right=1 - room["right"] / width,
        bottom=room["bottom"] / height,
        top=1 - room["top"] / height,
    )
    return figure


def png(figure: matplotlib.figure.Figure) -> bytes:
    """The picture, in 256 colours: a third of the size, and encoded sooner, than in all of them."""
    buffer = io.BytesIO()
    with matplotlib.style.context(_STYLE):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(buffer, "png")
    return buffer.getvalue()


def css_size(figure: matplotlib.figure.Figure) -> tuple[int, int]:
    """Width and height on the page, in CSS pixels."""
    width, height = figure.get_size_inches() * _CSS_DPI
    return round(width), round(height)


def styled(plot: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator: what ``plot`` draws has the style of style.mplstyle."""

    @functools.wraps(plot)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(_STYLE):
            return plot(*args, **kwargs)

    return drawn
