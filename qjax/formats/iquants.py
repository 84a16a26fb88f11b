"""GGML's i-quants of 2 and 3 bits: super-blocks of 256 weights whose magnitudes are points of a code book.

w = ± d (s + 1/2) g with a float16 d, a scale s of 4 bits for each sub-block, and a point g for each group of weights.
The scale of each sub-block is searched for, and the points with it; then the scales of a super-block are rounded to
4 bits under a float16.

Source of the rules: ggml-quants.c, quantize_row_iq2_xxs_impl to quantize_row_iq3_s_impl.
"""

import functools
from abc import abstractmethod
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float32

from qjax.formats._apart import apart
from qjax.formats._bits import pack_bits, unpack_bits
from qjax.formats._exact import exact_product, exact_quotient, exact_reciprocal, runtime_one
from qjax.formats._format import Field, Format, register
from qjax.formats._grids import Grid, grid
from qjax.formats._lanes import map_blocks
from qjax.formats._nearest import LOWEST_POINT, coordinate, nearest_points, point_numbers
from qjax.formats._search import GROUP_MAX_EPS, importance_weights, make_qp_quants, mean_square, nearest_int

# The super-blocks, in byte order.  A group is 8 weights in the 2-bit formats and 4 in the 3-bit ones.  Signs are a bit
# for each weight, set where it is negative; or 7 bits for 8 weights, of which an even number is negative.
#
#   IQ2_XXS  | d f16 | 8 times: 4 points u8, u32: s << 28, 4 signs of 7 bits                                 |
#   IQ2_XS   | d f16 | qs 32 u16: signs of 7 bits << 9, point of 9 bits                | scales 16 nibbles   |
#   IQ2_S    | d f16 | qs 32 u8: points, 32 u8: signs  | qh 8 u8: high pairs of points | scales 16 nibbles   |
#   IQ3_XXS  | d f16 | qs 64 u8: points                | 8 u32: s << 28, 4 signs of 7 bits                   |
#   IQ3_S    | d f16 | qs 64 u8: points                | qh 8 u8: ninth bits | signs 32 u8 | scales 8 nibbles |

_D, _QH = Field("d", "float16"), Field("qh", "uint8", 8)


class _IQuant(Format):
    """What the five formats share.  Each says what it stores, and where its search departs from the others'."""

    family = "iquants"
    block_size = 256
    uses_importance = True

    magnitudes: ClassVar[tuple[int, ...]]  # g of each level
    unit: ClassVar[float]  # what d (s + 1/2) g is counted in
    sub_block: ClassVar[int]
    even_signs: ClassVar[bool] = False
    variance_factor: ClassVar[int] = 2
    plain_variance: ClassVar[float] = 0.0  # share of the variance in the weights of the errors without importance
    # n, delta: scale i of -n..n gives the largest weight q = top + i delta
    steps: ClassVar[tuple[int, float]] = (9, 0.1)
    zero_below: ClassVar[float]
    starts_on_grid: ClassVar[bool] = True
    stretch: ClassVar[float] = 1  # of d, which ggml found to help

    @abstractmethod
    def _pack(self, d, scales, points, signs) -> tuple:
        """d, the scales s, the numbers of the points, and 8 signs in a byte, to the fields that hold them."""

    @abstractmethod
    def _unpack(self, fields) -> tuple:
        """The inverse."""

    @property
    def grid(self) -> Grid:
        """The code book."""
        return grid(self.name)

    def decode(self, fields):
        # A float16 times numbers of 5 and 6 bits is exact.
        d, scales, points, signs = self._unpack(fields)
        d = d.astype(jnp.float32)[..., None] * ((scales.astype(jnp.float32) + 0.5) * self.unit)
        d = jnp.repeat(d, self.sub_block // 8, axis=-1)
        table, size = jnp.asarray(self.grid.packed_levels), self.grid.points.shape[1]
        shifts = jnp.arange(8, dtype=jnp.uint32)

        def looked_up(points):
            """The levels of 8 weights, a nibble each."""
            found = table[points.astype(jnp.int32)].reshape(*d.shape, 8 // size)
            return functools.reduce(jnp.bitwise_or, (found[..., i] << 4 * size * i for i in range(8 // size)))

        def weights(levels, signs, d):
            g = self._magnitude(levels[..., None] >> 4 * shifts & 15)
            negative = (signs.astype(jnp.uint32)[..., None] >> shifts & 1) << 31
            return (
                lax.bitcast_convert_type(lax.bitcast_convert_type(g, jnp.uint32) | negative, jnp.float32) * d[..., None]
            )

        return apart(weights, apart(looked_up, points), signs, d).reshape(*fields.d.shape, self.block_size)

    def _magnitude(self, level):
        """g of a level.  The magnitudes are evenly spaced, but for the largest one; so no table is needed."""
        first, second, *_, last = self.magnitudes
        step, top = second - first, self.grid.n_levels - 1
        return (first + step * level + jnp.where(level == top, last - first - step * top, 0)).astype(jnp.float32)

    def encode(self, weights, importance=None, rounding=None, seed=0):
        return self.Fields(*self._pack(*map_blocks(self._search, weights, importance)))

    def _search(self, x: Float32[Array, "256 lanes"], importance: Any):
        """d, scales, points and signs of a slab of super-blocks (see `_lanes`), lanes last."""
        one = runtime_one(x, axis=0)[0]
        w = self._error_weights(x, importance)
        scale, points, signs = self._search_sub_blocks(self._by_sub_block(x), self._by_sub_block(w))
        scale = scale.reshape(-1, x.shape[1])
        largest = jnp.max(scale, axis=0)
        some = largest > 0
        d = exact_quotient(largest, 31 * one)
        scales = jnp.clip(nearest_int(0.5 * (1 / jnp.where(some, d, 1) * scale * one - 1)), 0, 15)
        points, signs = (
            jnp.swapaxes(a.reshape(len(a), *scale.shape), 0, 1).reshape(-1, x.shape[1]) for a in (points, signs)
        )
        return (d * jnp.float32(self.stretch)).astype(jnp.float16), scales.astype(jnp.uint8), points, signs

    def _by_sub_block(self, slab):
        """(256, lanes) to (sub_block, n_sub * lanes)."""
        return jnp.swapaxes(slab.reshape(-1, self.sub_block, slab.shape[1]), 0, 1).reshape(self.sub_block, -1)

    def _error_weights(self, x, importance):
        sigma2 = self.variance_factor * mean_square(x)
        if importance is not None:
            return importance_weights(x, importance, sigma2)
        return self.plain_variance * sigma2 + exact_product(x, x, runtime_one(x, axis=0))

    def _search_sub_blocks(self, x: Float32[Array, "sub_block lanes"], w: Float32[Array, "sub_block lanes"]):
        """The scale, the points (groups, lanes) and the signs (bytes, lanes) of the sub-block in each lane."""
        one = runtime_one(x, axis=0)[0]
        x, signs = _split_signs(x, w, self.even_signs)
        wx = w * x * one
        size = self.grid.points.shape[1]
        xs, ws = (jnp.swapaxes(a.reshape(-1, size, a.shape[-1]), 0, 1) for a in (x, jnp.sqrt(w)))

        def fit(points):
            """sum w x q and sum w q^2, first to last as C's loop adds them up."""
            sumqx = sumq2 = jnp.float32(0)
            for j in range(self.sub_block):
                q = coordinate(points[j // size], j % size)
                sumqx, sumq2 = sumqx + wx[j] * q * one, sumq2 + w[j] * q * q * one
            return sumqx, sumq2

        def better(best, candidate):
            sumqx, sumq2 = fit(candidate[0])
            is_better = (sumq2 > 0) & (sumqx * sumqx > best[0] * sumq2)
            scale = sumqx / jnp.where(is_better, sumq2, 1)
            new = (scale * sumqx, scale, *candidate)
            return tuple(jnp.where(is_better, a, b) for a, b in zip(new, best)), None

        largest, scale = self._first_scale(x, w)
        zero = largest < self.zero_below
        n, delta = self.steps
        q_of_largest = np.arange(-n, n + 1, dtype=np.float32) * np.float32(delta) + (2 * self.grid.n_levels - 1)
        q_of_largest = jnp.broadcast_to(jnp.asarray(q_of_largest)[:, None], (2 * n + 1, len(zero)))
        inverse = exact_quotient(q_of_largest, jnp.where(zero, 1, largest))
        points, on_grid = nearest_points(self.grid, xs, ws, inverse, exact_reciprocal(inverse))
        start = jnp.full(points.shape[1:], LOWEST_POINT), jnp.full(on_grid.shape[1:], self.starts_on_grid)
        (_, scale, best, on_grid), _ = lax.scan(better, (jnp.zeros_like(scale), scale, *start), (points, on_grid))

        again = self._searched_again(on_grid) & (scale > 0)
        positive = jnp.where(scale > 0, scale, 1)[None]
        points, _ = nearest_points(self.grid, xs, ws, 1 / positive, positive)
        best = jnp.where(again, points[0], best)
        sumqx, sumq2 = fit(best)
        refits = jnp.any(again, axis=0) & (sumq2 > 0)
        scale = jnp.where(refits, sumqx / jnp.where(refits, sumq2, 1), scale)
        signs = jnp.where(scale < 0, ~signs, signs)
        return tuple(jnp.where(zero, 0, a) for a in (jnp.abs(scale), point_numbers(self.grid, best), signs))

    def _first_scale(self, x, w):
        """The largest weight for the scan of scales to begin from, and the scale if none of them is any good."""
        largest = jnp.max(x, axis=0)
        return largest, exact_quotient(largest, (2 * self.grid.n_levels - 1) * runtime_one(x, axis=0)[0])

    def _searched_again(self, on_grid):
        """Which groups are searched once more with the scale that was found: those that are no grid points."""
        return ~on_grid


def _split_signs(x, w, even: bool):
    """Magnitudes, and signs with 8 in a byte.

    Where an even number has to be negative and is not, the weight that matters least changes sign, and its magnitude
    is then negative.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    below_zero = (bits < 0) & (bits != jnp.iinfo(jnp.int32).min)  # on the bits, for XLA takes denormals as 0
    negative, magnitude = (a.reshape(-1, 8, a.shape[-1]) for a in (below_zero, jnp.abs(x)))
    if even:
        matters = w.reshape(magnitude.shape) * magnitude * magnitude
        index = jnp.arange(8)[:, None]
        least = jnp.min(jnp.where(matters == jnp.min(matters, axis=1, keepdims=True), index, 8), axis=1, keepdims=True)
        flip = (index == least) & (jnp.sum(negative, axis=1, keepdims=True) % 2 == 1)
        negative, magnitude = negative ^ flip, jnp.where(flip, -magnitude, magnitude)
    bits = negative.astype(jnp.uint8) << jnp.arange(8, dtype=jnp.uint8)[:, None]
    return magnitude.reshape(x.shape), jnp.sum(bits, axis=1, dtype=jnp.uint8)


def _pack_even_signs(scales, signs):
    """A scale and four bytes of even signs in each u32."""
    seven = (signs & 127).reshape(*scales.shape, 4).astype(jnp.uint32) << jnp.arange(0, 28, 7, dtype=jnp.uint32)
    return jnp.sum(seven, axis=-1, dtype=jnp.uint32) | (scales.astype(jnp.uint32) << 28)


def _unpack_even_signs(words):
    """The inverse: scales and signs."""
    seven = (words[..., None] >> jnp.arange(0, 28, 7, dtype=jnp.uint32)) & 127
    return (words >> 28).astype(jnp.uint8), _with_eighth(seven.reshape(*words.shape[:-1], -1).astype(jnp.uint8))


def _with_eighth(seven):
    """Bytes of signs, of which the highest makes their number even."""
    return seven | (lax.population_count(seven) << 7)


class _TwoBit(_IQuant):
    magnitudes, unit, sub_block = (8, 25, 43), 0.25, 16


class _ThreeBit(_IQuant):
    sub_block = 32


@register
class IQ2_XXS(_TwoBit):
    """256 points of 8 and even signs; a scale for 32 weights.  Needs importance.  Byte-exact with ggml."""

    name, ggml_id, needs_importance = "IQ2_XXS", 16, True
    layout = (_D, Field("qs", "uint32", 16))
    sub_block, even_signs, variance_factor, steps, zero_below = 32, True, 1, (6, 0.1), GROUP_MAX_EPS

    def _first_scale(self, x, w):
        scale, _ = make_qp_quants(x, w, self.grid.n_levels + 1)
        return scale * self.grid.n_levels, scale

    def _searched_again(self, on_grid):
        return jnp.ones_like(on_grid)

    def _pack(self, d, scales, points, signs):
        points = lax.bitcast_convert_type(points.astype(jnp.uint8).reshape(*scales.shape, 4), jnp.uint32)
        return d, jnp.stack([points, _pack_even_signs(scales, signs)], axis=-1).reshape(*d.shape, 16)

    def _unpack(self, fields):
        points, words = (fields.qs[..., i::2] for i in (0, 1))
        points = lax.bitcast_convert_type(points, jnp.uint8).reshape(*fields.d.shape, 32)
        return fields.d, *(lambda scales, signs: (scales, points, signs))(*_unpack_even_signs(words))


@register
class IQ2_XS(_TwoBit):
    """512 points of 8 and even signs; a scale for 16 weights.  Needs importance.  Byte-exact with ggml."""

    name, ggml_id, needs_importance = "IQ2_XS", 17, True
    layout = (_D, Field("qs", "uint16", 32), Field("scales", "uint8", 8))
    even_signs, variance_factor, zero_below = True, 1, GROUP_MAX_EPS

    def _pack(self, d, scales, points, signs):
        return d, points | (signs.astype(jnp.uint16) << 9), pack_bits(scales, bits=4)

    def _unpack(self, fields):
        signs = _with_eighth((fields.qs >> 9).astype(jnp.uint8))
        return fields.d, unpack_bits(fields.scales, bits=4, n=16), fields.qs & 511, signs


@register
class IQ2_S(_TwoBit):
    """1024 points of 8; a scale for 16 weights.  Byte-exact with ggml."""

    name, ggml_id = "IQ2_S", 22
    layout = (_D, Field("qs", "uint8", 64), _QH, Field("scales", "uint8", 8))
    plain_variance, zero_below, stretch = 0.25, 1e-8, 0.9875

    def _pack(self, d, scales, points, signs):
        qs = jnp.concatenate([points.astype(jnp.uint8), signs], axis=-1)
        return d, qs, pack_bits((points >> 8).astype(jnp.uint8), bits=2), pack_bits(scales, bits=4)

    def _unpack(self, fields):
        low, signs = jnp.split(fields.qs, 2, axis=-1)
        points = low | (unpack_bits(fields.qh, bits=2, n=32).astype(jnp.uint16) << 8)
        return fields.d, unpack_bits(fields.scales, bits=4, n=16), points, signs


@register
class IQ3_XXS(_ThreeBit):
    """256 points of 4 and even signs; a scale for 32 weights.  Byte-exact with ggml."""

    name, ggml_id = "IQ3_XXS", 18
    layout = (_D, Field("qs", "uint8", 64), Field("scales_and_signs", "uint32", 8))
    magnitudes, unit = (4, 12, 20, 28, 36, 44, 52, 62), 0.5
    even_signs, steps, zero_below, stretch = True, (15, 0.2), 1e-8, 1.0125

    def _pack(self, d, scales, points, signs):
        return d, points.astype(jnp.uint8), _pack_even_signs(scales, signs)

    def _unpack(self, fields):
        scales, signs = _unpack_even_signs(fields.scales_and_signs)
        return fields.d, scales, fields.qs, signs


@register
class IQ3_S(_ThreeBit):
    """512 points of 4; a scale for 32 weights.  Byte-exact with ggml."""

    name, ggml_id = "IQ3_S", 21
    layout = (_D, Field("qs", "uint8", 64), _QH, Field("signs", "uint8", 32), Field("scales", "uint8", 4))
    magnitudes, unit = (1, 3, 5, 7, 9, 11, 13, 15), 2.0
    # ggml asks for a largest weight other than zero; XLA takes denormals for zero.
    steps, zero_below, stretch = (9, 0.2), float(np.finfo(np.float32).tiny), 1.033
    starts_on_grid = False

    def _searched_again(self, on_grid):
        return jnp.broadcast_to(~jnp.all(on_grid, axis=0), on_grid.shape)

    def _search(self, x, importance):
        d, scales, points, signs = super()._search(x, importance)
        # ggml goes past a sub-block of zeros without moving on in the bytes of points and of signs, so that those of
        # the sub-blocks after it come early, while their ninth bits and scales stay.
        empty = jnp.all(x.reshape(len(scales), self.sub_block, -1) == 0, axis=1)
        place = jnp.cumsum(~empty, axis=0) - 1
        moves = (place == jnp.arange(len(scales))[:, None, None]) & ~empty

        def compacted(values):
            by_sub_block = values.reshape(len(scales), -1, values.shape[-1])
            return jnp.sum(jnp.where(moves[:, :, None], by_sub_block, 0), axis=1, dtype=values.dtype).reshape(
                values.shape
            )

        return d, scales, points & 256 | compacted(points & 255), compacted(signs)

    def _pack(self, d, scales, points, signs):
        qh = pack_bits((points >> 8).astype(jnp.uint8), bits=1)
        return d, points.astype(jnp.uint8), qh, signs, pack_bits(scales, bits=4)

    def _unpack(self, fields):
        points = fields.qs | (unpack_bits(fields.qh, bits=1, n=64).astype(jnp.uint16) << 8)
        return fields.d, unpack_bits(fields.scales, bits=4, n=8), points, fields.signs
