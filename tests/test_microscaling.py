"""MXFP4 and NVFP4: their rounding against ggml, their numbers against the MX specification; see also test_bytes.py."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracles import ggml

import qjax
from qjax.formats import microscaling

NAMES = ("MXFP4", "NVFP4")


def just_below_powers_of_two():
    """Blocks of 32 with a largest weight 0 to 63 units in the last place below, or at, each power of two."""
    power = np.arange(-118, 128)[:, None]
    below = np.ldexp(np.float32(1), power).view(np.int32) - np.arange(64, dtype=np.int32)
    x = np.zeros((below.size, 32), np.float32)
    x[:, 0] = below.view(np.float32).ravel()
    return x


def test_the_rounding_of_log2f():
    """Close below a power of two C's log2f rounds up to its exponent, and the block gets the next scale."""
    x = just_below_powers_of_two()
    ours = qjax.quantize(x, "MXFP4").to_bytes()
    ggml.assert_same_bytes(qjax.formats.get("MXFP4"), ours, ggml.reference("MXFP4", x), x)
    # Some are rounded up and some are not, or the test would see nothing.
    largest = x[:, 0].astype(np.float64)
    up = np.asarray(ours)[:, 0].astype(int) - 125 - np.floor(np.log2(largest))
    assert set(up[largest != 2 ** np.floor(np.log2(largest))]) == {0, 1}


def test_the_smallest_scales_are_encoded():
    """From 2^-118 on, e = 7 and more; XLA flushes what is smaller."""
    x = np.random.default_rng(0).uniform(-1, 1, (512, 32)).astype(np.float32)
    x = np.ldexp(x / np.abs(x).max(axis=1, keepdims=True), np.arange(512)[:, None] % 9 - 118)
    ours = qjax.quantize(x, "MXFP4").to_bytes()
    ggml.assert_same_bytes(qjax.formats.get("MXFP4"), ours, ggml.reference("MXFP4", x), x)


def test_every_scale_and_code_of_mxfp4():
    """w = E8M0 times E2M1, for all 256 scales and 16 codes, the denormal products included, in float64."""
    data = np.zeros((256, 17), np.uint8)
    data[:, 0] = np.arange(256)
    data[:, 1:] = np.arange(16) * 17
    ours = np.asarray(qjax.dequantize(qjax.QTensor.from_bytes(data, "MXFP4", (256, 32))))[:, :16]
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    expected = np.ldexp(values, np.arange(256)[:, None] - 127)
    with np.errstate(over="ignore"):
        magnitude = np.abs(expected).astype(np.float32)
    np.testing.assert_array_equal(ours.view(np.uint32) & 0x7FFFFFFF, magnitude.view(np.uint32))
    np.testing.assert_array_equal(np.signbit(ours), expected < 0)  # ggml's table has no negative zero


def test_the_numbers_are_the_specifications():
    """E2M1 and UE4M3 as ml_dtypes has them, ours halved or doubled as ggml counts."""
    codes = jnp.arange(16, dtype=jnp.uint8)
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(microscaling._e2m1_doubled(codes), 2 * values)
    scales = np.arange(127, dtype=np.uint8)  # the positive numbers; 127 is not one
    numbers = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(microscaling._from_ue4m3(jnp.asarray(scales)), numbers / 2)
    below_240 = numbers <= 240  # ggml takes 448 for all beyond
    np.testing.assert_array_equal(microscaling._to_ue4m3(jnp.asarray(numbers))[below_240], scales[below_240])


@pytest.mark.parametrize("name", NAMES)
def test_representable_weights_survive(name):
    rng = np.random.default_rng(0)
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    x = rng.choice(values, (64, 128))
    x[:, ::16] = 6  # the largest value of every block
    x *= 2.0 ** rng.integers(-4, 5, (64, 1))
    np.testing.assert_array_equal(qjax.dequantize(qjax.quantize(x, name)), x)


def test_ties_take_the_lower_code():
    """Halfway between two values the smaller magnitude; and a small negative weight is code 0, not -0."""
    x = np.zeros((1, 32), np.float32)
    x[0, :9] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25]
    np.testing.assert_array_equal(qjax.dequantize(qjax.quantize(x, "MXFP4"))[0, :9], [6, 0, 0.5, 1, 1.5, 2, 3, 4, 0])
    assert np.asarray(qjax.quantize(x, "MXFP4").fields.qs)[0, 0, 8] & 15 == 0
