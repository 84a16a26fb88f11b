"""Blocks on the vector axis: how a search over one block becomes array code over many blocks at once.

ggml's searches are loops over the weights of a block.  Here a search sees a slab ``(n, lanes)``: the weights of a
block run down axis 0, as C's index does, and every lane is another block, so that each step of C's loop is one vector
instruction for many blocks.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float32


def _slab_size() -> int:
    """Weights in one slab.

    On CPU few enough for the slab to stay in the cache through the hundreds of passes of a search, and no power of
    two, or the rows of a slab would lie in each other's cache lines.
    """
    return 1040 * 32 if jax.default_backend() == "cpu" else 2**24


def map_blocks(search: Callable[..., Any], x: Float32[Array, "*rows n_blocks n"], *inputs: Any) -> Any:
    """``search`` over all blocks, slab after slab.

    x: the weights.
    inputs: more arrays ``(*rows, n_blocks, m)``, of any m, or broadcast to that; or pytrees of such, or None.
    search: takes a slab ``(n, lanes)`` for x and one ``(m, lanes)`` for each input, and returns a pytree of arrays
        ``(..., lanes)``; it must treat each lane alone, for the last slab is padded with zeros.

    Returns the pytree with each array as ``(*rows, n_blocks, ...)``.
    """
    blocks = x.shape[:-1]
    n_blocks = math.prod(blocks)
    lanes = max(min(_slab_size() // x.shape[-1], n_blocks), 1)
    n_slabs = max(-(-n_blocks // lanes), 1)

    def to_slabs(a):
        a = jnp.broadcast_to(a, (*blocks, a.shape[-1])).reshape(n_blocks, a.shape[-1])
        return jnp.pad(a, ((0, n_slabs * lanes - n_blocks), (0, 0))).reshape(n_slabs, lanes, a.shape[-1])

    def from_slabs(a):
        return a.reshape(n_slabs * lanes, *a.shape[2:])[:n_blocks].reshape(*blocks, *a.shape[2:])

    def search_slab(slabs):
        found = search(*jax.tree.map(jnp.transpose, slabs))
        return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), found)

    return jax.tree.map(from_slabs, lax.map(search_slab, jax.tree.map(to_slabs, (x, *inputs))))


def some_lanes(search: Callable[..., Any], some: Bool[Array, "*lanes"], state: Any, *inputs: Any) -> Any:
    """``search(state, *inputs)`` in those lanes where ``some`` holds, and ``state`` in the others.

    state, inputs: pytrees of arrays ``(..., *lanes)``.

    On CPU these lanes alone are worked, a quarter of all at a time; elsewhere all of them, which wait for each other
    anyway.
    """
    lanes = some.size
    if jax.default_backend() != "cpu" or lanes < 4:
        return jax.tree.map(functools.partial(jnp.where, some), search(state, *inputs), state)
    batch, flat = lanes // 4, lambda a: a.reshape(*a.shape[: a.ndim - some.ndim], lanes)
    begun, flat_inputs = jax.tree.map(flat, (state, inputs))
    count = jnp.cumsum(some.ravel())
    place = jnp.where(some.ravel(), count - 1, lanes + batch)
    order = jnp.full(lanes + batch, lanes).at[place].set(jnp.arange(lanes), mode="drop", unique_indices=True)

    def search_batch(progress):
        begin, state = progress
        chosen = lax.dynamic_slice(order, (begin,), (batch,))
        found = search(*jax.tree.map(lambda a: jnp.take(a, chosen, axis=-1, mode="clip"), (state, *flat_inputs)))
        into = lambda a, new: a.at[..., chosen].set(new, mode="drop", unique_indices=True)  # noqa: E731
        return begin + batch, jax.tree.map(into, state, found)

    done = lax.while_loop(lambda progress: progress[0] < count[-1], search_batch, (0, begun))[1]
    return jax.tree.map(lambda a, was: a.reshape(was.shape), done, state)


def scan_rows(
    step: Callable[..., tuple[Array, ...]], state: tuple[Array, ...], *slabs: Float32[Array, "n *lanes"]
) -> tuple[Array, ...]:
    """C's loop over the weights of a block: ``state = step(state, *rows)`` with one row of each slab after another."""
    n = len(slabs[0])
    # A few rows to an iteration: the state stays in registers for as long, and the code stays short.
    rows_per_iteration = math.gcd(n, 8)

    def iterate(iteration, state):
        for i in range(rows_per_iteration):
            state = step(state, *(slab[rows_per_iteration * iteration + i] for slab in slabs))
        return state

    return lax.fori_loop(0, n // rows_per_iteration, iterate, state)


def block_sums(
    terms: Callable[..., tuple[Array, ...]], *slabs: Float32[Array, "n *lanes"]
) -> tuple[Float32[Array, "*lanes"], ...]:
    """The sums of each block's ``terms``, first to last in float32, as C's loop adds them up.

    terms: takes one row of each slab and returns what is to be added.  A term that is a product has to be an
        `_exact.exact_product`, or it may be contracted with the sum.

    A reduction would add up in an order of the compiler's choice.
    """
    shapes = jax.eval_shape(terms, *(slab[0] for slab in slabs))
    zeros = tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)
    return scan_rows(lambda sums, *rows: tuple(map(jnp.add, sums, terms(*rows))), zeros, *slabs)


def block_sum(x: Float32[Array, "n *lanes"]) -> Float32[Array, "*lanes"]:
    """The sum of each block; see `block_sums`."""
    return block_sums(lambda row: (row,), x)[0]
