"""Choosing codes apart from a format's own encoder: what the rounders share.

A format stores ``scale * levels[code] + offset`` (see `Format.levels`).  Arrays here are (columns, rows): a column lies
in one piece, and the rows, which stand alone, are worked side by side.
"""

import functools
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, UInt8

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format, Scales
from qjax.formats.plain import Plain
from qjax.methods import rtn
from qjax.tensor import QTensor

_SLAB_ROWS = 512

Solver = Callable[[Float32[Array, "rows d_in"], Any, Format], tuple[Any, UInt8[Array, "rows n_blocks block_size"]]]
"""(rows, their fields rounded to nearest, format) -> their fields, and their codes"""


def chooses_codes(format: Format) -> bool:
    """Whether each weight has a code of its own, or none at all."""
    return format.levels is not None or isinstance(format, Plain)


def moves_scales(format: Format) -> bool:
    """Whether each block has a scale of its own, too."""
    return chooses_codes(format) and (format.with_scales is not None or isinstance(format, Plain))


def rounded(
    method: str,
    name: str,
    w: Array,
    format: Format,
    options: rtn.Options,
    solver_of: Callable[[tuple[int, ...]], Solver],
    *,
    fits: Callable[[Format], bool],
) -> Array | QTensor:
    """``w`` in ``format``, as a solver makes each of its matrices; where a format is plain, rounded to nearest.

    solver_of: takes the index of a matrix in the leading axes, () where there are none.
    fits: what the solver needs of a format, `chooses_codes` or `moves_scales`.
    Raises QjaxError naming the tensor if its format is of no use to the solver, and as rtn does.
    """
    format = format.resolve(w.shape)
    if isinstance(format, Plain):
        return rtn.quantize_tensor(name, w, format, options)
    if not fits(format):
        shared = "weights share codes" if format.levels is None else "blocks share a scale"
        others = ", ".join(n for n in formats.names() if fits(formats.get(n)) and not isinstance(formats.get(n), Plain))
        raise QjaxError(f"{name}: {method} can not round to {format.name}, in which {shared}. Use one of {others}.")
    if options.rounding is not None:
        raise QjaxError(f"{name}: {method} chooses the codes itself; leave rounding out")
    nearest = rtn.quantize_tensor(name, w, format, options)
    assert isinstance(nearest, QTensor)
    made = []
    for i in np.ndindex(w.shape[:-2]):
        of_matrix = jax.tree.map(operator.itemgetter(i), nearest.fields)
        made.append(_by_slabs(jnp.asarray(w[i], jnp.float32), of_matrix, format, solver_of(i)))
    fields = (jnp.stack(of_all).reshape(*w.shape[:-2], *of_all[0].shape) for of_all in zip(*made))
    return QTensor(format.Fields(*fields), format)


def _by_slabs(w: Float32[Array, "d_out d_in"], nearest: Any, format: Format, solve: Solver) -> Any:
    """The fields of a matrix, a slab of rows at a time."""
    by_rows, row_format = format.by_rows(nearest)
    n_rows, begun = len(w), []
    with ThreadPoolExecutor(rtn.THREADS) as pool:
        for first in range(0, n_rows, _SLAB_ROWS):
            # The last one is filled up with other rows, so that one program serves matrices of any height.
            rows = np.arange(first, first + _SLAB_ROWS) % n_rows
            begun.append(pool.submit(solve, w[rows], jax.tree.map(operator.itemgetter(rows), by_rows), row_format))
    fields, codes = jax.tree.map(lambda *slabs: jnp.concatenate(slabs)[:n_rows], *(job.result() for job in begun))
    return fields if format.with_scales is not None else format.with_codes(nearest, codes)


def scales_of(format: Format, fields: Any) -> tuple[Float32[Array, "n_groups rows"], Float32[Array, "n_groups rows"]]:
    """Scales and offsets, zeros where a format has none."""
    scale, offset = with_offset(format.scales(fields))
    return scale.T, offset.T


def with_offset(scales: Scales) -> tuple[Array, Array]:
    """Both, zeros where there is none."""
    return scales.scale, jnp.zeros_like(scales.scale) if scales.offset is None else scales.offset


def nearest(
    w: Float32[Array, "*s"],
    scale: Float32[Array, "*#s"],
    offset: Float32[Array, "*#s"],
    levels: Float32[np.ndarray, " n"],
) -> tuple[UInt8[Array, "*s"], Float32[Array, "*s"]]:
    """The codes whose weights are nearest, and these weights; with scale 0 the code of the least level."""
    v = (w - offset) / jnp.where(scale == 0, jnp.nan, scale)
    if _are_even(levels):
        i = jnp.clip(jnp.round((v - levels[0]) * (1 / (levels[1] - levels[0]))), 0, len(levels) - 1)
    else:
        midpoints = (levels[1:] + levels[:-1]) / 2
        i = functools.reduce(jnp.add, ((v > m).astype(jnp.float32) for m in midpoints))
    i = jnp.where(jnp.isnan(v), int(np.argmin(np.abs(levels))), i).astype(jnp.uint8)
    return i, scale * level(i, levels) + offset


def weights(
    codes: UInt8[Array, "d_in rows"],
    scale: Float32[Array, "n_groups rows"],
    offset: Float32[Array, "n_groups rows"],
    levels: Float32[np.ndarray, " n"],
) -> Float32[Array, "d_in rows"]:
    """What codes stand for."""
    return spread(scale, len(codes)) * level(codes, levels) + spread(offset, len(codes))


def spread_scales(
    format: Format, fields: Any, d_in: int
) -> tuple[Float32[Array, "d_in rows"], Float32[Array, "d_in rows"]]:
    """Scale and offset of each weight."""
    scale, offset = scales_of(format, fields)
    return spread(scale, d_in), spread(offset, d_in)


def spread(of_groups: Float32[Array, "n_groups rows"], d_in: int) -> Float32[Array, "d_in rows"]:
    """Each column's own of what its group has."""
    return jnp.repeat(of_groups, d_in // len(of_groups), axis=0)


def level(i: UInt8[Array, "*s"], levels: Float32[np.ndarray, " n"]) -> Float32[Array, "*s"]:
    """levels[i]"""
    if _are_even(levels):
        return levels[0] + (levels[1] - levels[0]) * i.astype(jnp.float32)
    return jnp.take(jnp.asarray(levels), i.astype(jnp.int32))


def _are_even(levels: Float32[np.ndarray, " n"]) -> bool:
    return bool(np.ptp(np.diff(levels)) == 0)


def of_rows(chosen: Bool[Array, " rows"], a: Array, b: Array) -> Array:
    """The rows of a where chosen, else those of b."""
    return jnp.where(chosen.reshape(-1, *(1 for _ in a.shape[1:])), a, b)
