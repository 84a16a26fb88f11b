"""Mixture of experts (Shazeer et al. 2017): of many feed-forward layers each token passes through a few.

    h ─ router ─ softmax ─ top k ─► ids, shares       y = Σ_k share_k · expert_k(h)

Pairs of a token and one of its experts are sorted by expert and cut into blocks of rows that share one, so that each
product is dense and reads the weights of a single expert (as MegaBlocks does, Gale et al. 2022):

    experts   2  0  0  1  2  0  0      tokens in the order of their experts, blocks of 4
    blocks   [0  0  0  0] [1  ·  ·  ·] [2  2  ·  ·]
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int

_MAX_BLOCK = 128


def route(
    logits: Float32[Array, "*rows n_experts"], n_used: int, normed: bool
) -> tuple[Int[Array, "*rows n_used"], Float32[Array, "*rows n_used"]]:
    """The n_used likeliest experts of each row and their shares: their probabilities, which if ``normed`` are divided
    by their sum."""
    shares, ids = lax.top_k(jax.nn.softmax(logits, axis=-1), n_used)
    return ids, shares / jnp.sum(shares, axis=-1, keepdims=True) if normed else shares


def mixture(
    h: Float32[Array, "rows d_model"],
    ids: Int[Array, "rows n_used"],
    shares: Float32[Array, "rows n_used"],
    n_experts: int,
    expert: Callable[[Array, Array], Array],
) -> Float32[Array, "rows d_model"]:
    """Σ share · expert(h) of each row; expert(rows, e) is what expert e makes of some rows."""
    rows, n_used = ids.shape
    n_pairs = rows * n_used
    # As many rows in a block as an expert has on average: more would be padding, fewer would read it again.
    block = min(1 << (n_pairs // n_experts).bit_length(), _MAX_BLOCK) if n_pairs > n_experts else 1
    n_blocks = (n_pairs + min(n_experts, n_pairs) * (block - 1)) // block

    chosen = ids.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    counts = jnp.bincount(chosen, length=n_experts)
    blocks = -(-counts // block)
    ends = jnp.cumsum(blocks)
    first_pairs = jnp.cumsum(counts) - counts

    def add(y: Array, i: Array) -> tuple[Array, None]:
        e = jnp.searchsorted(ends, i, side="right").clip(max=n_experts - 1)
        within = (i - ends[e] + blocks[e]) * block + jnp.arange(block)
        pairs = order[(first_pairs[e] + within).clip(max=n_pairs - 1)]
        share = jnp.where(within < counts[e], shares.reshape(-1)[pairs], 0)
        made = expert(h[pairs // n_used], e)
        return y.at[pairs // n_used].add(share[:, None] * made), None

    def add_if_there(y: Array, i: Array) -> tuple[Array, None]:
        return lax.cond(i < ends[-1], add, lambda y, i: (y, None), y, i)

    # Blocks of one row are all there.
    return lax.scan(add if block == 1 else add_if_there, jnp.zeros_like(h), jnp.arange(n_blocks))[0]
