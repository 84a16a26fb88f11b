"""IQ4_NL and IQ4_XS: codes of 4 bits into a table of 16 integers that lie closer together near zero.

Source of the rules: ggml-quants.c, quantize_row_iq4_nl_impl, with ntry = 7 as llama-quantize calls it, and for
activations with ntry = -1, that is without a search, as quantize_row_iq4_nl_ref does.

Below a largest weight of about 1e-8 the search compares denormal numbers, which XLA flushes, and may end elsewhere;
the scale is zero in float16 there, and so is every weight.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt8

from qjax.formats._apart import apart
from qjax.formats._bits import pack_bits, pack_strided, unpack_bits
from qjax.formats._exact import (
    exact_product,
    exact_quotient,
    exact_reciprocal,
    reciprocal_or_zero,
    runtime_one,
    signed_as_first,
)
from qjax.formats._format import Field, Format, Integers, Scales, register
from qjax.formats._lanes import block_sum, map_blocks
from qjax.formats._search import GROUP_MAX_EPS, first_largest, importance_weights, mean_square, nearest_int

#   IQ4_NL | d f16 |                                                     | qs 16 bytes of nibbles |     32 weights
#   IQ4_XS | d f16 | scales_h u16, 8 pairs | scales_l 4 bytes of nibbles | qs 128                 |    256 weights

_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_MIDPOINTS = (_VALUES[1:] + _VALUES[:-1]) / 2


def _nearest(v: Float32[Array, "*s"]) -> UInt8[Array, "*s"]:
    """The code of the nearest value, ties to the larger, as is NaN in ggml."""
    return functools.reduce(jnp.add, ((~(v < midpoint)).astype(jnp.uint8) for midpoint in _MIDPOINTS))


def _nearest_value(v: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """That value."""
    value = jnp.full_like(v, _VALUES[0])
    for midpoint, next_value in zip(_MIDPOINTS, _VALUES[1:]):
        value = jnp.where(v < midpoint, value, next_value)
    return value


def _decode(qs: UInt8[Array, "*s n_bytes"], d: Float32[Array, "*s n"]) -> Float32[Array, "*s n 2 16"]:
    """The values of strided codes, times the d of their 32."""

    return apart(lambda qs, d: _looked_up(qs, d) * d[..., None, None], qs, d)


def _looked_up(qs: UInt8[Array, "*s n_bytes"], d: Float32[Array, "*s n"]) -> Float32[Array, "*s n 2 16"]:
    codes = (qs.reshape(*d.shape, 1, 16) >> jnp.array([[0], [4]], jnp.uint8)) & 15
    return jnp.take(_VALUES, codes, axis=0)


def _integers(qs: UInt8[Array, "*s n_bytes"], d: Float32[Array, "*s n"]) -> Integers:
    codes = _looked_up(qs, d).astype(jnp.int8)
    *rows, _, _ = d.shape
    return Integers(codes.reshape(*rows, -1, 32), d.reshape(*rows, -1), None, (-127, 113))


def _value(codes: Int32[Array, "*s"]) -> Float32[Array, "*s"]:
    """The values of codes without a lookup: four words hold them, a byte each."""
    words = [int(word) for word in _VALUES.astype(np.int8).view("<i4")]
    word = functools.reduce(lambda w, i: jnp.where(codes >> 2 == i, words[i], w), (1, 2, 3), jnp.int32(words[0]))
    # Up to the top of the word and down again, which keeps the sign.
    return ((word << (24 - 8 * (codes & 3))) >> 24).astype(jnp.float32)


def _search(x, importance, sigma2) -> Float32[Array, " lanes"]:
    """The best of 16 scales d for x = d value, over a slab of blocks (see `_lanes`); 0 where all of x is.

    The weights of the errors are x^2, or with importance that times sqrt(sigma2 + x^2).
    """
    one = runtime_one(x, axis=0)
    w = x * x if importance is None else importance_weights(x, importance, sigma2)
    zero, largest = _largest(x)
    sums = functools.partial(_sums, x, w, one)

    def better(step, best):
        # The largest weight is met with -134 to -120, around the lowest value.
        sumqx, sumq2 = sums((_VALUES[0] - 7 + step) / largest)
        is_better = (sumq2 > 0) & (sumqx * sumqx > best[0] * sumq2)
        d = sumqx / jnp.where(is_better, sumq2, 1)
        return jnp.where(is_better, d * sumqx, best[0]), jnp.where(is_better, d, best[1])

    sumqx, sumq2 = sums(exact_reciprocal(exact_quotient(largest, -_VALUES[0] * one[0])))
    d = _least_error(sumqx, sumq2)
    _, d = lax.fori_loop(0, 15, better, (d * sumqx, d))
    return jnp.where(zero, 0, d)


def _largest_meets_lowest(x: Float32[Array, "32 lanes"]) -> tuple[Float32[Array, " lanes"], Float32[Array, " lanes"]]:
    """The inverse scale by which the largest weight is met with the lowest value, and of the codes that gives, which
    are kept, the scale d of least error."""
    one = runtime_one(x, axis=0)
    zero, largest = _largest(x)
    inverse = exact_reciprocal(exact_quotient(largest, _VALUES[0] * one[0]))
    d = _least_error(*_sums(x, x * x, one, inverse))
    return jnp.where(zero, 0, inverse), jnp.where(zero, 0, d)


def _largest(x):
    """Which blocks count as zero, and the first weight of largest magnitude of the others."""
    largest = first_largest(x)
    zero = jnp.abs(largest) < GROUP_MAX_EPS
    return zero, jnp.where(zero, 1, largest)


def _sums(x, w, one, inverse):
    """The weighed sums of value x and value^2, the values being the nearest to inverse x."""
    value = _nearest_value(inverse * x)
    wv = w * value
    return block_sum(exact_product(wv, x, one)), block_sum(exact_product(wv, value, one))


def _least_error(sumqx, sumq2):
    return jnp.where(sumq2 > 0, sumqx / jnp.where(sumq2 > 0, sumq2, 1), 0)


class _Nonlinear(Format):
    family = "iquants"
    uses_importance = True
    levels = _VALUES

    def with_codes(self, fields, codes):
        return fields._replace(qs=pack_strided(codes, bits=4, stride=16))

    def _scales(self, weights, importance):
        """(*rows, n_blocks, sub_blocks) of the scales that the search finds for each 32 weights."""
        sigma2 = None
        if importance is not None:
            sigma2 = 2 * map_blocks(mean_square, weights)[..., None, None]
            importance = importance.reshape(*importance.shape[:-1], -1, 32)
        return map_blocks(_search, weights.reshape(*weights.shape[:-1], -1, 32), importance, sigma2)


@register
class IQ4_NL(_Nonlinear):
    """32 codes and a scale.  Byte-exact with ggml where the scale is not zero in float16."""

    name, ggml_id, block_size = "IQ4_NL", 20, 32
    layout = (Field("d", "float16"), Field("qs", "uint8", 16))

    def encode(self, weights, importance=None, rounding=None, seed=0):
        d = self._scales(weights, importance)
        return self._fields(d, _nearest(reciprocal_or_zero(d) * weights))

    def encode_activations(self, values):
        inverse, d = (found[..., None] for found in map_blocks(_largest_meets_lowest, values))
        return self._fields(d, _nearest(inverse * values))

    def _fields(self, d, codes):
        return self.Fields(d[..., 0].astype(jnp.float16), pack_strided(codes, bits=4, stride=16))

    def decode(self, fields):
        return _decode(fields.qs, fields.d.astype(jnp.float32)[..., None]).reshape(*fields.d.shape, 32)

    def integers(self, fields):
        return _integers(fields.qs, fields.d.astype(jnp.float32)[..., None])

    def scales(self, fields):
        return Scales(fields.d.astype(jnp.float32), None)

    def with_scales(self, fields, scales):
        return fields._replace(d=scales.scale.astype(jnp.float16))


@register
class IQ4_XS(_Nonlinear):
    """8 sub-blocks of 32 codes with 6-bit scales, and a scale of these.

    Byte-exact with ggml where the scale is not zero in float16.
    """

    name, ggml_id, block_size = "IQ4_XS", 23, 256
    layout = (
        Field("d", "float16"),
        Field("scales_h", "uint16"),
        Field("scales_l", "uint8", 4),
        Field("qs", "uint8", 128),
    )
    run_size = 16

    def encode(self, weights, importance=None, rounding=None, seed=0):
        scales = self._scales(weights, importance)
        magnitude = jnp.where(jnp.isnan(scales), 0, jnp.abs(scales))
        largest = jnp.max(magnitude, axis=-1, keepdims=True)
        d = -signed_as_first(largest, (magnitude == largest) & (magnitude > 0), scales) / 32
        steps = reciprocal_or_zero(d) * scales
        scale_codes = jnp.clip(nearest_int(jnp.where(jnp.isnan(steps), 0, steps)), -32, 31)
        inverse = reciprocal_or_zero(d * scale_codes)[..., None]
        codes = _nearest(inverse * weights.reshape(*scales.shape, 32)).reshape(weights.shape)
        return self.Fields(
            d[..., 0].astype(jnp.float16), *self._pack_scales(scale_codes), pack_strided(codes, bits=4, stride=16)
        )

    def _pack_scales(self, scale_codes):
        """Codes from -32 on to scales_h and scales_l."""
        scale_codes = (scale_codes + 32).astype(jnp.uint8)
        pairs = (scale_codes >> 4).astype(jnp.uint16) << jnp.arange(0, 16, 2, dtype=jnp.uint16)
        return jnp.sum(pairs, axis=-1, dtype=jnp.uint16), pack_bits(scale_codes & 15, bits=4)

    def decode(self, fields):
        return _decode(fields.qs, self._steps(fields)).reshape(*fields.d.shape, 256)

    def integers(self, fields):
        return _integers(fields.qs, self._steps(fields))

    def scales(self, fields):
        steps = self._steps(fields)
        return Scales(steps.reshape(*steps.shape[:-2], -1), None)

    def with_scales(self, fields, scales):
        inverse = reciprocal_or_zero(fields.d.astype(jnp.float32))[..., None]
        codes = nearest_int(scales.scale.reshape(*fields.d.shape, 8) * inverse)
        return self.Fields(fields.d, *self._pack_scales(jnp.clip(codes, -32, 31)), fields.qs)

    def _steps(self, fields):
        """The scale of each 32 weights."""
        high = (fields.scales_h[..., None] >> jnp.arange(0, 16, 2, dtype=jnp.uint16)) & 3
        scale_codes = unpack_bits(fields.scales_l, bits=4, n=8) | (high << 4).astype(jnp.uint8)
        # 11 bits times 6 bits times 7 bits: all products are exact.
        return fields.d.astype(jnp.float32)[..., None] * (scale_codes.astype(jnp.int32) - 32).astype(jnp.float32)

    def runs(self, read):
        d, scales_h = read("d"), read("scales_h")
        for i in range(8):
            scale = (read("scales_l", i // 2) >> (i % 2 * 4)) & 15 | ((scales_h >> (2 * i)) & 3) << 4
            step, qs = d * (scale - 32).astype(jnp.float32), read("qs", 16 * i, 16)
            for first, codes in ((0, qs & 15), (16, qs >> 4)):
                yield 32 * i + first, step * _value(codes)
