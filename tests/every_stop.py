"""Runs in a kernel before a notebook's first cell: what `viz.explore` makes is drawn at every stop, then and there.

Whatever a reader can set the controls to is tested so, in the same run in which nbval compares the cells; where it
fails, the cell fails.  `notebooks/conftest.py` puts this file where the kernels find it.
"""


def _watch():
    from IPython.core.getipython import get_ipython

    from qjax import viz
    from qjax.viz.figure import Figure, png

    explore, most_bytes = viz.explore, 80_000
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
        assert all(len(png(figure)) < most_bytes for figure in figures), "a picture of over 80 kB"
        assert len({picture.alt for picture in pictures}) > len(pictures) / 2, "the control changes the picture"
        return explorer

    formatter.format, viz.explore = remember, explore_all


_watch()
del _watch
