"""Microscaling formats: 4-bit floats (E2M1) with a shared scale that is itself a small float.

Source of the rules: ggml-quants.c quantize_row_mxfp4_ref and quantize_row_nvfp4_ref, ggml-impl.h; the number formats
are those of the OCP Microscaling Formats (MX) specification 1.0.  Both ignore the importance matrix.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt8

from qjax.formats._apart import apart
from qjax.formats._bits import pack_nibbles, unpack_nibbles
from qjax.formats._exact import exact_quotient, runtime_one
from qjax.formats._format import Field, Format, Scales, register

#   MXFP4  | e E8M0   | qs 16 bytes of nibbles |            32 weights
#   NVFP4  | d 4×UE4M3 | qs 4×8 bytes of nibbles |          64 weights, a scale for every 16
#
# E2M1, a sign, two bits of exponent, one of mantissa:   code   0  1  2  3  4  5  6  7    8 .. 15 the same, negative
# ggml counts in halves, to have integers:              value   0  1  2  3  4  6  8 12    (12 stands for 6.0)
# and halves the scale in turn: here too, d is half of the scale as the specification defines it.

_DOUBLED = (1, 2, 3, 4, 6, 8, 12)


def _nearest_e2m1(x: Float32[Array, "*s n"], d: Float32[Array, "*#s 1"] | float) -> UInt8[Array, "*s n"]:
    """The code of the value nearest to x, ties to the lower code, and never the negative zero.

    The error falls up to the nearest value and rises behind it, so the code is the last one that beats the one before.
    Where x is so large that the errors round to the same number, it is the first of those, as in ggml.
    """
    magnitude = jnp.abs(x)
    code, error = jnp.zeros(x.shape, jnp.uint8), magnitude
    for i, value in enumerate(_DOUBLED, start=1):
        previous, error = error, jnp.abs(magnitude - value * d)
        code = jnp.where(error < previous, jnp.uint8(i), code)
    return code | ((x < 0) & (code > 0)).astype(jnp.uint8) << 3


def _e2m1_doubled(codes: UInt8[Array, "*s"]) -> Int32[Array, "*s"]:
    """Twice the value of each code, an integer."""
    exponent, mantissa = ((codes >> 1) & 3).astype(jnp.int32), (codes & 1).astype(jnp.int32)
    magnitude = jnp.where(exponent == 0, mantissa, (2 + mantissa) << jnp.maximum(exponent - 1, 0))
    return jnp.where(codes >= 8, -magnitude, magnitude)


class _Microscaling(Format):
    family = "microscaling"
    levels = np.array([*(-value for value in reversed(_DOUBLED)), 0, *_DOUBLED], np.float32)


def _e2m1_of_level(i: UInt8[Array, "*s"]) -> UInt8[Array, "*s"]:
    """The code of a level."""
    return jnp.where(i < 7, 15 - i, i - 7).astype(jnp.uint8)


@register
class MXFP4(_Microscaling):
    """32 4-bit floats and a power of two.  Byte-exact with ggml where a block's largest weight reaches 2^-118."""

    name, ggml_id, block_size = "MXFP4", 39, 32
    layout = (Field("e", "uint8"), Field("qs", "uint8", 16))

    def encode(self, weights, importance=None, rounding=None, seed=0):
        absmax = jnp.max(jnp.abs(weights), axis=-1)
        e = jnp.where(absmax > 0, _floor_log2f(absmax) + 125, 0) & 0xFF  # -2 + 127, in C's uint8
        # In units of 2 d, 2^(e-127), because d = 2^(e-128) itself can be denormal.
        inverse = lax.bitcast_convert_type(jnp.maximum(254 - e, 0) << 23, jnp.float32)
        codes = _nearest_e2m1(weights * inverse[..., None], 0.5)
        return self.Fields(e.astype(jnp.uint8), pack_nibbles(codes))

    def decode(self, fields):
        doubled = _e2m1_doubled(unpack_nibbles(fields.qs))
        e = fields.e.astype(jnp.int32)[..., None]
        d = lax.bitcast_convert_type(jnp.maximum(e - 1, 0) << 23, jnp.float32)  # 2^(e-128)
        return jnp.where(e < 2, _times_denormal(doubled, e), doubled.astype(jnp.float32) * d)

    def valid(self, fields):
        return fields.e != 0xFF  # E8M0's one NaN

    def scales(self, fields):
        e = jnp.maximum(fields.e.astype(jnp.int32) - 1, 0)
        return Scales(lax.bitcast_convert_type(e << 23, jnp.float32), None)

    def with_scales(self, fields, scales):
        # Between two powers of two the middle is 1.5 times the lower one.
        bits = lax.bitcast_convert_type(jnp.maximum(scales.scale, 0), jnp.int32) + (1 << 22)
        return fields._replace(e=jnp.clip((bits >> 23) + 1, 0, 254).astype(jnp.uint8))

    def with_codes(self, fields, codes):
        return fields._replace(qs=pack_nibbles(_e2m1_of_level(codes)))


def _floor_log2f(x: Float32[Array, "*s"]) -> Int32[Array, "*s"]:
    """``floor(log2f(x))`` of positive x, with the rounding of log2f.

    A logarithm less than half a unit in the last place below an integer k rounds up to k.  So do the 44 numbers just
    below 2^k for |k| >= 64, and half as many with every halving of |k|, whose logarithms have finer last places.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    floor = (bits >> 23) - 127
    below_k = jnp.where(floor < 0, ~floor, floor)  # |k|, or k - 1 as the logarithm comes from below
    return ((bits + (44 >> (lax.clz(below_k) - 25))) >> 23) - 127


def _times_denormal(doubled: Int32[Array, "*s"], e: Int32[Array, "*#s"]) -> Float32[Array, "*s"]:
    """``doubled`` 2^(e-128) for e = 0 or 1, built from bits, because XLA flushes denormal numbers."""
    n = jnp.abs(doubled) << jnp.minimum(e, 1)
    as_float = lax.bitcast_convert_type(n.astype(jnp.float32), jnp.int32)
    magnitude = jnp.where(n < 4, n << 21, as_float - (128 << 23))
    return lax.bitcast_convert_type(magnitude | (doubled & jnp.int32(-(2**31))), jnp.float32)


@register
class NVFP4(_Microscaling):
    """64 4-bit floats and an 8-bit float for every 16 of them.  Byte-exact with ggml.

    A tensor-wide scale, where a model has one, is a tensor of its own.
    """

    name, ggml_id, block_size = "NVFP4", 40, 64
    layout = (Field("d", "uint8", 4), Field("qs", "uint8", 32))

    def encode(self, weights, importance=None, rounding=None, seed=0):
        groups = weights.reshape(*weights.shape[:-1], 4, 16)
        absmax = jnp.max(jnp.abs(groups), axis=-1)
        d = _to_ue4m3(exact_quotient(absmax, 6 * runtime_one(absmax)))
        codes = apart(lambda d, groups: _nearest_e2m1(groups, _from_ue4m3(d)[..., None]), d, groups)
        return self.Fields(d, pack_nibbles(codes).reshape(*weights.shape[:-1], 32))

    def decode(self, fields):
        codes = unpack_nibbles(fields.qs.reshape(*fields.qs.shape[:-1], 4, 8))
        values = _e2m1_doubled(codes).astype(jnp.float32) * _from_ue4m3(fields.d)[..., None]
        return values.reshape(*values.shape[:-2], 64)

    def scales(self, fields):
        return Scales(_from_ue4m3(fields.d).reshape(*fields.d.shape[:-2], -1), None)

    def with_scales(self, fields, scales):
        return fields._replace(d=_to_ue4m3(jnp.maximum(2 * scales.scale, 0)).reshape(fields.d.shape))

    def with_codes(self, fields, codes):
        groups = _e2m1_of_level(codes).reshape(*fields.d.shape, 16)
        return fields._replace(qs=pack_nibbles(groups).reshape(fields.qs.shape))


# UE4M3: four bits of exponent, bias 7, and three of mantissa in the low 7 bits of a byte; 0x7F is not a number.


def _to_ue4m3(x: Float32[Array, "*s"]) -> UInt8[Array, "*s"]:
    """The nearest UE4M3 number to x >= 0, ties up, at most 448."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    normal = ((bits + (1 << 19)) >> 20) - (120 << 3)
    normal = jnp.where(normal >= 15 << 3, 0x7E, normal)  # ggml has no other number above 240
    denormal = jnp.minimum((x * 512 + 0.5).astype(jnp.int32), 7)
    return jnp.where(x < 2.0**-6, denormal, normal).astype(jnp.uint8)


def _from_ue4m3(x: UInt8[Array, "*s"]) -> Float32[Array, "*s"]:
    """Half the number, to go with doubled codes; 0 for 0x7F."""
    # It has the bits of a float16, whose exponent is biased by 15, without their tail.
    as_half = lax.bitcast_convert_type((x & 0x7F).astype(jnp.uint16) << 7, jnp.float16)
    return jnp.where(x == 0x7F, 0, as_half.astype(jnp.float32) * 128)
