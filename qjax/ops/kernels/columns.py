"""Matrices laid out as the CPU reads them while it generates: for products with one row.

A product with one row reads each weight once, so it takes as long as its bytes take.  XLA makes vector code along the
last axis only, so here that is the axis of the output rows; the terms of a group of weights are written out one by one:

    y[n] = Σ_g scale[g, n] a[g] (Σ_i code[g, i, n] x[g, i])  +  offset[g, n] a[g] Σ_i x[g, i]

Where codes take 4 bits, x is rounded to int8, each group with a scale a of its own (dynamic quantization, as in
llama.cpp), since the sum over a group then fits int16; where they take a byte, x stays float32 and a is 1.  Many rows,
as those of a prompt, are multiplied with tiles of the matrix made dense.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int, Int8

from qjax.ops.kernels import tiles
from qjax.tensor import QTensor

_GROUP = 32
"""Weights that share a scale of the activations, as in Q8_0."""
_FEW_ROWS = 8
"""So many rows of x are multiplied one by one."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "offset", "unit", "layer"],
    meta_fields=["group"],
)
@dataclass(frozen=True)
class Columns:
    """A matrix (d_out, d_in), output rows last; made by `columns` from a QTensor, read by `multiply`.

    Leading axes, as those of stacked layers, go before all; `of_layer` is one of these.
    """

    codes: Any
    """32 weights a row, uint8 (*layers, n, 16, d_out) with two codes in a byte where they fit (weight i below, i + 16
    above, both plus 8), else int8 (*layers, n, 32, d_out)."""
    scale: Any
    """float16 (*layers, n_groups, d_out)"""
    offset: Any
    """float16 (*layers, n_groups, d_out), or None"""
    unit: Any
    """float32 (*layers, d_out): of scale and offset, so that float16 holds both well."""
    group: int
    """Weights that share a scale: 16 or 32."""
    layer: Any = None
    """Which of the layers whose codes these are is meant, if one is; the other fields are its own."""

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte; then x is rounded to int8."""
        return self.codes.dtype == jnp.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        *layers, n, _, d_out = self.codes.shape
        return (*(layers if self.layer is None else ()), d_out, n * _GROUP)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def of_layer(self, i: int | Int[Array, ""]) -> "Columns":
        """The matrix of layer i, whose codes are read where they lie.

        If they were taken out, as in `jax.lax.scan`, XLA would copy all of them before each product.
        """
        taken = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), self)
        return replace(taken, codes=self.codes, layer=i)

    def alone(self) -> "Columns":
        """The same matrix with no codes but its own."""
        if self.layer is None:
            return self
        return replace(self, codes=lax.dynamic_index_in_dim(self.codes, self.layer, keepdims=False), layer=None)

    def row(self, i: int, of: int) -> Array:
        """Row i of every ``of`` rows of the codes, (n, d_out)."""
        d_out = self.codes.shape[-1]
        groups = self.codes.reshape(-1, math.prod(self.codes.shape[-3:-1]) // of, of, d_out)
        start = (0 if self.layer is None else self.layer, 0, i, 0)
        return lax.dynamic_slice(groups, start, (1, groups.shape[1], 1, d_out)).reshape(-1, d_out)


def columns(w: QTensor, int8: bool = True) -> Columns | QTensor:
    """``w`` (*layers, d_out, d_in) laid out anew; itself if its format has no integers, or only ``int8`` is quicker.

    Codes are kept as they are; scales are rounded to the 11 bits of float16.
    """
    if w.format.integers is None or w.shape[-1] % _GROUP:
        return w
    if jax.eval_shape(_columns, w).packed and not int8:
        return w
    return _by_parts(w)


@jax.jit
def _by_parts(w: QTensor) -> Columns:
    """`_columns` of some rows after others, for the codes lie unpacked on the way."""
    if w.ndim > 2:
        return lax.map(_by_parts, w)
    by_rows = w.by_rows()

    def part(start: Array, n: int) -> Columns:
        return _columns(jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, n), by_rows))

    whole = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(_columns, w))
    return tiles.in_parts(part, whole, w.shape[-1])


def _columns(w: QTensor) -> Columns:
    integers = w.format.integers(w.fields)
    low, high = integers.bounds
    codes, scale, offset = integers.codes, integers.scale, integers.offset
    if low == 0 and offset is not None:  # centred codes are half as large
        centre = (high + 1) // 2
        codes, offset, low, high = codes - centre, offset + centre * scale, -centre, high - centre
    group = codes.shape[-1]
    *rows, n_groups, _ = codes.shape
    codes = codes.reshape(*rows, n_groups * group // _GROUP, _GROUP)
    if low >= -8 and high <= 7 and group == _GROUP:
        low_half, high_half = jnp.split((codes + 8).astype(jnp.uint8), 2, axis=-1)
        codes = low_half | (high_half << 4)
    largest = jnp.max(jnp.abs(scale), axis=-1)
    if offset is not None:
        largest = jnp.maximum(largest, jnp.max(jnp.abs(offset), axis=-1))
    unit = jnp.where(largest > 0, largest, 1)
    stored = lambda values: jnp.swapaxes((values / unit[..., None]).astype(jnp.float16), -1, -2)  # noqa: E731
    return Columns(
        codes=jnp.moveaxis(codes, -3, -1),
        scale=stored(scale),
        offset=None if offset is None else stored(offset),
        unit=unit,
        group=group,
    )


def multiply(
    x: Float[Array, "*batch d_in"], w: Columns, dtype: DTypeLike = jnp.float32
) -> Float32[Array, "*batch d_out"]:
    """x @ w.T, up to 8 rows of x one after another, more of them with tiles of w made dense in dtype.

    Of few rows, where codes take 4 bits, x is rounded to int8 by groups, an error of about 0.5 % of the result's size;
    where they take a byte float32 is as fast.
    """
    # XLA would move what only depends on w out of the loop over tokens: all codes, made wide.
    x, w = lax.optimization_barrier((x, w))
    if math.prod(x.shape[:-1]) > _FEW_ROWS:
        return _dense_product(x.astype(dtype), w.alone())
    body = _nibbles if w.packed else _bytes
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1] // _GROUP, _GROUP)
    return jnp.stack([body(row, w) * w.unit for row in rows]).reshape(*x.shape[:-1], -1)


def _dense_product(x: Float[Array, "*batch d_in"], w: Columns) -> Float32[Array, "*batch d_out"]:
    def part(start: Array, n: int) -> Array:
        some = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, n, axis=-1), w)
        return tiles.contract(x, _dense(some).astype(x.dtype), (x.ndim - 1,), (0,))

    return tiles.in_parts(part, jnp.zeros((*x.shape[:-1], w.shape[0])), w.shape[1])


def embed(w: Columns, ids: Int[Array, "*batch"]) -> Float32[Array, "*batch d_in"]:
    """Rows ``ids`` of the matrix."""
    some = _dense(jax.tree.map(lambda leaf: jnp.take(leaf, ids.reshape(-1), axis=-1), w))
    return some.T.reshape(*ids.shape, -1)


def _dense(w: Columns) -> Float32[Array, "d_in d_out"]:
    """The weights in float32, transposed."""
    codes, d_out = w.codes, w.codes.shape[-1]
    if w.packed:
        # One loop for both halves; XLA writes concatenated ones apart and then together, which takes twice as long.
        codes = ((codes[:, None] >> jnp.uint8([0, 4])[:, None, None]) & 15).astype(jnp.int8) - 8
    in_full = lambda values: (values.astype(jnp.float32) * w.unit)[:, None]  # noqa: E731
    weights = codes.reshape(-1, w.group, d_out).astype(jnp.float32) * in_full(w.scale)
    return (weights if w.offset is None else weights + in_full(w.offset)).reshape(-1, d_out)


def _nibbles(x: Float32[Array, "n 32"], w: Columns) -> Float32[Array, " d_out"]:
    codes, a = quantize_activations(x)
    codes = codes.astype(jnp.int16)
    # 32 products of 4 and 8 bits stay below 2^15, whatever the order: what overflows on the way comes back.
    total = (-8 * codes.sum(-1, dtype=jnp.int16))[:, None]
    for i in range(_GROUP // 2):
        pair = w.row(i, of=_GROUP // 2).astype(jnp.int16)
        total += (pair & 15) * codes[:, i, None] + (pair >> 4) * codes[:, i + _GROUP // 2, None]
    # Behind the barrier floats begin; in one loop with them the int16 sums would take half the width of a vector.
    total = lax.optimization_barrier(total)
    y = a @ (total.astype(jnp.float32) * w.scale.astype(jnp.float32))
    if w.offset is not None:
        y += (a * codes.sum(-1)) @ w.offset.astype(jnp.float32)
    return y


def _bytes(x: Float32[Array, "n 32"], w: Columns) -> Float32[Array, " d_out"]:
    x = x.reshape(-1, w.group)
    total = sum(w.row(i, of=w.group).astype(jnp.float32) * x[:, i, None] for i in range(w.group))
    y = jnp.ones(x.shape[0]) @ (total * w.scale.astype(jnp.float32))
    if w.offset is not None:
        y += x.sum(-1) @ w.offset.astype(jnp.float32)
    return y


def quantize_activations(x: Float32[Array, "n 32"]) -> tuple[Int8[Array, "n 32"], Float32[Array, " n"]]:
    """Codes and scale of each group: absmax / 127, to nearest."""
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[:, None])
    return codes.astype(jnp.int8), scale
