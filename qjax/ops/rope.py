"""Rotary position embedding (Su et al. 2021).

Position p turns pair i of every head by the angle p · theta^(-2i / head_dim). The pairs are neighbours in llama's
GGUF files ("NORM" in llama.cpp), and half a head apart in others and in Hugging Face's ("NEOX"):

    neighbours  0   1 | 2   3 | 4   5 | ...     x[2i], x[2i+1]
    halves      0   h | 1 h+1 | 2 h+2 | ...     x[i], x[i+h], h = head_dim / 2
    angle        p·f₀ |  p·f₁ |  p·f₂ |

The two agree once the rows of the q and k weights are permuted, which is how they lie in a llama's GGUF file.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


class Rotation(NamedTuple):
    """The cosine and sine of every position's angles; computed once and shared by all layers."""

    cos: Float32[Array, "seq pairs"]
    sin: Float32[Array, "seq pairs"]


def rotation(
    positions: Int[Array, " seq"],
    n_rot: int,
    theta: float,
    scale: float = 1.0,
    factors: Sequence[float] = (),
    magnitude: float = 1.0,
) -> Rotation:
    """The rotation for token positions, of n_rot channels (all of a head, mostly); theta is the base of the frequencies
    (rope.freq_base).

    scale: of all frequencies.  factors: what each is divided by (rope_freqs.weight); nothing: 1.  magnitude: what is
    turned is multiplied by it, too.
    """
    frequencies = scale * theta ** (-np.arange(0, n_rot, 2) / n_rot)
    frequencies = frequencies / (np.asarray(factors) if factors else 1)
    angles = positions[:, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return Rotation(magnitude * jnp.cos(angles), magnitude * jnp.sin(angles))


def rope(
    x: Float[Array, "*batch seq heads head_dim"], rotation: Rotation, halves: bool = False
) -> Float32[Array, "*batch seq heads head_dim"]:
    """Turn the pairs of each head by its position's angles: neighbours, or those half a head apart.

    Of a rotation for fewer channels than a head has, the first so many are turned.
    """
    cos, sin = rotation.cos[:, None, :], rotation.sin[:, None, :]
    x, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    first, second = jnp.split(x, 2, axis=-1) if halves else (x[..., 0::2], x[..., 1::2])
    turned = first * cos - second * sin, first * sin + second * cos
    turned = jnp.concatenate(turned, axis=-1) if halves else jnp.stack(turned, axis=-1).reshape(x.shape)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
