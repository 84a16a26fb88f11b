"""How errors travel through a model: plots along its depth, of its activations, and of what its layers cost to read."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int
from matplotlib import colormaps, ticker
from matplotlib.axes import Axes

from qjax.machine import Limits, ProductRate
from qjax.model import Model
from qjax.models.config import Config
from qjax.models.parts import compiled, observe
from qjax.models.transformer import Params
from qjax.viz.figure import Figure, canvas, styled
from qjax.viz.plots import VERMILION

# Colour and marker of lines that stand for formats, dark enough for text.
_LINES = (("#0072B2", "o"), ("#D55E00", "s"), ("#007A59", "D"), ("#B0578D", "^"), ("#A86B00", "v"), ("#000000", "P"))
_DEPTH = "layers passed (a half: attention, but not yet MLP)"
_POINTS = "offset points"

Numbers = Sequence[float] | np.ndarray


# ── along the depth ────────────────────────────────────────────────────────────────────────────────────────


def depth_errors(base: Model, other: Model, tokens: Int[ArrayLike, "batch seq"]) -> Float[np.ndarray, " places"]:
    """How far what each part of ``other`` reads, normalised, is from what that of ``base`` does.

    The parts are attention and MLP of each layer, and the head; how far is a `relative_error` over tokens.  Models
    whose tensors have the same formats share one compiled program.
    """
    pairs = zip(*(_read(base.config, model.params, np.asarray(tokens, np.int32)) for model in (base, other)))
    return np.array([relative_error(y, x) for x, y in pairs])


def common_share(model: Model, tokens: Int[ArrayLike, "batch seq"]) -> Float[np.ndarray, " places"]:
    """How much of what each part of ``model`` reads, normalised, is the same in all channels: from 0 to 1.

    The parts are those of `depth_errors`.  Mean over tokens of (sum of the channels)² / (channels · sum of squares).
    """
    seen = (np.asarray(x, np.float64) for x in _read(model.config, model.params, np.asarray(tokens, np.int32)))
    return np.array([np.mean(x.sum(-1) ** 2 / (x.shape[-1] * (x**2).sum(-1))) for x in seen])


@compiled(static_argnames=("config",))
def _read(config: Config, params: Params, tokens: Int[Array, "batch seq"]) -> list[Float[Array, "batch seq d_model"]]:
    _, seen = observe(config, params, tokens, lambda h: h, first=tokens.shape[1])
    by_name = seen.unstack(config)
    firsts = ("attn_q", "attn_qkv"), ("ffn_gate", "ffn_gate_inp", "ffn_up")
    names = [[f"blk.{i}.{name}.weight" for name in first] for i in range(config.n_layers) for first in firsts]
    parts = [next(name for name in alternatives if name in by_name) for alternatives in names]
    return [by_name[name] for name in (*parts, "token_embd.weight" if config.tied else "output.weight")]


def relative_error(y: Float[ArrayLike, "*rows n"], original: Float[ArrayLike, "*rows n"]) -> float:
    """The root of the mean, over rows, of (length of the difference / length of the original)²."""
    y, original = np.asarray(y), np.asarray(original)
    return float(np.sqrt(np.mean(np.sum((y - original) ** 2, axis=-1) / np.sum(original**2, axis=-1))))


@styled
def plot_depth(errors: Mapping[str, Numbers], title: str) -> Figure:
    """Relative error along the depth, a line for each format.

    errors: by format, after the embedding and after attention and MLP of each layer, as `depth_errors` has them.
    """
    figure = canvas(8.6, 3.8, left=0.8, right=0.9)
    ax = figure.add_subplot()
    for (name, values), (colour, marker) in zip(errors.items(), _LINES):
        x = _depth(values)
        ax.plot(x, values, color=colour, marker=marker, markersize=5)
        ax.annotate(name, (x[-1], values[-1]), (10, 0), textcoords=_POINTS, color=colour, va="center")
    _depth_axes(ax)
    ax.set_title(title)
    figure.alt = f"{title}: relative error after the embedding and at the head, " + ", ".join(
        f"{name} {100 * values[0]:.2g} % and {100 * values[-1]:.2g} %" for name, values in errors.items()
    )
    return figure


def _depth(values: Numbers) -> np.ndarray:
    return np.arange(len(values)) / 2


def _depth_axes(ax: Axes) -> None:
    ax.set(xlabel=_DEPTH, ylabel="relative error", yscale="log")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda error, _: f"{100 * error:g} %")
    ax.yaxis.set_minor_locator(ticker.NullLocator())


@styled
def plot_sources(squares: Mapping[str, Numbers], total: Numbers, klds: Mapping[str, float], total_kld: float) -> Figure:
    """Whose error it is: of the residual stream along the depth, and in the predictions.

    squares: squared relative errors along the depth with one part of the model quantized alone, by name of the part as
        tensors are named ("blk.0.attn"), in the order of the model.  total: relative errors with all of them quantized.
    klds: in nats per token, by name of the part.  total_kld: with all of them quantized.
    """
    figure = canvas(8.6, 4.2, left=0.8, right=0.2, bottom=0.85)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.25, 1), "wspace": 0.5})
    colours = _part_colours(list(klds))
    x, bottom = _depth(total), np.zeros(len(total))
    for name, height in squares.items():
        left.bar(x, height, 0.36, bottom, color=colours[name], edgecolor="#FBFAF7", linewidth=0.7)
        bottom += height
    left.plot(x, np.square(total), "D", color="#000000", markersize=5, label="all parts at once")
    left.legend(loc="upper left", handletextpad=0.2)
    left.set(xlabel="layers passed (a half: attention,\nbut not yet MLP)", ylabel="squared relative error")
    left.set(title="in the residual stream", ylim=(0, 1.25 * max(bottom.max(), max(total) ** 2)))
    left.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    left.grid(False, axis="x")
    right.barh(list(klds), [1000 * kld for kld in klds.values()], color=[colours[name] for name in klds])
    right.set(xlabel="KLD, thousandths of a nat per token")
    right.set_title(f"in the predictions: sum {sum(klds.values()):.2g},\nall parts at once {total_kld:.2g}")
    right.grid(False, axis="y")
    worst = max(klds, key=lambda name: klds[name])
    figure.alt = (
        f"squared relative errors of the stream by part: at the end they add up to {bottom[-1]:.2g}, "
        f"with all parts quantized at once it is {total[-1] ** 2:.2g}; KLDs of single parts add up to "
        f"{sum(klds.values()):.2g}, all at once have {total_kld:.2g}, and most comes from the {worst}"
    )
    return figure


def _part_colours(parts: Sequence[str]) -> dict[str, Any]:
    """Blue for attention, orange for MLP, darker from layer to layer; grey for what is outside of the layers."""
    maps = {"attn": colormaps["Blues"], "ffn": colormaps["Oranges"]}
    kinds = [name.rpartition(".")[2] for name in parts]
    colours = {}
    for i, (name, kind) in enumerate(zip(parts, kinds)):
        darkness = 0.4 + 0.5 * kinds[:i].count(kind) / max(kinds.count(kind) - 1, 1)
        colours[name] = maps[kind](darkness) if kind in maps else "#777777"
    return colours


class Mixture(NamedTuple):
    """A model whose groups of tensors have formats of their own."""

    bpw: float
    """bits per weight of the whole model"""
    kld: float
    """from the model before quantization, in nats per token"""
    errors: Numbers
    """relative errors of the residual stream along the depth"""


GROUPS = ("attention", "MLP", "embedding and head")
"""of tensors, each of which has a format of its own in a mixture"""


def mixtures(
    packed: Mapping[str, Model], measure: Callable[[Callable[[str], str]], tuple[float, Numbers]]
) -> dict[tuple[str, ...], Mixture]:
    """Every mixture of some formats, by the formats of the `GROUPS`.

    packed: the model in each format, by its name.  measure: KLD and errors of a mixture, given the function from the
    name of a tensor to that of its format.
    """
    table, some = {}, next(iter(packed.values()))
    for choice in itertools.product(packed, repeat=len(GROUPS)):

        def chosen(name: str, choice: tuple[str, ...] = choice) -> str:
            return choice[0 if ".attn" in name else 1 if ".ffn" in name else 2]

        n_bytes = sum(packed[chosen(name)].tensors[name].nbytes for name in some.tensors)
        table[choice] = Mixture(8 * n_bytes / some.n_weights, *measure(chosen))
    return table


@styled
def plot_mixture(table: Mapping[tuple[str, ...], Mixture], choice: tuple[str, ...]) -> Figure:
    """One mixture of formats among all: its error along the depth, and its KLD and size.

    table: by the formats of the `GROUPS`.
    In grey the mixtures that give all groups one format, and on the right all others too.
    """
    chosen = table[choice]
    verdict = f"{chosen.bpw:.2f} bits per weight, KLD {chosen.kld:.2g}"
    smaller = [mixture for mixture in table.values() if mixture.bpw <= chosen.bpw and mixture.kld < chosen.kld]
    remark = f"{len(smaller)} are better and no larger" if smaller else "nothing better is as small"
    figure = canvas(8.6, 3.9, left=0.8, right=0.2, top=0.7)
    figure.suptitle(f"{verdict}: {remark}", x=0.8 / 8.6, ha="left")
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.55})
    grey: dict[str, Any] = {"color": "#555555", "textcoords": _POINTS}
    right.plot([m.bpw for m in table.values()], [m.kld for m in table.values()], "o", color="#BBB7AC", markersize=4)
    for name in dict.fromkeys(formats[0] for formats in table):
        uniform = table[(name,) * len(choice)]
        x = _depth(uniform.errors)
        left.plot(x, uniform.errors, color="#BBB7AC", linewidth=1.2)
        left.annotate(name, (x[-1], uniform.errors[-1]), (10, 0), va="center", **grey)
        right.plot(uniform.bpw, uniform.kld, "o", color="#555555", markersize=5)
        right.annotate(name, (uniform.bpw, uniform.kld), (-4, -5), ha="right", va="top", **grey)
    left.plot(_depth(chosen.errors), chosen.errors, color=VERMILION, marker="o", markersize=5)
    _depth_axes(left)
    left.set(title="in the residual stream", xlabel="layers passed")
    right.plot(chosen.bpw, chosen.kld, "o", color=VERMILION, markersize=9)
    right.set(yscale="log", xlabel="bits per weight", ylabel="KLD, nats per token", title="in the predictions")
    right.yaxis.set_minor_locator(ticker.NullLocator())
    # Below and left of the best there is room for names.
    right.set_xlim(min(m.bpw for m in table.values()) - 1.3)
    right.margins(y=0.15)
    formats = ", ".join(f"{group} {name}" for group, name in zip(GROUPS, choice))
    figure.alt = f"{formats}: {verdict}, {remark}; relative error {100 * chosen.errors[-1]:.2g} % after the last layer"
    return figure


# ── activations ────────────────────────────────────────────────────────────────────────────────────────────


@styled
def plot_activation(x: Float[ArrayLike, " channels"], scales: Mapping[str, Float[ArrayLike, "..."]]) -> Figure:
    """The activations of one token by magnitude, and below which of them a scale leaves nothing.

    scales: what one step of the codes is worth, for all channels or for each, by name of the way to choose it.
    """
    x = np.abs(np.asarray(x, np.float32))
    figure = canvas(8.6, 4.0, right=2.3)
    ax = figure.add_subplot(yscale="log", xlabel="channel", ylabel="magnitude")
    ax.plot(x, ".", color="#8A867C", markersize=4)
    lost = {}
    for (name, scale), (colour, _), style in zip(scales.items(), _LINES, ("--", "-.", "-")):
        # What is nearer to zero than to the first code.
        threshold = np.broadcast_to(np.asarray(scale) / 2, x.shape)
        lost[name] = float(np.mean(x < threshold))
        label = f"{name}:\n{100 * lost[name]:.0f} % become zero"
        ax.step(np.arange(x.size), threshold, color=colour, linestyle=style, where="mid", label=label)
    ax.set(xlim=(-4, x.size + 4), ylim=(x[x > 0].min() / 1.5, 2 * x.max()))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), labelspacing=1)
    ax.set_title("One token: what lies below a line becomes zero")
    figure.alt = f"{x.size} activations of a token, the largest {x.max():.2g}; what becomes zero: " + ", ".join(
        f"{name} {100 * share:.0f} %" for name, share in lost.items()
    )
    return figure


# ── bytes ──────────────────────────────────────────────────────────────────────────────────────────────────


@styled
def plot_offload(rates: Mapping[str, Numbers], fits: Mapping[str, int], room: str) -> Figure:
    """Tokens per second at most, by how many layers lie in the faster memory, a line for each format.

    rates: with 0, 1, 2, ... layers there.  fits: how many of them the faster memory has room for; beyond it a line is
    dotted.  room: what that memory is, in words.
    """
    figure = canvas(8.6, 3.8, right=0.9)
    ax = figure.add_subplot(yscale="log", xlabel=f"layers in {room}", ylabel="tokens per second, at most")
    for (name, values), (colour, marker) in zip(rates.items(), _LINES):
        n, last = fits[name], len(values) - 1
        ax.plot(range(n + 1), values[: n + 1], color=colour)
        ax.plot(range(n, last + 1), values[n:], color=colour, linestyle=":")
        ax.plot(n, values[n], marker, color=colour)
        ax.annotate(f"{values[n]:.0f}", (n, values[n]), (-6, 8), textcoords=_POINTS, color=colour, ha="right")
        ax.annotate(name, (last, values[-1]), (10, 0), textcoords=_POINTS, color=colour, va="center")
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.margins(y=0.12)
    ax.set_title("The slower memory decides, until all is in the faster one")
    figure.alt = f"most tokens per second by layers in {room}: " + ", ".join(
        f"{name} {values[0]:.0f} with none, {values[fits[name]]:.0f} with the {fits[name]} that fit"
        for name, values in rates.items()
    )
    return figure


@styled
def plot_roofline(limits: Limits, rates: Mapping[str, Sequence[ProductRate]]) -> Figure:
    """Operations a second of products in float32 by operations for each byte of the matrix, below what the machine
    allows: the roofline (Williams et al. 2009).

    rates: of the same products with matrices in each format, by its name.
    """
    figure = canvas(8.6, 4.2, left=0.85, right=0.3)
    ax = figure.add_subplot(xscale="log", yscale="log")
    ax.set(xlabel="operations for each byte of the matrix", ylabel="10⁹ operations a second")
    peak, ridge = limits.float32_gflop_s, limits.float32_gflop_s / limits.memory_gb_s
    points = [rate for line in rates.values() for rate in line]
    left, right = min(rate.intensity for rate in points) / 1.5, max(ridge, *(rate.intensity for rate in points)) * 1.5
    roof = f"roof: {limits.memory_gb_s:.0f} GB/s, {peak:.0f} · 10⁹ operations a second"
    ax.plot([left, ridge, right], [left * limits.memory_gb_s, peak, peak], color="#555555", linewidth=3, label=roof)
    for (name, line), (colour, marker) in zip(rates.items(), _LINES):
        ax.plot([r.intensity for r in line], [r.gflop_s for r in line], color=colour, marker=marker, label=name)
    ax.legend(loc="lower right")
    # Below the points there is room for the legend.
    ax.set(
        xlim=(left, right),
        ylim=(min(rate.gflop_s for rate in points) / 5, 1.6 * max(peak, *(r.gflop_s for r in points))),
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())
    n_rows = ", ".join(str(rate.n_rows) for rate in next(iter(rates.values())))
    ax.set_title(f"Products with {n_rows} rows, from left to right")
    figure.alt = (
        f"{limits.memory_gb_s:.0f} GB/s and {peak:.0f} · 10⁹ operations a second at most; reached: "
        + "; ".join(
            f"{name} " + ", ".join(f"{rate.gflop_s:.2g} with {rate.n_rows}" for rate in line)
            for name, line in rates.items()
        )
    )
    return figure
