"""Adapted: a matrix that stays as it is, and what a LoRA adapter adds to it (Hu et al. 2021, "LoRA").

    W' = W + scale · B A        y = x @ W'.T = x @ W.T + scale · (x @ A.T) @ B.T

W may be packed: it is decoded where it is multiplied, forwards and backwards, and never kept dense (Dettmers et al.
2023, "QLoRA").  Only A and B get a gradient, and x.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32

from qjax.tensor import dense


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"])
@dataclass(frozen=True)
class Adapted:
    """A matrix, or a stack of them, with its adapter.

    base: Array or QTensor, of logical shape (*stack, rows, columns).  scale: alpha / rank.
    """

    base: Any
    a: Float[Array, "*stack rank columns"]
    b: Float[Array, "*stack rows rank"]
    scale: float = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def product(
        self, multiply: Callable[[Array, Any], Array], x: Float[Array, "*batch columns"]
    ) -> Float32[Array, "*batch rows"]:
        """``x @ W'.T``; ``multiply(x, w)`` is ``x @ w.T``."""
        base = jax.tree.map(lax.stop_gradient, self.base)
        return multiply(x, base) + self.scale * multiply(multiply(x, self.a), self.b)

    def merged(self) -> Float32[Array, "*stack rows columns"]:
        """W', dense."""
        added = jnp.einsum("...or,...ri->...oi", self.b, self.a, precision=lax.Precision.HIGHEST)
        return dense(self.base) + self.scale * added
