"""Nibbles, bit planes and bit streams.  Each layout is drawn above its functions."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import UInt8

# Nibbles of a block of n weights, as in Q4_0: byte j holds weight j below and weight j + n/2 above.
#
#   byte        0           1          ...   n/2-1
#   bits     7..4  3..0  7..4  3..0
#   weight   n/2    0    n/2+1  1


def pack_nibbles(codes: UInt8[Array, "*s n"]) -> UInt8[Array, "*s n_bytes"]:
    """Codes 0..15 to bytes, two a byte."""
    low, high = jnp.split(codes & 15, 2, axis=-1)
    return low | (high << 4)


def unpack_nibbles(data: UInt8[Array, "*s n_bytes"]) -> UInt8[Array, "*s n"]:
    """The inverse of `pack_nibbles`."""
    # One shift by a vector instead of a concatenation: elementwise code, which XLA fuses into what follows.
    nibbles = (data[..., None, :] >> jnp.array([[0], [4]], jnp.uint8)) & 15
    return nibbles.reshape(*data.shape[:-1], 2 * data.shape[-1])


# A stream of b-bit codes, least significant bit first: code i occupies bits i*b .. i*b + b-1 of the block, and bit k
# of the block is bit k % 8 of byte k // 8.  With b = 3:
#
#   byte            0                 1                 2
#   bit      7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
#   code     2 2 1 1 1 0 0 0   5 4 4 4 3 3 3 2   7 7 7 6 6 6 5 5
#
# With b = 1 it is a bit plane: the fifth bits of Q5_0 and Q5_1.


def pack_bits(codes: UInt8[Array, "*s n"], bits: int) -> UInt8[Array, "*s n_bytes"]:
    """Codes below 2**bits to ceil(n * bits / 8) bytes."""
    n = codes.shape[-1]
    stream = ((codes[..., None] >> jnp.arange(bits, dtype=jnp.uint8)) & 1).reshape(*codes.shape[:-1], n * bits)
    stream = jnp.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -n * bits % 8)])
    stream = stream.reshape(*stream.shape[:-1], -1, 8)
    return jnp.sum(stream << jnp.arange(8, dtype=jnp.uint8), axis=-1, dtype=jnp.uint8)


def unpack_bits(data: UInt8[Array, "*s n_bytes"], bits: int, n: int) -> UInt8[Array, "*s n"]:
    """The first ``n`` codes of a stream; the inverse of `pack_bits`."""
    first = jnp.arange(n) * bits
    # A code of at most 8 bits lies in at most two bytes.
    low = jnp.take(data, first // 8, axis=-1)
    high = jnp.take(data, jnp.minimum(first // 8 + 1, data.shape[-1] - 1), axis=-1)
    both = low.astype(jnp.uint16) | (high.astype(jnp.uint16) << 8)
    return ((both >> (first % 8).astype(jnp.uint16)) & (2**bits - 1)).astype(jnp.uint8)
