"""explore: controls over a pure function."""

import html
import inspect
import itertools
from collections.abc import Callable, Iterable
from numbers import Number
from typing import Any

import ipywidgets
import matplotlib.figure

from qjax.viz.figure import css_size, png

Render = Callable[..., matplotlib.figure.Figure | str]


def explore(render: Render, **controls: Iterable[Any]) -> "Explorer":
    """A widget: one control for each keyword and below them ``render(**choice)``, drawn anew at each change.

    render: a pure function that returns a figure (shown at a fixed size) or a string of HTML.  Its default
        arguments are where the controls stand at first, so that they show ``render()``.
    controls: the values each argument can take; numbers get a slider, anything else a drop-down list.

    A stop is drawn once and then remembered.  Where ``render`` raises, its message is shown instead.
    Raises ValueError for a control without values, or whose values lack the default.
    """
    return Explorer(render, {name: list(options) for name, options in controls.items()})


class Explorer(ipywidgets.VBox):
    """What `explore` returns.

    render: as given.
    stops: every choice that the controls offer, as keyword arguments for ``render``.
    """

    def __init__(self, render: Render, controls: dict[str, list]):
        self.render = render
        self.stops = [dict(zip(controls, values)) for values in itertools.product(*controls.values())]
        self._drawn: dict[tuple, tuple[dict, dict]] = {}
        arguments = inspect.signature(render).parameters
        self._controls = [_control(name, controls[name], arguments[name].default) for name in controls]
        self._image = ipywidgets.Image(format="png", layout={"object_fit": "contain"})
        self._html = ipywidgets.HTML()
        bar = ipywidgets.HBox(self._controls, layout={"flex_flow": "row wrap"})
        super().__init__([bar, self._image, self._html])
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
                self._drawn[key] = _traits(self.render(**stop))
            image, text = self._drawn[key]
        except Exception as error:
            image, text = _traits(f"<p><b>{type(error).__name__}</b>: {html.escape(str(error))}</p>")
        self._image.layout.display = "block" if image else "none"
        for widget, traits in ((self._image, image), (self._html, text)):
            for name, value in traits.items():
                setattr(widget, name, value)


def _traits(picture: matplotlib.figure.Figure | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The traits of the image (none if there is no image) and of the HTML below it."""
    if isinstance(picture, str):
        return {}, {"value": picture}
    width, height = css_size(picture)
    # A width and a height, so that the page does not jump while a new picture loads.
    image = {"value": png(picture), "width": str(width), "height": str(height)}
    return {**image, "tooltip": getattr(picture, "alt", "")}, {"value": ""}


def _control(name: str, values: list, first: Any) -> Any:
    """A slider for numbers, a drop-down list for names; it stands at ``first`` or else at the first value."""
    if values and first is inspect.Parameter.empty:
        first = values[0]
    if first not in values:
        raise ValueError(f"explore: {name} can be one of {values}, but the default of render is {first!r}")
    common = {"options": values, "value": first, "description": name}
    if all(isinstance(value, Number) for value in values):
        # Drawn where the slider is let go: what lies on the way would be drawn for nobody.
        return ipywidgets.SelectionSlider(**common, continuous_update=False)
    return ipywidgets.Dropdown(**common)
