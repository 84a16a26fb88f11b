"""How loops over the weights of blocks stay vector code on CPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, UInt


def apart(f: Callable[..., Array], codes: UInt[Array, "..."] | Int[Array, "..."], *others: Array) -> Array:
    """``f(codes, *others)``, not fused on CPU with what follows, which is mostly a reshape.

    XLA computes a fused chain of operations weight by weight of its last array.  Behind a reshape the index of every
    weight has to be taken apart into those of the arrays before, with which no vector instruction goes: 4 to 10 times
    slower.  It does not fuse across a branch.  This one is always taken; it depends on ``codes``, so that no compiler
    pass knows that.
    """
    if jax.default_backend() != "cpu" or not codes.size:
        return f(codes, *others)
    shape = jax.eval_shape(f, codes, *others)
    always = (codes.ravel()[0] | 1) != 0
    return lax.cond(always, f, lambda *_: jnp.zeros(shape.shape, shape.dtype), codes, *others)
