"""The search of the i-quants: groups of weights to points of a code book, as ggml finds them.

For a scale s a group x gets levels l, the nearest ones to x = s (2 l + 1), coordinate by coordinate.  Where the tuple
of levels is a grid point, that is it; else the best of the points around it is, by sum w (s q - x)^2 with q = 2 l + 1.
Source of the rules: ggml-quants.c, iq2_find_best_neighbour and iq3_find_best_neighbour.

Lists of neighbours have one to some hundred points, of which lanes side by side wait for the longest.  So all groups
and scales of a slab are put in order of the length of their lists first, and are searched in batches of that order.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt16, UInt32

from qjax.formats._apart import apart
from qjax.formats._exact import runtime_one
from qjax.formats._grids import Grid

# Searches side by side.
_BATCH = 1056

# Lists of one point need no search; the others are sorted by these upper bounds of their lengths.
_LENGTHS = (1, 3, 5, 8, 12, 18, 28, 48)

# Closer than this to the middle between two levels, rounding errors decide which of them is the better one.
_DOUBT = 1e-4


_SPAN = 2**30 - 1

# All levels 0, in any code book.
LOWEST_POINT = np.uint32(0x11111111)


class _Lists(NamedTuple):
    """The candidates of each key: first those that no other point obstructs, for all keys, then all of them again."""

    spans: Int32[np.ndarray, " 2_n_keys"]  # key is a point << 30 | start << 10 | length
    points: UInt32[np.ndarray, " n"]  # q of each coordinate in a nibble, the first one lowest


@functools.cache
def _lists(grid: Grid) -> _Lists:
    nibbles = (2 * grid.points.astype(np.uint32) + 1) << 4 * np.arange(grid.points.shape[1], dtype=np.uint32)
    packed = nibbles.sum(axis=1, dtype=np.uint32)
    spans, points = [], []
    for start, candidates in (grid.unobstructed, grid.candidates):
        begin = start[:-1] + sum(map(len, points))
        spans.append((grid.point_of_key >= 0) * (_SPAN + 1) | begin << 10 | np.diff(start))
        points.append(packed[candidates])
    return _Lists(np.concatenate(spans).astype(np.int32), np.concatenate(points))


def coordinate(packed: UInt32[Array, "*s"], i: int) -> Float32[Array, "*s"]:
    """q = 2 level + 1 of coordinate ``i`` of packed points."""
    return (packed >> 4 * i & 15).astype(jnp.float32)


def point_numbers(grid: Grid, packed: UInt32[Array, "*s"]) -> UInt16[Array, "*s"]:
    """The numbers of packed points, as files hold them."""
    digits = [(coordinate(packed, i) - 1) / 2 * grid.n_levels**i for i in range(grid.points.shape[1])]
    key = functools.reduce(jnp.add, digits)
    return jnp.asarray(grid.point_of_key)[key.astype(jnp.int32)].astype(jnp.uint16)


def nearest_points(
    grid: Grid,
    x: Float32[Array, "n groups lanes"],
    w: Float32[Array, "n groups lanes"],
    inverse: Float32[Array, "steps lanes"],
    scale: Float32[Array, "steps lanes"],
) -> tuple[UInt32[Array, "steps groups lanes"], Bool[Array, "steps groups lanes"]]:
    """The point for each group at each of the scales of its lane; and whether its levels are a point themselves.

    x: weights; a negative one gets level 0.
    w: weights of the squared errors.
    inverse, scale: 1 / scale, and scale, as the reference computes them.

    Returns points packed as in `coordinate`.
    """
    lists = _lists(grid)
    n_keys = len(grid.point_of_key)
    one = runtime_one(x, axis=(0, 1))[0]

    def keys(inverse, x, one):
        key, doubt = jnp.float32(0), jnp.float32(0)
        for i, xi in enumerate(x):
            v = 0.5 * (inverse[:, None] * xi * one - 1)
            level = _nearest_level(v, grid.n_levels)
            doubt = jnp.maximum(doubt, jnp.abs(jnp.clip(v, 0, grid.n_levels - 1) - level))
            key = key + level * grid.n_levels**i
        # The obstructed candidates are left out where each coordinate's level is surely its best one.
        return jnp.where(doubt > 0.5 - _DOUBT, key + n_keys, key).astype(jnp.int32)

    span = jnp.asarray(lists.spans)[apart(keys, inverse, x, one)]
    return _search(jnp.asarray(lists.points), span & _SPAN, x, w, scale), span > _SPAN


def _nearest_level(v, n_levels: int):
    """ggml's ``nearest_int``, which rounds by shifting bits out of the mantissa, within the levels.

    As in C, a number beyond 2^22 becomes what its mantissa happens to hold: a group whose scale was fitted to weights
    that do not matter can have such.
    """
    mantissa = lax.bitcast_convert_type(v + jnp.float32(3 * 2**22), jnp.int32) & (2**23 - 1)
    return jnp.clip(mantissa - 2**22, 0, n_levels - 1).astype(jnp.float32)


def _search(
    points: UInt32[Array, " n_candidates"],
    span: Int32[Array, "steps groups lanes"],
    x: Float32[Array, "n groups lanes"],
    w: Float32[Array, "n groups lanes"],
    scale: Float32[Array, "steps lanes"],
) -> UInt32[Array, "steps groups lanes"]:
    """The best point of each list, the first of equals."""
    lanes, n_items, per_step = span.shape[-1], span.size, span[0].size
    batch = min(_BATCH, n_items)
    x, w = x.reshape(len(x), per_step), w.reshape(len(w), per_step)
    place, n_searched = _places(span & 1023)
    order = jnp.zeros(-(-n_items // batch) * batch, jnp.int32)
    items = jnp.arange(n_items, dtype=jnp.int32)
    order = order.at[place.ravel()].set(items, mode="drop", unique_indices=True)

    def search_batch(state):
        begin, found = state
        item = lax.dynamic_slice(order, (begin,), (batch,))
        lane = item % per_step
        xs, ws = jnp.take(x, lane, axis=1), jnp.take(w, lane, axis=1)
        s = scale.ravel()[item // per_step * lanes + item % lanes]
        one = runtime_one(xs, axis=0)[0]
        first, length = span.ravel()[item] >> 10, span.ravel()[item] & 1023

        def better(j, best):
            point = points[first + jnp.minimum(j, length - 1)]
            error = jnp.float32(0)
            for i in range(len(x)):
                diff = s * coordinate(point, i) * one - xs[i]
                error = error + ws[i] * diff * diff * one

            return tuple(jnp.where(error < best[0], new, old) for new, old in zip((error, point), best))

        best = jnp.full(batch, jnp.finfo(jnp.float32).max), points[first]
        _, best = lax.fori_loop(0, jnp.max(length), better, best)
        return begin + batch, lax.dynamic_update_slice(found, best, (begin,))

    _, found = lax.while_loop(
        lambda state: state[0] < n_searched, search_batch, (jnp.int32(0), jnp.zeros(len(order), jnp.uint32))
    )
    return jnp.where(place < len(order), found[jnp.minimum(place, len(order) - 1)], points[span >> 10])


def _places(
    length: Int32[Array, "steps groups lanes"],
) -> tuple[Int32[Array, "steps groups lanes"], Int32[Array, ""]]:
    """The place of each list in the order of lengths (beyond the end, where it is one point), and how many have one."""
    rows = length.reshape(-1, length.shape[-1])
    kinds = jnp.arange(len(_LENGTHS))[:, None]

    def count_row(counts, row):
        kind = sum((row > bound).astype(jnp.int32) for bound in _LENGTHS) - 1
        here = kinds == kind
        return counts + here, (kind, jnp.sum(jnp.where(here, counts, 0), axis=0))

    counts, (kind, rank) = lax.scan(count_row, jnp.zeros((len(_LENGTHS), rows.shape[1]), jnp.int32), rows)
    begin = jnp.cumsum(counts).reshape(counts.shape) - counts
    place = begin[jnp.maximum(kind, 0), jnp.arange(rows.shape[1])] + rank
    return jnp.where(kind >= 0, place, length.size * 2).reshape(length.shape), jnp.sum(counts)
