"""Causal grouped-query attention (Ainslie et al. 2023) against keys and values that may be a longer cache."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

# Float32 products stay float32 on GPUs, where the default would be TF32.
_product = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys head_dim"],
    positions: Int[Array, " seq"],
    dtype: DTypeLike = jnp.float32,
) -> Float32[Array, "batch seq heads head_dim"]:
    """softmax(q·kᵀ / √head_dim) · v, where the query at position p sees the keys 0 to p.

    Key j stands at position j, so unwritten cache rows after the last query are never seen. Query head h uses
    key head h // (heads // kv_heads); keys and values are not repeated in memory. The softmax is in float32,
    the two products in `dtype` with float32 sums.
    """
    batch, seq, heads, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    q = q.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim).astype(dtype)
    scores = jnp.einsum("bsgrd,bgtd->bgrst", q, k.astype(dtype), **_product) * head_dim**-0.5
    visible = jnp.arange(keys) <= positions[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    y = jnp.einsum("bgrst,bgtd->bsgrd", weights.astype(dtype), v.astype(dtype), **_product)
    return y.reshape(batch, seq, heads, head_dim)
