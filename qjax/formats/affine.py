"""Affine: any number of bits, any block, the format behind the sliders."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import UInt8

from qjax.errors import QjaxError
from qjax.formats import _rounding
from qjax.formats._bits import pack_bits, read_bits, unpack_bits
from qjax.formats._exact import exact_product, exact_quotient, reciprocal_or_zero, runtime_one
from qjax.formats._format import Field, Format, Integers, Scales

_SCALE_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, repr=False, kw_only=True)
class Affine(Format):
    """Uniform codes of 1 to 8 bits: w = q d (symmetric), w = q d + m (min-max) or w = (q - z) d (zero point).

    bits: 1 to 8.
    block_size: weights that share a scale: a number, "row" (per channel) or "tensor" (the last two axes).
    symmetric: codes -2^(bits-1) .. 2^(bits-1) - 1, with d such that the weight of largest magnitude, of either sign,
        gets the lowest code, as in Q4_0 and Q5_0.  Otherwise codes 0 .. 2^bits - 1, with m = min and
        d = (max - min) / (2^bits - 1), as in Q4_1 and Q5_1.
    zero_point: instead of m a whole number z of one byte, the code that stands for zero, as in GPTQ and AWQ; the range
        of the weights is made to reach zero first.  Goes with symmetric=False.
    rounding: a name from `qjax.formats.rounding_names()`.
    scale_dtype: how d and m are stored: float16 as in GGML, bfloat16 or float32.

    The codes are one bit stream a block (see _bits.py), so the tensor takes the bytes it claims.
    Raises QjaxError for values outside these ranges.
    """

    bits: int = 4
    block_size: int | Literal["row", "tensor"] = 32
    symmetric: bool = True
    zero_point: bool = False
    rounding: str = "nearest_even"
    scale_dtype: str = "float16"

    family = "affine"
    exactness = "our own"

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise QjaxError(f"Affine: bits is {self.bits}, expected 1 to 8")
        if self.block_size not in ("row", "tensor") and not (isinstance(self.block_size, int) and self.block_size > 0):
            raise QjaxError(f"Affine: block_size is {self.block_size!r}, expected a positive number, 'row' or 'tensor'")
        if self.scale_dtype not in _SCALE_DTYPES:
            raise QjaxError(f"Affine: scale_dtype is {self.scale_dtype!r}, expected one of {', '.join(_SCALE_DTYPES)}")
        if self.symmetric and self.zero_point:
            raise QjaxError("Affine: a symmetric format has no zero_point; give symmetric=False")
        _rounding.check(self.rounding)

    @property
    def name(self) -> str:
        kind = "symmetric" if self.symmetric else "zero point" if self.zero_point else "min-max"
        return f"Affine({self.bits} bits, {self._block_name}, {kind})"

    @property
    def _block_name(self) -> str:
        return f"block {self.block_size}" if isinstance(self.block_size, int) else f"per {self.block_size}"

    @property
    def _scales(self) -> tuple[Field, ...]:
        offsets = () if self.symmetric else (Field("z", "uint8") if self.zero_point else Field("m", self.scale_dtype),)
        return (Field("d", self.scale_dtype), *offsets)

    @property
    def layout(self) -> tuple[Field, ...]:
        if not isinstance(self.block_size, int):
            raise QjaxError(f"{self.name}: the size depends on the tensor; ask nbytes(shape) or a quantized tensor")
        return (*self._scales, Field("qs", "uint8", math.ceil(self.block_size * self.bits / 8)))

    def __repr__(self) -> str:
        return super().__repr__() if isinstance(self.block_size, int) else self.name

    def _repr_html_(self) -> str:
        return super()._repr_html_() if isinstance(self.block_size, int) else f"<b>{self.name}</b>"

    def resolve(self, shape):
        if self.block_size == "tensor":
            return _PerTensor(**{**vars(self), "block_size": shape[-1]})
        if self.block_size == "row":
            return replace(self, block_size=shape[-1])
        return super().resolve(shape)

    def nbytes(self, shape):
        resolved = self.resolve(shape)
        return resolved.nbytes(shape) if resolved != self else super().nbytes(shape)

    def _scope(self, weights) -> tuple[int, ...]:
        """The axes of (*rows, n_blocks, block_size) that share a scale."""
        return (-1,)

    def encode(self, weights, importance=None, rounding=None, seed=0):
        axes = self._scope(weights)
        one = runtime_one(weights, axes)
        steps = 2**self.bits - 1
        least, largest = (f(weights, axis=axes, keepdims=True) for f in (jnp.min, jnp.max))
        if self.symmetric:
            offset, rest = 2 ** (self.bits - 1), ()
            # The weight of largest magnitude, with its sign; the negative one where both signs reach it.
            d = jnp.where(largest > -least, largest, least) / -offset
        elif self.zero_point:
            least, largest = jnp.minimum(least, 0), jnp.maximum(largest, 0)
            d = exact_quotient(largest - least, steps * one)
            offset = jnp.clip(jnp.round(exact_product(-least, reciprocal_or_zero(d), one)), 0, steps)
            rest = (offset,)
        else:
            offset, rest, weights = 0, (least,), weights - least
            d = exact_quotient(jnp.max(weights, axis=axes, keepdims=True), steps * one)
        v = exact_product(weights, reciprocal_or_zero(d), one)
        codes = _rounding.rule(rounding or self.rounding, seed)(v, offset)
        codes = jnp.clip(codes, 0, steps).astype(jnp.uint8)
        scales = (x[..., 0].astype(field.dtype) for field, x in zip(self._scales, (d, *rest)))
        return self.Fields(*scales, self._pack_codes(codes))

    def _pack_codes(self, codes):
        qs = pack_bits(codes, self.bits)
        return qs if self.layout[-1].count > 1 else qs[..., 0]

    def decode(self, fields):
        return self._weights(self.codes(fields), lambda name: getattr(fields, name)[..., None])

    def codes(self, fields) -> UInt8[Array, "*rows n_blocks block_size"]:
        """The codes, from 0 on."""
        qs = fields.qs if self.layout[-1].count > 1 else fields.qs[..., None]
        return unpack_bits(qs, self.bits, int(self.block_size))

    @property
    def levels(self):
        """What codes stand for, in steps of d."""
        return np.arange(2**self.bits, dtype=np.float32) - (2 ** (self.bits - 1) if self.symmetric else 0)

    def scales(self, fields):
        """d and the offset of each block, as they are stored."""
        d, *rest = (x.astype(jnp.float32) for x in fields[:-1])
        n_blocks = fields.qs.shape[: fields.qs.ndim - (self.layout[-1].count > 1)]
        offset = (jnp.broadcast_to(-x * d if self.zero_point else x, n_blocks) for x in rest)
        return Scales(jnp.broadcast_to(d, n_blocks), *(offset if rest else [None]))

    @property
    def with_scales(self):
        """(fields, scales) to fields with the nearest scales that can be stored."""
        return self._with_scales

    def _with_scales(self, fields, scales):
        stored = [x for x in scales if x is not None]
        if self.zero_point:
            # Of the scale as it is stored.
            d = stored[0].astype(self.scale_dtype).astype(jnp.float32)
            stored[1] = jnp.clip(jnp.round(-stored[1] * reciprocal_or_zero(d)), 0, 2**self.bits - 1)
        return self.Fields(*(x.astype(field.dtype) for x, field in zip(stored, self._scales)), fields.qs)

    def with_codes(self, fields, codes):
        """Fields of the same scales with other codes, from 0 on."""
        return fields._replace(qs=self._pack_codes(codes))

    def _weights(self, codes, scale):
        """What codes stand for.  scale: the field of a name, with an axis for the codes of a block."""
        codes, d = codes.astype(jnp.float32), scale("d").astype(jnp.float32)
        if self.symmetric or self.zero_point:
            return (codes - (2 ** (self.bits - 1) if self.symmetric else scale("z").astype(jnp.float32))) * d
        return codes * d + scale("m").astype(jnp.float32)

    @property
    def piece_size(self):
        return 32

    @property
    def _divides(self) -> bool:
        """Into pieces of 32 codes, which fill whole bytes, whatever the bits."""
        return isinstance(self.block_size, int) and self.block_size % 32 == 0

    @property
    def integers(self):
        return self._integers if self._divides else None

    def _integers(self, fields):
        codes, half = self.codes(fields), 2 ** (self.bits - 1)
        d, *rest = (x.astype(jnp.float32) for x in fields[:-1])
        of_half = [] if self.symmetric else [(half - x) * d if self.zero_point else half * d + x for x in rest]
        n_blocks, per_block = codes.shape[:-1], int(self.block_size) // 32
        scale, *offset = (jnp.repeat(jnp.broadcast_to(x, n_blocks), per_block, axis=-1) for x in (d, *of_half))
        codes = (codes.astype(jnp.int16) - half).astype(jnp.int8).reshape(*n_blocks[:-1], -1, 32)
        return Integers(codes, scale, offset[0] if offset else None, (-half, half - 1))

    @property
    def runs(self):
        return self._runs if self._divides else None

    def _runs(self, read):
        yield 0, self._weights(read_bits(read, self.bits), read)


class _PerTensor(Affine):
    """Affine with rows as blocks and one scale for the last two axes of the tensor."""

    blocks_stand_alone = False

    @property
    def with_scales(self):
        return None

    @property
    def _block_name(self) -> str:
        return "per tensor"

    def _scope(self, weights):
        return tuple(range(-min(weights.ndim, 3), 0))

    def nbytes(self, shape):
        matrices = math.prod(shape[:-2])
        codes = math.prod(shape[:-1]) * self.layout[-1].nbytes
        return codes + matrices * sum(field.nbytes for field in self._scales)
