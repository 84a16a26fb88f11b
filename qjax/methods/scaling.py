"""Scales of the channels that matrices read: channels that matter, or have outliers, change places with the weights.

y = x Wᵀ = (x / s) (W s)ᵀ        1 / s goes into the norm, or the rows, that make x: see `folding.channels`
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

from qjax.methods.folding import Channels, Job, channels, floats, of_columns, scaled
from qjax.methods.readers import Readers
from qjax.methods.statistics import Tensors
from qjax.models.config import Config

_EXPONENTS = [(alpha / 10, beta) for beta in (0, 0.3) for alpha in range(10)]
_LARGEST = 1e4
"""Of scales, and of their inverses: scales of blocks are float16."""


def smooth(config: Config, tensors: Tensors, job: Job, strength: float = 0.5) -> tuple[Config, Tensors]:
    """SmoothQuant (Xiao et al. 2022): s = max|x|^α / max|w|^(1 - α) of each channel, so that activations that are to be
    quantized have outliers no larger than the weights'.

    strength: α; 0 makes all columns of weights equally large, 1 all channels of activations.
    """
    made: dict[str, Any] = dict(tensors)
    # From the end, as rows of attn_v and ffn_up that are scaled count in the columns' largest weights.
    for which in reversed(channels(config)):
        x = _of_channels(made, which, [job.seen[name].largest for name in which.reads], jnp.max)
        made |= scaled(made, which, _bounded(x**strength / _largest(made, which) ** (1 - strength)))
    return config, made


def awq(config: Config, tensors: Tensors, job: Job) -> tuple[Config, Tensors]:
    """AWQ (Lin et al. 2023): s = rms(x)^α / max|w|^β of each channel, with the exponents with which the matrices that
    read it, rounded to nearest as they will be, have the outputs with the smallest squared error.

    β = 0 is the paper's; its programs know weights too.  α = β = 0 changes nothing, and is tried first.
    """
    made: dict[str, Any] = dict(tensors)
    for which in channels(config):
        readers = Readers(tensors, job, which.reads)
        x = jnp.sqrt(_of_channels(tensors, which, [job.seen[which.reads[0]].importance], jnp.mean))
        w = _largest(tensors, which)
        candidates = [_bounded(x**alpha / w**beta) for alpha, beta in _EXPONENTS]
        errors = [sum(_error(readers, name, which, s) for name in readers.steps) for s in candidates]
        if (best := int(np.argmin(errors))) != 0:
            made |= scaled(made, which, candidates[best])
    return config, made


def _error(readers: Readers, name: str, which: Channels, s: Float32[Array, "*n_mat n"]) -> float:
    columns = of_columns(s, which)
    return readers.error(
        name, readers.matrices[name] * columns, readers.seen[name] / (columns * jnp.swapaxes(columns, -1, -2))
    )


def _of_channels(
    tensors: Tensors, which: Channels, numbers: Sequence[Any], reduce: Callable[..., Array]
) -> Float32[Array, "*n_mat n"]:
    """Of each channel, from numbers of the columns of several matrices; experts that make channels have their own."""
    each = tensors[which.makes[0].name].shape[:-2]
    flat = [jnp.asarray(a).reshape(-1, *each, a.shape[-1]) for a in numbers]
    return which.reduced(reduce(jnp.concatenate(flat), axis=0), reduce)


def _largest(tensors: Tensors, which: Channels) -> Float32[Array, "*n_mat n"]:
    """The largest |w| that meets each channel."""
    matrices = floats(tensors, *which.reads).values()
    return _of_channels(tensors, which, [jnp.abs(w).max(axis=-2) for w in matrices], jnp.max)


def _bounded(s: Float32[Array, "*n_mat n"]) -> Float32[Array, "*n_mat n"]:
    """With a geometric mean of 1, and 1 where they are zero or infinite, of channels or columns that are zero."""
    logs = jnp.log(s)
    logs -= jnp.mean(logs, axis=-1, keepdims=True, where=jnp.isfinite(logs))
    return jnp.exp(jnp.where(jnp.isfinite(logs), jnp.clip(logs, -np.log(_LARGEST), np.log(_LARGEST)), 0))
