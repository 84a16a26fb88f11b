"""What every figure of the house has to be."""

import io

from matplotlib.text import Text
from PIL import Image

from qjax import viz


def assert_well_made(figure: viz.Figure) -> None:
    """A picture small enough to store, not cut off, legible, and described in words."""
    data, metadata = figure._repr_png_()
    assert len(data) < 80_000
    assert len(Image.open(io.BytesIO(data)).convert("RGB").getcolors()) > 20, "empty"
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= drawn.x0 < drawn.x1 <= width, drawn
    assert 0 <= drawn.y0 < drawn.y1 <= height, drawn
    assert all(text.get_fontsize() >= 10 for text in figure.findobj(Text))
    assert metadata["alt"] == figure.alt != viz.Figure.alt
