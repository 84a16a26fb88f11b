"""matmul and embed: where a weight meets an activation, dense or quantized alike."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int

from qjax.ops.columns import Columns, multiply
from qjax.ops.sharded import Sharded
from qjax.tensor import QTensor, dequantize

# Weights made dense at a time, so that the temporary stays below a layer of a small model: 8 MiB in float32.
_TILE_WEIGHTS = 2**21


def matmul(
    x: Float[Array, "*batch d_in"], w: Array | QTensor | Columns | Sharded, dtype: DTypeLike | None = None
) -> Float32[Array, "*batch d_out"]:
    """``x @ w.T`` for ``w`` of logical shape (d_out, d_in), dense or quantized.

    dtype: of both factors, float32 or bfloat16; products are summed in float32.  Default: that of ``x``.
    A quantized ``w`` is decoded where it is used, a tile of its rows at a time, and never kept dense.  Where it lies
    on several devices, each multiplies its piece.
    """
    if isinstance(w, Columns):
        return multiply(x, w)
    if isinstance(w, Sharded):
        return w.product(partial(matmul, dtype=dtype), x)
    dtype = jnp.dtype(dtype or x.dtype)
    x = x.astype(dtype)
    d_out, d_in = w.shape
    if isinstance(w, Array) and w.dtype == dtype:
        return _product(x, w, dtype)
    # Two tiles at least: XLA dissolves a loop of one step, and then decodes all layers of a model before the first
    # product.  What depends on the step of a loop cannot be moved out of it, nor out of the loop over tokens.
    n_tiles = max(-(-d_out * d_in // _TILE_WEIGHTS), 2)
    tile = -(-d_out // n_tiles)

    by_rows = w.by_rows() if isinstance(w, QTensor) else w

    def add_tile(y: Array, i: Array) -> tuple[Array, None]:
        # The last tile overlaps the one before, rather than being shorter.
        start = jnp.minimum(i * tile, d_out - tile)
        rows = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, tile), by_rows)
        return lax.dynamic_update_slice_in_dim(y, _product(x, rows, dtype), start, axis=-1), None

    return lax.scan(add_tile, jnp.zeros((*x.shape[:-1], d_out)), jnp.arange(n_tiles))[0]


def embed(w: Array | QTensor | Sharded, ids: Int[Array, "*batch"]) -> Float32[Array, "*batch d_model"]:
    """Rows ``ids`` of an embedding matrix (vocab, d_model); only these rows are decoded."""
    if isinstance(w, Sharded):
        return w.embed(embed, ids)
    # Without the barrier XLA moves the conversion of a dense table out of the loop over tokens.
    table, ids = lax.optimization_barrier((w, ids))
    return _dense(table[ids], jnp.float32)


def _dense(w: Array | QTensor, dtype) -> Array:
    return dequantize(w, dtype) if isinstance(w, QTensor) else w.astype(dtype)


def _product(x, rows, dtype) -> Float32[Array, "*batch d_out"]:
    rows = _dense(rows, dtype)
    return _contract(x, rows, (x.ndim - 1,), (1,)) if dtype == jnp.float32 else _rounded_product(x, rows)


@jax.custom_vjp
def _rounded_product(x, rows) -> Float32[Array, "*batch d_out"]:
    """A product of bfloat16 factors, whose gradient is rounded to bfloat16 too: JAX's own rule would multiply a
    float32 gradient with bfloat16 factors, which takes as long as float32 throughout."""
    return _contract(x, rows, (x.ndim - 1,), (1,))


def _rounded_forward(x, rows):
    return _rounded_product(x, rows), (x, rows)


def _rounded_backward(factors, gradient):
    x, rows = factors
    gradient, batch = gradient.astype(x.dtype), tuple(range(x.ndim - 1))
    dx = _contract(gradient, rows, (x.ndim - 1,), (0,))
    return dx.astype(x.dtype), _contract(gradient, x, batch, batch).astype(rows.dtype)


_rounded_product.defvjp(_rounded_forward, _rounded_backward)


def _contract(a, b, axes_a, axes_b) -> Float32[Array, "..."]:
    # HIGHEST, because a GPU would otherwise multiply float32 in TF32, with 10 bits of mantissa.
    return lax.dot_general(
        a, b, ((axes_a, axes_b), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
