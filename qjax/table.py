"""A table of text: on a terminal, in a notebook, as Markdown."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_CELL = 100
"""Longer cells are cut."""


@dataclass(frozen=True)
class Table:
    """Cells of text under headings; nothing in them is trusted, so each way of showing them escapes them.

    columns: heading to the side its cells stand on, "<" left or ">" right, as in format().
    caption: stands above, not cut.
    """

    columns: Mapping[str, str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __str__(self) -> str:
        cells = [[printable(cell) for cell in row] for row in (tuple(self.columns), *self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        sides = self.columns.values()
        lines = ("  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths)).rstrip() for row in cells)
        return "\n".join([*filter(None, [self.caption]), *lines])

    def _repr_html_(self) -> str:
        sides = ["left" if side == "<" else "right" for side in self.columns.values()]
        head, *body = (
            "".join(f'<{tag} style="text-align:{s}">{html.escape(printable(c))}</{tag}>' for s, c in zip(sides, row))
            for tag, row in (("th", tuple(self.columns)), *(("td", row) for row in self.rows))
        )
        body = "".join(f"<tr>{row}</tr>" for row in body)
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def markdown(self, aligned: bool = False) -> str:
        """A table in GitHub's Markdown; ``aligned``, with its cells below one another, for who reads it as text."""
        cells = [tuple(self.columns), *(tuple(map(_escape_markdown, row)) for row in self.rows)]
        widths = [max(3, *map(len, column)) if aligned else 3 for column in zip(*cells)]
        columns = list(zip(self.columns.values(), widths))
        rules = ["-" * width if side == "<" else "-" * (width - 1) + ":" for side, width in columns]
        if aligned:
            cells = [[f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns)] for row in cells]
        head, *rows = (f"| {' | '.join(row)} |" for row in cells)
        caption = f"{_escape_markdown(self.caption)}\n\n" if self.caption else ""
        return caption + "\n".join([head, f"| {' | '.join(rules)} |", *rows])


def printable(text: str) -> str:
    """``text`` on one line of at most MAX_CELL characters; control, invisible and undecodable ones are escaped, which
    could otherwise steer a terminal or hide what is there."""
    start = text[: MAX_CELL + 1]
    start = start if start.isprintable() else repr(start)[1:-1]
    return start if len(start) <= MAX_CELL else f"{start[: MAX_CELL - 1]}…"


def folded(title: str, *bodies: str) -> str:
    """HTML that shows ``title``, and the HTML ``bodies`` when it is clicked."""
    return f"<details><summary>{html.escape(printable(title))}</summary>{''.join(bodies)}</details>"


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*\[\]|<&~$])", r"\\\1", printable(text))
