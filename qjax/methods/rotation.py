"""Rotation: the residual stream and the values of each head in a basis without outliers.

Source: Ashkboos et al. 2024, QuaRot; the rotations that need no work when the model runs.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float32

from qjax.errors import QjaxError
from qjax.methods.folding import Job, channels, floats, stream
from qjax.methods.statistics import Tensors
from qjax.models.config import Config
from qjax.ops import hadamard

SEED = 0
"""Of the random signs."""


def rotate(config: Config, tensors: Tensors, job: Job) -> tuple[Config, Tensors]:
    """With x R instead of the residual stream x, and the values of each head turned by a Hadamard matrix.

    An RMS norm without weights commutes with R, so the weights of norms are moved into the matrices that read their
    output first.  That of the last norm cannot go into an embedding that is looked up too: a tied head becomes a tensor
    of its own, and the file larger by as much.

    Raises QjaxError for architectures whose norms are others, or follow a matrix.
    """
    for trait, why in (("layer_norms", "subtract the mean"), ("post_norms", "weigh what a layer adds to the stream")):
        if getattr(config.traits, trait):
            raise QjaxError(f"rotate: the norms of {config.architecture} {why}, which no rotation passes; leave it out")
    made = dict(tensors)
    if config.tied:
        made["output.weight"], config = made["token_embd.weight"], replace(config, tied=False)
    of_heads = orthogonal(config.head_dim, signs=False)
    for which in channels(config):
        (maker, *_), reads = which.makes, floats(made, *which.reads)
        if maker.name.endswith("_norm.weight"):
            weight = floats(made, maker.name)[maker.name]
            made |= {name: w * weight for name, w in reads.items()} | {maker.name: jnp.ones_like(weight)}
        elif maker.name.endswith(("attn_v.weight", "attn_qkv.weight")):
            made |= {name: _columns(w, of_heads) for name, w in reads.items()}
            for name, start in which.makes:
                w, rows = floats(made, name)[name], slice(start, start + which.n)
                made[name] = w.at[rows].set(_rows(w[rows], of_heads))
    r, met = orthogonal(config.d_model), stream(config)
    made |= {name: _columns(w, r) for name, w in floats(made, *met.columns).items()}
    made |= {name: _rows(w, r) for name, w in floats(made, *met.rows).items()}
    return config, made


def orthogonal(n: int, signs: bool = True) -> Float32[Array, "n n"]:
    """A Hadamard matrix, by default with random signs of its rows; where none is known, a random rotation."""
    rng = np.random.default_rng(SEED)
    try:
        r = hadamard.matrix(n)
    except QjaxError:
        q, upper = np.linalg.qr(rng.standard_normal((n, n)))
        return jnp.asarray(q * np.sign(np.diag(upper)), jnp.float32)
    return jnp.asarray(r * rng.choice([-1, 1], (n, 1)) if signs else r, jnp.float32)


def _columns(w: Float32[Array, "*rows d"], r: Float32[Array, "n n"]) -> Float32[Array, "*rows d"]:
    """Each n neighbours of each row times r."""
    blocks = w.reshape(*w.shape[:-1], -1, len(r))
    return jnp.matmul(blocks, r, precision=lax.Precision.HIGHEST).reshape(w.shape)


def _rows(w: Float32[Array, "..."], r: Float32[Array, "n n"]) -> Float32[Array, "..."]:
    """The same of the columns of matrices, or of a bias."""
    return _columns(w, r) if w.ndim == 1 else jnp.swapaxes(_columns(jnp.swapaxes(w, -1, -2), r), -1, -2)
