"""How loops over the weights of blocks stay vector code on CPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


def apart(f: Callable[..., Array], a: Shaped[Array, "..."], *others: Array) -> Array:
    """``f(a, *others)``, not fused on CPU with what follows, which is mostly a reshape or a lookup.

    XLA computes a fused chain of operations weight by weight of its last array.  Behind a reshape the index of every
    weight has to be taken apart into those of the arrays before, and a lookup takes one index after another; neither
    goes with vector instructions, and all before them in the chain is then 4 to 10 times slower.  XLA does not fuse
    across a branch.  This one is always taken; it depends on ``a``, so that no compiler pass knows that.
    """
    if jax.default_backend() != "cpu" or not a.size:
        return f(a, *others)
    shape = jax.eval_shape(f, a, *others)
    bits = lax.bitcast_convert_type(a.ravel()[0], f"uint{8 * a.dtype.itemsize}")
    return lax.cond((bits | 1) != 0, f, lambda *_: jnp.zeros(shape.shape, shape.dtype), a, *others)
