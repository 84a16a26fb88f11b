"""The gated feed-forward layer."""

import jax
from jaxtyping import Array, Float32


def swiglu(gate: Float32[Array, "*rows d_ff"], up: Float32[Array, "*rows d_ff"]) -> Float32[Array, "*rows d_ff"]:
    """silu(gate) ∘ up (Shazeer 2020), of the products of a layer's input with its two first matrices."""
    return jax.nn.silu(gate) * up
