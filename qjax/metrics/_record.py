"""What the records share: a mean with its error, and a table for the notebook."""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from jaxtyping import Float


def mean_and_stderr(x: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Mean of independent samples and its standard error √(variance / (n - 1)), summed in float64."""
    return float(np.mean(x, dtype=np.float64)), float(np.sqrt(np.var(x, dtype=np.float64) / (x.size - 1)))


def html_table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), caption: str = "") -> str:
    """Cells of text as an HTML table, escaped; the first column stands left, the others right."""

    def cells(row: Sequence[str], tag: str) -> str:
        sides = ("left", *["right"] * (len(row) - 1))
        return "".join(f'<{tag} style="text-align:{s}">{escape(c)}</{tag}>' for s, c in zip(sides, row))

    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>" if header else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{caption}{head}<tbody>{body}</tbody></table>"
