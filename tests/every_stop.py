"""Runs in nbval's kernels: what `viz.explore` makes is drawn at every stop, then and there.

Whatever a reader can set the controls to is tested so, in the same run in which nbval compares the cells; where it
fails, the cell fails.  `conftest.py` has the kernels call `watch` before a notebook's first cell, in runs that
collect the tests too.
"""

import os

from haste import collect_rarely, hasten, share_contexts

MAX_PNG_BYTES = 80_000

# Where nearly all of the time goes to compiling.
IN_GREAT_HASTE = "00_start_here", "04_inside_a_ggml_block", "05_every_format_on_one_page"


def watch():
    collect_rarely()
    share_contexts()
    hasten(level=0 if os.environ.get("QJAX_NOTEBOOK") in IN_GREAT_HASTE else 1)

    from IPython.core.getipython import get_ipython

    from qjax import viz
    from qjax.viz.figure import Figure, png

    explore = viz.explore
    formatter, shown = get_ipython().display_formatter, set()
    show = formatter.format

    def remember(value, *args, **kw):
        shown.add(repr(value))
        return show(value, *args, **kw)

    def explore_all(*args, **controls):
        explorer = explore(*args, **controls)
        assert repr(explorer.render()) in shown, "the picture of the first stop stands above the control"
        pictures = [explorer.render(**stop) for stop in explorer.stops]
        assert all(isinstance(picture, Figure | viz.Html) for picture in pictures)
        figures = [picture for picture in pictures if isinstance(picture, Figure)]
        assert len({tuple(figure.get_size_inches()) for figure in figures}) <= 1, "the page jumps"
        assert all(len(png(figure)) < MAX_PNG_BYTES for figure in figures), "a picture is too large"
        assert len({picture.alt for picture in pictures}) > len(pictures) / 2, "the control changes the picture"
        return explorer

    formatter.format, viz.explore = remember, explore_all
