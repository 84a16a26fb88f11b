"""plot_*: numbers in, a Figure out."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float
from matplotlib import ticker
from matplotlib.axes import Axes

from qjax.formats import _rounding
from qjax.tensor import QTensor, dequantize
from qjax.viz.figure import Figure, canvas, styled

BLUE, VERMILION = "#0072B2", "#D55E00"


# ── one matrix ─────────────────────────────────────────────────────────────────────────────────────────────


def codes(t: QTensor) -> Float[np.ndarray, "*rows columns"]:
    """The whole numbers that stand for the weights: w = code · d, plus m where the format has a minimum.

    Raises AttributeError for a format without a scale ``d`` for each block.
    """
    fields: Any = t.fields
    w = np.asarray(dequantize(t)).reshape(*fields.d.shape, -1)
    d = np.asarray(fields.d, np.float32)[..., None]
    m = np.asarray(fields.m, np.float32)[..., None] if "m" in fields._fields else 0.0
    return np.rint(np.divide(w - m, d, out=np.zeros_like(w), where=d != 0)).reshape(t.shape)


@styled
def plot_panels(
    x: Float[ArrayLike, "rows columns"],
    t: QTensor,
    *,
    window: tuple[int, int] = (32, 32),
    error_limit: float | None = None,
) -> Figure:
    """A matrix as it was, as codes, as these are read back, and what was lost.

    x: weights.  t: the same, quantized.  window: rows and columns of it that are shown, from the upper left.
    error_limit: where the scale of the error ends, to compare pictures; default: at the largest error shown.
    """
    rows, columns = window
    w, read = np.asarray(x, np.float32), np.asarray(dequantize(t))
    error = read - w
    rms = float(np.sqrt(np.mean(error**2)))
    w, read, error, q = (a[:rows, :columns] for a in (w, read, error, codes(t)))
    rows, columns = w.shape
    largest, worst = float(np.abs(w).max()), error_limit or float(np.abs(error).max())
    figure = canvas(8.6, 3.0, left=0.35, right=0.1, top=0.1, bottom=0.1)
    figure.alt = (
        f"four pictures of the first {rows}×{columns} weights of a matrix: original, {t.format.name} codes "
        f"from {q.min():.0f} to {q.max():.0f}, read back, and error"
    )
    # One axes for all four: axes and colour bars of their own would take twice as long as a slider may.
    ax = figure.add_subplot()
    ax.axis("off")
    panels = [
        ("original", "weight", w, "RdBu_r", (-largest, largest)),
        (f"codes, {t.bpw:.1f} bpw", "code", q, "viridis", (q.min(), q.max())),
        ("read back", "weight", read, "RdBu_r", (-largest, largest)),
        ("error", f"error, RMS {rms:.2g}", error, "PuOr_r", (-worst, worst)),
    ]
    for i, (title, unit, values, colours, (low, high)) in enumerate(panels):
        left, right = 1.15 * i, 1.15 * i + 1
        ax.text(left, -0.03, title, weight="bold", size=11)
        for picture, top, bottom in ((values, 0, 1), (np.linspace(low, high, 256)[None], 1.06, 1.13)):
            ax.imshow(picture, colours, extent=(left, right, bottom, top), vmin=low, vmax=high, aspect="auto")
        ax.text(left, 1.25, f"{low:.2g}")
        ax.text(right, 1.25, f"{high:.2g}", ha="right")
        ax.text((left + right) / 2, 1.38, unit, ha="center")
    ax.text(-0.03, 0.5, f"{rows} rows of {columns} weights", rotation=90, ha="right", va="center")
    ax.set(xlim=(0, 4.45), ylim=(1.42, -0.13))
    return figure


# ── rounding ───────────────────────────────────────────────────────────────────────────────────────────────


def round_to_step(x: Float[ArrayLike, "..."], step: float, rule: str, seed: int = 0) -> Float[np.ndarray, "..."]:
    """Multiples of ``step`` near ``x``, chosen by a rule of `qjax.formats.rounding_names()`."""
    return step * np.asarray(_rounding.rule(rule, seed)(jnp.asarray(x, jnp.float32) / step, 0.0))


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
    # The middles of 4000 equal parts of the range of the codes: their means are a uniform distribution's.
    x = -1 + (2 - step) * (np.arange(4000, dtype=np.float32) + 0.5) / 4000
    y = round_to_step(x, step, rule)
    error = (y - x) / step
    mean, mse = _zero(float(error.mean())), float(np.mean(error**2))
    figure = canvas(8.6, 3.3)
    figure.alt = (
        f"{rule} at {bits} bits: a staircase of {len(np.unique(y))} levels; "
        f"the error has mean {mean:.2f} Δ and mean square {mse:.3f} Δ²"
    )
    left, right = figure.subplots(1, 2)
    left.plot(x, x, color="#999999", linewidth=1)
    left.plot(x, y, color=BLUE, **({"ls": "", "marker": ",", "alpha": 0.5} if rule == "stochastic" else {}))
    left.set(xlabel="weight", ylabel="rounded weight", title=f"{rule}, {bits} bits: Δ = 2/{2**bits}")
    share, edges = np.histogram(error, bins=np.linspace(-1, 1, 41))
    right.stairs(100 * share / x.size, edges, fill=True, color=BLUE)
    right.axvline(mean, color=VERMILION)
    right.text(mean + 0.04, 5.4, f"mean {mean:+.2f} Δ", color=VERMILION)
    right.set(xlabel="error in steps Δ", ylabel="% of weights", xlim=(-1.1, 1.1), ylim=(0, 6))
    right.set_title(f"mean square {mse:.3f} Δ²{note}")
    return figure


@styled
def plot_error_histogram(errors: Mapping[str, Float[ArrayLike, "..."]], step: float = 1.0) -> Figure:
    """Distributions of rounding errors side by side, each with its mean.

    errors: by the name of what made them.  step: Δ, in the errors' unit.
    """
    figure = canvas(8.6, 2.5)
    means = {}
    axes = figure.subplots(1, len(errors), sharey=True, squeeze=False)[0]
    for ax, (name, values) in zip(axes, errors.items()):
        in_steps = np.asarray(values, np.float64).ravel() / step
        means[name] = _zero(float(in_steps.mean()))
        share, edges = np.histogram(in_steps, bins=np.linspace(-1, 1, 41))
        ax.stairs(100 * share / in_steps.size, edges, fill=True, color=BLUE)
        ax.axvline(means[name], color=VERMILION)
        ax.text(
            1.05, 0.88, f"mean {means[name]:+.2f} Δ", color=VERMILION, ha="right", transform=ax.get_xaxis_transform()
        )
        ax.set(title=name, xlabel="error in steps Δ", xlim=(-1.1, 1.1))
        ax.margins(y=0.25)
    axes[0].set_ylabel("% of weights")
    figure.alt = "distributions of the rounding error: " + ", ".join(
        f"{name} with mean {mean:.2f} Δ" for name, mean in means.items()
    )
    return figure


@styled
def plot_dot_error(lengths: Sequence[int], errors: Mapping[str, Sequence[float]]) -> Figure:
    """How the error of a dot product grows with its length, on two logarithmic scales, beside √n and n.

    errors: RMS error at each length, by rounding rule.
    """
    n = np.asarray(lengths, np.float64)
    figure = canvas(8.6, 3.6, right=1.7)
    figure.alt = "RMS error of a dot product by its length: " + ", ".join(
        f"{rule} grows {values[-1] / values[0]:.0f} times from n = {lengths[0]} to {lengths[-1]}"
        for rule, values in errors.items()
    )
    ax = figure.add_subplot(xscale="log", yscale="log")
    ax.set(xlabel="weights in the dot product, n", ylabel="RMS error, in steps Δ")
    ax.set_title("A bias adds up, random errors average out")
    smallest = min(values[0] for values in errors.values()) / 1.5
    _lines(ax, n, errors, {"∝ n": smallest * n / n[0], "∝ √n": smallest * np.sqrt(n / n[0])})
    ax.set_xticks(n, [f"{length}" for length in lengths])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    return figure


@styled
def plot_divergences(bits: Sequence[int], divergences: Mapping[str, Sequence[float]]) -> Figure:
    """KL divergence of quantized models from their base, by the width of the codes, a line for each rounding rule.

    divergences: nats per token at each width, by rule; on a logarithmic scale.
    """
    figure = canvas(8.6, 3.6, right=1.9)
    figure.alt = f"KL divergence at {', '.join(map(str, bits))} bits: " + "; ".join(
        f"{rule} {', '.join(f'{x:.1g}' for x in values)}" for rule, values in divergences.items()
    )
    ax = figure.add_subplot(yscale="log", xlabel="bits a code", ylabel="KLD, nats per token")
    ax.set_title("What each rule does to the predictions of a model")
    _lines(ax, np.asarray(bits, np.float64), divergences, {})
    ax.set_xticks(bits)
    return figure


def _lines(ax: Axes, x: np.ndarray, lines: Mapping[str, Sequence[float]], guides: Mapping[str, np.ndarray]) -> None:
    """Lines with markers and dotted guides, each labelled at its right end."""
    labels = []
    for label, y in guides.items():
        ax.plot(x, y, color="#888888", linewidth=1, linestyle=":")
        labels.append((y[-1], label, "#666666"))
    for (label, y), marker in zip(lines.items(), "osD^v*"):
        (line,) = ax.plot(x, y, marker=marker)
        labels.append((y[-1], label, line.get_color()))
    _label_right(ax, x[-1], labels)


def _label_right(ax: Axes, x: float, labels: Sequence[tuple[float, str, Any]], gap: float = 14.0) -> None:
    """Texts right of ``x``, each at its height or, where two would overlap, ``gap`` points above the other.

    labels: (y, text, colour).
    """
    ax.autoscale_view()  # the heights on the page depend on it
    to_points = 72 / ax.figure.dpi
    above = -np.inf
    for y, text, colour in sorted(labels, key=lambda label: label[0]):
        at = ax.transData.transform((x, y))[1] * to_points
        above = max(at, above + gap)
        ax.annotate(text, (x, y), (10, above - at), textcoords="offset points", color=colour, va="center")
