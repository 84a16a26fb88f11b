"""One scale for many weights: what an outlier among them does, and what it helps to share with fewer or to clip."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import ticker
from matplotlib.axes import Axes

from qjax.metrics import tensor_error
from qjax.viz.figure import Figure, canvas, styled
from qjax.viz.landscape import DB_PER_BIT
from qjax.viz.plots import BLUE, VERMILION

# From light to dark, in grey too.
_ERROR_COLOURS = "OrRd"
_GUIDE = {"color": "#777777", "linewidth": 1, "linestyle": ":"}
_MARKERS = "osD^v"

Line = Sequence[float] | Sequence[int] | Float[np.ndarray, " n"]


def peak_sqnr_db(bits: int, peak: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """SQNR of weights whose scale reaches ``peak`` times their standard deviation, as long as steps are small.

    The noise is Δ²/12 (Bennett 1948) with Δ = peak σ / 2^(bits - 1).
    """
    return DB_PER_BIT * bits + 10 * math.log10(3) - 20 * np.log10(peak)


# ── one outlier ────────────────────────────────────────────────────────────────────────────────────────────


@styled
def plot_reach(
    w: Float[np.ndarray, "rows columns"],
    reads: Mapping[str, Float[np.ndarray, "rows columns"]],
    others: Bool[np.ndarray, "rows columns"],
) -> Figure:
    """Where the error is, one map for each way to share scales, and the SQNR of all weights but the outliers.

    reads: ``w`` quantized and read back.  others: false at the outliers.
    """
    sigma, limit = float(w[others].std()), 2.0
    figure = canvas(8.6, 2.3, left=0.45, right=0.0, bottom=0.4)
    axes = figure.subplots(1, len(reads), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(wspace=0.08)
    described = []
    for ax, (name, read) in zip(axes, reads.items()):
        sqnr = tensor_error(w[others], read[others]).sqnr_db
        picture = _map(ax, np.abs(read - w) / sigma, limit, name)
        ax.set_xlabel(f"SQNR of the others {sqnr:.0f} dB")
        described.append(f"{name}: SQNR of the others {sqnr:.0f} dB")
    axes[0].set_ylabel(f"{w.shape[0]} rows of {w.shape[1]}")
    scale = figure.colorbar(picture, ax=axes.tolist(), aspect=12, pad=0.02, ticks=[0, 1, 2])
    scale.set_label("error, σ")
    scale.outline.set_visible(False)
    figure.alt = f"errors of {w.shape[0]}×{w.shape[1]} weights with an outlier among them; " + "; ".join(described)
    return figure


@styled
def plot_outlier(peaks: Line, sqnr_db: Mapping[int, Line]) -> Figure:
    """SQNR of the other weights by the size of the largest, measured and by `peak_sqnr_db`, a line for each width.

    peaks: largest weight / standard deviation of the others.  sqnr_db: at each of them, by bits.
    """
    x = np.asarray(peaks, np.float64)
    figure = canvas(8.6, 3.9, right=0.85)
    ax = figure.add_subplot(xscale="log", xlabel="largest weight / σ", ylabel="SQNR of the other weights, dB")
    fine = np.geomspace(x[0], x[-1], 100)
    for (bits, measured), marker in zip(sorted(sqnr_db.items()), _MARKERS):
        formula = peak_sqnr_db(bits, fine)
        ax.plot(fine[formula > -6], formula[formula > -6], **_GUIDE)
        (line,) = ax.plot(x, measured, marker, linestyle="-", linewidth=0.8)
        ax.annotate(
            f"{bits} bits", (x[0], measured[0]), (2, 9), textcoords="offset points", color=line.get_color()
        )  # fmt: skip
    ax.text(x[-1] * 1.06, 0, "all others\nare zero", va="center")
    ax.set_title("Ten times the outlier, 20 dB less, until nothing is left (dotted: the formula)")
    ax.set_xticks(x, [f"{peak:.0f}" for peak in x])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set(xlim=(x[0] * 0.92, x[-1] * 1.02), ylim=(-6, max(m[0] for m in sqnr_db.values()) + 5))
    figure.alt = f"SQNR of the others, largest weight {x[0]:.0f} to {x[-1]:.0f} σ: " + ", ".join(
        f"{bits} bits {measured[0]:.0f} to {measured[-1]:.0f} dB" for bits, measured in sorted(sqnr_db.items())
    )
    return figure


@styled
def plot_comb(
    w: Float[np.ndarray, "rows columns"],
    read: Float[np.ndarray, "rows columns"],
    at: tuple[int, int],
    group: int,
    bits: int,
) -> Figure:
    """What an outlier does to those that share its scale: the map of errors, and the values left to them.

    w: row-major, ``group`` consecutive weights to a scale.  read: quantized and read back.  at: the outlier.
    Right: the weights of the outlier's group within ±4 σ, and the values that ``bits`` can give them there.
    """
    others = np.ones(w.shape, bool)
    others[at] = False
    sigma, mine = float(w[others].std()), np.ravel_multi_index(at, w.shape) // group
    members = np.arange(w.size) // group == mine
    step = float(np.abs(w.ravel()[members]).max()) / 2 ** (bits - 1) / sigma
    shares = others.ravel() & members
    near, values = w.ravel()[shares] / sigma, read.ravel()[shares]
    zeros, sqnr = float(np.mean(values == 0)), tensor_error(w[others], read[others]).sqnr_db
    bpw = bits + 16 / group

    figure = canvas(8.6, 3.1, left=0.45, right=0.25, top=0.45, bottom=0.6)
    left, right = figure.subplots(1, 2)
    _map(left, np.abs(read - w) / sigma, 2.0, f"{bpw:.2f} bpw, SQNR of the others {sqnr:.1f} dB")
    left.set(xlabel="error: the darkest 2 σ and more", ylabel=f"{w.shape[0]} rows of {w.shape[1]}")
    share, edges = np.histogram(near, bins=np.linspace(-4, 4, 41))
    right.stairs(share / share.max(), edges, fill=True, color="#BBB7AC")
    half = min(int(4 / step), 2 ** (bits - 1))
    comb = step * np.arange(-half, half + 1)
    right.vlines(comb, 0, 1.12, color=BLUE, linewidth=max(0.6, min(2, 12 * step)))
    right.set(xlim=(-4, 4), ylim=(0, 1.15), yticks=[], xlabel="weight / σ, of those that share the outlier's scale")
    right.set_title(f"step {step:.2g} σ: {zeros:.0%} of {shares.sum():,} become zero")
    right.grid(False)
    figure.alt = (
        f"{bits} bits, {group} weights to a scale, {bpw:.2f} bpw, an outlier of {abs(w[at]) / sigma:.0f} σ: steps of "
        f"{step:.2g} σ around it, where {zeros:.0%} become zero; SQNR of all others {sqnr:.1f} dB"
    )
    return figure


def _map(ax: Axes, error: np.ndarray, limit: float, title: str):
    ax.set_title(title)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    return ax.imshow(error, _ERROR_COLOURS, vmin=0, vmax=limit, aspect="auto")


# ── clipping ───────────────────────────────────────────────────────────────────────────────────────────────


@styled
def plot_clip(clips: Line, sqnr_db: Mapping[int, Line]) -> Figure:
    """SQNR of Gaussian weights by where they are clipped, a line for each width, the best clip marked.

    clips: in standard deviations.  Dotted: what rounding alone would leave, `peak_sqnr_db`, and clipping alone.
    """
    c = np.asarray(clips, np.float64)
    tail = np.array([math.erfc(x / math.sqrt(2)) for x in c])
    clipped = (c**2 + 1) * tail - math.sqrt(2 / math.pi) * c * np.exp(-(c**2) / 2)
    figure = canvas(8.6, 4.1, right=0.85)
    ax = figure.add_subplot(xlabel="clip / σ", ylabel="SQNR, dB")
    top = max(np.max(values) for values in sqnr_db.values()) + 6
    clipping = -10 * np.log10(clipped)
    shown = clipping < top
    ax.plot(c[shown], clipping[shown], **_GUIDE)
    best = {}
    for bits, values in sorted(sqnr_db.items()):
        (line,) = ax.plot(c, values)
        ax.plot(c, peak_sqnr_db(bits, c), **_GUIDE)
        i = int(np.argmax(values))
        best[bits] = c[i], values[i]
        ax.plot(*best[bits], "o", color=line.get_color(), markersize=9)
        ax.annotate(
            f"{c[i]:.2f} σ", best[bits], (0, -18), textcoords="offset points", ha="center", color=line.get_color()
        )
        ax.annotate(
            f"{bits} bits", (c[-1], values[-1]), (6, 0), textcoords="offset points", va="center", color=line.get_color()
        )
    steep, flat = int(np.argmin(np.abs(clipping - 0.7 * top))), len(c) // 8
    ax.annotate("clipping alone", (c[steep], clipping[steep]), (-8, 0), textcoords="offset points", ha="right")
    bits = sorted(sqnr_db)[-2:][0]
    ax.annotate(
        f"rounding alone, {bits} bits", (c[flat], peak_sqnr_db(bits, c)[flat]), (6, 6), textcoords="offset points"
    )
    ax.set(xlim=(c[0], c[-1]), ylim=(0, top), title="Too near cuts the tail, too far makes the step coarse")
    figure.alt = "SQNR of Gaussian weights by the clip; the best: " + ", ".join(
        f"{bits} bits {clip:.2f} σ, {value:.1f} dB" for bits, (clip, value) in best.items()
    )
    return figure


# ── the price of scales ────────────────────────────────────────────────────────────────────────────────────


@styled
def plot_block_sizes(
    sizes: Sequence[int],
    by_bits: Mapping[int, Line],
    by_kind: Mapping[str, Line],
    bits: int = 4,
) -> Figure:
    """What smaller blocks buy, and which size is the best.

    sizes: weights to a scale.  by_bits: SQNR at each size, by the bits of a code; left, by bits per weight.
    by_kind: the same for several kinds of weights with ``bits`` a code; right, as decibels below 6.02 per bit, for
    scales of 16 bits and, as if they were as good, of 8.
    """
    n = np.asarray(sizes, np.float64)
    figure = canvas(8.6, 4.0, right=0.95)
    figure.subplots_adjust(wspace=0.28)
    left, right = figure.subplots(1, 2)
    for (width, values), marker in zip(sorted(by_bits.items()), _MARKERS):
        (line,) = left.plot(width + 16 / n, values, marker=marker, markersize=5)
        for size, value in zip(sizes, values):
            if width == bits and size in (16, 32, sizes[-1]):
                left.annotate(
                    f"{size} weights" if size == 16 else f"{size}", (width + 16 / size, value), (4, -13),
                    textcoords="offset points", color=line.get_color(),
                )  # fmt: skip
        left.annotate(
            f"{width} bits", (width + 16 / n[-1], values[-1]), (-8, 0), textcoords="offset points", ha="right",
            va="center", color=line.get_color(),
        )  # fmt: skip
    left.set(xlabel="bits per weight, scales included", ylabel="SQNR, dB")
    left.set_title(f"A scale of 16 bits for {sizes[0]} to {sizes[-1]} weights")
    left.set_xlim(min(by_bits) - 1.1)

    best = {}
    for (kind, values), colour, marker in zip(by_kind.items(), (BLUE, VERMILION), _MARKERS):
        for scale_bits, style in ((16, "-"), (8, "--")):
            gap = DB_PER_BIT * (bits + scale_bits / n) - np.asarray(values)
            i = int(np.argmin(gap))
            best[kind, scale_bits] = sizes[i], gap[i]
            right.plot(n, gap, linestyle=style, marker=marker, markersize=5, color=colour)
            right.plot(n[i], gap[i], "o", markersize=12, fillstyle="none", color="#222222")
            right.annotate(
                f"{scale_bits}-bit", (n[0], gap[0]), (-6, 0), textcoords="offset points", ha="right", va="center",
                color=colour,
            )  # fmt: skip
        right.annotate(
            kind, (n[-1], gap[-1]), (7, 0), textcoords="offset points", va="center", color=colour, annotation_clip=False
        )
    right.set(xscale="log", xlabel="weights to a scale", ylabel="dB below 6.02 per bit")
    right.set_title(f"{bits} bits: the best size depends")
    right.set_xticks(n, [f"{size}" for size in sizes])
    right.xaxis.set_minor_locator(ticker.NullLocator())
    right.set_xlim(n[0] * 0.42, n[-1] * 1.1)
    right.invert_yaxis()
    figure.alt = f"SQNR by bits per weight and block size; the best block of {bits} bits: " + ", ".join(
        f"{' '.join(kind.split())} with scales of {scale_bits} bits {size}, {gap:.1f} dB below 6.02 per bit"
        for (kind, scale_bits), (size, gap) in best.items()
    )
    return figure


# ── channels ───────────────────────────────────────────────────────────────────────────────────────────────


@styled
def plot_channels(matrices: Mapping[str, Float[np.ndarray, "rows columns"]]) -> Figure:
    """How large the rows and the columns of matrices are: root mean square of each, over that of the matrix.

    Of ``matrices`` two are shown, or one that is both: where a row stands out most from the median, and a column.
    """
    wildest = [max(matrices, key=lambda name: _spread(matrices[name], axis)) for axis in (1, 0)]
    shown = {name: matrices[name] for name in wildest}
    figure = canvas(8.6, 0.55 + 1.85 * len(shown))
    figure.subplots_adjust(hspace=0.85, wspace=0.1)
    grid = figure.subplots(len(shown), 2, squeeze=False, sharey="row")
    described = []
    for axes, (name, w) in zip(grid, shown.items()):
        rms, highest = float(np.sqrt(np.mean(w**2))), 0.0
        for ax, axis, what, colour in zip(axes, (1, 0), ("row", "column"), (BLUE, VERMILION)):
            size = _rms(w, axis) / rms
            top = int(np.argmax(size))
            highest = max(highest, float(size[top]))
            ax.plot(size, ".", color=colour, markersize=3)
            ax.plot(top, size[top], "o", markersize=10, fillstyle="none", color="#222222")
            title = f"{name}: {what}s up to {size[top]:.1f}"
            ax.set(title=title, xlabel=f"{what}, of {size.size}")
            described.append(title)
        axes[0].set(ylabel="RMS, over all", ylim=(0, 1.15 * highest))
    figure.alt = "root mean square of rows and columns, over that of the matrix; " + "; ".join(described)
    return figure


def _rms(w: Float[np.ndarray, "rows columns"], axis: int) -> Float[np.ndarray, " n"]:
    return np.sqrt(np.mean(w**2, axis=axis))


def _spread(w: Float[np.ndarray, "rows columns"], axis: int) -> float:
    """The largest row (axis 1) or column (axis 0), over the median of them."""
    size = _rms(w, axis)
    return float(size.max() / np.median(size))
