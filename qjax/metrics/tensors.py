"""How far a tensor lies from its original."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Shaped

from qjax.metrics._record import measures


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

    @property
    def rmse(self) -> float:
        """root of the mean squared error"""
        return self.mse**0.5

    @property
    def relative_rmse(self) -> float:
        """√(Σ error² / Σ original²), what sqnr_db is in decibels"""
        return 10 ** (-self.sqnr_db / 20)

    def __str__(self) -> str:
        return (
            f"SQNR {self.sqnr_db:.2f} dB, MSE {self.mse:.3e}, largest error {self.max_error:.3e}, "
            f"cosine {self.cosine:.6f} ({self.n:,} weights)"
        )

    def _repr_html_(self) -> str:
        return measures(
            [
                ("SQNR", f"{self.sqnr_db:.2f} dB"),
                ("MSE", f"{self.mse:.3e}"),
                ("largest error", f"{self.max_error:.3e}"),
                ("cosine", f"{self.cosine:.6f}"),
                ("weights", f"{self.n:,}"),
            ]
        )._repr_html_()


def tensor_error(
    original: Shaped[Array | np.ndarray, "..."], approximation: Shaped[Array | np.ndarray, "..."]
) -> TensorError:
    """Compare two float arrays of one shape, at least one element."""
    return slabs_error([(original, approximation)])


def slabs_error(
    slabs: Iterable[tuple[Shaped[Array | np.ndarray, "..."], Shaped[Array | np.ndarray, "..."]]],
) -> TensorError:
    """Compare two tensors, of which parts come one after another: (original, approximation), at least one element."""
    signal = noise = other = product = max_error = 0.0
    n = 0
    for original, approximation in slabs:
        x, y = (np.asarray(a, np.float32).ravel() for a in (original, approximation))
        # Infinities that both have, and what overflows, are NaN and infinite in the result.
        with np.errstate(invalid="ignore", over="ignore"):
            error = x - y
        signal, noise, other = signal + _dot(x, x), noise + _dot(error, error), other + _dot(y, y)
        product += _dot(x, y)
        max_error = float(np.maximum(max_error, np.max(np.abs(error))))
        n += x.size
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = float(product / np.sqrt(signal) / np.sqrt(other)) if signal and other else float(signal == other)
        sqnr_db = float(10 * np.log10(signal / noise)) if noise else float("inf")
    return TensorError(noise / n, sqnr_db, max_error, cosine, n)


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """Σ a b in float64, without a float64 copy of either."""
    return float(np.einsum("i,i->", a, b, dtype=np.float64))
