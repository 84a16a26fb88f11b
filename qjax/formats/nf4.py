"""NF4, the 4-bit normal float of QLoRA, with double quantization: its scales are themselves stored in 8 bits.

Sources: Dettmers et al. 2023, "QLoRA", section 3 and appendix E (the 16 values); Dettmers et al. 2022, "8-bit
Optimizers via Block-wise Quantization" (the 8-bit map); the layout is that of bitsandbytes' `QuantState`.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from qjax.errors import QjaxError
from qjax.formats._exact import exact_product, reciprocal_or_zero, runtime_one
from qjax.formats._format import Field, Format, Scales, register

NESTED_BLOCK_SIZE = 256  # blocks that share a nested_absmax

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
VALUES = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip


def _dynamic_map() -> Float32[np.ndarray, " 256"]:
    """The signed 8-bit map: seven decades, the one below 10^-i with 2^(6-i) values that halve 0.1 to 1 evenly; 0; 1."""
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for i in range(7):
        n, start = 2**i, np.float32(0.1)
        step, k = float((1 - start) / np.float32(n)), np.arange(n + 1)
        # As torch.linspace: from the nearer end, rounded once.
        edges = np.where(k < (n + 1) // 2, float(start) + step * k, 1 - step * (n - k)).astype(np.float32)
        decade = np.float32(10.0 ** (i - 6)) * ((edges[1:] + edges[:-1]) / 2)
        values += [decade, -decade]
    return np.sort(np.concatenate(values))


SCALES = _dynamic_map()


class _NormalFloat(Format):
    """64 codes of 4 bits and their absmax: w = absmax times a quantile."""

    family, block_size = "nf4", 64
    exactness = "codes of the weights equal bitsandbytes'"
    levels = VALUES

    def scales(self, fields):
        rows: Any = self.by_rows(fields)[0]
        return Scales(rows.absmax, None)

    def with_codes(self, fields, codes):
        return fields._replace(qs=codes[..., 0::2] << 4 | codes[..., 1::2])


class NF4_F32(_NormalFloat):
    """NF4 whose absmax are float32; 4.5 bits per weight.  What rows of NF4 are, taken by themselves."""

    name, layout = "NF4_F32", (Field("absmax", "float32"), Field("qs", "uint8", 32))

    def encode(self, weights, importance=None, rounding=None, seed=0):
        absmax = jnp.max(jnp.abs(weights), axis=-1)
        codes = _nearest(weights * reciprocal_or_zero(absmax)[..., None], VALUES)
        return self.Fields(absmax, codes[..., 0::2] << 4 | codes[..., 1::2])

    def decode(self, fields):
        codes = (fields.qs[..., None] >> jnp.array([4, 0], jnp.uint8)) & 15
        return jnp.take(VALUES, codes.reshape(*fields.absmax.shape, 64), axis=0) * fields.absmax[..., None]


@register
class NF4(_NormalFloat):
    """64 codes of 4 bits and the code of their absmax; 4.127 bits per weight.

    absmax - nested_offset is an entry of an 8-bit map times nested_absmax, which 256 blocks share; these blocks follow
    each other through the rows of a matrix (the last two axes), and nested_offset is the mean absmax of the matrix:

        absmax (*rows, n_blocks), nested_absmax (*stack, n_groups), nested_offset (*stack,), qs (*rows, n_blocks, 32)

    with *rows = (*stack, rows of the matrix).  The codes of the weights equal bitsandbytes' bit for bit, and so does
    decoding.  nested_offset is a sum in another order, and bitsandbytes on CPU does not always take the nearest entry
    of the map (as it does on GPU): half a percent of the absmax codes differ by one.
    """

    name, blocks_stand_alone = "NF4", False
    layout = (
        Field("absmax", "uint8"),
        Field("nested_absmax", "float32"),
        Field("nested_offset", "float32"),
        Field("qs", "uint8", 32),
    )

    @property
    def type_size(self) -> int:
        """Bytes of one block, without the nested scale that it shares."""
        absmax, *_, qs = self.layout
        return absmax.nbytes + qs.nbytes

    @property
    def bpw(self) -> float:
        """Bits per weight of a large matrix."""
        return super().bpw + 32 / (NESTED_BLOCK_SIZE * self.block_size)

    def nbytes(self, shape):
        n_matrices = int(np.prod(shape[:-2]))
        n_groups = -(-int(np.prod(shape[-2:])) // (self.block_size * NESTED_BLOCK_SIZE))
        return super().nbytes(shape) + n_matrices * 4 * (n_groups + 1)

    def encode(self, weights, importance=None, rounding=None, seed=0):
        absmax, qs = NF4_F32().encode(weights)
        offset = absmax
        for _ in absmax.shape[-2:]:  # a mean of means: the sum of all would be less exact
            offset = jnp.mean(offset, axis=-1)
        groups = self._groups(absmax.reshape(*offset.shape, -1) - offset[..., None])
        nested_absmax = jnp.max(jnp.abs(groups), axis=-1)
        scaled = groups * reciprocal_or_zero(nested_absmax)[..., None]
        return self.Fields(self._ungroup(_nearest(scaled, SCALES), absmax.shape), nested_absmax, offset, qs)

    def decode(self, fields):
        rows, format = self.by_rows(fields)
        return format.decode(rows)

    def by_rows(self, fields):
        nested = jnp.take(SCALES, self._groups(fields.absmax.reshape(*fields.absmax.shape[:-2], -1)), axis=0)
        one = runtime_one(nested)
        absmax = exact_product(nested, fields.nested_absmax[..., None], one) + fields.nested_offset[..., None, None]
        rows = NF4_F32()
        return rows.Fields(self._ungroup(absmax, fields.absmax.shape), jnp.asarray(fields.qs)), rows

    def pack(self, fields):
        raise QjaxError("NF4 has no block of bytes, for 256 blocks share a scale; it is saved as safetensors")

    def unpack(self, data):
        raise QjaxError("NF4 has no block of bytes, for 256 blocks share a scale; it is read from safetensors")

    def _groups(self, blocks: Array) -> Array:
        """(*stack, n) to (*stack, n_groups, 256), the last group filled up with zeros."""
        *stack, n = blocks.shape
        padding = [(0, 0)] * len(stack) + [(0, -n % NESTED_BLOCK_SIZE)]
        return jnp.pad(blocks, padding).reshape(*stack, -1, NESTED_BLOCK_SIZE)

    def _ungroup(self, groups: Array, shape: tuple[int, ...]) -> Array:
        """The inverse, to the shape of absmax."""
        stack = shape[:-2]
        return groups.reshape(*stack, -1)[..., : int(np.prod(shape[-2:]))].reshape(shape)


def _nearest(x: Float32[Array, "*s"], values: Float32[np.ndarray, " n"]) -> UInt8[Array, "*s"]:
    """The index of the nearest of the sorted ``values``, ties to the lower."""
    midpoints = (values[1:] + values[:-1]) / 2
    return functools.reduce(jnp.add, ((x > midpoint).astype(jnp.uint8) for midpoint in midpoints))
