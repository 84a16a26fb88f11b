"""Nibbles, bit planes and bit streams.  Each layout is drawn above its functions."""

import functools
from collections.abc import Callable

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
    high = jnp.arange(2, dtype=jnp.int32)[:, None] == 1
    runs = data[..., None, :].astype(jnp.int32)
    return jnp.where(high, runs >> 4, runs & 15).astype(jnp.uint8).reshape(*data.shape[:-1], -1)


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
    if 8 % bits == 0:
        return _shifted(data[..., None], bits, jnp.arange(0, 8, bits)).reshape(*data.shape[:-1], -1)[..., :n]
    first = jnp.arange(n) * bits
    # A code of at most 8 bits lies in at most two bytes.
    low = jnp.take(data, first // 8, axis=-1)
    high = jnp.take(data, jnp.minimum(first // 8 + 1, data.shape[-1] - 1), axis=-1)
    both = low.astype(jnp.uint16) | (high.astype(jnp.uint16) << 8)
    return ((both >> (first % 8).astype(jnp.uint16)) & (2**bits - 1)).astype(jnp.uint8)


# Codes of b bits a stride apart, as most 256-weight blocks hold theirs: every 8/b runs of `stride` codes fill one run
# of `stride` bytes, the first run in the lowest bits.  With b = 2 and a stride of 32, as in TQ2_0:
#
#   byte         0                     1              ...   32
#   bits     7.6  5.4  3.2  1.0   7.6  5.4  3.2  1.0      7.6   5.4   3.2   1.0
#   weight    96   64   32    0    97   65   33    1      224   192   160   128


def pack_strided(codes: UInt8[Array, "*s n"], bits: int, stride: int) -> UInt8[Array, "*s n_bytes"]:
    """Codes below 2**bits to n * bits / 8 bytes."""
    runs = codes.reshape(*codes.shape[:-1], -1, 8 // bits, stride)
    shifted = (runs[..., i, :] << (i * bits) for i in range(8 // bits))
    return functools.reduce(jnp.bitwise_or, shifted).reshape(*codes.shape[:-1], -1)


def unpack_strided(data: UInt8[Array, "*s n_bytes"], bits: int, stride: int) -> UInt8[Array, "*s n"]:
    """The inverse of `pack_strided`."""
    runs = data.reshape(*data.shape[:-1], -1, 1, stride)
    return _shifted(runs, bits, jnp.arange(0, 8, bits)[:, None]).reshape(*data.shape[:-1], -1)


def read_bits(read: Callable[..., Array], bits: int) -> Array:
    """The first 32 codes of a stream, from the bytes that a kernel reads (see `Format.runs`)."""
    data = read("qs", 0, 32, bits)
    if 8 % bits:
        data = data | read("qs", 1, 32, bits) << 8
    return (data >> (jnp.arange(32) * bits & 7)) & (2**bits - 1)


def _shifted(data: UInt8[Array, "..."], bits: int, shifts: Array) -> UInt8[Array, "..."]:
    """The ``bits`` that begin at ``shifts``."""
    # As 32 bits: processors have no vector instruction that shifts each byte by its own amount.
    return ((data.astype(jnp.uint32) >> shifts.astype(jnp.uint32)) & (2**bits - 1)).astype(jnp.uint8)


# The eight scales s and eight minima m of Q4_K and Q5_K, 6 bits each, in 12 bytes; the high two bits of the last four
# of each fill up the bytes of the first four:
#
#   byte     0 .. 3                4 .. 7                8 .. 11
#   bits     7 6     5..0          7 6     5..0          7..4       3..0
#            s4 5..4 s0            m4 5..4 m0            m4 3..0    s4 3..0     in byte 0, 4 and 8
#            s7 5..4 s3            m7 5..4 m3            m7 3..0    s7 3..0     in byte 3, 7 and 11


def pack_scales_and_mins(scales: UInt8[Array, "*s 8"], mins: UInt8[Array, "*s 8"]) -> UInt8[Array, "*s 12"]:
    """Codes below 64 to bytes."""
    high = [codes[..., :4] | (codes[..., 4:] >> 4 << 6) for codes in (scales, mins)]
    return jnp.concatenate([*high, (scales[..., 4:] & 15) | (mins[..., 4:] << 4)], axis=-1)


def unpack_scales_and_mins(data: UInt8[Array, "*s 12"]) -> tuple[UInt8[Array, "*s 8"], UInt8[Array, "*s 8"]]:
    """The inverse of `pack_scales_and_mins`."""
    scales, mins, low = jnp.split(data, 3, axis=-1)
    return (
        jnp.concatenate([scales & 63, (low & 15) | (scales >> 6 << 4)], axis=-1),
        jnp.concatenate([mins & 63, (low >> 4) | (mins >> 6 << 4)], axis=-1),
    )


def read_scale_and_min(read: Callable[..., Array], i: int) -> tuple[Array, Array]:
    """Scale and minimum of sub-block i, from the bytes that a kernel reads (see `Format.runs`)."""
    s, m, low = (read("scales", i % 4 + first) for first in (0, 4, 8))
    return (s & 63, m & 63) if i < 4 else (low & 15 | s >> 6 << 4, low >> 4 | m >> 6 << 4)


# The sixteen 6-bit scales of Q3_K: 8 bytes of their low nibbles, strided, then 4 bytes of their high pairs, strided.
#
#   byte     0 .. 7                          8 .. 11
#   bits     7..4       3..0                 7 6       5 4      3 2      1 0
#            s8 3..0    s0 3..0              s12 5..4  s8 5..4  s4 5..4  s0 5..4    in byte 0 and 8


def pack_scales(scales: UInt8[Array, "*s 16"]) -> UInt8[Array, "*s 12"]:
    """Codes below 64 to bytes."""
    return jnp.concatenate([pack_nibbles(scales), pack_strided(scales >> 4, bits=2, stride=4)], axis=-1)


def unpack_scales(data: UInt8[Array, "*s 12"]) -> UInt8[Array, "*s 16"]:
    """The inverse of `pack_scales`."""
    return unpack_nibbles(data[..., :8]) | (unpack_strided(data[..., 8:], bits=2, stride=4) << 4)
