"""Affine: sizes and error bounds; the GGML formats it has as special cases are in test_formats.py."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax.formats import Affine

pytestmark = pytest.mark.in_haste

BLOCKS = (7, 32, 100, "row", "tensor")
SHAPE = (2, 3, 22400)  # 22400 = 7 * 32 * 100


# What a scale takes beside d, in bytes, of each kind.
KINDS = {
    "symmetric": (dict(symmetric=True), 0),
    "min-max": (dict(symmetric=False), 2),
    "zero point": (dict(symmetric=False, zero_point=True), 1),
}


def size_bytes(bits, block_size, kind, shape):
    """What the codes and float16 scales of a tensor take, from the definition."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    block = block_size if isinstance(block_size, int) else columns
    n_blocks = rows * columns // block
    n_scales = math.prod(shape[:-2]) if block_size == "tensor" else n_blocks
    return n_blocks * math.ceil(block * bits / 8) + n_scales * (2 + KINDS[kind][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_tensor_takes_the_bytes_it_claims(bits, block_size, kind):
    format = Affine(bits=bits, block_size=block_size, **KINDS[kind][0])
    shapes = jax.eval_shape(lambda x: qjax.quantize(x, format), jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    assert shapes.nbytes == format.nbytes(SHAPE) == size_bytes(bits, block_size, kind, SHAPE)
    assert shapes.shape == SHAPE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "block_size"), [(1, 100), (3, 7), (5, "row"), (8, 32), (6, "tensor")])
def test_real_tensors_too(bits, block_size, kind):
    format = Affine(bits=bits, block_size=block_size, **KINDS[kind][0])
    shape = (4, 700) if block_size != 32 else (4, 640)
    t = qjax.quantize(np.ones(shape, np.float32), format)
    assert sum(np.asarray(f).nbytes for f in t.fields) == t.nbytes == size_bytes(bits, block_size, kind, shape)
    assert t.bpw == 8 * t.nbytes / math.prod(shape)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [7, "row", "tensor"])
@given(bits=st.sampled_from([1, 3, 8]), seed=st.integers(0, 2**31), exponent=st.integers(-10, 10))
@settings(max_examples=8, deadline=None)
def test_the_error_is_at_most_half_a_step(block_size, symmetric, bits, seed, exponent):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((3, 700)) * 2.0**exponent).astype(np.float32)
    format = Affine(bits=bits, block_size=block_size, symmetric=symmetric, scale_dtype="float32")
    error = np.abs(np.asarray(qjax.dequantize(qjax.quantize(x, format)), np.float64) - x)

    scope = x.astype(np.float64).reshape({7: (3, -1, 7), "row": (3, 1, -1), "tensor": (1, 1, -1)}[block_size])
    if symmetric:
        largest, smallest = scope.max(axis=-1, keepdims=True), scope.min(axis=-1, keepdims=True)
        d = np.where(largest > -smallest, largest, smallest) / -(2 ** (bits - 1))
        inside = scope / d <= 2 ** (bits - 1) - 0.5
    else:
        d = np.ptp(scope, axis=-1, keepdims=True) / (2**bits - 1)
        inside = np.full(scope.shape, True)
    error, slack = error.reshape(scope.shape), np.abs(scope).max() * 2.0**-21
    limit = np.where(inside, 0.5, 1.0) * np.abs(d)
    assert (error <= limit + slack).all()
    assert inside.any()


@pytest.mark.parametrize("block_size", BLOCKS)
def test_min_max_meets_both_ends(block_size):
    x = (np.random.default_rng(0).standard_normal(SHAPE[1:]) + 0.3).astype(np.float32)
    for bits in (1, 8):
        xq = np.asarray(qjax.dequantize(qjax.quantize(x, Affine(bits=bits, block_size=block_size, symmetric=False))))
        n = {"row": SHAPE[-1], "tensor": x.size}.get(block_size, block_size)
        exact, ours = x.reshape(-1, n), xq.reshape(-1, n)
        # d and m are stored as float16: 2^-11 of each, and half the smallest step for each code.
        slack = (np.ptp(exact, axis=1) + np.abs(exact.min(axis=1))) * 2.0**-11 + 2.0**-24 * 2**bits
        assert (np.abs(ours.min(axis=1) - exact.min(axis=1)) <= slack).all()
        assert (np.abs(ours.max(axis=1) - exact.max(axis=1)) <= slack).all()


def test_symmetric_keeps_zero_and_the_largest_weight():
    x = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    x[:, 5::32] = 0
    for bits in (1, 3, 8):
        xq = np.asarray(qjax.dequantize(qjax.quantize(x, Affine(bits=bits, scale_dtype="float32"))))
        at = np.abs(x).reshape(64, 3, 32).argmax(axis=-1)[..., None]
        largest, largest_q = (np.take_along_axis(a.reshape(64, 3, 32), at, -1) for a in (x, xq))
        np.testing.assert_array_equal(largest_q, largest)
        assert (xq[:, 5::32] == 0).all()


@pytest.mark.parametrize(("bits", "block_size"), [(1, 32), (4, 7), (8, "tensor")])
def test_zero_point_is_the_definition(bits, block_size):
    """Weights of both signs, of one and none, among few that are not zero: z is the code of zero, in float64 numpy."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 5, 672)) * rng.choice([0, 1], (3, 5, 672)) + [[[0]], [[3]], [[-3]]]).astype(np.float32)
    x[0, 0] = 0
    format = Affine(bits=bits, block_size=block_size, symmetric=False, zero_point=True, scale_dtype="float32")
    t = qjax.quantize(x, format)
    blocks = x.astype(np.float64).reshape(3, 1, -1) if block_size == "tensor" else x.reshape(-1, block_size)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    d, steps = (high - low) / (2**bits - 1), 2**bits - 1
    np.testing.assert_allclose(np.asarray(t.fields.d).ravel(), d.ravel(), rtol=1e-6)
    z = np.asarray(t.fields.z, np.float64).reshape(d.shape)
    assert (np.abs(z - -low / np.where(d, d, 1)) <= 0.5 + 1e-5).all()
    codes = np.clip(np.round(blocks / np.where(d, d, 1)[..., None]) + z[..., None], 0, steps)
    expected = ((codes - z[..., None]) * d[..., None]).reshape(x.shape)
    ours = np.asarray(qjax.dequantize(t), np.float64)
    # Where float32 puts a quotient on the other side of a half, the neighbouring code.
    assert np.mean(np.abs(ours - expected) > 1e-5 * np.abs(x).max()) < 1e-3
    assert (ours[x == 0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "block_size"), [(1, 32), (4, 128), (8, "row"), (8, "tensor")])
def test_integers_are_the_weights(bits, block_size, kind):
    """In groups of 32, with which kernels work; blocks that do not divide into them have none."""
    format = Affine(bits=bits, block_size=block_size, scale_dtype="float32", **KINDS[kind][0])
    t = qjax.quantize(np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32) + 0.5, format)
    codes, scale, offset, (low, high) = t.format.integers(t.fields)
    assert codes.shape == (3, 8, 32)
    assert -128 <= low <= codes.min() <= codes.max() <= high <= 127
    weights = np.float64(codes) * np.float64(scale)[..., None]
    weights += 0 if offset is None else np.float64(offset)[..., None]
    np.testing.assert_allclose(weights.reshape(3, 256), qjax.dequantize(t), rtol=0, atol=1e-6)
    assert Affine(bits=bits, block_size=24).integers is None


@pytest.mark.parametrize(
    ("block_size", "scale_dtype"),
    [(7, "float32"), (32, "float16"), ("row", "bfloat16"), ("tensor", "float32")],
)
def test_leading_axes_do_not_mix(block_size, scale_dtype):
    """A stack of matrices is quantized matrix by matrix, per-tensor scales included."""
    x = np.random.default_rng(0).standard_normal((3, 4, 22400)).astype(np.float32) * [[[1]], [[10]], [[0.01]]]
    x = x.astype(np.float32)
    format = Affine(bits=3, block_size=block_size, scale_dtype=scale_dtype)
    together = qjax.quantize(x, format)
    mapped = jax.vmap(lambda m: qjax.quantize(m, format))(x)
    for i, matrix in enumerate(x):
        alone = qjax.dequantize(qjax.quantize(matrix, format))
        np.testing.assert_array_equal(qjax.dequantize(together[i]), alone)
        np.testing.assert_array_equal(qjax.dequantize(together)[i], alone)
        np.testing.assert_array_equal(jax.vmap(qjax.dequantize)(mapped)[i], alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bits=0), "bits is 0, expected 1 to 8"),
        (dict(bits=9), "bits is 9, expected 1 to 8"),
        (dict(block_size=0), "block_size is 0"),
        (dict(block_size=-32), "block_size is -32, expected a positive number, 'row' or 'tensor'"),
        (dict(scale_dtype="int8"), "scale_dtype is 'int8'"),
        (dict(zero_point=True), "a symmetric format has no zero_point"),
        (dict(rounding="nearest"), "Did you mean nearest_"),
    ],
)
def test_parameters_out_of_range(options, message):
    with pytest.raises(qjax.QjaxError, match=message):
        Affine(**options)


def test_formats_are_values():
    assert Affine(bits=3) == Affine(bits=3) != Affine(bits=3, block_size=64)
    assert len({Affine(bits=3), Affine(bits=3), Affine(bits=4)}) == 2
    assert Affine(bits=3, block_size=64).bpw == 3 + 16 / 64
    assert Affine(bits=4, symmetric=False).bpw == 5
    assert Affine(bits=4, symmetric=False, zero_point=True).bpw == 4.75
    for format in (Affine(), Affine(block_size="row"), Affine(block_size="tensor", symmetric=False)):
        assert format.name in repr(format)
        assert format.name in format._repr_html_()
