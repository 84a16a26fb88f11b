"""Formats of two or three values a weight: -d, 0 and d, or the sign alone.

Source of the rules: ggml-quants.c, quantize_row_q1_0_ref, quantize_row_q2_0_ref, quantize_row_tq1_0_ref and
quantize_row_tq2_0_ref.  All ignore the importance matrix.
"""

import functools
from abc import abstractmethod

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8

from qjax.formats import _rounding
from qjax.formats._apart import apart
from qjax.formats._bits import pack_bits, pack_strided, unpack_bits
from qjax.formats._exact import exact_product, reciprocal_or_zero, runtime_one
from qjax.formats._format import Field, Format, Scales, register
from qjax.formats._lanes import block_sum, map_blocks

#   TQ1_0  | qs 48 bytes of 5 trits | qh 4 bytes of 4 trits | d f16 |    256 weights
#   TQ2_0  | qs 64 bytes of 4 codes                         | d f16 |    256 weights
#   Q2_0   | d f16 | qs 16 bytes of 4 codes                         |     64 weights
#   Q1_0   | d f16 | qs 16 bytes of 8 signs                         |    128 weights

_D = Field("d", "float16")


class _OneScale(Format):
    """Codes and a d that all weights of the block share."""

    family = "ternary"

    @abstractmethod
    def _pack_codes(self, codes) -> dict:
        """Codes to the fields that hold them."""

    def scales(self, fields):
        return Scales(fields.d.astype(jnp.float32), None)

    def with_scales(self, fields, scales):
        return fields._replace(d=scales.scale.astype(jnp.float16))

    def with_codes(self, fields, codes):
        return fields._replace(**self._pack_codes(codes))


class _Ternary(_OneScale):
    """w = (q - 1) d with q = 0, 1 or 2 and d = absmax: a weight of less than half the largest becomes 0."""

    rounding = "nearest_away"
    levels = np.arange(-1, 2, dtype=np.float32)

    @abstractmethod
    def _bytes(self, fields) -> UInt8[Array, "..."]:
        """The byte of each code (*blocks, ...), with axes of size 1 where neighbours share it."""

    @abstractmethod
    def _codes(self, data: UInt8[Array, "..."]) -> Array:
        """The codes (*blocks, ...) out of their bytes."""

    def encode(self, weights, importance=None, rounding=None, seed=0):
        d = jnp.max(jnp.abs(weights), axis=-1, keepdims=True)
        v = exact_product(weights, reciprocal_or_zero(d), runtime_one(weights))
        codes = jnp.clip(_rounding.rule(rounding or self.rounding, seed)(v, 1), 0, 2).astype(jnp.uint8)
        return self.Fields(**self._pack_codes(codes), d=d[..., 0].astype(jnp.float16))

    def decode(self, fields):
        def weights(data, d):
            codes = self._codes(data).astype(jnp.int32) - 1
            return codes.astype(jnp.float32) * d.reshape(*d.shape, *(1 for _ in codes.shape[d.ndim :]))

        d = fields.d.astype(jnp.float32)
        return apart(weights, self._bytes(fields), d).reshape(*d.shape, self.block_size)


# Five trits in a byte, the first the most significant: read as a base-3 fraction t1/3 + t2/9 + ... + t5/243 and stored
# as 256ths of it, rounded up, so that each trit is the carry out of the byte times 3 and no division is needed.
# As in `pack_strided` the trits of a byte are `stride` weights apart.


def _pack_trits(trits: UInt8[Array, "*s n"], n_trits: int, stride: int) -> UInt8[Array, "*s n_bytes"]:
    """Runs of ``n_trits`` times ``stride`` trits to runs of ``stride`` bytes."""
    runs = trits.reshape(*trits.shape[:-1], -1, n_trits, stride).astype(jnp.uint16)
    number = functools.reduce(jnp.add, (runs[..., i, :] * 3 ** (4 - i) for i in range(n_trits)))
    return ((number * 256 + 242) // 243).astype(jnp.uint8).reshape(*trits.shape[:-1], -1)


@register
class TQ1_0(_Ternary):
    """256 trits, five a byte, and a scale.  Byte-exact with ggml."""

    name, ggml_id, block_size = "TQ1_0", 34, 256
    layout = (Field("qs", "uint8", 48), Field("qh", "uint8", 4), _D)

    # 160 weights in 32 bytes, 80 in 16, and the last 16 in the 4 of qh.
    _powers = np.concatenate(
        [np.repeat(np.array([1, 3, 9, 27, 81][:n], np.uint8), m) for n, m in ((5, 32), (5, 16), (4, 4))]
    )

    def _pack_codes(self, codes):
        first, second, last = jnp.split(codes, (160, 240), axis=-1)
        qs = jnp.concatenate([_pack_trits(first, 5, 32), _pack_trits(second, 5, 16)], axis=-1)
        return {"qs": qs, "qh": _pack_trits(last, 4, 4)}

    def _bytes(self, fields):
        first, second = jnp.split(fields.qs, (32,), axis=-1)
        return jnp.concatenate([*[first] * 5, *[second] * 5, *[fields.qh] * 4], axis=-1)

    def _codes(self, data):
        return ((data * self._powers).astype(jnp.uint16) * 3) >> 8


_PAIRS = np.arange(0, 8, 2, dtype=np.uint8)  # where the codes of 2 bits begin in a byte


@register
class TQ2_0(_Ternary):
    """256 codes of 2 bits and a scale.  Byte-exact with ggml."""

    name, ggml_id, block_size, layout = "TQ2_0", 35, 256, (Field("qs", "uint8", 64), _D)

    def _pack_codes(self, codes):
        return {"qs": pack_strided(codes, bits=2, stride=32)}

    def _bytes(self, fields):
        return fields.qs.reshape(*fields.d.shape, 2, 1, 32)

    def _codes(self, data):
        return (data >> _PAIRS[:, None]) & 3


@register
class Q2_0(_Ternary):
    """64 codes of 2 bits and a scale; code 3, for 2 d, is read but `encode` never writes it.  Byte-exact with ggml."""

    name, ggml_id, block_size, layout = "Q2_0", 42, 64, (_D, Field("qs", "uint8", 16))
    levels = np.arange(-1, 3, dtype=np.float32)

    def _pack_codes(self, codes):
        return {"qs": pack_bits(codes, bits=2)}

    def _bytes(self, fields):
        return fields.qs[..., None]

    def _codes(self, data):
        return (data >> _PAIRS) & 3


@register
class Q1_0(_OneScale):
    """128 signs and a scale, the mean magnitude.  Byte-exact with ggml."""

    name, ggml_id, block_size, layout = "Q1_0", 41, 128, (_D, Field("qs", "uint8", 16))
    levels = np.array([-1, 1], np.float32)

    def encode(self, weights, importance=None, rounding=None, seed=0):
        d = map_blocks(lambda x: block_sum(jnp.abs(x)), weights) / 128
        bits = lax.bitcast_convert_type(weights, jnp.int32)
        not_negative = (bits >= 0) | (bits == jnp.iinfo(jnp.int32).min)  # on the bits, for XLA takes denormals as 0
        return self.Fields(d.astype(jnp.float16), **self._pack_codes(not_negative.astype(jnp.uint8)))

    def _pack_codes(self, codes):
        return {"qs": pack_bits(codes, bits=1)}

    def decode(self, fields):
        positive = unpack_bits(fields.qs, bits=1, n=128) == 1
        d = fields.d.astype(jnp.float32)[..., None]
        return jnp.where(positive, d, -d)
