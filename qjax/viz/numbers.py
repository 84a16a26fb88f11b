"""Which values bits stand for: integers and floats of any width, their bits as a table, their grids as pictures."""

import html
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Float64, Int, Int64
from matplotlib.axes import Axes

from qjax.errors import QjaxError
from qjax.metrics import tensor_error
from qjax.viz.figure import Figure, canvas, styled
from qjax.viz.html import Html

# ── types of numbers ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Integer:
    """Whole numbers; with ``signed`` in two's complement, where the highest bit counts -2^(bits-1)."""

    name: str
    bits: int
    signed: bool = True

    special = "none"

    @property
    def fields(self) -> tuple[int, int, int]:
        """Widths of sign, exponent and mantissa (here: the number)."""
        return int(self.signed), 0, self.bits - self.signed

    @property
    def largest(self) -> int:
        return 2 ** (self.bits - self.signed) - 1

    def decode(self, codes: Int[ArrayLike, "*s"]) -> Float64[np.ndarray, "*s"]:
        """The values of bit patterns."""
        codes = np.asarray(codes, np.int64)
        return np.asarray(codes - (codes >> (self.bits - 1) << self.bits) * self.signed, np.float64)

    def encode(self, x: ArrayLike) -> Int64[np.ndarray, "*s"]:
        """The bit patterns nearest to ``x``, a tie to the even one; the outermost for what lies beyond; 0 for NaN."""
        lowest = -(2 ** (self.bits - 1)) if self.signed else 0
        nearest = np.rint(np.clip(np.nan_to_num(np.asarray(x, np.float64)), lowest, lowest + 2**self.bits - 1))
        return np.asarray(nearest.astype(np.int64) & (2**self.bits - 1))


@dataclass(frozen=True)
class Binary:
    """Floats as IEEE 754 has them, with any number of bits: a sign, an exponent, a mantissa.

    special: what the highest exponent means. "ieee": infinity and NaN.  "nan": numbers, but for one NaN (E4M3).
        "none": numbers; what is too large becomes the largest, and NaN has no pattern.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    special: str = "none"

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def fields(self) -> tuple[int, int, int]:
        """Widths of sign, exponent and mantissa."""
        return 1, self.exponent_bits, self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest_code(self) -> int:
        """The pattern of the largest finite number."""
        everything = 2 ** (self.bits - 1) - 1
        return everything - {"ieee": 2**self.mantissa_bits, "nan": 1, "none": 0}[self.special]

    @property
    def largest(self) -> float:
        return float(self.decode(self.largest_code))

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest number above zero, which is the smallest step too."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def epsilon(self) -> float:
        """From 1 to the next number."""
        return 2.0**-self.mantissa_bits

    @property
    def count(self) -> int:
        """How many finite values there are; zero has two patterns and counts once."""
        return 2 * self.largest_code + 1

    def decode(self, codes: Int[ArrayLike, "*s"]) -> Float64[np.ndarray, "*s"]:
        """The values of bit patterns."""
        codes = np.asarray(codes, np.int64)
        magnitude = codes & (2 ** (self.bits - 1) - 1)
        # Octave 0 is that of the denormal numbers and the first normal ones: their steps are the same.
        octave = np.maximum(magnitude >> self.mantissa_bits, 1) - 1
        value = (magnitude - (octave << self.mantissa_bits)) * np.exp2(octave) * self.smallest
        beyond = np.inf if self.special == "ieee" else np.nan
        value = np.where(magnitude > self.largest_code, beyond, value)
        value = np.where(magnitude > self.largest_code + 1, np.nan, value)
        return np.where(codes >> (self.bits - 1), -value, value)

    def encode(self, x: ArrayLike) -> Int64[np.ndarray, "*s"]:
        """The bit patterns nearest to ``x``, a tie to the even one.

        What rounds to more than the largest number becomes what comes next in ``special``: infinity, NaN, or the
        largest itself.  NaN becomes a NaN, or 0 where there is none.
        """
        x = np.asarray(x, np.float64)
        magnitude = np.clip(np.nan_to_num(np.abs(x)), self.smallest / 4, 2 * self.largest)
        octave = np.maximum(np.frexp(magnitude)[1] - 2 + self.bias, 0).astype(np.int64)
        nearest = np.rint(magnitude / (np.exp2(octave) * self.smallest)).astype(np.int64)
        # Patterns count the numbers upwards, so one too many carries into the next octave by itself.
        codes = np.minimum(nearest + (octave << self.mantissa_bits), self.largest_code + (self.special != "none"))
        nan = {"ieee": self.largest_code + 1 + 2 ** (self.mantissa_bits - 1), "nan": self.largest_code + 1, "none": 0}
        codes = np.where(np.isnan(x), nan[self.special], codes)
        return np.where(np.signbit(x) & ~np.isnan(x), codes | 2 ** (self.bits - 1), codes)


NumberType = Integer | Binary

_SHORT_NAMES = {"fp32": "e8m23", "tf32": "e8m10", "fp16": "e5m10", "bf16": "e8m7"}


def number_type(name: str) -> NumberType:
    """The type called ``name``: int8, uint4, e4m3 (exponent and mantissa bits), fp32, tf32, fp16, bf16.

    Of the floats those of 16 bits and more and e5m2 have infinities and NaN as IEEE 754 says, e4m3 has one NaN, and
    the others neither, as in the OCP specifications of 8-bit floats and of microscaling formats.
    Raises QjaxError for other names.
    """
    if match := re.fullmatch(r"(u?)int([1-9]|[12]\d|3[0-2])", name):
        return Integer(name, int(match[2]), signed=not match[1])
    if match := re.fullmatch(r"e([1-8])m(1?\d|2[0-3])", _SHORT_NAMES.get(name, name)):
        exponent_bits, mantissa_bits = int(match[1]), int(match[2])
        ieee = exponent_bits + mantissa_bits >= 15 or (exponent_bits, mantissa_bits) == (5, 2)
        return Binary(name, exponent_bits, mantissa_bits, "ieee" if ieee else "nan" if name == "e4m3" else "none")
    known = ", ".join(_SHORT_NAMES)
    raise QjaxError(f"unknown type of numbers {name!r}. Use int1 to int32, uint1 to uint32, e1m0 to e8m23, {known}")


def nearest(x: ArrayLike, name: str) -> Float64[np.ndarray, "*s"]:
    """What ``x`` becomes in the type called ``name``."""
    type = number_type(name)
    return type.decode(type.encode(x))


def values(name: str) -> Float64[np.ndarray, " n"]:
    """All finite values of a type of at most 16 bits, in order; zero once.  Raises QjaxError for wider ones."""
    type = number_type(name)
    if type.bits > 16:
        raise QjaxError(f"{name} has 2^{type.bits} patterns, too many to list; take a type of at most 16 bits")
    all = type.decode(np.arange(2**type.bits))
    return np.unique(all[np.isfinite(all)]) + 0.0


def sqnr_db(
    x: Float[ArrayLike, "rows columns"], name: str, scale: Literal["none", "row", "tensor"] = "tensor"
) -> float:
    """The SQNR of ``x`` in the type called ``name``, in dB.

    scale: what shares a factor: nothing, so that there is none, each row, or all.  The best of 25 is taken: the first
        puts the largest magnitude on the largest number of the type, each further one is 7 % larger.
    """
    x = np.asarray(x, np.float64)
    if scale == "none":
        return tensor_error(x, nearest(x, name)).sqnr_db
    largest = np.abs(x).max(axis=1 if scale == "row" else None, keepdims=True)
    factors = (number_type(name).largest / largest * 2.0**power for power in np.arange(0, 2.5, 0.1))
    return max(tensor_error(x, nearest(x * factor, name) / factor).sqnr_db for factor in factors)


# ── bits ───────────────────────────────────────────────────────────────────────────────────────────────────

_COMMON = ("fp32", "tf32", "fp16", "bf16", "e4m3", "e5m2", "e2m1", "int8", "int4")
# Sign, exponent, mantissa: text and ground, which differ in grey as well.
_FIELD_COLOURS = (("#FFFFFF", "#8A3B00"), ("#222222", "#9CCBEA"), ("#222222", "#EFE6CF"))


def bit_table(number: str, names: Sequence[str] = _COMMON) -> Html:
    """The bits of a number in each type, the value that they stand for, and its relative error.

    number: as Python writes it, or a fraction such as "1/3".  What is no number is said so above an empty table,
        which is as high as a full one.
    """
    typed = textwrap.shorten(number, 40, placeholder="…")
    try:
        x, said = _number(number), f"The bits of {typed}"
    except (ValueError, ZeroDivisionError):
        x, said = None, f"“{typed}” is not a number. Try 0.1, 1/3, -448, 1e-8, inf or nan."
    rows = [[name, *_row(number_type(name), x)] for name in names]
    head = "".join(_cell("th", text, align) for text, align in zip(_HEAD, _ALIGN))
    body = "".join(
        "<tr>" + "".join(_cell("td", text, align) for text, align in zip(row, _ALIGN)) + "</tr>" for row in rows
    )
    caption = f'<caption style="text-align: left; padding: 4px 0"><b>{html.escape(said)}</b></caption>'
    # A line height of its own, for that of a widget is twice that of a cell's output.
    style = "border-collapse: collapse; white-space: nowrap; line-height: 1.5"
    markup = f'<table style="{style}">{caption}<tr>{head}</tr>{body}</table>'
    return Html(markup, said if x is None else f"{said}: " + ", ".join(f"{row[0]} {row[5]}" for row in rows))


_HEAD = ("type", "sign", "exponent", "mantissa, or number", "stands for", "value", "relative error")
# Not <sup>, which makes its row taller.
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_ALIGN = ("left", "right", "right", "left", "left", "left", "left")


def _number(text: str) -> float:
    above, slash, below = text.partition("/")
    return float(above) / float(below) if slash else float(text)


def _row(type: NumberType, x: float | None) -> list[str]:
    """Sign, exponent and mantissa, the sum that they are, its value and relative error; dashes for no number."""
    if x is None:
        return ["–"] * 6
    if math.isnan(x) and type.special == "none":
        return ["–", "–", "–", "", "has no NaN", ""]
    code = int(type.encode(x))
    bits, fields = f"{code:0{type.bits}b}", []
    for width, (text, ground) in zip(type.fields, _FIELD_COLOURS):
        field, bits = bits[:width], bits[width:]
        style = f"font-family: monospace; color: {text}; background: {ground}; padding: 1px 3px"
        fields.append(f'<span style="{style}">{field}</span>' if field else "")
    value = float(type.decode(code))
    return [*fields, _sum(type, code), f"{value:.9g}", _relative(value, x)]


def _sum(type: NumberType, code: int) -> str:
    """As in ``1.5 × 2⁻³``; empty for integers, zero, and what is not finite."""
    value = float(type.decode(code))
    if isinstance(type, Integer) or not math.isfinite(value) or not value:
        return ""
    exponent = code >> type.mantissa_bits & (2**type.exponent_bits - 1)
    power = max(exponent, 1) - type.bias
    return f"{value / 2.0**power:.6g} × 2{str(power).translate(_RAISED)}" + ("" if exponent else ", denormal")


def _relative(value: float, x: float) -> str:
    if value == x or math.isnan(x):
        return "exact"
    return f"{(value - x) / abs(x):+.2g}" if math.isfinite(value) and math.isfinite(x) and x else "overflow"


def _cell(tag: str, text: str, align: str) -> str:
    return f'<{tag} style="text-align: {align}; padding: 2px 6px">{text}</{tag}>'


# ── pictures of grids ──────────────────────────────────────────────────────────────────────────────────────

_DB_PER_BIT = 20 * math.log10(2)
_COLOURS = ("#0072B2", "#D55E00", "#007A59", "#B0578D", "#A86B00", "#2A8FC4", "#000000")
_MARKERS = "osD^v*X"
_FAINT = "#B5B1A7"


@styled
def plot_number_lines(names: Sequence[str]) -> Figure:
    """All values of some types on lines, each divided by the largest magnitude of its type; integers and floats."""
    lines = {name: values(name) for name in names}
    figure = canvas(8.6, 1.0 + 0.36 * len(names), left=0.85, right=2.0, top=0.15)
    described = {name: f"{v.size} values, {_plain(v[0])} to {_plain(v[-1])}" for name, v in lines.items()}
    figure.alt = "number lines: " + "; ".join(f"{name}, {text}" for name, text in described.items())
    ax = figure.add_subplot()
    for y, (name, v) in enumerate(lines.items()):
        colour = _COLOURS[isinstance(number_type(name), Binary)]
        _ticks(ax, y, v / np.abs(v).max(), colour, 2 if v.size <= 16 else 1)
        ax.text(1.05, y, described[name], va="center", color=colour)
    ax.set(xlim=(-1.04, 1.04), ylim=(len(lines) - 0.5, -0.5), xlabel="value / largest magnitude of its type")
    ax.set_yticks(range(len(lines)), list(lines))
    ax.grid(False)
    return figure


@styled
def plot_coverage(x: Float[ArrayLike, "..."], grids: Mapping[str, Float[ArrayLike, "_"]]) -> Figure:
    """How numbers are distributed and below it, for each grid, its values: dark if one of the numbers is nearest to it.

    grids: by name, values in order.
    """
    x = np.ravel(x)
    share, edges = np.histogram(x, bins=80)
    figure = canvas(8.6, 1.6 + 0.4 * len(grids), left=1.6, right=1.3, top=0.15)
    ax = figure.add_subplot()
    ax.stairs(-0.6 - 1.5 * share / share.max(), edges, baseline=-0.6, fill=True, color="#BBB7AC")
    described = []
    for y, grid in enumerate(np.asarray(values, np.float64) for values in grids.values()):
        used = np.isin(np.arange(grid.size), np.searchsorted((grid[1:] + grid[:-1]) / 2, x))
        _ticks(ax, y, grid[~used], _FAINT, 1)
        _ticks(ax, y, grid[used], _COLOURS[0], 3)
        described.append(f"{used.sum()} of {grid.size} used")
        ax.text(1.02, y, described[-1], va="center", transform=ax.get_yaxis_transform())
    figure.alt = f"a histogram of numbers from {x.min():.2g} to {x.max():.2g} over grids: " + ", ".join(
        f"{name}, {text}" for name, text in zip(grids, described)
    )
    ax.set(ylim=(len(grids) - 0.5, -2.3), xlabel="number")
    ax.set_yticks(range(-1, len(grids)), ["numbers", *grids])
    ax.grid(False)
    return figure


def _ticks(ax: Axes, y: float, v: np.ndarray, colour: str, width: float) -> None:
    ax.axhline(y, color="#DDDAD2", linewidth=0.7, zorder=0)
    ax.plot(v, np.full(v.size, y), "|", color=colour, markersize=13, markeredgewidth=width)


def _plain(x: float) -> str:
    return f"{x:g}".replace("-", "−")


@styled
def plot_staircase(name: str) -> Figure:
    """What numbers become in a type, and how many of its values lie between each power of two and the next."""
    v = values(name)
    x = np.linspace(v[0], v[-1], 1500)
    octaves, counts = np.unique(np.frexp(v[v > 0])[1] - 1, return_counts=True)
    figure = canvas(8.6, 3.3, left=0.95)
    figure.subplots_adjust(wspace=0.25)
    left, right = figure.subplots(1, 2)
    left.plot(x, x, color="#999999", linewidth=1)
    left.plot(x, nearest(x, name), color=_COLOURS[0])
    left.set(xlabel="number", ylabel="what it becomes")
    left.set_title(f"{name}: {v.size} values, largest {_plain(v[-1])}")
    left.locator_params(nbins=5)
    right.bar(octaves, counts, color=_COLOURS[0])
    right.set(xlabel="octave k: from 2ᵏ to below 2ᵏ⁺¹", ylabel="values in it", ylim=(0, counts.max() * 1.15))
    right.set_title(f"smallest step {np.diff(v).min():.3g}")
    right.locator_params(integer=True)
    right.grid(False, axis="x")
    figure.alt = (
        f"{name}: a staircase of {v.size} values, largest {v[-1]:g}, smallest step {np.diff(v).min():.3g}; values in "
        f"the octaves from 2^{octaves[0]} to 2^{octaves[-1]}: {counts[0]} in the first, {counts[-1]} in the last"
    )
    return figure


@styled
def plot_steps(names: Sequence[str]) -> Figure:
    """The distance from a number to the next, and the same divided by the number, for numbers of all sizes."""
    exponents = np.arange(-20, 18, 1 / 16)
    x = np.exp2(exponents)
    figure = canvas(8.6, 4.0)
    figure.subplots_adjust(wspace=0.22)
    for ax, title, unit in zip(figure.subplots(1, 2), ("step to the next number", "step / number"), (1, x)):
        for name, colour in zip(names, _COLOURS):
            y = np.log2(_step(number_type(name), x) / unit)
            ax.plot(exponents, y, color=colour, linewidth=1.5)
            ax.annotate(name, (-20, y[0]), (-4, 0), textcoords="offset points", color=colour, ha="right", va="center")
        ax.set(xlabel="number", title=title, xlim=(-28, 18.5), xticks=range(-20, 19, 10))
        # Powers by hand: a logarithmic axis would take longer to draw than all lines.
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(lambda power, _: f"2$^{{{power:g}}}$")
    figure.alt = "the step from a number to the next, by its size: " + ", ".join(
        f"{name} {_step(number_type(name), np.ones(1))[0]:.2g} at 1" for name in names
    )
    return figure


def _step(type: NumberType, x: Float64[np.ndarray, "*s"]) -> Float64[np.ndarray, "*s"]:
    """From ``x`` > 0 to the next number of a type; NaN beyond its largest."""
    lowest, digits = (0, 0) if isinstance(type, Integer) else (1 - type.bias, type.mantissa_bits)
    octave = 0 if isinstance(type, Integer) else np.maximum(np.frexp(x)[1] - 1, lowest)
    return np.where(x <= type.largest, np.exp2(octave - digits), np.nan)


# ── pictures of weights ────────────────────────────────────────────────────────────────────────────────────


@styled
def plot_weights(matrices: Mapping[str, Float[ArrayLike, "..."]]) -> Figure:
    """All weights, in deviations of their matrix, beside a Gaussian; and each matrix' excess kurtosis.

    Excess kurtosis is E[w⁴]/σ⁴ - 3: 0 for a Gaussian, above for heavier tails.
    """
    z = {name: np.ravel(w) / np.std(w) for name, w in matrices.items()}
    kurtosis = [float(np.mean(v**4) - 3) for v in z.values()]
    share, edges = np.histogram(np.concatenate([*z.values()]), bins=np.arange(-6, 6.01, 0.2), density=True)
    at = np.linspace(-6, 6, 200)
    figure = canvas(8.6, 3.4)
    left, right = figure.subplots(1, 2)
    left.stairs(share, edges, fill=True, color="#9CCBEA", baseline=1e-7)
    left.plot(at, np.exp(-(at**2) / 2) / math.sqrt(2 * math.pi), color=_COLOURS[1])
    left.set(yscale="log", ylim=(1e-7, 1), xlabel="weight / σ of its matrix", ylabel="density")
    left.set_title(f"{len(z)} matrices, and a Gaussian")
    right.plot(kurtosis, range(len(z)), "o", color=_COLOURS[0], markersize=5)
    right.set(xlabel="excess kurtosis", ylabel="matrix, in the order of the file", yticks=[], xlim=(-1.7, 3.6))
    right.invert_yaxis()
    for x, label in ((-1.2, "uniform"), (0, "Gaussian"), (3, "Laplace")):
        right.axvline(x, color="#888888", linestyle=":", linewidth=1, zorder=0)
        right.annotate(label, (x, 1.03), xycoords=("data", "axes fraction"), ha="center")
    figure.alt = (
        f"histogram of the weights of {len(z)} matrices over a Gaussian; excess kurtosis "
        f"{min(kurtosis):.2f} to {max(kurtosis):.2f}"
    )
    return figure


@styled
def plot_splits(sqnr_db: Mapping[str, Mapping[str, float]]) -> Figure:
    """SQNR of floats of one width by how many of their bits are exponent.

    sqnr_db: by kind of weights, then by type, in order.
    """
    types = list(next(iter(sqnr_db.values())))
    figure = canvas(8.6, 3.8, right=2.6)
    ax = figure.add_subplot(xlabel="exponent and mantissa bits, beside the sign", ylabel="SQNR, dB")
    # In the order in which the lines begin, uppermost first.
    order = sorted(sqnr_db, key=lambda kind: -sqnr_db[kind][types[0]])
    for kind, colour, marker in zip(order, _COLOURS, _MARKERS):
        ax.plot(types, [sqnr_db[kind][name] for name in types], marker=marker, color=colour, label=kind)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0, labelspacing=0.9)
    ax.set_title(f"How should {number_type(types[0]).bits} bits be split?")
    best = {kind: max(sqnr_db[kind], key=lambda name: sqnr_db[kind][name]) for kind in order}
    figure.alt = "SQNR of floats by exponent bits; the best: " + ", ".join(
        f"{kind}: {name}, {sqnr_db[kind][name]:.0f} dB" for kind, name in best.items()
    )
    return figure


@styled
def plot_bound(measured: Mapping[str, Mapping[float, float]]) -> Figure:
    """How many decibels quantizers of a Gaussian stay below 6.02 dB per bit, and how many bits that wastes.

    measured: by name of the quantizer, the SQNR in dB that so many bits per weight buy.
    """
    figure = canvas(8.6, 3.6, right=2.5)
    ax = figure.add_subplot(xlabel="bits per weight", ylabel="dB below the bound")
    ax.axhline(0, color="#555555", linestyle=":", linewidth=1)
    ax.set_title("What n bits of a Gaussian could be worth, and what they are")
    right = max(max(by_bits) for by_bits in measured.values())
    label: Any = {"xytext": (24, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    ax.annotate("bound: 6.02 dB per bit", (right, 0), **label)
    described = []
    for (name, by_bits), colour, marker in zip(measured.items(), _COLOURS, _MARKERS):
        gaps = [_DB_PER_BIT * bits - sqnr for bits, sqnr in by_bits.items()]
        ax.plot(list(by_bits), gaps, marker=marker, color=colour)
        ax.annotate(f"{name}:\n{gaps[-1] / _DB_PER_BIT:.2f} bits wasted", (right, gaps[-1]), color=colour, **label)
        described.append(f"{name} {gaps[-1]:.1f} at {max(by_bits):.1f} bits")
    ax.invert_yaxis()
    figure.alt = "decibels below the bound of 6.02 per bit: " + ", ".join(described)
    return figure
