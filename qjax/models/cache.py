"""The keys and values of the tokens seen so far."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from qjax.models.config import Config


class Cache(NamedTuple):
    """Rows 0 to length - 1 along `max_seq` are written; those of one head lie together."""

    k: Float[Array, "n_layers batch kv_heads max_seq head_dim"]
    v: Float[Array, "n_layers batch kv_heads max_seq head_dim"]
    length: Int32[Array, ""]

    @property
    def max_seq(self) -> int:
        """Tokens the cache has room for."""
        return self.k.shape[3]

    def write(
        self,
        layer: Int[Array, ""],
        k: Float[Array, "batch seq kv_heads head_dim"],
        v: Float[Array, "batch seq kv_heads head_dim"],
    ) -> "Cache":
        """Put the keys and values of seq tokens after `length`, which stays: all layers write at one offset.

        The caller sees to it that length + seq is at most max_seq; XLA would move the rows back silently.
        """

        def put(rows: Array, new: Array) -> Array:
            new = new.swapaxes(1, 2)[None].astype(rows.dtype)
            return lax.dynamic_update_slice(rows, new, (layer, 0, 0, self.length, 0))

        return self._replace(k=put(self.k, k), v=put(self.v, v))

    def read(self, layer: Int[Array, ""]) -> tuple[Array, Array]:
        """The keys and values of one layer, (batch, kv_heads, max_seq, head_dim)."""
        k, v = (lax.dynamic_index_in_dim(rows, layer, keepdims=False) for rows in (self.k, self.v))
        return k, v


def empty(
    config: Config,
    batch: int,
    max_seq: int,
    *,
    k_dtype: DTypeLike = jnp.float16,
    v_dtype: DTypeLike = jnp.float16,
) -> Cache:
    """A cache with room for max_seq tokens of each of `batch` sequences."""
    shape = (config.n_layers, batch, config.n_kv_heads, max_seq, config.head_dim)
    return Cache(jnp.zeros(shape, k_dtype), jnp.zeros(shape, v_dtype), jnp.zeros((), jnp.int32))
