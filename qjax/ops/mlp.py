"""The gated feed-forward layer."""

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from qjax.ops.linear import matmul
from qjax.tensor import QTensor


def swiglu(
    x: Float[Array, "*rows d_model"],
    gate: Array | QTensor,
    up: Array | QTensor,
    down: Array | QTensor,
    dtype: DTypeLike | None = None,
) -> Float32[Array, "*rows d_model"]:
    """down · (silu(gate · x) ∘ (up · x)) (Shazeer 2020); gate, up: (d_ff, d_model), down: (d_model, d_ff)."""
    return matmul(jax.nn.silu(matmul(x, gate, dtype)) * matmul(x, up, dtype), down, dtype)
