"""What the records share: a mean with its error, and a table for the notebook."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from qjax.table import Table


def mean_and_stderr(x: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Mean of independent samples and its standard error √(variance / (n - 1)), summed in float64."""
    return float(np.mean(x, dtype=np.float64)), float(np.sqrt(np.var(x, dtype=np.float64) / (x.size - 1)))


def rounded(record: Any) -> str:
    """What was rounded beside the weights."""
    activations = f", activations {record.activations}" if record.activations else ""
    return f"cache {record.cache_k}/{record.cache_v}{activations}"


def measures(rows: Sequence[Sequence[str]], caption: str = "") -> Table:
    """A table of (name, value)."""
    return Table({"measure": "<", "value": ">"}, rows, caption)
