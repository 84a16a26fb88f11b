"""The Walsh-Hadamard rotation, which spreads an outlier over its neighbours."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32


def matrix(n: int) -> Float32[np.ndarray, "n n"]:
    """The orthonormal Hadamard matrix of order n, a power of two, in Sylvester's order: symmetric, its own inverse."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return (h / n**0.5).astype(np.float32)


def hadamard(x: Float32[Array, "*rows d"], n: int) -> Float32[Array, "*rows d"]:
    """Each n neighbours along the last axis, times `matrix` of order n; doing it twice undoes it.

    All n numbers come out about as large as the root of their mean square, so that one large number no longer sets
    the scale by which the others are rounded. Lengths and inner products stay.
    """
    if n == 1:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, n)
    return jnp.matmul(blocks, matrix(n), precision=lax.Precision.HIGHEST).reshape(x.shape)
