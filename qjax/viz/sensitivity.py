"""Which tensors are fragile, and which format each gets: maps of a model's tensors, and what a mixture buys."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float
from matplotlib import colormaps, ticker
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.patches import Patch

from qjax import formats
from qjax.viz.figure import Figure, canvas, styled
from qjax.viz.plots import BLUE, VERMILION

# Colour, marker, line and filling of one way to spend bits after the other; the last two belong together.
_METHODS: tuple[dict[str, Any], ...] = (
    {"color": "#555555", "marker": "o", "linestyle": ":"},
    {"color": "#007A59", "marker": "^", "linestyle": "-"},
    {"color": BLUE, "marker": "s", "linestyle": "-"},
    {"color": VERMILION, "marker": "D", "linestyle": "-"},
    {"color": VERMILION, "marker": "D", "linestyle": "--", "markerfacecolor": "#FBFAF7"},
)
# Colour and dashes of further lines.
_LINES = ((BLUE, "-"), ("#007A59", "--"), ("#A86B00", "-."), (VERMILION, "-"), ("#000000", ":"))
# With more layers cells have no room for words.
_MAX_WORDS = 8
# Of more layers or runs of layers a sentence only says how many they are.
_MAX_RUNS = 10
# Rows of a map as a token meets them.
_KINDS = ("token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "", "output")
_ORDER = {kind: row for row, kind in enumerate(_KINDS)}


class Allocation(NamedTuple):
    """A model whose matrices have formats of their own, and what became of it."""

    formats: Mapping[str, str]
    """name of the format by name of the tensor"""
    bpw: float
    """bits per weight of the whole model"""
    klds: Float[np.ndarray, " tokens"]
    """from the model before quantization, in nats, of each token of a text"""
    ppl: float

    @property
    def kld(self) -> float:
        """Their mean."""
        return float(np.mean(self.klds))


def affordable(allocations: Sequence[Allocation], budget: float) -> Allocation | None:
    """Of those with at most ``budget`` bits per weight the one closest to the base; None if there is none."""
    return min((a for a in allocations if a.bpw <= budget), key=lambda a: a.kld, default=None)


# ── maps of tensors ────────────────────────────────────────────────────────────────────────────────────────


def _tensor_map(
    ax: Axes,
    values: Mapping[str, float],
    words: Callable[[str], str],
    colours: Colormap,
    norm: Normalize,
) -> None:
    """Layers across, kinds of tensors down; a tensor of no layer is as wide as all layers.

    words: what to write into the cell of a tensor, where there is room.
    """
    cells = {name: _place(name) for name in values}
    n_layers = 1 + max((layer for layer, _ in cells.values() if layer is not None), default=0)
    kinds = sorted({kind for _, kind in cells.values()}, key=lambda kind: (_ORDER.get(kind, 8), kind))
    gap = 0.03 if n_layers <= _MAX_WORDS else 0.0
    corners, fills = [], []
    for name, (layer, kind) in cells.items():
        left, row, width = layer or 0, kinds.index(kind), n_layers if layer is None else 1
        x, y = (left + gap, left + width - gap), (row + 0.04, row + 0.96)
        corners.append([(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])])
        fills.append(colours(norm(values[name])))
        if n_layers <= _MAX_WORDS or layer is None:
            dark = np.dot(fills[-1][:3], (0.299, 0.587, 0.114)) < 0.55
            colour = "#FFFFFF" if dark else "#111111"
            ax.text(left + width / 2, row + 0.52, words(name), ha="center", va="center", color=colour)
    # One collection: a patch for each cell would take twice as long to draw.
    ax.add_collection(PolyCollection(corners, facecolors=fills, linewidths=0))
    ax.set(xlim=(0, n_layers), ylim=(len(kinds), 0), xlabel="layer")
    step = 1 if n_layers <= _MAX_WORDS else 5
    ax.set_xticks(np.arange(0, n_layers, step) + 0.5, [f"{i}" for i in range(0, n_layers, step)])
    ax.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _place(name: str) -> tuple[int | None, str]:
    """Layer and kind of a tensor: (3, "ffn_down") of blk.3.ffn_down.weight, and (None, "output") of output.weight."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+?)(?:\.weight)?", name)
    assert match
    return int(match[1]) if match[1] else None, match[2]


def _short(name: str) -> str:
    """As in ``ffn_down, layer 3``."""
    layer, kind = _place(name)
    return kind if layer is None else f"{kind}, layer {layer}"


@styled
def plot_sensitivity(kld: Mapping[str, float], sizes: Mapping[str, int], title: str, top: int = 9) -> Figure:
    """What each tensor costs when it alone is quantized: a map of all, and the most fragile by weight.

    kld: in nats per token, by name of the tensor.  sizes: weights of each.
    top: how many are ranked, by KLD per weight, as multiples of what all tensors together have.
    """
    figure = canvas(8.6, 4.0, left=1.1, right=0.35, top=0.7)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.25, 1), "wspace": 0.62})
    figure.suptitle(title, x=0.012, ha="left")
    total = sum(kld.values())
    share = {name: 100 * value / total for name, value in kld.items()}
    norm = LogNorm(min(share.values()), max(share.values()))
    _tensor_map(left, share, lambda name: f"{share[name]:.2g}", colormaps["YlGnBu"], norm)
    left.set_title("share of all KLDs, %")
    mean = total / sum(sizes[name] for name in kld)
    per_weight = {name: value / sizes[name] / mean for name, value in kld.items()}
    ranked = sorted(per_weight, key=lambda name: -per_weight[name])[:top]
    right.barh([_short(name) for name in ranked], [per_weight[name] for name in ranked], color=BLUE)
    for row, name in enumerate(ranked):
        right.text(per_weight[name], row, f" {per_weight[name]:.2g}", va="center")
    right.invert_yaxis()
    right.set_title("KLD per weight, 1 = mean")
    right.set_xlim(0, 1.15 * per_weight[ranked[0]])
    right.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    right.grid(False, axis="y")
    worst = sorted(share, key=lambda name: -share[name])[:3]
    figure.alt = (
        f"{title}: "
        + ", ".join(f"{_short(name)} has {share[name]:.2g} % of all KLDs" for name in worst)
        + "; per weight "
        + ", ".join(f"{_short(name)} {per_weight[name]:.2g} times the mean" for name in ranked[:3])
    )
    return figure


@styled
def plot_formats(mixtures: Mapping[str, Mapping[str, str]]) -> Figure:
    """Which tensor gets which format, one map for each mixture.

    mixtures: by title, the name of the format by name of the tensor.
    """
    kinds = max(len({_place(name)[1] for name in mixture}) for mixture in mixtures.values())
    figure = canvas(8.6, 1.45 + 0.29 * kinds, left=1.1, right=0.15, bottom=0.95)
    axes = figure.subplots(1, len(mixtures), squeeze=False)[0]
    figure.subplots_adjust(wspace=0.5)
    described = []
    for ax, (title, mixture) in zip(axes, mixtures.items()):
        _format_map(ax, mixture)
        ax.set_title(title)
        described.append(f"{title}: " + ", ".join(_in_words(mixture)))
    names = _by_size(name for mixture in mixtures.values() for name in mixture.values())
    patches = [Patch(color=_format_colour(name), label=name) for name in names]
    figure.legend(handles=patches, loc="lower left", ncols=len(names), bbox_to_anchor=(0.11, 0.0))
    figure.alt = "; ".join(described)
    return figure


def _format_map(ax: Axes, mixture: Mapping[str, str]) -> None:
    bpw = {name: formats.get(format).bpw for name, format in mixture.items()}
    _tensor_map(ax, bpw, lambda name: mixture[name], colormaps["YlGnBu"], _BITS)


# From a light colour for few bits to a dark one for many, each bit by as much.
_BITS = LogNorm(1.8, 11)


def _format_colour(name: str) -> Any:
    return colormaps["YlGnBu"](_BITS(formats.get(name).bpw))


def _by_size(names: Any) -> list[str]:
    """Each name once, by bits per weight."""
    return sorted(set(names), key=lambda name: (formats.get(name).bpw, name))


def _in_words(mixture: Mapping[str, str]) -> list[str]:
    """How many tensors have each format, by size; and which, but for the most frequent format."""
    used = list(mixture.values())
    names = _by_size(used)
    usual = max(names, key=used.count, default=None)
    n_layers = len({layer for layer, _ in map(_place, mixture)} - {None})
    said = []
    for format in names:
        n = used.count(format)
        which = _which([name for name in mixture if mixture[name] == format], n_layers)
        said.append(f"{format} for {n} tensor{'s' * (n > 1)}" + f" ({which})" * (format != usual))
    return said


def _which(names: Sequence[str], n_layers: int) -> str:
    """As in ``token_embd; attn_v and ffn_down of layers 2 to 4``."""
    layers: dict[str, list[int]] = {}
    for layer, kind in sorted(map(_place, names), key=lambda place: (place[0] is not None, _ORDER.get(place[1], 8))):
        layers.setdefault(kind, []).extend([] if layer is None else [layer])
    together: dict[tuple[int, ...], list[str]] = {}
    for kind, found in layers.items():
        together.setdefault(tuple(sorted(found)), []).append(kind)
    return "; ".join(_listed(kinds) + _of_layers(found, n_layers) for found, kinds in together.items())


def _of_layers(layers: Sequence[int], n_layers: int) -> str:
    """As in `` of layers 0 to 3, 6 and 9``; nothing where there are none."""
    if not layers or len(layers) == n_layers > 1:
        return f" of all {n_layers} layers" if layers else ""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [w for run in runs for w in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    if len(words) > _MAX_RUNS:
        return f" of {len(layers)} of {n_layers} layers"
    return f" of layer{'s' * (len(layers) > 1)} {_listed(words)}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


# ── importance ─────────────────────────────────────────────────────────────────────────────────────────────


@styled
def plot_importance(means: Mapping[str, Float[ArrayLike, " columns"]], title: str) -> Figure:
    """How unevenly text drives the columns of matrices: their mean x², largest first, as multiples of the mean.

    means: mean x² of each column, by the name of the line.
    """
    figure = canvas(8.6, 3.6, left=0.85, right=2.2)
    ax = figure.add_subplot(xscale="log", yscale="log", xlabel="columns, the most important first")
    ax.set(ylabel="mean x², 1 = mean of all", title=title)
    shares = {}
    for (name, values), (colour, dashes) in zip(means.items(), _LINES):
        x = np.sort(np.asarray(values, np.float64).ravel())[::-1]
        shares[name] = 100 * x[: max(1, round(len(x) / 100))].sum() / x.sum()
        label = f"{name}: {shares[name]:.0f} %"
        ax.plot(np.arange(1, len(x) + 1), x / x.mean(), color=colour, linestyle=dashes, label=label)
    heading = "the largest 1 % have"
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), title=heading, alignment="left", labelspacing=0.8)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    figure.alt = f"{title}: " + ", ".join(
        f"1 % of the columns of {name} have {share:.0f} % of the importance" for name, share in shares.items()
    )
    return figure


# ── what bits buy ──────────────────────────────────────────────────────────────────────────────────────────


@styled
def plot_allocations(table: Mapping[str, Sequence[Allocation]], title: str) -> Figure:
    """KLD by size, a line for each way to spend bits.

    table: by the name of the way; each drawn in the order of its sizes.
    """
    figure = canvas(8.6, 4.2, left=0.85, right=1.9)
    ax = figure.add_subplot()
    _lines(ax, table)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), labelspacing=0.8)
    ax.set_title(title)
    figure.alt = f"{title}: KLD by bits per weight, " + "; ".join(
        f"{method} from {ordered[0].kld:.2g} at {ordered[0].bpw:.2f} to {ordered[-1].kld:.2g} at {ordered[-1].bpw:.2f}"
        for method, ordered in ((method, _sorted(rows)) for method, rows in table.items())
    )
    return figure


def _lines(ax: Axes, table: Mapping[str, Sequence[Allocation]]) -> None:
    ax.set(yscale="log", xlabel="bits per weight, whole model", ylabel="KLD, nats per token")
    for (method, rows), style in zip(table.items(), _METHODS):
        ordered = _sorted(rows)
        line = {"markersize": 5, "linewidth": 1.3, "label": method} | style
        ax.plot([a.bpw for a in ordered], [a.kld for a in ordered], **line)
    # Powers of ten, written as such, would take as long to draw as all the rest.
    ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.yaxis.set_minor_locator(ticker.NullLocator())


def _sorted(rows: Sequence[Allocation]) -> list[Allocation]:
    return sorted(rows, key=lambda a: a.bpw)


@styled
def plot_allocation(table: Mapping[str, Sequence[Allocation]], budget: float, method: str) -> Figure:
    """What a budget buys in one way of spending it: the formats, and its place among all.

    table: as for `plot_allocations`.  budget: bits per weight of the whole model.
    """
    figure = canvas(8.6, 4.5, left=1.1, right=0.15, top=0.75, bottom=1.1)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.3, 1), "wspace": 0.5})
    _lines(right, table)
    ends = right.get_xlim()
    right.axvspan(budget, ends[1], color="#888888", alpha=0.15, linewidth=0)
    right.set_xlim(*ends)
    right.set_title("all mixtures, by size")
    handles, names = right.get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names), columnspacing=1.2, handlelength=1.8)
    bought = affordable(table[method], budget)
    if bought is None:
        verdict = f"{budget:g} bits per weight buy no {method} mixture"
        left.axis("off")
    else:
        verdict = (
            f"{method}, {bought.bpw:.2f} of {budget:g} bits per weight: KLD {bought.kld:.2g}, PPL {bought.ppl:.3f}"
        )
        _format_map(left, bought.formats)
        left.set_title("which tensor got which format")
        right.plot(bought.bpw, bought.kld, "o", markersize=16, fillstyle="none", color="#222222")
    figure.suptitle(verdict, x=0.012, ha="left")
    figure.alt = "; ".join([verdict, *(_in_words(bought.formats) if bought else ())])
    return figure


# ── training ───────────────────────────────────────────────────────────────────────────────────────────────


@styled
def plot_losses(losses: Mapping[str, Sequence[float]], title: str, unit: str) -> Figure:
    """Loss by step, a line for each run.

    losses: of each step, by the name of the run.  unit: what they are, as the axis says it.
    """
    figure = canvas(8.6, 3.0, left=0.85, right=1.2)
    ax = figure.add_subplot(xlabel="step", ylabel=unit, title=title)
    for (name, values), (colour, dashes) in zip(losses.items(), _LINES):
        ax.plot(np.arange(1, len(values) + 1), values, color=colour, linestyle=dashes)
        ax.text(len(values), values[-1], f"  {name}", color=colour, va="center")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
    figure.alt = f"{title}: {unit}, by step, " + "; ".join(
        f"{name} from {values[0]:.2g} to {values[-1]:.2g}" for name, values in losses.items()
    )
    return figure
