"""matmul and embed: where a weight meets an activation, dense or quantized alike."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int

from qjax.tensor import QTensor, dequantize

# Weights made dense at a time, so that the temporary stays below a layer of a small model: 8 MiB in float32.
_TILE_WEIGHTS = 2**21


def matmul(x: Float[Array, "*batch d_in"], w: Array | QTensor, dtype=None) -> Float32[Array, "*batch d_out"]:
    """``x @ w.T`` for ``w`` of logical shape (d_out, d_in), dense or quantized.

    dtype: of both factors, float32 or bfloat16; products are summed in float32.  Default: that of ``x``.
    A quantized ``w`` is decoded where it is used, at most 2M weights at a time, and never kept dense.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    d_out, d_in = w.shape
    # Without the barrier XLA moves the decoding out of a loop over tokens, and the whole model lies dense in memory.
    w, x = lax.optimization_barrier((w, x.astype(dtype)))
    tile = max(_TILE_WEIGHTS // d_in, 1)
    if d_out <= tile or (isinstance(w, Array) and w.dtype == dtype):
        return _product(x, w, dtype)

    n_tiles, rest = divmod(d_out, tile)
    tiles = jax.tree.map(
        lambda a: a.reshape(n_tiles, tile, *a.shape[1:]), w[: d_out - rest]
    )
    y = lax.map(lambda w_tile: _product(x, w_tile, dtype), tiles)
    y = jnp.moveaxis(y, 0, -2).reshape(*x.shape[:-1], d_out - rest)
    return jnp.concatenate([y, _product(x, w[d_out - rest :], dtype)], axis=-1) if rest else y


def embed(w: Array | QTensor, ids: Int[Array, "*batch"]) -> Float32[Array, "*batch d_model"]:
    """Rows ``ids`` of an embedding matrix (vocab, d_model); only these rows are decoded."""
    w, ids = lax.optimization_barrier((w, ids))
    return _dense(w[ids], jnp.float32)


def _dense(w: Array | QTensor, dtype) -> Array:
    return dequantize(w, dtype) if isinstance(w, QTensor) else w.astype(dtype)


def _product(x, w, dtype) -> Float32[Array, "*batch d_out"]:
    # HIGHEST, because a GPU would otherwise multiply float32 in TF32, with 10 bits of mantissa.
    return lax.dot_general(
        x,
        _dense(w, dtype),
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
