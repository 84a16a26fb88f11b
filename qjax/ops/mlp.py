"""The gated feed-forward layer, and what stands between its matrices."""

from functools import partial

import jax
from jaxtyping import Array, Float32

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": partial(jax.nn.gelu, approximate=True)}
"""By name; gelu with tanh (Hendrycks and Gimpel 2016), as GPT-2 and Gemma have it."""


def gated(
    gate: Float32[Array, "*rows d_ff"], up: Float32[Array, "*rows d_ff"], activation: str = "silu"
) -> Float32[Array, "*rows d_ff"]:
    """activation(gate) ∘ up (Shazeer 2020), of the products of a layer's input with its two first matrices."""
    return ACTIVATIONS[activation](gate) * up
