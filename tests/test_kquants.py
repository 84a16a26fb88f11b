"""The K-quants: their tiny sub-blocks, other roundings, Q8_K and the packing of scales; see also test_bytes.py."""

import functools

import jax
import numpy as np
import pytest
from conftest import sampled
from oracles import ggml, weights
from test_bytes import weights_for

import qjax
from qjax.formats import _bits, kquants


@functools.cache
def of_all_kinds() -> np.ndarray:
    """Two rows of 4096 weights of each kind."""
    return np.concatenate([weights.draw(kind, 2**13) for kind in (weights.MODEL_LIKE | weights.KINDS).values()])


@pytest.mark.parametrize("name", ["Q3_K", pytest.param("Q4_K", marks=pytest.mark.exact)])
def test_a_single_super_block(name):
    x, importance = weights.draw(weights.gaussian, 2**12)[:, :256], weights.importance(256)
    ours = qjax.quantize(x, name, importance=importance).to_bytes()
    ggml.assert_same_bytes(qjax.formats.get(name), ours, ggml.reference(name, x, importance), x)


@pytest.mark.parametrize("name", sampled(["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"], "Q3_K", "Q6_K"))
def test_tiny_sub_blocks(name):
    """XLA flushes denormals, so that a search among tiny weights may find other codes than ggml's.

    They lie in sub-blocks whose scale is rounded to zero, or in super-blocks whose d is: the decoded weights are equal.
    Only Q3_K compares products of eight weights, which are denormal in sub-blocks that a d of 6e-8 can still hold.
    """
    x = weights.draw(weights.log_uniform_blocks, weights_for(name).size)  # a shape that test_bytes.py compiles too
    ours, theirs = qjax.dequantize(qjax.quantize(x, name)), ggml.dequantize(name, ggml.reference(name, x))
    if name == "Q3_K":
        largest = np.abs(x).reshape(-1, 16).max(axis=1).repeat(16).reshape(x.shape)
        tiny = (largest < 2e-5) & np.isfinite(theirs)
        assert (np.abs(ours - theirs)[tiny] <= largest[tiny]).all()
        ours, theirs = (np.where(tiny, 0, decoded) for decoded in (ours, theirs))
    np.testing.assert_array_equal(ours, theirs)


# Each pair is a search to compile.
@pytest.mark.parametrize(
    ("format", "rule"),
    [
        pytest.param(kquants.Q4_K(), "stochastic", marks=pytest.mark.thorough),
        pytest.param(kquants.Q6_K(), "floor", marks=pytest.mark.thorough),
        pytest.param(kquants.Q4_K(), "floor", marks=pytest.mark.exact),
        pytest.param(kquants.Q6_K(), "stochastic", marks=pytest.mark.exact),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_another_rounding_moves_a_code_by_less_than_a_step(format, rule):
    x = of_all_kinds()
    nearest, other = (qjax.quantize(x, format, rounding=rounding) for rounding in (None, rule))
    for field in ("d", "scales"):
        np.testing.assert_array_equal(getattr(nearest.fields, field), getattr(other.fields, field))
    unpack = jax.jit(lambda t: t.format._unpack(t.fields)[-1])
    codes = [np.asarray(unpack(t)).astype(int) for t in (nearest, other)]
    difference = codes[1] - codes[0]
    assert set(np.unique(difference)) == ({-1, 0} if rule == "floor" else {-1, 0, 1})


def test_q8_k_meets_the_largest_weight_and_sums_its_codes():
    x = of_all_kinds()
    t = qjax.quantize(x, "Q8_K")
    codes = np.asarray(t.fields.qs).astype(int)
    np.testing.assert_array_equal(t.fields.bsums, codes.reshape(*codes.shape[:-1], 16, 16).sum(axis=-1))
    blocks = x.reshape(codes.shape)
    largest = np.abs(blocks).argmax(axis=-1, keepdims=True)
    some = np.abs(blocks).max(axis=-1) > 0
    np.testing.assert_array_equal(np.take_along_axis(codes, largest, axis=-1)[some], -127)


def test_six_bit_scales_survive_packing():
    codes = np.random.default_rng(0).integers(0, 64, (2**10, 16), np.uint8)
    pack, unpack = jax.jit(_bits.pack_scales), jax.jit(_bits.unpack_scales)
    np.testing.assert_array_equal(unpack(pack(codes)), codes)
    pack, unpack = jax.jit(_bits.pack_scales_and_mins), jax.jit(_bits.unpack_scales_and_mins)
    unpacked = unpack(pack(codes[:, :8], codes[:, 8:]))
    np.testing.assert_array_equal(np.concatenate(unpacked, axis=-1), codes)
