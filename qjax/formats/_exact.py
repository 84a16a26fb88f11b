"""The primitives that keep float32 results equal to C's.

ggml's reference quantizers are compiled without fused multiply-add and divide with a true division.  XLA on CPU
contracts ``a*b + c`` into one FMA and turns a division by a broadcast or a constant into a product with the
reciprocal: 4 to 60 % of float32 results then differ in the last bit, and some of the codes rounded from them with it.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32


def runtime_one(x: Float32[Array, "..."], axis: int | tuple[int, ...] = -1) -> Float32[Array, "..."]:
    """1.0 for each block of ``x`` (its extent along ``axis``), in a form that no compiler pass sees is a constant.

    ``(a*b) * one + c`` contracts to ``fma(a*b, one, c)``, which rounds exactly like the product and the sum apart.
    It is derived from the data, so that it stays opaque wherever the quantizer is traced: a constant, or a jit
    argument that becomes one when the caller jits too, is folded away.  That the square of an integer is 0, 1 or 4
    modulo 8, and never 5, no compiler knows.  The barrier is for data that are constant.
    """
    for i in (axis,) if isinstance(axis, int) else axis:
        x = lax.slice_in_dim(x, 0, 1, axis=i)
    bits = lax.bitcast_convert_type(lax.optimization_barrier(x), jnp.uint32)
    return jnp.where(bits * bits % 8 == 5, jnp.float32(2), jnp.float32(1))


def exact_product(
    a: Float32[Array, "*#s"], b: Float32[Array, "*#s"], one: Float32[Array, "*#s"]
) -> Float32[Array, "*s"]:
    """``a * b`` rounded to float32 before anything is added to it.  ``one`` comes from `runtime_one`."""
    return (a * b) * one


def exact_quotient(a: Float32[Array, "*s"], b: Float32[Array, "*#s"]) -> Float32[Array, "*s"]:
    """``a / b`` as a division, although ``b`` is broadcast.

    A constant divisor is given as ``constant * one``: a bare one would be broadcast again, past the barrier, by vmap.
    """
    return a / lax.optimization_barrier(jnp.broadcast_to(b, a.shape))


def signed_as_first(
    magnitude: Float32[Array, "*s 1"], mask: Bool[Array, "*s n"], x: Float32[Array, "*s n"]
) -> Float32[Array, "*s 1"]:
    """``magnitude`` with the sign of the first element of each block of ``x`` for which ``mask`` holds, plus if none.

    C's running maximum keeps the first of equal values, which decides between +max and -max, and between the zeros.
    The sign rides in the lowest bit of the index, because argmax and a gather do not vectorise on CPU.
    """
    index_and_sign = 2 * jnp.arange(x.shape[-1]) + jnp.signbit(x)
    first = jnp.min(jnp.where(mask, index_and_sign, 2 * x.shape[-1]), axis=-1, keepdims=True)
    return jnp.where(first & 1, -magnitude, magnitude)


def reciprocal_or_zero(d: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """``d ? 1/d : 0``, the inverse scale of ggml's block quantizers."""
    return jnp.where(d != 0, 1 / jnp.where(d != 0, d, 1), 0)


def exact_reciprocal(quotient: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """``1 / quotient`` where that is a quotient a / b itself, which XLA would turn into the single division b / a."""
    return 1 / lax.optimization_barrier(quotient)
