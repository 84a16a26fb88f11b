"""The K-quants, byte for byte against ggml."""

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import ggml, weights

import qjax
from qjax.formats import _bits, kquants

SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
WITH_IMPORTANCE = pytest.mark.parametrize("importance", [None, weights.importance(4096)], ids=["plain", "importance"])

# Without those whose searches compare numbers that are denormal in float32; see test_tiny_sub_blocks.
KINDS = {**weights.MODEL_LIKE, **{name: weights.KINDS[name] for name in ("cauchy", "zero_and_one_hot", "ties")}}
KINDS |= {name: weights.KINDS[name] for name in ("constant", "bfloat16", "some_denormal")}


@functools.cache
def of_all_kinds() -> np.ndarray:
    """Two rows of 4096 weights of each kind, and eight of a model: one array, so that a case compiles once."""
    return np.concatenate([*(weights.draw(kind, 2**13) for kind in KINDS.values()), weights.tiny_model()[:8]])


def assert_equals_ggml(name, x, importance):
    ours = qjax.quantize(x, name, importance=importance).to_bytes()
    ggml.assert_same_bytes(qjax.formats.get(name), ours, ggml.reference(name, x, importance), x)


@WITH_IMPORTANCE
@pytest.mark.parametrize("name", SEARCHED)
def test_bytes_equal_ggmls(name, importance):
    assert_equals_ggml(name, of_all_kinds(), importance)


@pytest.mark.exact
@WITH_IMPORTANCE
@pytest.mark.parametrize("name", SEARCHED)
def test_bytes_equal_ggmls_on_4_million_weights_of_each_kind(name, importance):
    for kind in KINDS.values():
        assert_equals_ggml(name, weights.draw(kind, 2**22), importance)
    assert_equals_ggml(name, weights.tiny_model(), importance)


@pytest.mark.parametrize("name", ["Q3_K", "Q4_K"])
def test_bytes_do_not_depend_on_the_caller(name):
    """Under vmap, inside a larger program, with more axes, and a single super-block at a time."""
    x, importance = of_all_kinds()[-16:], weights.importance(4096)
    theirs = ggml.reference(name, x, importance)

    def encode(x):
        return qjax.quantize(x, name, importance=importance).fields

    calls = {
        "jit of vmap": jax.jit(jax.vmap(encode)),
        "larger program": jax.jit(
            lambda x: (encode(x * jnp.float32(1)), x + qjax.dequantize(qjax.quantize(x, name)))[0]
        ),
        "three axes": lambda x: jax.tree.map(lambda f: f.reshape(16, *f.shape[2:]), encode(x.reshape(2, 8, 4096))),
    }
    for call in calls.values():
        ours = qjax.QTensor(call(x), qjax.formats.get(name)).to_bytes()
        ggml.assert_same_bytes(qjax.formats.get(name), ours, theirs, x)
    assert_equals_ggml(name, x[:1, :256], importance[:256])


@pytest.mark.parametrize("name", SEARCHED)
def test_tiny_sub_blocks(name):
    """XLA flushes denormals, so that a search among tiny weights may find other codes than ggml's.

    They lie in sub-blocks whose scale is rounded to zero, or in super-blocks whose d is: the decoded weights are equal.
    """
    x = weights.draw(weights.log_uniform_blocks, of_all_kinds().size)
    theirs = ggml.dequantize(name, ggml.reference(name, x))
    np.testing.assert_array_equal(qjax.dequantize(qjax.quantize(x, name)), theirs)


@pytest.mark.parametrize("name", SEARCHED)
def test_decoding_random_bytes_equals_ggufs(name):
    """Every bit pattern of every field: scales that are denormal, infinite and NaN among them."""
    format = qjax.formats.get(name)
    data = np.random.default_rng(0).integers(0, 256, (2**11, format.type_size), np.uint8)
    ours = qjax.dequantize(qjax.QTensor.from_bytes(data, name, (len(data), 256)))
    theirs = ggml.dequantize(name, data)
    assert 0.8 < np.isfinite(theirs).mean() < 1
    ggml.assert_same_values(format, ours, theirs)


@pytest.mark.parametrize("rule", ["floor", "stochastic"])
@pytest.mark.parametrize("format", [kquants.Q4_K(), kquants.Q6_K()], ids=lambda f: f.name)
def test_another_rounding_moves_a_code_by_less_than_a_step(format, rule):
    x = of_all_kinds()[:16]
    nearest, other = (qjax.quantize(x, format, rounding=rounding) for rounding in (None, rule))
    for field in ("d", "scales"):
        np.testing.assert_array_equal(getattr(nearest.fields, field), getattr(other.fields, field))
    codes = [np.asarray(format._unpack(t.fields)[-1]).astype(int) for t in (nearest, other)]
    difference = codes[1] - codes[0]
    assert set(np.unique(difference)) == ({-1, 0} if rule == "floor" else {-1, 0, 1})


def test_q8_k_equals_ggmls():
    """The bytes are ggml's, but for the sums of a block of zeros, which it leaves as they were."""
    x = of_all_kinds()
    t = qjax.quantize(x, "Q8_K")
    theirs = np.zeros(t.to_bytes().shape, np.uint8)
    pointers = (ctypes.c_void_p(a.ctypes.data) for a in (x, theirs))
    ggml._libggml().quantize_row_q8_K_ref(*pointers, ctypes.c_int64(x.size))
    ggml.assert_same_bytes(t.format, t.to_bytes(), theirs, x)
    blocks = theirs.reshape(-1, 292)
    d, codes = blocks[:, :4].copy().view(np.float32), blocks[:, 4:260].view(np.int8)
    np.testing.assert_array_equal(qjax.dequantize(t).reshape(-1, 256), d * codes)


def test_q8_k_meets_the_largest_weight_and_sums_its_codes():
    x = of_all_kinds()
    t = qjax.quantize(x, "Q8_K")
    codes = np.asarray(t.fields.qs).astype(int)
    np.testing.assert_array_equal(t.fields.bsums, codes.reshape(*codes.shape[:-1], 16, 16).sum(axis=-1))
    blocks = x.reshape(codes.shape)
    largest = np.abs(blocks).argmax(axis=-1, keepdims=True)
    some = np.abs(blocks).max(axis=-1) > 0
    np.testing.assert_array_equal(np.take_along_axis(codes, largest, axis=-1)[some], -127)


@pytest.mark.parametrize("name", [*SEARCHED, "Q8_K"])
def test_sizes_equal_ggufs(name):
    gguf = pytest.importorskip("gguf")
    format = qjax.formats.get(name)
    assert (format.block_size, format.type_size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert format.ggml_id == gguf.GGMLQuantizationType[name].value


def test_six_bit_scales_survive_packing():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2**10, 16), np.uint8))
    np.testing.assert_array_equal(_bits.unpack_scales(_bits.pack_scales(codes)), codes)
    scales, mins = codes[:, :8], codes[:, 8:]
    unpacked = _bits.unpack_scales_and_mins(_bits.pack_scales_and_mins(scales, mins))
    np.testing.assert_array_equal(np.concatenate(unpacked, axis=-1), codes)
