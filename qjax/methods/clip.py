"""Clipping: give up the largest weights of a block, so that its other weights get finer steps.

A format's own search is tried on the weights made smaller by several factors, which makes the scales so much smaller,
and the largest weights are met by the last code.  Of each block the scales stay that leave the smallest E H Eᵀ, H being
the second moment of its inputs: the clipping search of AWQ (Lin et al. 2023, arXiv 2306.00978, section 4), which takes
the error of the output as well, block by block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, UInt8

from qjax.formats import Format
from qjax.methods import coding, rtn
from qjax.methods.statistics import Seen
from qjax.tensor import QTensor

_SIZES = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


def quantize(name: str, w: Array, format: Format, seen: Seen | None, options: rtn.Options) -> Array | QTensor:
    """A Rounder.  Raises QjaxError as `coding.rounded` does."""
    d_in = w.shape[-1]
    moments = jnp.eye(d_in) if seen is None else jnp.asarray(seen.second_moment)

    def solver_of(matrix: tuple[int, ...]) -> coding.Solver:
        return functools.partial(solve, moments[matrix])

    return coding.rounded("clip", name, w, format, options, solver_of, fits=coding.moves_scales)


@functools.partial(jax.jit, static_argnames="format")
def solve(
    h: Float32[Array, "d_in d_in"], w: Float32[Array, "rows d_in"], nearest: Any, format: Format
) -> tuple[Any, UInt8[Array, "rows n_blocks block_size"]]:
    """The fields of some rows, and their codes.  nearest: the fields of round-to-nearest; one of the candidates."""
    n_rows, block = len(w), format.block_size
    blocks, n_blocks = w.reshape(n_rows, -1, block), w.shape[1] // block
    of_blocks = h.reshape(n_blocks, block, n_blocks, block)[np.arange(n_blocks), :, np.arange(n_blocks)]
    importance = jnp.diagonal(h).reshape(-1, block) if format.uses_importance else None

    def with_codes(fields):
        codes, rounded = coding.nearest(w.T, *coding.spread_scales(format, fields, w.shape[1]), format.levels)
        e = (rounded - w.T).reshape(n_blocks, block, n_rows)
        return fields, codes, jnp.sum(jnp.einsum("bij,bjr->bir", of_blocks, e) * e, axis=1)

    def of_size(size):
        return with_codes(format.encode(size * blocks, importance))

    found = lax.map(of_size, jnp.asarray(_SIZES, jnp.float32))
    fields, codes, errors = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), with_codes(nearest), found)
    best = jnp.argmin(errors, axis=0).T
    place = best, jnp.arange(n_rows)[:, None], jnp.arange(n_blocks)
    codes = codes.reshape(-1, n_blocks, block, n_rows).transpose(0, 3, 1, 2)[place]
    return format.with_codes(jax.tree.map(lambda a: a[place], fields), codes), codes
