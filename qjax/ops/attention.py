"""Causal grouped-query attention (Ainslie et al. 2023) against keys and values that may be a longer cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

# Queries are taken in blocks, so that scores stay in the processor's cache, of enough rows for a product to run fast;
# and in parts, so that most keys no query of a part sees are left out.  A part is one loop, for what XLA compiles
# grows with their number and not with that of the blocks.  Of rows in odd numbers XLA makes loops half as fast.
_BLOCK, _MAX_PARTS, _EVEN = 128, 4, 16


class Scoring(NamedTuple):
    """How the scores of queries and keys are made."""

    window: int | Int[Array, ""] | None = None
    """So many keys back a query sees, the one at its own position included (Beltagy et al. 2020); None: all."""
    scale: float | None = None
    """of q·kᵀ; None: 1 / √head_dim"""
    softcap: float = 0.0
    """c: scores become c tanh(score / c), so between -c and c (Gemma Team 2024); 0: they stay."""


PLAIN = Scoring()
"""All keys, 1 / √head_dim."""


def attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys head_dim"],
    start: int | Int[Array, ""] = 0,
    scoring: Scoring = PLAIN,
) -> Float32[Array, "batch seq heads head_dim"]:
    """softmax(scores) · v in float32, where the query at position p sees the keys 0 to p, or the last of them.

    Query i stands at position start + i and key j at j, so cache rows not yet written are never seen. Query
    head h uses key head h // (heads // kv_heads); keys and values are not repeated in memory.
    """
    seq = q.shape[1]
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    if not isinstance(start, int):
        # Only a start known when compiling tells which keys a part can see.
        return _by_blocks(q, k, v, start, scoring)
    part = -(-seq // (_MAX_PARTS * _BLOCK)) * _BLOCK
    q, k, v = (_padded(a, axis, -seq % _EVEN) for a, axis in ((q, 1), (k, 2), (v, 2)))
    ends = [min(begin + part, q.shape[1]) for begin in range(0, seq, part)]
    parts = [
        _by_blocks(q[:, begin:end], k[:, :, : start + end], v[:, :, : start + end], start + begin, scoring)
        for begin, end in zip([0, *ends], ends)
    ]
    return jnp.concatenate(parts, axis=1)[:, :seq]


def _by_blocks(
    q: Float[Array, "batch rows heads head_dim"],
    k: Float32[Array, "batch kv_heads keys head_dim"],
    v: Float32[Array, "batch kv_heads keys head_dim"],
    start: int | Int[Array, ""],
    scoring: Scoring,
) -> Float32[Array, "batch rows heads head_dim"]:
    """`_attend`, one block of queries after another."""
    batch, rows, *head = q.shape
    n_blocks = -(-rows // _BLOCK)
    if n_blocks < 2:
        return _attend(q, k, v, start, scoring)
    blocks = _padded(q, 1, -rows % _BLOCK).reshape(batch, n_blocks, _BLOCK, *head).swapaxes(0, 1)
    starts = start + _BLOCK * jnp.arange(n_blocks)
    y = lax.map(lambda block: _attend(block[0], k, v, block[1], scoring), (blocks, starts))
    return y.swapaxes(0, 1).reshape(batch, -1, *head)[:, :rows]


def _padded(a: Array, axis: int, n: int) -> Array:
    """With ``n`` rows of zeros behind, which no query of the text sees."""
    return jnp.pad(a, [(0, n if i == axis else 0) for i in range(a.ndim)])


def _attend(
    q: Float[Array, "batch rows heads head_dim"],
    k: Float32[Array, "batch kv_heads keys head_dim"],
    v: Float32[Array, "batch kv_heads keys head_dim"],
    start: int | Int[Array, ""],
    scoring: Scoring,
) -> Float32[Array, "batch rows heads head_dim"]:
    batch, rows, heads, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    # The query heads that share a key head lie below one another: each key head is one matrix product.
    q = q.reshape(batch, rows, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, -1, head_dim) * (scoring.scale or head_dim**-0.5)
    scores = _product("bgmd,bgtd->bgmt", q, k).reshape(batch, kv_heads, -1, rows, keys)
    if scoring.softcap:
        scores = softcapped(scores, scoring.softcap)
    back = start + jnp.arange(rows)[:, None] - jnp.arange(keys)
    visible = back >= 0 if scoring.window is None else (back >= 0) & (back < scoring.window)
    # Not -inf: rows behind the text may see nothing, and NaN would go from them into gradients.
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    y = _product("bgmt,bgtd->bgmd", weights.reshape(batch, kv_heads, -1, keys), v)
    y = y.reshape(batch, kv_heads, -1, rows, head_dim).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, rows, heads, head_dim)


def softcapped(x: Float32[Array, "*shape"], cap: float) -> Float32[Array, "*shape"]:
    """cap · tanh(x / cap)."""
    return cap * jnp.tanh(x / cap)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    # HIGHEST, because a GPU would otherwise multiply float32 in TF32, with 10 bits of mantissa.
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST)
