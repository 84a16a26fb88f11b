"""Rotary position embedding (Su et al. 2021) in the interleaved order of GGUF's llama files.

Position p turns the pair (x[2i], x[2i+1]) of every head by the angle p · theta^(-2i / head_dim):

    x:      0   1 | 2   3 | 4   5 | ...      pair i sits side by side ("NORM" in llama.cpp)
    angle:   p·f₀ |  p·f₁ |  p·f₂ |

Hugging Face keeps the pairs half a head apart (i, i + head_dim/2). The two agree once the rows of the q and k
weights are permuted, which is how they lie in a GGUF file.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


class Rotation(NamedTuple):
    """The cosine and sine of every position's angles; computed once and shared by all layers."""

    cos: Float32[Array, "seq pairs"]
    sin: Float32[Array, "seq pairs"]


def rotation(positions: Int[Array, " seq"], head_dim: int, theta: float) -> Rotation:
    """The rotation for token positions; theta is the base of the frequencies (rope.freq_base)."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = positions[:, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rope(
    x: Float[Array, "*batch seq heads head_dim"], rotation: Rotation
) -> Float32[Array, "*batch seq heads head_dim"]:
    """Turn the interleaved pairs of each head by its position's angles."""
    cos, sin = rotation.cos[:, None, :], rotation.sin[:, None, :]
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
