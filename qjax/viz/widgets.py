"""explore: controls over a pure function."""

import base64
import html
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import ipywidgets
import matplotlib.figure

from qjax.viz.figure import css_size, png

Render = Callable[..., matplotlib.figure.Figure | str]


def explore(render: Render, **controls: Iterable[Any]) -> "Explorer":
    """A widget: one control for each keyword and below them ``render(**choice)``, drawn anew at each change.

    render: a pure function that returns a figure (shown at a fixed size) or a string of HTML.  Its default
        arguments are where the controls stand at first, so that they show ``render()``.
    controls: the values that each argument can take, numbers or names, for a slider; or `Typed`, for a field.

    A stop is drawn once and then remembered.  Where ``render`` raises, its message is shown instead.
    Raises ValueError for a control without values, or whose values lack the default.
    """
    return Explorer(render, {name: v if isinstance(v, Typed) else list(v) for name, v in controls.items()})


class Typed(list):
    """Strings that are offered for an argument of `explore`, where any other may be typed as well."""


class Explorer(ipywidgets.VBox):
    """What `explore` returns.

    render: as given.
    stops: every choice that the controls offer (a field: its examples), as keyword arguments for ``render``.
    """

    def __init__(self, render: Render, controls: dict[str, list]):
        self.render = render
        self.stops = [dict(zip(controls, values)) for values in itertools.product(*controls.values())]
        self._drawn: dict[tuple, str] = {}
        arguments = inspect.signature(render).parameters
        self._controls = [_control(name, controls[name], arguments[name].default) for name in controls]
        self._picture = ipywidgets.HTML()
        bar = ipywidgets.HBox(self._controls, layout={"flex_flow": "row wrap"})
        super().__init__([bar, self._picture])
        for control in self._controls:
            control.observe(self._refresh, names="value")
        self._refresh()

    def __repr__(self) -> str:
        return f"Explorer({', '.join(f'{c.description}: {len(c.options)} stops' for c in self._controls)})"

    def _refresh(self, change: Any = None) -> None:
        """Shows the picture of the stop where the controls stand."""
        stop = {control.description: control.value for control in self._controls}
        key = tuple(stop.values())
        try:
            if key not in self._drawn:
                self._drawn[key] = to_html(self.render(**stop))
            self._picture.value = self._drawn[key]
        except Exception as error:
            message = f"{type(error).__name__}</b>: {html.escape(str(error))}"
            self._picture.value = f"<p><b>{message}</p>"


def to_html(picture: matplotlib.figure.Figure | str) -> str:
    """HTML that shows ``picture``.

    A figure becomes an ``img``, which unlike ipywidgets.Image has an ``alt``; width and height are there from the
    start, so that the page does not jump.
    """
    if isinstance(picture, str):
        return picture
    width, height = css_size(picture)
    data = base64.b64encode(png(picture)).decode()
    alt = html.escape(getattr(picture, "alt", "a figure"))
    size = f'width="{width}" height="{height}" style="max-width: 100%; height: auto"'
    return f'<img alt="{alt}" {size} src="data:image/png;base64,{data}">'


def _control(name: str, values: list, first: Any) -> Any:
    """A slider, or a field for `Typed` values, that stands at ``first``, or else at the first value.

    A slider for names too: JupyterLab takes the arrow keys away from a drop-down list.
    """
    if values and first is inspect.Parameter.empty:
        first = values[0]
    if first not in values:
        raise ValueError(f"explore: {name} can be one of {values}, but the default of render is {first!r}")
    # Drawn where the slider is let go, or at Enter: what lies on the way would be drawn for nobody.
    control = ipywidgets.Combobox if isinstance(values, Typed) else ipywidgets.SelectionSlider
    return control(options=values, value=first, description=name, continuous_update=False, layout={"width": "28em"})
