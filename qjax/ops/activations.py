"""How the input x (*batch, d_in) of a matrix product is rounded while a model runs: activation quantization.

    x ─ round ─► x̂ = step (q - zero) ─ product ─► x̂ @ w.T

What shares a step may be a row of x, as it comes (dynamic, per token: Yao et al. 2022, ZeroQuant); all rows of one
matrix, or a column of them, within a range that was found before (static: Xiao et al. 2022, SmoothQuant, eq. 1); or a
block of a row, as ggml has it.  A step for each column is for measuring what the outliers of some columns cost: codes
of different steps cannot be summed as integers.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float32

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.formats.plain import plain_format
from qjax.tensor import QTensor, dequantize

PER = ("token", "tensor", "channel")


class Range(NamedTuple):
    """The values that a grid covers, of all columns or of each: Arrays of shape () or (d_in,)."""

    low: Any
    high: Any


class Grid(NamedTuple):
    """Values step (q - zero), q being whole numbers from `least` to `most`."""

    step: Any
    zero: Any
    least: int
    most: int


@dataclass(frozen=True)
class Uniform:
    """Whole multiples of a step.

    bits: of a code, 2 to 8.
    per: what has a step of its own: "token", a row of x, by its own extremes; "tensor" and "channel", all rows together
        or a column of them, by a Range that is given.
    symmetric: codes -(2^(bits-1) - 1) to 2^(bits-1) - 1, for magnitudes up to the larger end of the range.  Else 0 to
        2^bits - 1 with a code that stands for zero, for the range as it is, made to reach zero (Nagel et al. 2021,
        2.2).
    Values outside the range become its ends.  Raises QjaxError for others of these.
    """

    bits: int = 8
    per: str = "token"
    symmetric: bool = True

    def __post_init__(self):
        if not 2 <= self.bits <= 8 or self.per not in PER:
            raise QjaxError(
                f"activations of {self.bits} bits per {self.per}: expected 2 to 8 bits, per {', '.join(PER)}"
            )

    @property
    def name(self) -> str:
        return f"{'int' if self.symmetric else 'uint'}{self.bits}-{self.per}"

    @property
    def static(self) -> bool:
        """Whether it takes a Range."""
        return self.per != "token"

    def grid(self, range: Range, xp: Any = jnp) -> Grid:
        """The grid of each range; xp: jnp, or np for float64."""
        if self.symmetric:
            most = 2 ** (self.bits - 1) - 1
            return Grid(xp.maximum(abs(range.low), abs(range.high)) / most, xp.zeros_like(range.low), -most, most)
        low, most = xp.minimum(range.low, 0), 2**self.bits - 1
        step = (xp.maximum(range.high, 0) - low) / most
        return Grid(step, xp.round(-low / xp.where(step > 0, step, 1)), 0, most)

    def of(self, x: Float[Array, "*batch d_in"], range: Range | None) -> Grid:
        """The grid for x.  Raises QjaxError where a Range is needed and there is none."""
        if not self.static:
            range = Range(jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True))
        elif range is None:
            raise QjaxError(f"{self.name} needs ranges; find them with qjax.evaluate.calibrate")
        return self.grid(range)

    def __call__(
        self, x: Float[Array, "*batch d_in"], weight: Any = None, range: Range | None = None
    ) -> Float32[Array, "*batch d_in"]:
        """x̂, to half a step of x within the range."""
        step, zero, least, most = self.of(x, range)
        codes = jnp.clip(jnp.round(x / jnp.where(step > 0, step, 1)) + zero, least, most)
        return step * (codes - zero)


@dataclass(frozen=True)
class Blocks:
    """The blocks of a format, filled as ggml fills them with activations.

    format: None is the one that ggml's CPU code multiplies with the weight's (`Format.activations`): so llama.cpp
        rounds activations when it runs on a CPU.  It also sums in another order, and keeps the sums of Q8_1's blocks
        in 16 bits.
    """

    format: Format | None = None

    static = False

    @property
    def name(self) -> str:
        return "ggml" if self.format is None else self.format.name.lower()

    def __call__(
        self, x: Float[Array, "*batch d_in"], weight: Any = None, range: Range | None = None
    ) -> Float32[Array, "*batch d_in"]:
        """x̂.  Raises QjaxError where blocks do not divide d_in, and where ggml has no product with the weight."""
        return dequantize(packed(x, self.format or _in_ggml(weight)))


Rounding = Uniform | Blocks


def rounding(name: str) -> Rounding:
    """A rounding by its name, in any case: int8-token, uint4-tensor, int8-channel ..., a format (q8_0, q8_k), or ggml.

    Raises QjaxError for another.
    """
    if found := re.fullmatch(rf"(u?)int([2-8])-({'|'.join(PER)})", name.lower()):
        return Uniform(int(found[2]), found[3], not found[1])
    if name.lower() == "ggml":
        return Blocks()
    try:
        format = formats.get(name)
    except QjaxError:
        raise QjaxError(
            f"activations {name!r}: expected int8-token, int8-tensor or int8-channel (int2 to int8, uint2 to uint8), "
            "ggml, or a format such as q8_0 or q8_k"
        ) from None
    if not format.encodable or format.needs_importance:
        raise QjaxError(f"activations {name!r}: {format.name} cannot round what a model computes. Use q8_0.")
    return Blocks(format)


def packed(x: Float[Array, "*rows d_in"], format: Format) -> QTensor:
    """Rows in a format, as ggml rounds what a model computes.  Raises QjaxError where blocks do not divide d_in."""
    format = format.resolve(x.shape)
    fields = format.encode_activations(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, format.block_size))
    # Without the barrier XLA may leave out a conversion to float16 and back, and with it the rounding.
    return QTensor(lax.optimization_barrier(fields), format)


def _in_ggml(weight: Any) -> Format:
    """The format of what ggml multiplies a weight with."""
    (leaf, *_) = jax.tree.leaves(weight, is_leaf=lambda a: isinstance(a, QTensor))
    format = leaf.format if isinstance(leaf, QTensor) else plain_format(leaf.dtype)
    if format.activations is None:
        raise QjaxError(f"ggml has no products with {format.name}, so none of its roundings. Use q8_0 or int8-token.")
    return formats.get(format.activations)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "range"], meta_fields=["rounding"])
@dataclass(frozen=True)
class Rounded:
    """A matrix (d_out, d_in) whose other factor is rounded before they are multiplied; leading axes go before all."""

    weight: Any
    """Array, QTensor or Sharded"""
    rounding: Rounding
    range: Any = None
    """a Range where the rounding is static"""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def round(self, x: Float[Array, "*batch d_in"]) -> Float32[Array, "*batch d_in"]:
        return self.rounding(x, self.weight, self.range)

    @property
    def integer_step(self) -> bool:
        """Whether the rounded values of a row are multiples of one step, so that their codes can be summed."""
        return isinstance(self.rounding, Uniform) and self.rounding.symmetric and self.rounding.per != "channel"

    def step(self, x: Float[Array, "*batch d_in"]) -> Float32[Array, "*batch 1"]:
        """That step of each row."""
        assert isinstance(self.rounding, Uniform)
        return jnp.broadcast_to(self.rounding.of(x, self.range).step, (*x.shape[:-1], 1))


def as_range(low: Any, high: Any) -> Range:
    """A Range in float32."""
    return Range(np.asarray(low, np.float32), np.asarray(high, np.float32))
