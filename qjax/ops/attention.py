"""Causal grouped-query attention (Ainslie et al. 2023) against keys and values that may be a longer cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

# Queries are taken in blocks, so that scores stay in the processor's cache and keys no query sees are left
# out; in few blocks, so that the program stays small, and of enough rows for a product to run fast.
_MAX_BLOCKS, _MIN_BLOCK = 4, 128


def attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys head_dim"],
    start: int | Int[Array, ""] = 0,
) -> Float32[Array, "batch seq heads head_dim"]:
    """softmax(q·kᵀ / √head_dim) · v in float32, where the query at position p sees the keys 0 to p.

    Query i stands at position start + i and key j at j, so cache rows not yet written are never seen. Query
    head h uses key head h // (heads // kv_heads); keys and values are not repeated in memory.
    """
    seq, keys = q.shape[1], k.shape[2]
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    block = max(-(-seq // _MAX_BLOCKS), _MIN_BLOCK)
    parts = []
    for begin in range(0, seq, block):
        rows = q[:, begin : begin + block]
        # A start known when compiling tells which keys the block can see.
        seen = start + begin + rows.shape[1] if isinstance(start, int) else keys
        parts.append(_attend(rows, k[:, :, :seen], v[:, :, :seen], start + begin))
    return jnp.concatenate(parts, axis=1)


def _attend(
    q: Float[Array, "batch rows heads head_dim"],
    k: Float32[Array, "batch kv_heads keys head_dim"],
    v: Float32[Array, "batch kv_heads keys head_dim"],
    start: int | Int[Array, ""],
) -> Float32[Array, "batch rows heads head_dim"]:
    batch, rows, heads, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    # The query heads that share a key head lie below one another: each key head is one matrix product.
    q = q.reshape(batch, rows, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, -1, head_dim) * head_dim**-0.5
    scores = _product("bgmd,bgtd->bgmt", q, k).reshape(batch, kv_heads, -1, rows, keys)
    visible = jnp.arange(keys) <= start + jnp.arange(rows)[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    y = _product("bgmt,bgtd->bgmd", weights.reshape(batch, kv_heads, -1, keys), v)
    y = y.reshape(batch, kv_heads, -1, rows, head_dim).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, rows, heads, head_dim)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    # HIGHEST, because a GPU would otherwise multiply float32 in TF32, with 10 bits of mantissa.
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)
