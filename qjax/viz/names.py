"""Names beside points, where they cover neither a point nor another text."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

# Of a letter of the 10-point font, on average, and of a line; all lengths are in points.
_LETTER, _LINE = 7.0, 13.0
_NEAR = 40.0
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))

Box = tuple[float, float, float, float]


class Point(NamedTuple):
    """A point of a plot. low, high: the ends of its bar of errors, if it has one.  name: None if it has none."""

    name: str | None
    x: float
    y: float
    colour: Any = "#222222"
    low: float | None = None
    high: float | None = None


def name_points(ax: Axes, points: Sequence[Point]) -> None:
    """Writes the names of the points beside them; to be called when the limits of ``ax`` are what they will be, and its
    legend and all other texts are there."""
    to_points = 72 / ax.figure.dpi

    def on_page(x: float, y: float) -> tuple[float, float]:
        across, up = ax.transData.transform((x, y)).tolist()
        return across * to_points, up * to_points

    (left, bottom), (right, top) = ax.transAxes.transform([(0, 0), (1, 1)]).tolist()
    frame = left * to_points, bottom * to_points, right * to_points, top * to_points
    at = [on_page(point.x, point.y) for point in points]
    written = (artist.get_window_extent() for artist in (*ax.texts, ax.get_legend()) if artist)
    edges = ((float(edge) * to_points for edge in (w.x0, w.y0, w.x1, w.y1)) for w in written)
    taken: list[Box] = [(x0, y0, x1, y1) for x0, y0, x1, y1 in edges]
    taken += [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    for point, (x, _) in zip(points, at):
        if point.low is not None and point.high is not None:
            taken.append((x - 4, on_page(point.x, point.low)[1], x + 4, on_page(point.x, point.high)[1]))

    def neighbours(i: int) -> int:
        return sum(math.dist(at[i], other) < _NEAR for other in at)

    # Where it is crowded first, for the others find a place anywhere.
    for i in sorted(range(len(points)), key=neighbours, reverse=True):
        text, (x, y) = points[i].name, at[i]
        if text is None:
            continue
        width = _LETTER * len(text)

        def box(place: Place, x: float = x, y: float = y, width: float = width) -> Box:
            middle, height = x + place.across, y + place.up
            return middle - width / 2, height - _LINE / 2, middle + width / 2, height + _LINE / 2

        places = list(_places(width))
        free = (p for p in places if _inside(box(p), frame) and not any(_overlap(box(p), other) for other in taken))
        place = next(free, places[-1])
        taken.append(box(place))
        line: dict[str, Any] = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 0}
        ax.annotate(
            text, (points[i].x, points[i].y), (place.across, place.up), textcoords="offset points", ha="center",
            va="center", color=points[i].colour, arrowprops=None if place.beside else line,
        )  # fmt: skip


class Place(NamedTuple):
    """Where the middle of a name lies from its point, and whether that is so near that no line has to join them."""

    across: float
    up: float
    beside: bool


def _places(width: float) -> Iterator[Place]:
    """Around a point, the nearest first."""
    for distance, (dx, dy) in itertools.product((9, 16, 26, 38, 50, 64, 80), _DIRECTIONS):
        across = dx * (distance / (1 + abs(dy)) + width / 2)
        yield Place(across, dy * distance, beside=distance == 9 and dx * dy == 0)


def _inside(box: Box, frame: Box) -> bool:
    return frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
