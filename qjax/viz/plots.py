"""plot_*: numbers in, a Figure out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from qjax.formats import _rounding
from qjax.tensor import dequantize, QTensor
from qjax.viz.figure import Figure, styled

BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"


def _canvas(width: float, height: float, **margins: float) -> Figure:
    """A figure of so many inches with margins in inches: left, right, top, bottom.

    Fixed margins, because a constrained layout costs half of the 200 ms that a slider may take.
    """
    room = {"left": 0.75, "right": 0.2, "top": 0.45, "bottom": 0.6} | margins
    figure = Figure(figsize=(width, height), layout="none")
    figure.subplots_adjust(
        left=room["left"] / width,
        right=1 - room["right"] / width,
        bottom=room["bottom"] / height,
        top=1 - room["top"] / height,
    )
    return figure


# ── one matrix ─────────────────────────────────────────────────────────────────────────────────────────────


def codes(t: QTensor) -> Float[np.ndarray, "*rows columns"]:
    """The whole numbers that stand for the weights: w = code · d, or code · d + m where the format has a minimum.

    Raises AttributeError for a format without a scale ``d`` for each block.
    """
    fields = t.fields
    w = np.asarray(dequantize(t)).reshape(*fields.d.shape, -1)
    d = np.asarray(fields.d, np.float32)[..., None]
    m = np.asarray(fields.m, np.float32)[..., None] if "m" in fields._fields else 0.0
    return np.rint(np.divide(w - m, d, out=np.zeros_like(w), where=d != 0)).reshape(t.shape)


@styled
def plot_panels(x: Float[ArrayLike, "rows columns"], t: QTensor, *, window: tuple[int, int] = (32, 32)) -> Figure:
    """A matrix as it was, as codes, as the codes are read back, and what was lost; the upper left ``window`` of it.

    x: weights.  t: the same, quantized.
    """
    rows, columns = window
    w, read = np.asarray(x, np.float32), np.asarray(dequantize(t))
    error = read - w
    rms = float(np.sqrt(np.mean(error**2)))
    w, read, error, q = (a[:rows, :columns] for a in (w, read, error, codes(t)))
    largest, worst = np.abs(w).max(), np.abs(error).max()
    figure = _canvas(8.6, 3.1, left=0.45, right=0.1, top=0.4, bottom=0.35)
    figure.alt = (
        f"four pictures of the first {rows}×{columns} weights of a matrix: original, {t.format.name} codes "
        f"from {q.min():.0f} to {q.max():.0f}, read back, and error"
    )
    panels = [
        ("original", "weight", w, "RdBu_r", largest),
        (f"{t.format.name} codes", "code", q, "viridis", None),
        ("read back", "weight", read, "RdBu_r", largest),
        ("error", f"error (RMS {rms:.2g})", error, "PuOr_r", worst or 1e-9),
    ]
    for ax, (title, unit, values, colours, limit) in zip(figure.subplots(1, 4, sharey=True), panels):
        low, high = (values.min(), values.max()) if limit is None else (-limit, limit)
        image = ax.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
        ax.set_title(title)
        ax.grid(False)
        ax.set_xticks([])
        ax.set_yticks([0, rows - 1], ["0", f"{rows - 1}"])
        ticks = [low, high] if limit is None else [-limit, 0, limit]
        bar = figure.colorbar(image, ax=ax, location="bottom", pad=0.04, fraction=0.08, ticks=ticks)
        bar.ax.set_xticklabels([f"{v:.2g}" for v in ticks])
        bar.set_label(unit, labelpad=0)
    figure.axes[0].set_ylabel("row (output)", labelpad=-8)
    return figure


# ── rounding ───────────────────────────────────────────────────────────────────────────────────────────────


def round_to_step(x: Float[ArrayLike, "..."], step: float, rule: str, seed: int = 0) -> Float[np.ndarray, "..."]:
    """Multiples of ``step`` near ``x``, chosen by a rule of `qjax.formats.rounding_names()`."""
    return step * np.asarray(_rounding.rule(rule, seed)(np.asarray(x, np.float32) / np.float32(step), 0.0))


def _zero(x: float) -> float:
    """``x`` without the sign of a zero that rounding to two digits leaves: -0.00 is no number to show."""
    return 0.0 if abs(x) < 0.005 else x


@styled
def plot_rounding(bits: int, rule: str, *, note: str = "") -> Figure:
    """What a rounding rule does to weights from -1 to 1 with 2^bits codes: the staircase and its errors.

    Left the transfer function, right the distribution of the error in steps Δ, with its mean and mean square.
    note: more to say above the errors.
    """
    step = 2.0 ** (1 - bits)
    x = np.linspace(-1, 1, 4001, dtype=np.float32)
    y = round_to_step(x, step, rule)
    error = (y - x) / step
    mean, mse = float(error.mean()), float(np.mean(error**2))
    figure = _canvas(8.6, 3.3)
    figure.alt = (
        f"{rule} at {bits} bits: staircase of {len(np.unique(y))} levels; the error has mean {_zero(mean):.2f} Δ "
        f"and mean square {mse:.3f} Δ²"
    )
    left, right = figure.subplots(1, 2, width_ratios=[1, 1])
    left.plot(x, x, color="#999999", linewidth=1, label="exact")
    style = {"marker": ".", "linestyle": "", "markersize": 1} if rule == "stochastic" else {"drawstyle": "steps-mid"}
    left.plot(x, y, color=BLUE, **style)
    left.set(xlabel="weight", ylabel="rounded weight", title=f"{rule}, {bits} bits, Δ = {step:g}")
    left.set_aspect("equal", adjustable="datalim")
    right.hist(error, bins=np.linspace(-1.025, 1.025, 42), weights=np.full(x.shape, 100 / x.size), color=BLUE)
    right.axvline(mean, color=VERMILION)
    right.annotate(
        f"mean {_zero(mean):+.2f} Δ", (mean, 1), (4, -12), xycoords=("data", "axes fraction"),
        textcoords="offset points", color=VERMILION,
    )
    right.set(xlabel="error in steps Δ", ylabel="% of weights", xlim=(-1.1, 1.1))
    right.set_title(f"mean square {mse:.3f} Δ²{note}")
    return figure


@styled
def plot_error_histogram(errors: Mapping[str, Float[ArrayLike, "..."]], step: float) -> Figure:
    """Distributions of rounding errors side by side, in steps; the mean of each is marked.

    errors: by the name of the rule.  step: Δ, in the errors' unit.
    """
    figure = _canvas(8.6, 2.6)
    for ax, (name, values) in zip(figure.subplots(1, len(errors), sharey=True, squeeze=False)[0], errors.items()):
        in_steps = np.asarray(values, np.float64).ravel() / step
        ax.hist(in_steps, bins=np.linspace(-1.025, 1.025, 42), weights=np.full(in_steps.size, 100 / in_steps.size))
        ax.axvline(in_steps.mean(), color=VERMILION)
        ax.set(title=name, xlabel="error in steps Δ", xlim=(-1.1, 1.1))
    figure.axes[0].set_ylabel("% of weights")
    figure.alt = "distribution of the rounding error, in steps, of " + ", ".join(
        f"{name} (mean {_zero(float(np.mean(values)) / step):.2f})" for name, values in errors.items()
    )
    return figure
