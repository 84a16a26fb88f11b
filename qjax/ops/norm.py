"""RMS normalisation (Zhang and Sennrich 2019), and layer normalisation (Ba et al. 2016)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def rms_norm(
    x: Float[Array, "*rows d_model"], weight: Float[Array, " d_model"], eps: float
) -> Float32[Array, "*rows d_model"]:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def layer_norm(
    x: Float[Array, "*rows d_model"], weight: Float[Array, " d_model"], bias: Float[Array, " d_model"], eps: float
) -> Float32[Array, "*rows d_model"]:
    """`rms_norm` of x less its mean, and the bias."""
    x = x.astype(jnp.float32)
    return rms_norm(x - jnp.mean(x, axis=-1, keepdims=True), weight, eps) + bias
