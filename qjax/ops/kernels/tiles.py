"""Products with a matrix that is made dense, by tiles if the product is smaller: any format, any platform, any rows."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int8

from qjax.tensor import QTensor, dense

# Weights made dense at a time, so that the temporary stays below a layer of a small model: 8 MiB in float32.
_TILE_WEIGHTS = 2**21


def multiply(
    x: Float[Array, "*batch d_in"],
    w: Array | QTensor,
    dtype: DTypeLike,
    step: Float32[Array, "*batch 1"] | None = None,
) -> Float32[Array, "*batch d_out"]:
    """x @ w.T, both rounded to dtype, products summed in float32; see `product`."""
    d_out, d_in = w.shape
    made = _factor_dtype(dtype)
    x = x.astype(made)
    # For gradients the factors are kept as they are, packed; what is dense is made again.
    decoded = jax.checkpoint(lambda x, rows: product(x, dense(rows, made), dtype, step))
    if 4 * math.prod(x.shape[:-1]) >= d_in * made.itemsize:
        # The product takes as many bytes as the dense matrix: to put it together from tiles would take longer.
        return decoded(x, w)
    by_rows = w.by_rows() if isinstance(w, QTensor) else w

    def part(start: Array, n: int) -> Array:
        rows = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, n), by_rows)
        return decoded(x, rows)

    return in_parts(part, jnp.zeros((*x.shape[:-1], d_out)), d_out, d_in)


def _factor_dtype(dtype: DTypeLike) -> Any:
    """In which `product` takes the factors."""
    return jnp.dtype(jnp.float32 if dtype == jnp.int8 else dtype)


def in_parts(part: Callable[[Array, int], Any], whole: Any, d_out: int, d_in: int) -> Any:
    """``whole``, arrays whose last axis is d_out or longer, written part by part: part(start, n) gives n elements."""
    # Two tiles at least: XLA dissolves a loop of one step, and then decodes all layers of a model before the first
    # product.  What depends on the step of a loop cannot be moved out of it, nor out of the loop over tokens.
    n_tiles = max(-(-d_out * d_in // _TILE_WEIGHTS), 2)
    tile = -(-d_out // n_tiles)

    def add_tile(whole: Any, i: Array) -> tuple[Any, None]:
        # The last tile overlaps the one before, rather than being shorter.
        start = jnp.minimum(i * tile, d_out - tile)
        write = lambda a, values: lax.dynamic_update_slice_in_dim(a, values, start, axis=-1)  # noqa: E731
        return jax.tree.map(write, whole, part(start, tile)), None

    return lax.scan(add_tile, whole, jnp.arange(n_tiles))[0]


def product(x: Array, rows: Array, dtype: DTypeLike, step: Array | None = None) -> Float32[Array, "*batch d_out"]:
    """x @ rows.T of dense factors, given in dtype, or for int8 in float32.

    float32, bfloat16: within d_in 2^-24 Σ|x w| of the same in float64.
    int8: each row of both factors is rounded to whole multiples of its largest magnitude / 127, its step; the integers
    are summed exactly.  So within Σ(|x| step_w + |w| step_x + step_x step_w / 2) / 2, and 2^-22 of the result.  Its
    gradient is zero.  step: that of the rows of x, where it is not this one.
    """
    if dtype == jnp.int8:
        return _integer_product(x, rows, step)
    return contract(x, rows, (x.ndim - 1,), (1,)) if dtype == jnp.float32 else _rounded_product(x, rows)


def _integer_product(x: Float32[Array, "*batch d_in"], rows: Float32[Array, "d_out d_in"], step: Array | None) -> Array:
    (x, step_x), (rows, step_w) = _integers(x, step), _integers(rows)
    sums = lax.dot_general(x, rows, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * step_x * step_w[:, 0]


def _integers(
    a: Float32[Array, "*rows d_in"], step: Float32[Array, "*rows 1"] | None = None
) -> tuple[Int8[Array, "*rows d_in"], Float32[Array, "*rows 1"]]:
    """Each row as integers from -127 to 127, and the step that they count: this one, or 1/127 of its largest."""
    if step is None:
        step = jnp.max(jnp.abs(a), axis=-1, keepdims=True) / 127
    return jnp.round(a / jnp.where(step > 0, step, 1)).astype(jnp.int8), step


@jax.custom_vjp
def _rounded_product(x, rows) -> Float32[Array, "*batch d_out"]:
    """A product of bfloat16 factors, whose gradient is rounded to bfloat16 too: JAX's own rule would multiply a
    float32 gradient with bfloat16 factors, which takes as long as float32 throughout."""
    return contract(x, rows, (x.ndim - 1,), (1,))


def _rounded_forward(x, rows):
    return _rounded_product(x, rows), (x, rows)


def _rounded_backward(factors, gradient):
    x, rows = factors
    gradient, batch = gradient.astype(x.dtype), tuple(range(x.ndim - 1))
    dx = contract(gradient, rows, (x.ndim - 1,), (0,))
    return dx.astype(x.dtype), contract(gradient, x, batch, batch).astype(rows.dtype)


_rounded_product.defvjp(_rounded_forward, _rounded_backward)


def contract(a, b, axes_a, axes_b) -> Float32[Array, "..."]:
    """The sum of products over these axes, in float32."""
    # HIGHEST, because a GPU would otherwise multiply float32 in TF32, with 10 bits of mantissa.
    return lax.dot_general(
        a, b, ((axes_a, axes_b), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
