"""GGML's K-quants: super-blocks of 256 weights in sub-blocks of 16 or 32, whose scales are quantized themselves.

First each sub-block's scale, and minimum, is searched for; then the scales of a super-block are rounded to integers
under a float16; last the weights are rounded again, with the scales that were stored.

Source of the rules: ggml-quants.c, quantize_row_q2_K_ref to quantize_row_q8_K_ref, and with importance the _impl of
each.
"""

import functools
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

from qjax.formats import _rounding
from qjax.formats._apart import apart
from qjax.formats._bits import (
    pack_scales,
    pack_scales_and_mins,
    pack_strided,
    read_scale_and_min,
    unpack_scales,
    unpack_scales_and_mins,
    unpack_strided,
)
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
from qjax.formats._search import (
    GROUP_MAX_EPS,
    first_largest,
    importance_weights,
    make_q3_quants,
    make_qkx2_quants,
    make_qp_quants,
    make_qx_quants,
    mean_square,
    nearest_int,
)

# The super-blocks, in byte order.  All codes are strided (see `_bits`): pairs and single bits by 32 weights, nibbles
# by 32 and in Q6_K by 64.
#
#   Q2_K   | scales 16: m << 4 | s | qs 64, pairs |                             | d f16 | dmin f16 |
#   Q3_K   | hmask 32, third bits | qs 64, pairs | scales 12 of 6 bits          | d f16 |
#   Q4_K   | d f16 | dmin f16 | scales 12 of 6 bits |                     | qs 128, nibbles |
#   Q5_K   | d f16 | dmin f16 | scales 12 of 6 bits | qh 32, fifth bits   | qs 128, nibbles |
#   Q6_K   | ql 128, nibbles | qh 64, pairs | scales 16 int8                    | d f16 |
#   Q8_K   | d f32 | qs 256 int8 | bsums 16 int16, each the sum of 16 codes |

_D, _DMIN = Field("d", "float16"), Field("dmin", "float16")


class _Searched(NamedTuple):
    """What the searches find for a super-block of n_sub sub-blocks, before the weights are rounded again."""

    codes: Array  # (256,) of the searches themselves; they stay where a sub-block's scale is zero
    d: Array
    scales: Array  # (n_sub,)
    dmin: Array | None = None
    mins: Array | None = None  # (n_sub,)


class _KQuant(Format):
    """w = d s (q - offset) - dmin m, with integers s and m for each sub-block and q for each weight."""

    family = "kquants"
    block_size = 256
    rounding = "nearest_even"
    uses_importance = True

    sub_block: ClassVar[int]
    bits: ClassVar[int]
    offset: ClassVar[int] = 0
    scale_bounds: ClassVar[tuple[int, int]]  # of s and m
    axes: ClassVar[tuple[int, ...]]  # of a super-block's weights: every stride of a field and the sub-block are axes

    @abstractmethod
    def _search(self, x: Float32[Array, "256 lanes"], importance: Any) -> _Searched:
        """The searches over a slab of super-blocks (see `_lanes`): arrays as in `_Searched`, with lanes last."""

    @abstractmethod
    def _pack(self, d, scales, dmin, mins, codes) -> tuple:
        """The integers to the fields that hold them."""

    @abstractmethod
    def _unpack(self, fields) -> tuple:
        """The inverse."""

    def encode(self, weights, importance=None, rounding=None, seed=0):
        found = map_blocks(self._search, weights, importance)
        d = found.d.astype(jnp.float16)
        dmin = None if found.dmin is None else found.dmin.astype(jnp.float16)
        rule = _rounding.rule(rounding or self.rounding, seed)
        codes = apart(functools.partial(self._round, rule), weights, found._replace(d=d, dmin=dmin))
        return self.Fields(*self._pack(d, found.scales, dmin, found.mins, codes))

    def _round(self, rule, weights, stored: _Searched):
        """The codes of the weights for the scales as they are stored."""
        step = self._for_weights(stored.d, stored.scales)
        least = jnp.float32(0) if stored.dmin is None else self._for_weights(stored.dmin, stored.mins)
        # Not a broadcast, so that the division stays one (see `_exact`), and not an array held in memory either.
        w = self._split(weights)
        v = (w + least) / jnp.where(jnp.isnan(w), w, step)
        # Where a scale overflows float16: ggml's nearest_int makes the lowest code of infinity, and 0 of NaN.
        v = jnp.where(jnp.abs(v) < 2**22, v, jnp.where(jnp.isnan(v), 0, -(2**22)))
        codes = jnp.clip(rule(v, self.offset), 0, 2**self.bits - 1).astype(jnp.uint8)
        return jnp.where(step == 0, self._split(stored.codes), codes).reshape(weights.shape)

    def decode(self, fields):
        return apart(self._decode, fields).reshape(*fields.d.shape, self.block_size)

    def _decode(self, fields):
        # A float16 times a scale of up to 8 bits and a code of up to 5 is exact, so an FMA gives what C gives.
        d, scales, dmin, mins, codes = self._unpack(fields)
        w = self._for_weights(d, scales) * (codes.astype(jnp.int32) - self.offset).astype(jnp.float32)
        return w if dmin is None else w - self._for_weights(dmin, mins)

    def integers(self, fields):
        *_, codes = self._unpack(fields)
        scale, offset = self.scales(fields)
        codes = codes.astype(jnp.int8).reshape(*scale.shape, self.sub_block) - self.offset
        return Integers(codes, scale, offset, (-self.offset, 2**self.bits - 1 - self.offset))

    @property
    def levels(self):
        return np.arange(2**self.bits, dtype=np.float32) - self.offset

    def scales(self, fields):
        d, scales, dmin, mins, _ = self._unpack(fields)

        def of_groups(unit, integers):
            return (unit.astype(jnp.float32)[..., None] * integers.astype(jnp.float32)).reshape(*d.shape[:-1], -1)

        return Scales(of_groups(d, scales), None if dmin is None else -of_groups(dmin, mins))

    def with_scales(self, fields, scales):
        d, _, dmin, _, codes = self._unpack(fields)

        def integers(unit, of_groups):
            steps = of_groups.reshape(*d.shape, -1) * reciprocal_or_zero(unit.astype(jnp.float32))[..., None]
            return jnp.clip(nearest_int(steps), *self.scale_bounds).astype(jnp.int8)

        mins = None if dmin is None else integers(dmin, -scales.offset)
        return self.Fields(*self._pack(d, integers(d, scales.scale), dmin, mins, codes.reshape(*d.shape, 256)))

    def with_codes(self, fields, codes):
        d, scales, dmin, mins, _ = self._unpack(fields)
        return self.Fields(*self._pack(d, scales, dmin, mins, codes))

    def _split(self, of_weights):
        """(*s, 256) to (*s, *axes).  On these axes scales broadcast and codes lie in order, so that XLA vectorises."""
        return of_weights.reshape(*of_weights.shape[:-1], *self.axes)

    def _for_weights(self, d, codes):
        """``d * codes`` of each super-block and sub-block, to be broadcast over its weights."""
        scales = d.astype(jnp.float32)[..., None] * codes.astype(jnp.float32)
        return scales.reshape(*d.shape, *self.axes[:-1], 1)

    def _by_sub_block(self, slab):
        """(256, lanes) to (sub_block, lanes * n_sub): the sub-blocks side by side."""
        return apart(lambda slab: slab.T.reshape(-1, self.sub_block).T, slab)

    def _of_super_block(self, values):
        """(lanes * n_sub,), one for each sub-block, to (n_sub, lanes)."""
        return values.reshape(-1, self.block_size // self.sub_block).T

    def _by_super_block(self, codes):
        """(sub_block, lanes * n_sub) to (256, lanes)."""
        return codes.astype(jnp.uint8).T.reshape(-1, self.block_size).T


class _WithMinimum(_KQuant):
    """Q2_K, Q4_K, Q5_K: unsigned codes, a scale and a minimum for each sub-block."""

    top: ClassVar[int]  # of the integers that stand for scales and minima
    candidates: ClassVar[tuple[float, float, int, bool]]  # rmin, rdelta, nstep and use_mad of make_qkx2_quants
    variance_factor: ClassVar[int]

    @property
    def scale_bounds(self):
        return 0, self.top

    @abstractmethod
    def _error_weights(self, x) -> Array:
        """The weights of the errors without importance."""

    def _search(self, x, importance):
        sub_blocks, candidates = self._by_sub_block(x), self.candidates
        if importance is None:
            w = self._error_weights(sub_blocks)
        else:
            w = self._by_sub_block(importance_weights(x, importance, self.variance_factor * mean_square(x)))
            candidates = (-0.9, 0.05, 36, False)
        *scale_and_minimum, codes = make_qkx2_quants(sub_blocks, w, 2**self.bits - 1, *candidates)
        scale, minimum = (self._of_super_block(values) for values in scale_and_minimum)
        if importance is None:
            (d, scales), (dmin, mins) = (self._largest_to_top(values) for values in (scale, minimum))
        else:
            sum_w = self._of_super_block(block_sum(w))
            (d, scales), (dmin, mins) = (make_qp_quants(values, sum_w, self.top) for values in (scale, minimum))
        return _Searched(self._by_super_block(codes), d, scales, dmin, mins)

    def _largest_to_top(self, values):
        """Rounds the scales of a super-block so that the largest gets the integer ``top``."""
        largest = jnp.max(values, axis=0)
        some = largest > 0
        inverse = jnp.where(some, self.top / jnp.where(some, largest, 1), 0)
        d = exact_quotient(jnp.where(some, largest, 0), self.top * runtime_one(values, axis=0)[0])
        return d, jnp.minimum(nearest_int(inverse * values), self.top)


@register
class Q2_K(_WithMinimum):
    """16 sub-blocks of 16 codes of 2 bits, with scales and minima of 4 bits.  Byte-exact with ggml."""

    name, ggml_id = "Q2_K", 10
    layout = (Field("scales", "uint8", 16), Field("qs", "uint8", 64), _D, _DMIN)
    sub_block, bits, top = 16, 2, 15
    axes = (2, 4, 2, 16)
    candidates, variance_factor = (-0.5, 0.1, 15, True), 1

    def _error_weights(self, x):
        return jnp.abs(x)

    def _pack(self, d, scales, dmin, mins, codes):
        scales, mins = scales.astype(jnp.uint8), mins.astype(jnp.uint8)
        return scales | (mins << 4), pack_strided(codes, bits=2, stride=32), d, dmin

    def _unpack(self, fields):
        scales, mins = fields.scales & 15, fields.scales >> 4
        return fields.d, scales, fields.dmin, mins, self._split(unpack_strided(fields.qs, bits=2, stride=32))


class _SixBitScalesAndMins(_WithMinimum):
    sub_block, top, variance_factor = 32, 63, 2
    axes = (4, 2, 32)

    def _error_weights(self, x):
        one = runtime_one(x, axis=0)
        return jnp.sqrt(block_sum(exact_product(x, x, one)) / self.sub_block) + jnp.abs(x)

    def runs(self, read):
        d, dmin = read("d"), read("dmin")
        for i in range(8):
            scale, minimum = read_scale_and_min(read, i)
            step, least = d * scale.astype(jnp.float32), dmin * minimum.astype(jnp.float32)
            yield 32 * i, step * self._read_codes(read, i).astype(jnp.float32) - least

    def _read_codes(self, read, i: int) -> Array:
        """The codes of sub-block i."""
        return (read("qs", 32 * (i // 2), 32) >> (i % 2 * 4)) & 15


@register
class Q4_K(_SixBitScalesAndMins):
    """8 sub-blocks of 32 codes of 4 bits, with scales and minima of 6 bits.  Byte-exact with ggml."""

    name, ggml_id = "Q4_K", 12
    layout = (_D, _DMIN, Field("scales", "uint8", 12), Field("qs", "uint8", 128))
    bits, candidates = 4, (-1.0, 0.1, 20, False)

    def _pack(self, d, scales, dmin, mins, codes):
        scales = pack_scales_and_mins(scales.astype(jnp.uint8), mins.astype(jnp.uint8))
        return d, dmin, scales, pack_strided(codes, bits=4, stride=32)

    def _unpack(self, fields):
        scales, mins = unpack_scales_and_mins(fields.scales)
        return fields.d, scales, fields.dmin, mins, self._split(unpack_strided(fields.qs, bits=4, stride=32))


@register
class Q5_K(_SixBitScalesAndMins):
    """8 sub-blocks of 32 codes of 5 bits, with scales and minima of 6 bits.  Byte-exact with ggml."""

    name, ggml_id = "Q5_K", 13
    layout = (_D, _DMIN, Field("scales", "uint8", 12), Field("qh", "uint8", 32), Field("qs", "uint8", 128))
    bits, candidates = 5, (-0.5, 0.1, 15, False)

    def _pack(self, d, scales, dmin, mins, codes):
        scales = pack_scales_and_mins(scales.astype(jnp.uint8), mins.astype(jnp.uint8))
        qh, qs = pack_strided(codes >> 4, bits=1, stride=32), pack_strided(codes & 15, bits=4, stride=32)
        return d, dmin, scales, qh, qs

    def _unpack(self, fields):
        scales, mins = unpack_scales_and_mins(fields.scales)
        low, high = unpack_strided(fields.qs, bits=4, stride=32), unpack_strided(fields.qh, bits=1, stride=32)
        return fields.d, scales, fields.dmin, mins, self._split(low) | (self._split(high) << 4)

    def _read_codes(self, read, i):
        return super()._read_codes(read, i) | (((read("qh", 0, 32) >> i) & 1) << 4)


class _Symmetric(_KQuant):
    """Q3_K, Q6_K: signed codes and signed scales, 16 sub-blocks of 16."""

    sub_block = 16


@register
class Q3_K(_Symmetric):
    """16 sub-blocks of 16 codes of 3 bits, with signed scales of 6 bits.  Byte-exact with ggml."""

    name, ggml_id = "Q3_K", 11
    layout = (Field("hmask", "uint8", 32), Field("qs", "uint8", 64), Field("scales", "uint8", 12), _D)
    bits, offset, axes, scale_bounds = 3, 4, (2, 4, 2, 16), (-32, 31)

    def _search(self, x, importance):
        sub_blocks = self._by_sub_block(x)
        if importance is None:
            scale, codes = make_q3_quants(sub_blocks, self.offset)
            d, scales = _largest_to_lowest(self._of_super_block(scale), -32)
            scales = jnp.where(d == 0, -32, scales)
        else:
            w = self._by_sub_block(importance_weights(x, importance, 2 * mean_square(x)))
            scale, codes = make_qx_quants(sub_blocks, w, self.offset)
            d, scales = make_qx_quants(self._of_super_block(scale), self._of_super_block(block_sum(w)), 32)
            scales = scales - 32
        return _Searched(self._by_super_block(codes), d, scales)

    def _pack(self, d, scales, dmin, mins, codes):
        hmask, qs = pack_strided(codes >> 2, bits=1, stride=32), pack_strided(codes & 3, bits=2, stride=32)
        return hmask, qs, pack_scales((scales + 32).astype(jnp.uint8)), d

    def _unpack(self, fields):
        low, high = unpack_strided(fields.qs, bits=2, stride=32), unpack_strided(fields.hmask, bits=1, stride=32)
        scales = unpack_scales(fields.scales).astype(jnp.int8) - 32
        return fields.d, scales, None, None, self._split(low) | (self._split(high) << 2)


@register
class Q6_K(_Symmetric):
    """16 sub-blocks of 16 codes of 6 bits, with signed scales of 8 bits.  Byte-exact with ggml."""

    name, ggml_id = "Q6_K", 14
    layout = (Field("ql", "uint8", 128), Field("qh", "uint8", 64), Field("scales", "int8", 16), _D)
    bits, offset, axes, scale_bounds = 6, 32, (2, 2, 2, 2, 16), (-128, 127)
    run_size = 16

    def _search(self, x, importance):
        sub_blocks = self._by_sub_block(x)
        w = sub_blocks * sub_blocks if importance is None else self._by_sub_block(importance)
        scale, codes = make_qx_quants(sub_blocks, w, self.offset)
        d, scales = _largest_to_lowest(self._of_super_block(scale), -128)
        return _Searched(jnp.where(d == 0, 0, self._by_super_block(codes)), d, scales)

    def _pack(self, d, scales, dmin, mins, codes):
        ql, qh = pack_strided(codes & 15, bits=4, stride=64), pack_strided(codes >> 4, bits=2, stride=32)
        return ql, qh, scales.astype(jnp.int8), d

    def _unpack(self, fields):
        low, high = unpack_strided(fields.ql, bits=4, stride=64), unpack_strided(fields.qh, bits=2, stride=32)
        return fields.d, fields.scales, None, None, self._split(low) | (self._split(high) << 4)

    def runs(self, read):
        d = read("d")
        for i in range(16):
            half, quarter = i // 8, i % 8 // 2  # of 128 weights and of 32
            low = read("ql", 64 * half + 16 * (i % 4), 16) >> (i % 8 // 4 * 4)
            high = read("qh", 32 * half + 16 * (i % 2), 16) >> (2 * quarter)
            codes = (low & 15 | (high & 3) << 4) - 32
            yield 16 * i, d * read("scales", i).astype(jnp.float32) * codes.astype(jnp.float32)


def _largest_to_lowest(scale, lowest: int):
    """Rounds the scales of a super-block so that the one of largest magnitude gets the integer ``lowest``."""
    largest = first_largest(scale)
    some = jnp.abs(largest) >= GROUP_MAX_EPS
    inverse = lowest / jnp.where(some, largest, 1)
    scales = jnp.clip(nearest_int(inverse * scale), lowest, -lowest - 1)
    return jnp.where(some, exact_reciprocal(inverse), 0), jnp.where(some, scales, 0)


@register
class Q8_K(Format):
    """256 signed bytes and a float32 scale: the activations' side of the K- and I-quants' dot products.

    Byte-exact with ggml, which leaves ``bsums`` unset in a block of zeros; here they are 0.
    """

    name, ggml_id, family, for_weights = "Q8_K", 15, "kquants", False
    block_size, rounding = 256, "nearest_even"
    layout = (Field("d", "float32"), Field("qs", "int8", 256), Field("bsums", "int16", 16))

    def encode(self, weights, importance=None, rounding=None, seed=0):
        magnitude = jnp.abs(weights)
        absmax = jnp.max(magnitude, axis=-1, keepdims=True)
        largest = signed_as_first(absmax, magnitude == absmax, weights)
        inverse = jnp.where(absmax > 0, -127 / jnp.where(absmax > 0, largest, 1), 0)
        v = exact_product(weights, inverse, runtime_one(weights))
        codes = jnp.clip(_rounding.rule(rounding or self.rounding, seed)(v, 0), -127, 127).astype(jnp.int8)
        sums = jnp.sum(codes.reshape(*codes.shape[:-1], 16, 16), axis=-1, dtype=jnp.int16)
        d = jnp.where(absmax > 0, exact_reciprocal(jnp.where(absmax > 0, inverse, 1)), 0)
        return self.Fields(d[..., 0], codes, sums)

    def decode(self, fields):
        return fields.qs.astype(jnp.float32) * fields.d[..., None]
