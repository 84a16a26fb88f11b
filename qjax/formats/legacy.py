"""GGML's first formats: blocks of 32 weights with one float16 scale, and in the _1 variants a float16 minimum.

Source of the rules: ggml-quants.c, quantize_row_q4_0_ref to quantize_row_q8_1_ref, and with importance the _impl of
each.
"""

import functools
from abc import abstractmethod
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float32

from qjax.errors import QjaxError
from qjax.formats import _rounding
from qjax.formats._apart import apart
from qjax.formats._bits import pack_bits, pack_nibbles, unpack_bits, unpack_nibbles
from qjax.formats._exact import exact_product, exact_quotient, reciprocal_or_zero, runtime_one, signed_as_first
from qjax.formats._format import Field, Format, Integers, Scales, register
from qjax.formats._lanes import map_blocks
from qjax.formats._search import importance_weights, make_qkx2_quants, make_qx_quants

# The codes of a block, 4 bits below and, in Q5_0 and Q5_1, a plane of fifth bits:
#
#   Q4_0   | d f16 |                 | qs 16 bytes of nibbles |
#   Q4_1   | d f16 | m f16 |         | qs                     |
#   Q5_0   | d f16 |         | qh u32 | qs                     |
#   Q5_1   | d f16 | m f16 | qh u32 | qs                     |
#   Q8_0   | d f16 |                 | qs 32 int8             |
#   Q8_1   | d f16 | s f16 |         | qs 32 int8             |    s = d times the sum of the codes

_D, _M = Field("d", "float16"), Field("m", "float16")
_QH, _QS = Field("qh", "uint8", 4), Field("qs", "uint8", 16)


class _Legacy(Format):
    family = "legacy"
    block_size = 32
    rounding = "half_up"


class _UnsignedCodes(_Legacy):
    """One half of a format says how codes are chosen (`_Symmetric`, `_WithMinimum`), the other how they are stored."""

    uses_importance = True
    weighs_rows = True
    bits: ClassVar[int]

    @abstractmethod
    def _scales(self, weights) -> tuple:
        """The scales from the extremes of each block, ``(*rows, n_blocks, 1)`` in float32."""

    @abstractmethod
    def _round(self, rule, weights, *scales) -> Array:
        """The codes by the rounding ``rule``."""

    @abstractmethod
    def _search(self, x, w) -> tuple:
        """The scales and codes of least error, ``w`` the weights of the errors, for a slab of blocks (see `_lanes`)."""

    @abstractmethod
    def _pack_codes(self, codes) -> tuple:
        """Codes below 2**bits to the fields that hold them."""

    @abstractmethod
    def _unpack_codes(self, fields) -> Array:
        """The inverse."""

    def encode(self, weights, importance=None, rounding=None, seed=0):
        if importance is None:
            scales = self._scales(weights)
            rule = _rounding.rule(rounding or self.rounding, seed)
            fields = apart(
                lambda *arrays: self._pack_codes(self._round(rule, *arrays).astype(jnp.uint8)), weights, *scales
            )
            scales = (scale[..., 0] for scale in scales)
        elif rounding is not None:
            raise QjaxError(f"{self.name}: with importance a search finds the codes; leave rounding or importance out")
        else:
            *scales, codes = map_blocks(self._search_weighted, weights, importance, _mean_squares(weights))
            fields = self._pack_codes(codes.astype(jnp.uint8))
        return self.Fields(*(scale.astype(jnp.float16) for scale in scales), *fields)

    def decode(self, fields):
        return apart(self._decode, fields).reshape(*fields.d.shape, self.block_size)

    @abstractmethod
    def _decode(self, fields) -> Array:
        """The weights, as `_split` has the codes."""

    def integers(self, fields):
        codes = self._unpack_codes(fields).astype(jnp.int8)
        d, *m = (x.astype(jnp.float32) for x in self._stored_scales(fields))
        half = 2 ** (self.bits - 1)
        return Integers(codes, d, m[0], (0, 2 * half - 1)) if m else Integers(codes - half, d, None, (-half, half - 1))

    def from_integers(self, integers):
        scales = [integers.scale] if integers.offset is None else [integers.scale, integers.offset]
        codes = integers.codes + (2 ** (self.bits - 1) if integers.offset is None else 0)
        return self.Fields(*(x.astype(jnp.float16) for x in scales), *self._pack_codes(codes.astype(jnp.uint8)))

    @property
    def levels(self):
        codes = np.arange(2**self.bits, dtype=np.float32)
        return codes if self.layout[1] is _M else codes - 2 ** (self.bits - 1)

    def scales(self, fields):
        d, *m = (x.astype(jnp.float32) for x in self._stored_scales(fields))
        return Scales(d, *(m or [None]))

    def with_scales(self, fields, scales):
        stored = [x.astype(jnp.float16) for x in scales if x is not None]
        return self.Fields(*stored, *fields[len(stored) :])

    def with_codes(self, fields, codes):
        return self.Fields(*self._stored_scales(fields), *self._pack_codes(codes))

    def _stored_scales(self, fields):
        return [getattr(fields, name) for name in "dm" if name in fields._fields]

    def _split(self, fields):
        """The codes as (*rows, n_blocks, 2, 16), low nibbles and high ones, so that XLA vectorises; and the scales."""
        codes = self._unpack_codes(fields).astype(jnp.int32)
        scales = (x.astype(jnp.float32)[..., None, None] for x in self._stored_scales(fields))
        return codes.reshape(*fields.d.shape, 2, 16), tuple(scales)

    def _search_weighted(self, x, importance, mean_square) -> tuple:
        return self._search(x, importance_weights(x, importance, mean_square))


def _mean_squares(weights: Float32[Array, "*rows n_blocks n"]) -> Float32[Array, "*rows 1 1"]:
    """The mean square of each row, added up from its first weight to its last."""
    one = runtime_one(weights, axis=(-2, -1))[..., 0, 0]

    def add_block(total, block):
        return functools.reduce(jnp.add, exact_product(block, block, one), total), None

    total, _ = lax.scan(add_block, jnp.zeros_like(one), jnp.moveaxis(weights, (-2, -1), (0, 1)))
    return exact_quotient(total, weights.shape[-2] * weights.shape[-1] * one)[..., None, None]


def _absmax(weights: Float32[Array, "*rows n_blocks n"]) -> Float32[Array, "*rows n_blocks 1"]:
    """The largest magnitude of each block; apart, for XLA has a vectorised kernel for a maximum alone."""
    return apart(lambda weights: jnp.max(jnp.abs(weights), axis=-1, keepdims=True), weights)


class _Nibbles(_UnsignedCodes):
    bits = 4

    def _pack_codes(self, codes) -> tuple:
        return (pack_nibbles(codes),)

    def _unpack_codes(self, fields):
        return unpack_nibbles(fields.qs)


class _NibblesAndFifthBit(_UnsignedCodes):
    bits = 5

    def _pack_codes(self, codes) -> tuple:
        return pack_bits(codes >> 4, bits=1), pack_nibbles(codes)

    def _unpack_codes(self, fields):
        return unpack_nibbles(fields.qs) | (unpack_bits(fields.qh, bits=1, n=32) << 4)


class _Symmetric(_UnsignedCodes):
    """w = (q - 2^(bits-1)) d, with d chosen so that the weight of largest magnitude is met with code 0.

    d carries the opposite of that weight's sign, so the direction of ties in weight space varies by block.
    """

    def _scales(self, weights):
        half = 2 ** (self.bits - 1)
        magnitude = jnp.abs(weights)
        absmax = _absmax(weights)
        # C starts from +0, so that in a block of zeros none replaces it.
        return (signed_as_first(absmax, (magnitude == absmax) & (magnitude > 0), weights) / -half,)

    def _round(self, rule, weights, d):
        half = 2 ** (self.bits - 1)
        v = exact_product(weights, reciprocal_or_zero(d), runtime_one(weights))
        return jnp.clip(rule(v, half), 0, 2 * half - 1)

    def _search(self, x, w):
        return make_qx_quants(x, w, 2 ** (self.bits - 1))

    def _decode(self, fields):
        codes, (d,) = self._split(fields)
        return (codes - 2 ** (self.bits - 1)).astype(jnp.float32) * d


class _WithMinimum(_UnsignedCodes):
    """w = q d + m, with m the minimum and d a (2^bits - 1)th of the range."""

    @property
    def activations(self):
        # Whose blocks have their sum beside them, which m is multiplied with.
        return "Q8_1"

    def _scales(self, weights):
        m, largest = (apart(functools.partial(f, axis=-1, keepdims=True), weights) for f in (jnp.min, jnp.max))
        # Which zero is the least is rarely asked, and costs as much as all the rest.
        signed = lambda m, weights: signed_as_first(jnp.abs(m), weights == m, weights)  # noqa: E731
        m = lax.cond(jnp.any(m == 0), signed, lambda m, _: m, m, weights)
        d = exact_quotient(jnp.abs(largest - m), (2**self.bits - 1) * runtime_one(weights))  # abs: -0 - 0 is -0
        return d, m

    def _round(self, rule, weights, d, m):
        v = exact_product(weights - m, reciprocal_or_zero(d), runtime_one(weights))
        return jnp.clip(rule(v, 0), 0, 2**self.bits - 1)

    def _search(self, x, w):
        d, m, codes = make_qkx2_quants(x, w, 2**self.bits - 1, rmin=-0.9, rdelta=0.05, nstep=36)
        return d, -m, codes

    def _decode(self, fields):
        # At most 5 bits times the 11 of a float16: the product is exact, so an FMA gives what C gives.
        codes, (d, m) = self._split(fields)
        return codes.astype(jnp.float32) * d + m


@register
class Q4_0(_Symmetric, _Nibbles):
    """32 codes of 4 bits and a scale.  Byte-exact with ggml."""

    name, ggml_id, layout = "Q4_0", 2, (_D, _QS)
    run_size = 16

    def runs(self, read):
        d, qs = read("d"), read("qs", 0, 16)
        for first, codes in ((0, qs & 15), (16, qs >> 4)):
            yield first, d * (codes - 8).astype(jnp.float32)


@register
class Q4_1(_WithMinimum, _Nibbles):
    """32 codes of 4 bits, a scale and a minimum.  Byte-exact with ggml."""

    name, ggml_id, layout = "Q4_1", 3, (_D, _M, _QS)


@register
class Q5_0(_Symmetric, _NibblesAndFifthBit):
    """32 codes of 5 bits and a scale.  Byte-exact with ggml."""

    name, ggml_id, layout = "Q5_0", 6, (_D, _QH, _QS)


@register
class Q5_1(_WithMinimum, _NibblesAndFifthBit):
    """32 codes of 5 bits, a scale and a minimum.  Byte-exact with ggml."""

    name, ggml_id, layout = "Q5_1", 7, (_D, _M, _QH, _QS)


class _SignedBytes(_Legacy):
    """w = q d with d = absmax / 127."""

    rounding = "nearest_away"

    def _scale_and_codes(self, weights, rounding, seed):
        """d (*rows, n_blocks) in float32 and the codes."""
        one = runtime_one(weights)
        d = exact_quotient(_absmax(weights), 127 * one)
        v = exact_product(weights, reciprocal_or_zero(d), one)
        codes = _rounding.rule(rounding or self.rounding, seed)(v, 0)
        return d[..., 0], jnp.clip(codes, -127, 127).astype(jnp.int8)

    def decode(self, fields):
        return fields.qs.astype(jnp.float32) * fields.d.astype(jnp.float32)[..., None]


@register
class Q8_0(_SignedBytes):
    """32 signed bytes and a scale.  Byte-exact with ggml."""

    name, ggml_id, layout = "Q8_0", 8, (_D, Field("qs", "int8", 32))
    levels = np.arange(-128, 128, dtype=np.float32)

    def encode(self, weights, importance=None, rounding=None, seed=0):
        d, codes = self._scale_and_codes(weights, rounding, seed)
        return self.Fields(d.astype(jnp.float16), codes)

    def integers(self, fields):
        return Integers(fields.qs, fields.d.astype(jnp.float32), None, (-128, 127))

    def from_integers(self, integers):
        return self.Fields(integers.scale.astype(jnp.float16), integers.codes)

    def scales(self, fields):
        return Scales(fields.d.astype(jnp.float32), None)

    def with_scales(self, fields, scales):
        return fields._replace(d=scales.scale.astype(jnp.float16))

    def with_codes(self, fields, codes):
        return fields._replace(qs=(codes.astype(jnp.int16) - 128).astype(jnp.int8))

    def runs(self, read):
        yield 0, read("d") * read("qs", 0, 32).astype(jnp.float32)


@register
class Q8_1(_SignedBytes):
    """Q8_0 and the sum of the block: the activations' side of products with Q4_1 and Q5_1.  Byte-exact with ggml."""

    name, ggml_id, for_weights, layout = "Q8_1", 9, False, (_D, Field("s", "float16"), Field("qs", "int8", 32))

    def encode(self, weights, importance=None, rounding=None, seed=0):
        d, codes = self._scale_and_codes(weights, rounding, seed)
        s = jnp.sum(codes, axis=-1, dtype=jnp.int32).astype(jnp.float32) * d
        return self.Fields(d.astype(jnp.float16), s.astype(jnp.float16), codes)
