"""The formats of ggml's first family and the plain ones; see also test_bytes.py."""

import functools

import numpy as np
import pytest
from conftest import sampled
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from oracles import ggml, weights

import qjax
from qjax.formats import Affine

SYMMETRIC, WITH_MINIMUM = ("Q4_0", "Q5_0"), ("Q4_1", "Q5_1")
BLOCK_FORMATS = (*SYMMETRIC, *WITH_MINIMUM, "Q8_0")
FLOAT_FORMATS = ("F16", "BF16")

drawn = functools.cache(weights.draw)  # the draws outlast a test, the quantized tensors do not


def our_bytes(name, x):
    return np.asarray(qjax.quantize(x, name).to_bytes())


# Encoding.


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, *FLOAT_FORMATS])
def test_denormal_weights(name):
    """XLA flushes denormals.  The bytes are equal as soon as a block's largest weight reaches 2^-118.

    Below, the float16 scale is zero, so that the codes do not matter, and the decoded zeros are equal.
    """
    format = qjax.formats.get(name)
    x = drawn(weights.all_denormal, 2**17)
    ours, theirs = our_bytes(name, x), ggml.PEERS["gguf"](name, x)
    if name in BLOCK_FORMATS:
        np.testing.assert_array_equal(ggml.dequantize(name, ours), ggml.dequantize(name, theirs))
        seen = np.abs(x.reshape(-1, 32)).max(axis=1) >= 2.0**-118
        assert 0.2 < seen.mean() < 0.8
        x, ours, theirs = (a.reshape(len(seen), -1)[seen] for a in (x, ours, theirs))
    ggml.assert_same_bytes(format, ours, theirs, x)


def test_bfloat16_keeps_nan_and_infinity():
    bits = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0xFFABCDEF, 0x7FC00000, 0x7F7FFFFF], np.uint32)
    x = bits.view(np.float32)[None]
    ggml.assert_same_bytes(qjax.formats.get("BF16"), our_bytes("BF16", x), ggml.PEERS["gguf"]("BF16", x), x)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("Q4_0", Affine(bits=4, rounding="half_up")),
        ("Q5_0", Affine(bits=5, rounding="half_up")),
        ("Q4_1", Affine(bits=4, symmetric=False, rounding="half_up")),
        ("Q5_1", Affine(bits=5, symmetric=False, rounding="half_up")),
    ],
)
def test_affine_has_them_as_special_cases(name, format):
    kinds = ("gaussian", "student_t", "bfloat16", "ties", "zero_and_one_hot", "constant")
    x = np.concatenate([weights.draw(weights.KINDS[kind], 2**16).reshape(-1, 32) for kind in kinds])
    if format.symmetric:  # where +max and -max tie, Affine takes the negative one and GGML the first
        x = x[(x.max(axis=1) != -x.min(axis=1)) | (x == 0).all(axis=1)]
        assert len(x) > 10_000
    ours, ggmls = (np.asarray(qjax.dequantize(qjax.quantize(x, f))) for f in (format, name))
    np.testing.assert_array_equal(ours, ggmls)
    assert format.nbytes(x.shape) == qjax.formats.get(name).nbytes(x.shape)


# With importance.


@pytest.mark.parametrize("columns", sampled([32, 576], 576))
@pytest.mark.parametrize("name", ["Q4_0", "Q5_1"])
def test_importance_sees_the_whole_row(name, columns):
    """The mean square of a row of any length weighs each of its errors, wherever the row is."""
    x = drawn(weights.laplace_with_outliers, 2**17).ravel()[: 60 * columns].reshape(3, 20, columns)
    importance = weights.importance(columns)
    ours = qjax.quantize(x, name, importance=importance).to_bytes()
    theirs = ggml.reference(name, x.reshape(60, columns), importance)
    ggml.assert_same_bytes(qjax.formats.get(name), ours, theirs, x)


@pytest.mark.parametrize("name", [*SYMMETRIC, *WITH_MINIMUM])
def test_a_search_leaves_no_rounding_to_replace(name):
    with pytest.raises(qjax.QjaxError, match=f"{name}: with importance a search finds the codes"):
        qjax.quantize(np.ones((1, 32), np.float32), name, importance=np.ones(32, np.float32), rounding="floor")


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 64), (1, 3 * 4096)])
def test_small_and_odd_shapes(name, shape):
    x = drawn(weights.bfloat16, 2**17).ravel()[: np.prod(shape)].reshape(shape)
    ours = our_bytes(name, x)
    assert ours.shape == (*shape[:-1], qjax.formats.get(name).nbytes(shape[-1:]))
    ggml.assert_same_bytes(qjax.formats.get(name), ours, ggml.PEERS["gguf"](name, x.reshape(-1, shape[-1])), x)


# Properties.

blocks = arrays.arrays(
    np.float32,
    (4, 32),
    elements=st.floats(-1024, 1024, width=32, allow_subnormal=False).map(lambda v: v + 0.0),
)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@given(x=blocks)
@settings(max_examples=40, deadline=None)
def test_any_block_gives_the_peers_bytes(name, x):
    # Above 2^-118, see test_denormal_weights.
    x = np.where(np.abs(x) < 2.0**-110, np.float32(0), x)
    ggml.assert_same_bytes(qjax.formats.get(name), our_bytes(name, x), ggml.PEERS["gguf"](name, x), x)


@pytest.mark.parametrize("name", [*SYMMETRIC, "Q8_0"])
@given(x=blocks)
@settings(max_examples=40, deadline=None)
def test_quantizing_twice_changes_nothing(name, x):
    """q d is exact in float32 and the largest code gives back d: the same values, and bytes if d is not 0."""
    once = qjax.quantize(x, name)
    twice = qjax.quantize(qjax.dequantize(once), name)
    np.testing.assert_array_equal(qjax.dequantize(twice), qjax.dequantize(once))
    kept = np.asarray(once.fields.d).ravel() != 0
    ours, theirs = (np.asarray(t.to_bytes()).reshape(4, -1)[kept] for t in (twice, once))
    ggml.assert_same_bytes(once.format, ours, theirs)


@pytest.mark.parametrize("name", WITH_MINIMUM)
@given(x=blocks)
@settings(max_examples=40, deadline=None)
def test_quantizing_twice_changes_nothing_with_a_minimum(name, x):
    """Holds where q d + m is exact: not where |m| is thousands of times d, so that the sum rounds."""
    once = qjax.quantize(x, name)
    d, m = (np.abs(np.asarray(f, np.float32)).ravel() for f in (once.fields.d, once.fields.m))
    exact = (d > 0) & (m < 2**8 * d) & ((m == 0) | (m > 2**-8 * d))
    twice = qjax.quantize(qjax.dequantize(once), name)
    ours, theirs = (np.asarray(t.to_bytes()).reshape(4, -1)[exact] for t in (twice, once))
    ggml.assert_same_bytes(once.format, ours, theirs)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@given(x=blocks)
@settings(max_examples=40, deadline=None)
def test_the_error_is_at_most_half_a_step(name, x):
    """And a whole one at the far end of Q4_0 and Q5_0, whose codes are not symmetric about zero."""
    t = qjax.quantize(x, name)
    error = np.abs(x.astype(np.float64) - np.asarray(qjax.dequantize(t)))
    largest = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
    steps = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 127, "Q4_1": 15, "Q5_1": 31}[name]
    step = (np.ptp(x.astype(np.float64), axis=1, keepdims=True) if name in WITH_MINIMUM else largest) / steps
    share = 1 if name in SYMMETRIC else 0.5
    # Storing d and m as float16 moves each by 2^-11 of itself, or by half the smallest float16.
    stored = (steps * step + largest) * 2.0**-11 + (steps + 1) * 2.0**-25
    assert (error <= share * step + stored + largest * 2.0**-22).all()


# Errors.


def test_unknown_names_offer_the_nearest():
    with pytest.raises(qjax.QjaxError, match=r"unknown format 'Q4-0'\. Did you mean .*Q4_0"):
        qjax.formats.get("Q4-0")
    with pytest.raises(qjax.QjaxError, match=r"unknown tensor type id 4; .*Q4_0 2"):
        qjax.formats.by_id(4)
    assert qjax.formats.get("q4_0") is qjax.formats.get("Q4_0")
    assert qjax.formats.get(Affine()) == Affine()


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_a_row_that_does_not_divide(name):
    with pytest.raises(qjax.QjaxError, match=rf"row length 96.* is not a multiple of 32|row length 100 .*{name}"):
        qjax.quantize(np.zeros((2, 100), np.float32), name)


@pytest.mark.parametrize("name", ["I8", "I16", "I32", "I64", "F64"])
def test_formats_that_are_only_read_say_so(name):
    with pytest.raises(qjax.QjaxError, match=f"{name} .*Use "):
        qjax.quantize(np.zeros((2, 4), np.float32), name)


@pytest.mark.parametrize("name", ["I64", "F64"])
def test_wide_numbers_name_the_setting(name):
    with pytest.raises(qjax.QjaxError, match="JAX_ENABLE_X64"):
        qjax.QTensor.from_bytes(np.zeros(16, np.uint8), name, (2,))
