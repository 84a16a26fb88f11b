"""Matrices laid out as the CPU reads them while it generates: for products with one row.

A product with one row reads each weight once, so it takes as long as its bytes take.  XLA makes vector code along the
last axis only, so here that is the axis of the output rows; the terms of a group of weights are written out one by one:

    y[n] = Σ_g scale[g, n] a[g] (Σ_i code[g, i, n] x[g, i])  +  offset[g, n] a[g] Σ_i x[g, i]

x is rounded to int8, each group with a scale a of its own (dynamic quantization, as in llama.cpp), so that sums over i
fit int16, of which a vector holds most.  A word of 16 bits holds k = 4 codes of b = 4 bits, or 2 of 8, each plus
2^(b-1).  They are not taken apart: with w_j = word >> b j, code j is w_j - 2^b w_(j+1), and the sum over a word

    Σ_j code_j x_j = Σ_j w_j (x_j - 2^b x_(j-1)),   x_(-1) = 0,

takes k - 1 shifts, k products, and holds modulo 2^16, as int16 counts.  Many rows, as those of a prompt, are multiplied
with tiles of the matrix made dense.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int, Int8, UInt16

from qjax.ops.kernels import tiles
from qjax.tensor import QTensor

_FEW_ROWS = 8
"""So many rows of x are multiplied one by one."""
_WAYS = 8
"""So many lines of memory can a processor's first cache hold whose addresses agree modulo 4096."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "offset", "unit", "layer"],
    meta_fields=["bits", "terms"],
)
@dataclass(frozen=True)
class Columns:
    """A matrix (d_out, d_in), output rows last; made by `columns` from a QTensor, read by `multiply`.

    Leading axes, as those of stacked layers, go before all; `of_layer` is one of these.
    """

    codes: Any
    """uint16 (*layers, n_groups, n_words, d_out or more): word i of a group holds its codes i, i + n_words, ..., from
    the lowest bits up, each plus 2^(bits-1).  Behind d_out comes padding (see `_width`)."""
    scale: Any
    """float16 (*layers, n_groups, d_out)"""
    offset: Any
    """float16 (*layers, n_groups, d_out), or None"""
    unit: Any
    """float32 (*layers, d_out): of scale and offset, so that float16 holds both well."""
    bits: int
    """Of a code: 4 or 8."""
    terms: int
    """So many products of a code and an int8 sum up to an int16."""
    layer: Any = None
    """Which of the layers whose codes these are is meant, if one is; the other fields are its own."""

    @property
    def group(self) -> int:
        """Weights that share a scale: 16 or 32."""
        return self.codes.shape[-2] * (16 // self.bits)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.unit.shape, self.codes.shape[-3] * self.group)

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

    @property
    def kind(self) -> tuple[Any, ...]:
        """What matrices agree in that can be `joined`."""
        return self.bits, self.terms, self.codes.shape[:-1], self.offset is None

    def words(self, i: int) -> UInt16[Array, "n_groups d_out"]:
        """Word i of every group."""
        start = (0 if self.layer is None else self.layer, 0, i, 0)
        codes = self.codes.reshape(-1, *self.codes.shape[-3:])
        n_groups, d_out = self.codes.shape[-3], self.unit.shape[-1]
        return lax.dynamic_slice(codes, start, (1, n_groups, 1, d_out)).reshape(n_groups, d_out)


def columns(w: QTensor) -> Columns | QTensor:
    """``w`` (*layers, d_out, d_in) laid out anew; itself if its format has no integers.

    Codes are kept as they are; scales are rounded to the 11 bits of float16.
    """
    return w if w.format.integers is None else _by_parts(w)


@jax.jit
def _by_parts(w: QTensor) -> Columns:
    """`_columns` of some rows after others, for the codes lie unpacked on the way."""
    if w.ndim > 2:
        return lax.map(_by_parts, w)
    by_rows = w.by_rows()

    def part(start: Array, n: int) -> Columns:
        return _columns(jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, n), by_rows))

    whole = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(_columns, w))
    *groups, d_out = whole.codes.shape
    whole = replace(whole, codes=jnp.zeros((*groups, _width(groups[-1], d_out)), jnp.uint16))
    return tiles.in_parts(part, whole, *w.shape)


def joined(*matrices: Columns) -> Columns:
    """One matrix with the rows of all, one after another; all are of one `Columns.kind`."""
    first, d_out = matrices[0], sum(w.shape[-2] for w in matrices)

    def beside(*leaves: Array) -> Array:
        return jnp.concatenate([leaf[..., : w.shape[-2]] for leaf, w in zip(leaves, matrices)], axis=-1)

    whole = jax.tree.map(beside, *matrices)
    padding = [(0, 0)] * (first.codes.ndim - 1) + [(0, _width(first.codes.shape[-2], d_out) - d_out)]
    return replace(whole, codes=jnp.pad(whole.codes, padding))


def _width(n_words: int, d_out: int) -> int:
    """Of an array of words: d_out, and a line of 64 bytes more where the words of a group, which are read side by side,
    would drive one another out of the cache."""
    n_places = 4096 // math.gcd(4096, 2 * d_out)
    return d_out + 32 if n_words > _WAYS * n_places else d_out


def _columns(w: QTensor) -> Columns:
    integers = w.format.integers(w.fields)
    low, high = integers.bounds
    codes, scale, offset = integers.codes, integers.scale, integers.offset
    if low == 0 and offset is not None:  # centred codes are half as large
        centre = (high + 1) // 2
        codes, offset, low, high = codes - centre, offset + centre * scale, -centre, high - centre
    bits = 4 if low >= -8 and high < 8 else 8
    *rows, group = codes.shape
    codes = (codes.astype(jnp.int16) + 2 ** (bits - 1)).astype(jnp.uint16).reshape(*rows, 16 // bits, -1)
    codes = sum(codes[..., j, :] << (bits * j) for j in range(16 // bits))
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
        bits=bits,
        terms=min(2**15 // (127 * max(-low, high)), group),
    )


def multiply(
    x: Float[Array, "*batch d_in"], w: Columns, dtype: DTypeLike = jnp.float32
) -> Float32[Array, "*batch d_out"]:
    """x @ w.T, up to 8 rows of x one after another, more of them with tiles of w made dense in dtype.

    Few rows of x are rounded to int8 by groups, an error of about 0.5 % of the result's size.
    """
    # XLA would move what only depends on w out of the loop over tokens: all codes, made wide.  Not so x, which is
    # rounded once for all matrices that it meets.
    w = lax.optimization_barrier((x, w))[1]
    if math.prod(x.shape[:-1]) > _FEW_ROWS:
        return _dense_product(x.astype(dtype), w.alone())
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1] // w.group, w.group)
    return jnp.stack([_row_product(row, w) for row in rows]).reshape(*x.shape[:-1], -1)


def _dense_product(x: Float[Array, "*batch d_in"], w: Columns) -> Float32[Array, "*batch d_out"]:
    def part(start: Array, n: int) -> Array:
        some = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, n, axis=-1), w)
        return tiles.contract(x, _dense(some).astype(x.dtype), (x.ndim - 1,), (0,))

    return tiles.in_parts(part, jnp.zeros((*x.shape[:-1], w.shape[0])), *w.shape)


def embed(w: Columns, ids: Int[Array, "*batch"]) -> Float32[Array, "*batch d_in"]:
    """Rows ``ids`` of the matrix."""
    some = _dense(jax.tree.map(lambda leaf: jnp.take(leaf, ids.reshape(-1), axis=-1), w))
    return some.T.reshape(*ids.shape, -1)


def _dense(w: Columns) -> Float32[Array, "d_in d_out"]:
    """The weights in float32, transposed."""
    # One loop for all codes of a word; XLA writes concatenated ones apart and then together, which takes twice as long.
    shifts = w.bits * jnp.arange(16 // w.bits, dtype=jnp.uint16)[:, None, None]
    words, most = w.codes[:, None, :, : w.unit.shape[-1]], 2**w.bits - 1
    codes = ((words >> shifts) & most).astype(jnp.int16) - (most + 1) // 2
    in_full = lambda values: (values.astype(jnp.float32) * w.unit)[:, None]  # noqa: E731
    weights = codes.reshape(-1, w.group, codes.shape[-1]).astype(jnp.float32) * in_full(w.scale)
    return (weights if w.offset is None else weights + in_full(w.offset)).reshape(-1, codes.shape[-1])


def _row_product(x: Float32[Array, "n_groups group"], w: Columns) -> Float32[Array, " d_out"]:
    x, a = quantize_activations(x)
    n_groups, n_words = len(x), w.codes.shape[-2]
    x = x.astype(jnp.int16).reshape(n_groups, -1, n_words)
    before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
    factors = (x - (before << w.bits)).astype(jnp.uint16)
    n_summed = w.terms * w.bits // 16
    # Of 2^(bits-1), which each code has too much.
    excess = x.reshape(n_groups, -1, n_words // n_summed, n_summed).sum((1, 3), dtype=jnp.int16) << (w.bits - 1)
    total = jnp.zeros((), jnp.int32)
    for s in range(excess.shape[1]):
        part = -excess.astype(jnp.uint16)[:, s, None]
        for i in range(s * n_summed, (s + 1) * n_summed):
            word = w.words(i)
            for j in range(factors.shape[1]):
                part += (word >> (w.bits * j)) * factors[:, j, i, None]
        total += part.astype(jnp.int16).astype(jnp.int32)
    y = a @ (total.astype(jnp.float32) * w.scale.astype(jnp.float32))
    if w.offset is not None:
        y += (a * x.sum((1, 2))) @ w.offset.astype(jnp.float32)
    return y * w.unit


def quantize_activations(x: Float32[Array, "n group"]) -> tuple[Int8[Array, "n group"], Float32[Array, " n"]]:
    """Codes and scale of each group: absmax / 127, to nearest."""
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[:, None])
    return codes.astype(jnp.int8), scale
