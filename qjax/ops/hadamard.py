"""The Walsh-Hadamard rotation, which spreads an outlier over its neighbours."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32

from qjax.errors import QjaxError


def matrix(n: int) -> Float32[np.ndarray, "n n"]:
    """An orthonormal Hadamard matrix of order n: every entry is 1 or -1 over √n.

    For a power of two it is Sylvester's: symmetric, its own inverse.  Other orders double one of Paley's (1933): q + 1
    for a prime q = 3 mod 4, 2 (q + 1) for q = 1 mod 4, as for 12, 20, 28, 36, 44 and 60.
    Raises QjaxError for an order that this does not reach.
    """
    order, h = n, np.ones((1, 1))
    while order > 1:
        if (found := _paley(order)) is not None:
            h = np.kron(h, found)
            break
        if order % 2:
            raise QjaxError(f"no Hadamard matrix of order {n} is known here; expected 2^k m, m of Paley's orders")
        h, order = np.kron(h, [[1, 1], [1, -1]]), order // 2
    return (h / n**0.5).astype(np.float32)


def _paley(n: int) -> np.ndarray | None:
    """Paley's matrix of an order that no doubling gives, if there is one."""
    if n % 4 or n & (n - 1) == 0:
        return None
    if (n - 1) % 4 == 3 and _is_prime(n - 1):
        c = _conference(n - 1)
        c[1:, 0] = -1
        return np.eye(n) + c
    q = n // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        return np.kron(_conference(q), [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
    return None


def _conference(q: int) -> np.ndarray:
    """Whether i - j is a square modulo the prime q (1) or not (-1), with a border of ones."""
    legendre = np.full(q, -1.0)
    legendre[np.arange(1, q) ** 2 % q] = 1
    legendre[0] = 0
    c = np.pad(legendre[np.subtract.outer(np.arange(q), np.arange(q)) % q], ((1, 0), (1, 0)), constant_values=1)
    c[0, 0] = 0
    return c


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % p for p in range(2, int(n**0.5) + 1))


def hadamard(x: Float32[Array, "*rows d"], n: int) -> Float32[Array, "*rows d"]:
    """Each n neighbours along the last axis, times `matrix` of order n, a power of two; doing it twice undoes it.

    All n numbers come out about as large as the root of their mean square, so that one large number no longer sets
    the scale by which the others are rounded. Lengths and inner products stay.
    """
    if n == 1:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, n)
    return jnp.matmul(blocks, matrix(n), precision=lax.Precision.HIGHEST).reshape(x.shape)
