"""Products of a few rows on a GPU, from packed weights: what is read of the matrix is its fields, once.

One kernel serves all formats that have `Format.runs`.  A program of its grid makes some rows of the result; it goes
along the blocks of these rows of w, a tile at a time, decodes a run of weights and multiplies it with each row of x:

    acc[m, r, b, i] += w[r, b, run + i] x[m, b, run + i]          y[m, r] = Σ_b Σ_i acc[m, r, b, i]

r being rows of w, b blocks, i the weights of a run.  Written for Triton, so all of these are powers of two.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float, Float32

from qjax.formats import Format
from qjax.tensor import QTensor

MAX_ROWS = 16
"""Rows of x: each has accumulators of its own, and with more of them matrix units are quicker."""

_ROWS = 4
"""Rows of w in a tile, at least: they share what is read of x."""
_TILE = 2048
"""Weights of a tile's run."""
_ACCUMULATORS = 8192
"""Of a program, at most: 64 registers a thread."""
_WARPS = 4


def readable(w: QTensor) -> bool:
    """Whether the kernel has a way to decode w, and 32 bits count its weights."""
    return w.format.runs is not None and w.ndim == 2 and w.size < 2**31


def multiply(x: Float[Array, "*batch d_in"], w: QTensor, interpret: bool = False) -> Float32[Array, "*batch d_out"]:
    """x @ w.T for up to `MAX_ROWS` rows of x; weights and products are float32, whatever x is.

    Within (d_in + 2) 2^-24 Σ|x| (|scale code| + |offset|) of the product in float64, as any float32 sum is.
    interpret: run as JAX operations, on any platform.
    """
    w = w.by_rows()
    rows = x.reshape(-1, x.shape[-1])
    n, (d_out, d_in) = rows.shape[0], w.shape
    n_pieces, run_size = d_in // w.format.piece_size, w.format.run_size
    tile = min(_TILE, _ACCUMULATORS // pl.next_power_of_2(n)) // run_size
    tile_pieces = min(pl.next_power_of_2(n_pieces), tile // _ROWS)
    tile_rows = tile // tile_pieces
    call = pl.pallas_call(
        functools.partial(_kernel, w.format, (n, d_out, n_pieces), (tile_rows, tile_pieces)),
        out_shape=jax.ShapeDtypeStruct((n * d_out,), jnp.float32),
        grid=(pl.cdiv(d_out, tile_rows),),
        compiler_params=triton.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
    )
    return call(rows.reshape(-1), *(field.reshape(-1) for field in w.fields)).reshape(*x.shape[:-1], d_out)


def _kernel(format: Format, sizes: tuple[int, int, int], tile: tuple[int, int], x: Any, *refs: Any) -> None:
    """x, the fields and y as flat references; so each index is written out, and rows need not divide into tiles."""
    (n, d_out, n_pieces), (tile_rows, tile_pieces) = sizes, tile
    *fields, y = refs
    fields = dict(zip((field.name for field in format.layout), zip(format.layout, fields)))
    parts = format.block_size // format.piece_size
    first_row = pl.program_id(0) * tile_rows
    # Beyond the last row or block the last one is read again: its products are not stored, or are with zeros.
    rows = jnp.minimum(first_row + _iota(tile_rows, 0), d_out - 1)
    steps = _iota(format.run_size, 2)

    def add(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        pieces = i * tile_pieces + _iota(tile_pieces, 1)
        inside = pieces < n_pieces
        pieces = jnp.minimum(pieces, n_pieces - 1)

        @functools.cache
        def read(name: str, first: int = 0, n: int = 1, bits: int = 8) -> Array:
            field, ref = fields[name]
            if field.count == 1:
                index = rows * (n_pieces // parts) + pieces // parts
            else:
                count = field.count // parts
                within = first + _iota(n, 2) * bits // 8
                index = (rows * n_pieces + pieces) * count + (within if bits == 8 else jnp.minimum(within, count - 1))
            values = triton.load(ref.at[index])
            return values.astype(jnp.float32 if jnp.issubdtype(values.dtype, jnp.floating) else jnp.int32)

        for first, weights in format.runs(read):
            columns = pieces * format.piece_size + first + steps
            mask = jnp.broadcast_to(inside, columns.shape)
            for m in range(n):
                row = triton.load(x.at[m * n_pieces * format.piece_size + columns], mask=mask, other=0.0)
                sums = (*sums[:m], sums[m] + weights * row.astype(jnp.float32), *sums[m + 1 :])
        return sums

    zeros = jnp.zeros((tile_rows, tile_pieces, format.run_size), jnp.float32)
    sums = lax.fori_loop(0, pl.cdiv(n_pieces, tile_pieces), add, (zeros,) * n)
    made = first_row + jnp.arange(tile_rows)
    for m in range(n):
        triton.store(y.at[m * d_out + made], sums[m].sum(axis=2).sum(axis=1), mask=made < d_out)


def _iota(n: int, axis: int) -> Array:
    """0 .. n - 1 along an axis of three."""
    return lax.broadcasted_iota(jnp.int32, tuple(n if i == axis else 1 for i in range(3)), axis)
