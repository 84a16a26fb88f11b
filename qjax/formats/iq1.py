"""The i-quants of 1.5 bits: eight weights at a time are a point of a grid of -1, 0 and 1, all shifted by an eighth.

w = d (2 s + 1) (g + delta), with a 3-bit scale s for each run of 32 weights (IQ1_S) or 16 (IQ1_M), g one of the 2048
grid points, and delta 1/8 or -1/8, chosen for each run (IQ1_S) or for each grid point (IQ1_M).

Source of the rules: ggml-quants.c, quantize_row_iq1_s_impl, quantize_row_iq1_m_impl, iq1_find_best_neighbour2.
"""

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt16

from qjax.formats import _grids
from qjax.formats._apart import apart
from qjax.formats._exact import exact_product, exact_quotient, runtime_one
from qjax.formats._format import Field, Format, is_finite, register
from qjax.formats._lanes import block_sums, map_blocks
from qjax.formats._search import importance_weights, mean_square, nearest_int

#   IQ1_S  | d f16 | qs 32 bytes | qh 8 u16 |        qs: low bits of the grid indices; qh, one for each run of 32:
#
#     bits   15     14..12  11..9   8..6    5..3    2..0
#            delta  s       high bits of the indices 3, 2, 1, 0
#
#   IQ1_M  | qs 32 bytes | qh 16 bytes | scales 4 u16 |      qh, one for each run of 16:
#
#     bits   7        6..4             3        2..0
#            delta 1  high of index 1  delta 0  high of index 0
#
#     scales, one for each four runs:
#
#     bits   15..12                11..9  8..6  5..3  2..0
#            a nibble of d (f16)   s of the runs 3, 2, 1, 0
#
# A delta bit that is set means -1/8.

_DELTA = np.float32(0.125)
# In the comparisons of the search rounding counts for less than this.
_NEARLY = np.float32(1 - 2.0**-21)
# Candidates that are compared in one go, and batches of lists of about equal length.
_STEP, _BATCHES = 8, 8


class _IQ1(Format):
    """What the two formats share; they differ in the runs, and in the order of the sums over a split."""

    family = "iquants"
    block_size = 256
    uses_importance = True

    run: ClassVar[int]
    """Weights with one scale."""
    deltas: ClassVar[tuple[tuple[int, ...], ...]]
    """The choices of delta bits for the points of a run, those of opposite delta in reverse order."""
    zero_below: ClassVar[float]
    stretch: ClassVar[float]
    """Of d, which ggml found to help."""

    @abstractmethod
    def _error_weights(self, x, importance) -> Array:
        """The weights of the errors, for a slab of blocks."""

    @abstractmethod
    def _splits(self, wx, w, rank) -> tuple[Any, Any, Callable]:
        """The sums over all splits of the weights in order of ``rank``, as `_best_split` takes them."""

    def _search(self, x, importance):
        """(256, lanes): scale and choice of deltas of each run, (n_runs, lanes), its points, (n_runs, points, lanes),
        twice, as indices and packed; and the weights of the errors."""
        w = self._error_weights(x, importance)
        by_run = (jnp.swapaxes(a.reshape(-1, self.run, x.shape[1]), 0, 1).reshape(self.run, -1) for a in (x, w))
        scale, choice, index, packed = self._search_runs(*by_run)
        scale, choice = (a.reshape(-1, x.shape[1]) for a in (scale, choice))
        index, packed = (jnp.swapaxes(a.reshape(len(a), *scale.shape), 0, 1) for a in (index, packed))
        return scale, choice, index, packed, w

    def _search_runs(self, x, w):
        """(run, lanes): scale and choice of deltas (lanes), points (points, lanes) as indices and packed."""
        one = runtime_one(x, axis=0)[0]
        rank = _rank(x)
        i1, i2, choice, scale = _best_split(*self._splits(w * x * one, w, rank))
        found = (choice >= 0) & (jnp.max(jnp.abs(x), axis=0) >= self.zero_below)
        levels = (rank >= i1).astype(jnp.int32) + (rank >= i2).astype(jnp.int32)
        levels = jnp.where(scale < 0, 2 - levels, levels)
        choice = jnp.where(found, jnp.where(scale < 0, len(self.deltas) - 1 - choice, choice), 0)
        scale, delta = jnp.abs(scale), self._delta(choice)
        index, packed, on_grid = _nearest_points(x, w, levels, delta, scale, one)
        sumqx, sumq2 = _fit(x, w, _levels_of(packed) - 1 + jnp.repeat(delta, 8, axis=0), one)
        refit = (sumqx > 0) & (sumq2 > 0) & ~jnp.all(on_grid, axis=0)
        scale = jnp.where(refit, sumqx / jnp.where(refit, sumq2, 1), scale)
        return jnp.where(found, scale, 0), choice, *(jnp.where(found, a, 0) for a in (index, packed))

    def _delta(self, choice):
        """The deltas of the points of a run, (points, *lanes)."""
        bits = jnp.asarray(self.deltas, jnp.float32)[choice]
        return jnp.moveaxis((1 - 2 * bits) * _DELTA, -1, 0)

    def _scales(self, scale, one):
        """d (lanes) before it is fitted or stretched, and the codes of the scales (n_runs, lanes)."""
        d = exact_quotient(jnp.max(scale, axis=0), 15 * one)
        codes = nearest_int(0.5 * (_times(scale, 1 / jnp.where(d > 0, d, 1)) - 1))
        return d, jnp.clip(codes, 0, 7).astype(jnp.int32)

    def _weights(self, d, scale, index, negative):
        """d (*s), scales (*s, n_runs), indices and delta bits (*s, n_runs, points) to weights."""
        # A float16 times two numbers of 4 bits is exact.
        dl = d.astype(jnp.float32)[..., None] * (2 * scale + 1).astype(jnp.float32)
        delta = jnp.where(negative, -_DELTA, _DELTA)

        def looked_up(index):
            return jnp.take(jnp.asarray(_tables().packed), index.astype(jnp.int32), mode="clip").astype(jnp.uint32)

        def weights(levels, delta, dl):
            level = (levels[..., None] >> 2 * jnp.arange(8, dtype=jnp.uint32)) & 3
            return dl[..., None] * (level.astype(jnp.int32).astype(jnp.float32) - 1 + delta[..., None])

        packed, delta, dl = (
            jnp.broadcast_to(a, index.shape).reshape(*d.shape, 32)
            for a in (apart(looked_up, index), delta, dl[..., None])
        )
        return apart(weights, packed, delta, dl).reshape(*d.shape, self.block_size)


@register
class IQ1_S(_IQ1):
    """256 weights as 32 points, with a delta and a scale for every 32.  Byte-exact with ggml; needs importance."""

    name, ggml_id, needs_importance = "IQ1_S", 19, True
    layout = (Field("d", "float16"), Field("qs", "uint8", 32), Field("qh", "uint16", 8))
    run, zero_below, stretch = 32, 1e-12, 1.125
    deltas = ((0, 0, 0, 0), (1, 1, 1, 1))

    def encode(self, weights, importance=None, rounding=None, seed=0):
        d, index, codes = map_blocks(self._search_blocks, weights, importance)
        high = jnp.sum((index >> 8) << 3 * jnp.arange(4), axis=-1)
        qs = (index & 255).astype(jnp.uint8).reshape(*d.shape, 32)
        return self.Fields(d, qs, (high | codes << 12).astype(jnp.uint16))

    def _search_blocks(self, x, importance):
        scale, choice, index, _, _ = self._search(x, importance)
        d, codes = self._scales(scale, runtime_one(x, axis=0)[0])
        return (d * self.stretch).astype(jnp.float16), index, jnp.where(d > 0, codes | choice << 3, 0)

    def _error_weights(self, x, importance):
        return importance_weights(x, importance, 2 * mean_square(x))

    def _splits(self, wx, w, rank):
        px, pw = _prefix_sums(rank, wx, w)
        # The product of a power of two with a difference is the difference of the products.
        middle = px * _DELTA, pw * _DELTA**2
        rest = px[-1] - px, pw[-1] - pw
        left = middle, [(_times(px, code), _times(pw, code, code)) for code in (-1 + _DELTA, -1 - _DELTA)]
        right = middle, [(_times(rest[0], c), _times(rest[1], c, c)) for c in (1 + _DELTA, 1 - _DELTA)]

        def sums(left, right):
            mx, mw = (b - a for a, b in zip(left[0], right[0]))
            for middle_x, (lx, lw), (rx, rw) in zip((mx, -mx), left[1], right[1]):
                yield (lx + middle_x) + rx, (lw + mw) + rw

        return left, right, sums

    def decode(self, fields):
        high = (fields.qh[..., None] >> 3 * jnp.arange(4, dtype=jnp.uint16)) & 7
        index = fields.qs.reshape(*high.shape) | high << 8
        return self._weights(fields.d, fields.qh >> 12 & 7, index, (fields.qh >> 15)[..., None] != 0)


@register
class IQ1_M(_IQ1):
    """256 weights as 32 points with a delta each, and a scale for every 16.  Byte-exact with ggml."""

    name, ggml_id = "IQ1_M", 29
    layout = (Field("qs", "uint8", 32), Field("qh", "uint8", 16), Field("scales", "uint16", 4))
    run, zero_below, stretch = 16, 1e-7, 1.1125
    deltas = ((0, 0), (0, 1), (1, 0), (1, 1))

    def encode(self, weights, importance=None, rounding=None, seed=0):
        d, index, bits, codes = map_blocks(self._search_blocks, weights, importance)
        qs = (index & 255).astype(jnp.uint8).reshape(*d.shape, 32)
        qh = jnp.sum((index >> 8 | bits << 3) << 4 * jnp.arange(2), axis=-1).astype(jnp.uint8)
        scales = jnp.sum(codes.reshape(*d.shape, 4, 4) << 3 * jnp.arange(4), axis=-1)
        nibbles = lax.bitcast_convert_type(d, jnp.uint16)[..., None] >> 4 * jnp.arange(4, dtype=jnp.uint16)
        return self.Fields(qs, qh, scales.astype(jnp.uint16) | nibbles << 12)

    def _search_blocks(self, x, importance):
        one = runtime_one(x, axis=0)[0]
        scale, choice, index, packed, w = self._search(x, importance)
        d, codes = self._scales(scale, one)
        some = d > 0
        delta = jnp.swapaxes(self._delta(choice), 0, 1)
        q = (_levels_of(packed) - 1 + jnp.repeat(delta, 8, axis=1)) * (2 * codes + 1)[:, None]
        sumqx, sumq2 = _fit(x, w, q.reshape(x.shape), one)
        d = jnp.where(sumq2 > 0, sumqx / jnp.where(sumq2 > 0, sumq2, 1), d)
        d = jnp.where(some, d * self.stretch, 0).astype(jnp.float16)
        bits = jnp.moveaxis(jnp.asarray(self.deltas)[choice], -1, 1)
        return d, index, jnp.where(some, bits, 0), jnp.where(some, codes, 0)

    def _error_weights(self, x, importance):
        if importance is not None:
            return importance_weights(x, importance, 2 * mean_square(x))
        return exact_product(x, x, runtime_one(x, axis=0))

    def _splits(self, wx, w, rank):
        # Sums over each half of the run, in the order of the whole, because each half has its own delta.
        first = jnp.arange(len(w))[:, None] < 8
        by_half = _prefix_sums(rank, *(jnp.where(half, a, 0) for half in (first, ~first) for a in (wx, w)))
        halves = by_half[:2], by_half[2:]
        codes = [np.array([-1, 0, 1], np.float32) + delta for delta in (_DELTA, -_DELTA)]
        total = [[_times(px[-1], q[2]) for q in codes] for px, _ in halves]
        left = [
            (px, [_times(pw[-1], q[2], q[2]) + _times(pw, q[0] ** 2 - q[1] ** 2) for q in codes]) for px, pw in halves
        ]
        right = [(px, [_times(pw, q[1] ** 2 - q[2] ** 2) for q in codes]) for px, pw in halves]

        def sums(left, right):
            pairs = []
            for t, (lx, lw), (rx, rw) in zip(total, left, right):
                x = lx + rx
                pairs.append([(t - x, a + b) for t, a, b in zip(t, lw, rw)])
            for a in pairs[0]:
                for b in pairs[1]:
                    yield a[0] + b[0], a[1] + b[1]

        return left, right, sums

    def decode(self, fields):
        high = (fields.qh[..., None] >> 4 * jnp.arange(2, dtype=jnp.uint8)) & 15
        index = fields.qs.reshape(*high.shape) | (high & 7).astype(jnp.uint16) << 8
        scale = (fields.scales[..., None] >> 3 * jnp.arange(4, dtype=jnp.uint16)) & 7
        nibbles = (fields.scales >> 12) << 4 * jnp.arange(4, dtype=jnp.uint16)
        d = lax.bitcast_convert_type(jnp.sum(nibbles, axis=-1, dtype=jnp.uint16), jnp.float16)
        return self._weights(d, scale.reshape(*d.shape, 16), index, high & 8 != 0)

    def valid(self, fields):
        nibbles = (fields.scales >> 12) << 4 * np.arange(4, dtype=np.uint16)
        return is_finite(nibbles.sum(axis=-1, dtype=np.uint16).view(np.float16))


def _times(a: Float32[Array, "*s"], *factors) -> Float32[Array, "*s"]:
    """``a`` times one factor after another, each product rounded before it meets the next or a sum.

    Unlike a product with `runtime_one` this holds for factors that are constant or the same for a whole block: two such
    in a row are merged, so the 1 that parts them has to be one of each value's own.
    """
    ones = jnp.where(jnp.isnan(a), 2, jnp.float32(1))
    return functools.reduce(lambda a, factor: a * factor * ones, factors, a)


def _fit(x, w, q, one):
    """sum w x q and sum w q^2 over axis 0, as C rounds them."""
    return block_sums(lambda x, w, q: (w * q * one * x * one, w * q * one * q * one), x, w, q)


def _rank(x: Float32[Array, "n lanes"]) -> Int32[Array, "n lanes"]:
    """Each weight's place in ascending order; equal ones keep theirs (qsort is a merge sort in glibc)."""
    place = jnp.arange(len(x))[:, None]
    before = ((x[i] < x) | ((x[i] == x) & (i < place)) for i in range(len(x)))
    return functools.reduce(jnp.add, (b.astype(jnp.int32) for b in before))


def _prefix_sums(
    rank: Int32[Array, "n lanes"], *values: Float32[Array, "n lanes"]
) -> list[Float32[Array, "n_and_1 lanes"]]:
    """The sums of the first 0 to n of each of the values, in order of ``rank``."""
    n = len(rank)
    place = jnp.arange(n + 1)[:, None]
    # A last row of zeros, for the sum before it.
    rows = [functools.reduce(lambda row, i: jnp.where(rank[i] == place, a[i], row), range(n), 0.0) for a in values]

    def add(total, row):
        return jax.tree.map(jnp.add, total, row), total

    return lax.scan(add, [jnp.zeros_like(a[0]) for a in values], rows)[1]


def _best_split(
    left: Any, right: Any, sums: Callable
) -> tuple[Int32[Array, " lanes"], Int32[Array, " lanes"], Int32[Array, " lanes"], Float32[Array, " lanes"]]:
    """The best way to give the first i1 sorted weights the level 0, those from i2 on 2, and those between them 1.

    left, right: pytrees of arrays (n + 1, lanes), what depends on i1 and on i2.
    sums: takes a row of each and yields (sum w x q, sum w q^2) for each choice of deltas.

    C goes through (i1, i2, choice) in lexicographic order and takes what satisfies, rounded,
    (sum w x q)^2 > best * sum w q^2.  That ends with the best or with one that equals it up to rounding.  So the best
    of each i1 is found first, in any order, and C's way is gone only through those i1 that come that close.

    Returns i1, i2, choice (-1 where no sum w q^2 is positive) and scale.
    """
    n_rows, lanes = jax.tree.leaves(right)[0].shape
    place = jnp.arange(n_rows, dtype=jnp.float32)[:, None]

    def row(a, i):
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), a)

    def pick(a, i):
        return jax.tree.map(lambda a: jnp.take_along_axis(a, i[None], axis=0, mode="clip")[0], a)

    def best_of_rows(first):
        rows, i1 = jax.tree.map(lambda a: a[first : first + 8], (left, place))
        best = jnp.full((len(i1), lanes), -1.0)
        for i2 in range(first, n_rows):
            for sumqx, sumq2 in sums(rows, row(right, i2)):
                best = jnp.maximum(best, jnp.where((sumq2 > 0) & (i1 <= i2), sumqx / sumq2 * sumqx, -1))
        return best

    def replay(state):
        pending, *found = state
        i1 = jnp.min(jnp.where(pending, place, n_rows), axis=0).astype(jnp.int32)
        at_i1 = pick(left, i1)

        def compare(i2, found):
            best, split = found
            for k, (sumqx, sumq2) in enumerate(sums(at_i1, row(right, i2))):
                better = (i1 <= i2) & (sumq2 > 0) & (sumqx * sumqx > best * sumq2)
                best = jnp.where(better, sumqx / sumq2 * sumqx, best)
                split = jnp.where(better, i1 << 16 | i2 << 8 | k, split)
            return best, split

        return pending & (place != i1), *lax.fori_loop(0, n_rows, compare, tuple(found))

    best_of_row = jnp.concatenate([best_of_rows(first) for first in range(0, n_rows, 8)])
    pending = (best_of_row >= jnp.max(best_of_row, axis=0) * _NEARLY) & (best_of_row >= 0)
    none = jnp.full(lanes, np.finfo(np.float32).min), jnp.full(lanes, -1)
    _, _, split = lax.while_loop(lambda state: jnp.any(state[0]), replay, (pending, *none))
    i1, i2, choice = split >> 16, split >> 8 & 255, jnp.where(split < 0, -1, split & 255)
    scale = jnp.float32(0)
    for k, (sumqx, sumq2) in enumerate(sums(pick(left, i1), pick(right, i2))):
        scale = jnp.where(choice == k, sumqx / jnp.where(choice == k, sumq2, 1), scale)
    return i1, i2, choice, scale


class _Tables(NamedTuple):
    """The grid for look-ups.  A point is packed as its eight levels 0, 1, 2 (for -1, 0, 1), two bits each.

    The candidates of key k are those from start[:, k], as point << 16 | packed: in row 0 the unobstructed ones.
    """

    packed: UInt16[np.ndarray, " n_points"]
    on_grid: Bool[np.ndarray, " n_keys"]
    start: Int32[np.ndarray, "2 n_keys"]
    length: Int32[np.ndarray, "2 n_keys"]
    candidates: Int32[np.ndarray, " n"]


@functools.cache
def _tables() -> _Tables:
    grid = _grids.grid("IQ1")
    packed = (grid.points @ 4 ** np.arange(8)).astype(np.uint16)
    (start, points), (all_start, all_points) = grid.unobstructed, grid.candidates
    starts = np.stack([start, all_start + len(points)]).astype(np.int32)
    points = np.concatenate([points, all_points]).astype(np.int32)
    return _Tables(packed, grid.point_of_key >= 0, starts[:, :-1], np.diff(starts), points << 16 | packed[points])


def _levels_of(packed: Int32[Array, "*s lanes"]) -> Float32[Array, "*s_8 lanes"]:
    """Packed points (..., points, lanes) to levels (..., 8 points, lanes)."""
    levels = (packed[..., None, :] >> 2 * jnp.arange(8)[:, None]) & 3
    return levels.reshape(*packed.shape[:-2], -1, packed.shape[-1]).astype(jnp.float32)


def _nearest_points(x, w, levels, delta, scale, one):
    """The grid points that stand for levels: themselves where they are, else of the candidates the one of least error.

    x, w, levels: (8 points, lanes)
    delta: (points, lanes)
    scale: (lanes)

    Returns the points' indices and the packed points, and whether the levels were on the grid; (points, lanes) each.
    """
    _, points_on_grid, starts, lengths, candidates = map(jnp.asarray, _tables())
    x, w, levels = (jnp.swapaxes(a.reshape(-1, 8, len(one)), 0, 1) for a in (x, w, levels))
    key = functools.reduce(jnp.add, (level * 3**i for i, level in enumerate(levels)))
    errors = []
    for level in range(3):
        diff = _times(level - 1 + delta, scale) - x
        errors.append(w * diff * diff * one)
    e0, e1, e2 = errors
    # Where no coordinate gains by leaving its level, the unobstructed candidates are enough.
    falls, rises = e1 <= e0, e1 <= e2
    stays = jnp.where(levels == 1, falls & rises, jnp.where(levels == 0, (e0 <= e1) & rises, falls & (e2 <= e1)))
    row = jnp.where(functools.reduce(jnp.logical_and, stays), 0, 1)
    start, length = starts[row, key], lengths[row, key]

    errors = jnp.stack(errors).reshape(3, 8, -1)
    candidate = _best_candidates(candidates, start.ravel(), length.ravel(), errors).reshape(start.shape)
    return candidate >> 16, candidate & 0xFFFF, points_on_grid[key]


def _best_candidates(
    candidates: Int32[Array, " n"],
    start: Int32[Array, " items"],
    length: Int32[Array, " items"],
    errors: Float32[Array, "3 8 items"],
) -> Int32[Array, " items"]:
    """The candidate of least error of each list, the first of equals.

    errors: by level and coordinate.

    Lists have 1 to some 200 candidates, and side by side the short ones wait for the longest.  So they are put in
    order of length, and searched in batches.
    """
    n = len(start)
    batch = -(-n // _BATCHES)
    order = jnp.sort((1023 - length) << 20 | jnp.arange(n)) & (1 << 20) - 1
    order = jnp.concatenate([order, jnp.arange(n, batch * _BATCHES)])

    def search(items):
        first, n_more, e = (jnp.take(a, items, axis=-1, mode="clip") for a in (start, length - 1, errors))

        def compare(state):
            j, best, best_candidate = state
            place = first + jnp.minimum(j + jnp.arange(_STEP)[:, None], n_more)
            candidate = jnp.take(candidates, place, mode="clip")
            error = jnp.zeros(place.shape)
            for i in range(8):
                low, high = (candidate & (bit << 2 * i) != 0 for bit in (1, 2))
                error = error + jnp.where(high, e[2, i], jnp.where(low, e[1, i], e[0, i]))
            for i in range(_STEP):
                better = error[i] < best
                best = jnp.where(better, error[i], best)
                best_candidate = jnp.where(better, candidate[i], best_candidate)
            return j + _STEP, best, best_candidate

        none = 0, jnp.full(batch, np.finfo(np.float32).max), jnp.take(candidates, first, mode="clip")
        longest = jnp.max(n_more)
        return lax.while_loop(lambda state: state[0] <= longest, compare, none)[2]

    found = lax.map(search, order.reshape(_BATCHES, batch)).ravel()
    return jnp.zeros(n, jnp.int32).at[order].set(found, mode="drop", unique_indices=True)
