"""Half-quadratic quantization (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"):
offsets that leave few large errors, found from the weights alone.

Of a group's errors E it makes Σ |E|^p small, with p < 1, for which a few large errors are cheap: outliers may be met
badly, so that the others are met well.  A second variable Z stands for the errors, and two steps alternate:

    Z = shrink(W - Ŵ) = sign(E) max(|E| - |E|^(p-1) / β, 0)         the outliers' errors are given up
    o = o + mean(W - Ŵ - Z)                                         the offset fits what is left

while β grows.  Errors are counted in steps of the scale, so that p and β mean the same in every group.  A format
without offsets fits its scale instead, by least squares.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt8

from qjax.formats import Format
from qjax.methods import coding, rtn
from qjax.methods.statistics import Seen
from qjax.tensor import QTensor

# As the authors have them: the exponent, the first β, its growth, and the rounds.
_P, _BETA, _GROWTH, _ROUNDS = 0.7, 10.0, 1.01, 20


def quantize(name: str, w: Array, format: Format, seen: Seen | None, options: rtn.Options) -> Array | QTensor:
    """A Rounder, which looks at no text.  Raises QjaxError as `coding.rounded` does."""
    return coding.rounded("hqq", name, w, format, options, lambda matrix: solve, fits=coding.moves_scales)


@functools.partial(jax.jit, static_argnames="format")
def solve(w: Array, nearest: Any, format: Format) -> tuple[Any, UInt8[Array, "rows n_blocks block_size"]]:
    """The fields of some rows, and their codes: of each block the best that the rounds come by."""
    n_rows, n_blocks, w = len(w), w.shape[1] // format.block_size, w.T

    def coded(fields):
        """Codes, errors in steps (n_groups, group, rows), and of each block Σ |W - Ŵ|^p (rows, n_blocks)."""
        scale, offset = coding.spread_scales(format, fields, len(w))
        codes, rounded = coding.nearest(w, scale, offset, format.levels)
        error = w - rounded
        cost = jnp.sum((jnp.abs(error) ** _P).reshape(n_blocks, -1, n_rows), axis=1).T
        return codes, error / jnp.where(scale == 0, jnp.inf, scale), cost

    def better(best, fields, codes, cost):
        best_fields, best_codes, best_cost = best
        chosen = cost < best_cost
        of_blocks = lambda a, b: jnp.where(chosen.reshape(*chosen.shape, *(1 for _ in a.shape[2:])), a, b)  # noqa: E731
        of_columns = jnp.repeat(chosen.T, format.block_size, axis=0)
        return (
            jax.tree.map(of_blocks, fields, best_fields),
            jnp.where(of_columns, codes, best_codes),
            jnp.minimum(cost, best_cost),
        )

    def one_round(k, state):
        fields, *best = state
        codes, error, _ = coded(fields)
        magnitude = jnp.abs(error)
        kept = jnp.sign(error) * jnp.maximum(
            magnitude - jnp.where(magnitude > 0, magnitude, 1) ** (_P - 1) / (_BETA * _GROWTH**k), 0
        )
        scales = format.scales(fields)
        by_group = lambda a: a.reshape(scales.scale.shape[1], -1, n_rows)  # noqa: E731
        rest, level = by_group(error - kept), by_group(coding.level(codes, format.levels))
        if scales.offset is None:
            step = jnp.sum(level * rest, axis=1) / jnp.maximum(jnp.sum(level * level, axis=1), 1)
            scales = scales._replace(scale=scales.scale * (1 + step.T))
        else:
            scales = scales._replace(offset=scales.offset + scales.scale * jnp.mean(rest, axis=1).T)
        fields = format.with_scales(fields, scales)
        return fields, *better(best, fields, *coded(fields)[::2])

    codes, _, cost = coded(nearest)
    _, fields, codes, _ = lax.fori_loop(0, _ROUNDS, one_round, (nearest, nearest, codes, cost))
    codes = codes.T.reshape(n_rows, n_blocks, -1)
    return format.with_codes(fields, codes), codes
