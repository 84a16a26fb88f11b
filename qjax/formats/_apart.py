"""How loops over the weights of blocks stay vector code on CPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def apart(f: Callable[..., Any], *arguments: Any) -> Any:
    """``f(*arguments)``, not fused on CPU with what follows, which is mostly a reshape or a lookup.

    XLA computes a fused chain of operations weight by weight of its last array.  Behind a reshape the index of every
    weight has to be taken apart into those of the arrays before, and a lookup takes one index after another; neither
    goes with vector instructions, and all before them in the chain is then 4 to 10 times slower.  XLA does not fuse
    across a branch.  This one is always taken; it depends on the arguments, so that no compiler pass knows that.
    """
    data = jax.tree.leaves(arguments)[0]
    if jax.default_backend() != "cpu" or not data.size:
        return f(*arguments)
    result = jax.eval_shape(f, *arguments)
    bits = lax.bitcast_convert_type(data.ravel()[0], f"uint{8 * data.dtype.itemsize}")
    zeros = lambda *_: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), result)  # noqa: E731
    return lax.cond((bits | 1) != 0, f, zeros, *arguments)
