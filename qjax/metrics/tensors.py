"""How far a tensor lies from its original."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Shaped

from qjax.metrics._record import html_table


@dataclass(frozen=True)
class TensorError:
    """The error of `approximation` against `original`, summed in float64."""

    mse: float
    """mean squared error"""
    sqnr_db: float
    """10 log10(Σ original² / Σ error²), signal to quantization noise; infinite where there is no error"""
    max_error: float
    """largest magnitude of an error"""
    cosine: float
    """cosine of the angle between the two as vectors; 1 where both are zero, 0 where one is"""
    n: int

    def __str__(self) -> str:
        return (
            f"SQNR {self.sqnr_db:.2f} dB, MSE {self.mse:.3e}, largest error {self.max_error:.3e}, "
            f"cosine {self.cosine:.6f} ({self.n:,} weights)"
        )

    def _repr_html_(self) -> str:
        return html_table(
            [
                ("SQNR", f"{self.sqnr_db:.2f} dB"),
                ("MSE", f"{self.mse:.3e}"),
                ("largest error", f"{self.max_error:.3e}"),
                ("cosine", f"{self.cosine:.6f}"),
                ("weights", f"{self.n:,}"),
            ]
        )


def tensor_error(
    original: Shaped[Array | np.ndarray, "..."], approximation: Shaped[Array | np.ndarray, "..."]
) -> TensorError:
    """Compare two float arrays of one shape, at least one element."""
    x, y = (np.asarray(a, np.float32).ravel() for a in (original, approximation))
    error = x - y
    signal, noise, other = _dot(x, x), _dot(error, error), _dot(y, y)
    cosine = _dot(x, y) / (signal * other) ** 0.5 if signal and other else float(signal == other)
    with np.errstate(divide="ignore"):
        sqnr_db = float(10 * np.log10(signal / noise)) if noise else float("inf")
    return TensorError(noise / x.size, sqnr_db, float(np.max(np.abs(error))), cosine, x.size)


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """Σ a b in float64, without a float64 copy of either."""
    return float(np.einsum("i,i->", a, b, dtype=np.float64))
