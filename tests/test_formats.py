"""The GGML formats, byte for byte against gguf and libgguf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


def bits_of(x):
    return np.asarray(x, np.float32).view(np.uint32)


# Encoding: the same bytes.


@pytest.mark.parametrize("peer", ggml.PEERS)
@pytest.mark.parametrize("name", [*BLOCK_FORMATS, *FLOAT_FORMATS])
@pytest.mark.parametrize("kind", weights.KINDS)
def test_bytes_equal_the_peers(kind, name, peer):
    """1.4 million weights a format; benchmarks/formats.py does the same with 16 million of each kind."""
    x = drawn(weights.KINDS[kind], 2**17)
    ggml.assert_same_bytes(qjax.formats.get(name), our_bytes(name, x), ggml.PEERS[peer](name, x), x)


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, *FLOAT_FORMATS])
def test_negative_zeros_are_ggmls(name):
    """gguf takes the sign of d and m from another zero than C does, so libgguf alone decides."""
    x = drawn(weights.negative_zero, 2**17)
    ggml.assert_same_bytes(qjax.formats.get(name), our_bytes(name, x), ggml.PEERS["libgguf"](name, x), x)


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


# With importance, and the side of the activations.

SEARCHED = (*SYMMETRIC, *WITH_MINIMUM)


@pytest.mark.parametrize("kind", [*weights.MODEL_LIKE, "ties", "bfloat16", "constant", "zero_and_one_hot"])
@pytest.mark.parametrize("name", SEARCHED)
def test_bytes_with_importance_equal_ggmls(name, kind):
    x = drawn({**weights.KINDS, **weights.MODEL_LIKE}[kind], 2**16)
    importance = weights.importance(x.shape[1])
    ours = qjax.quantize(x, name, importance=importance).to_bytes()
    ggml.assert_same_bytes(qjax.formats.get(name), ours, ggml.reference(name, x, importance), x)


@pytest.mark.parametrize("columns", [32, 576])
@pytest.mark.parametrize("name", ["Q4_0", "Q5_1"])
def test_importance_sees_the_whole_row(name, columns):
    """The mean square of a row of any length weighs each of its errors."""
    x = drawn(weights.laplace_with_outliers, 2**17).ravel()[: 60 * columns].reshape(-1, columns)
    importance = weights.importance(columns)
    format, theirs = qjax.formats.get(name), ggml.reference(name, x, importance)
    ggml.assert_same_bytes(format, qjax.quantize(x, name, importance=importance).to_bytes(), theirs, x)
    stacked = qjax.quantize(x.reshape(3, 20, columns), name, importance=importance)
    ggml.assert_same_bytes(format, stacked.to_bytes(), theirs, x)


@pytest.mark.parametrize("name", SEARCHED)
def test_a_search_leaves_no_rounding_to_replace(name):
    with pytest.raises(qjax.QjaxError, match=f"{name}: with importance a search finds the codes"):
        qjax.quantize(np.ones((1, 32), np.float32), name, importance=np.ones(32, np.float32), rounding="floor")


@pytest.mark.parametrize("kind", weights.KINDS)
def test_q8_1_equals_ggmls(kind):
    """And, like Q8_0, decodes to codes times d; s is d times their sum."""
    x = drawn(weights.KINDS[kind], 2**16)
    t = qjax.quantize(x, "Q8_1")
    ggml.assert_same_bytes(t.format, t.to_bytes(), ggml.reference("Q8_1", x), x)
    np.testing.assert_array_equal(qjax.dequantize(t), qjax.dequantize(qjax.quantize(x, "Q8_0")))


def callers(format):
    """The ways to call a quantizer; a compiler that sees more of the program must not round otherwise."""

    def encode(x):
        return qjax.quantize(x, format).fields

    def with_context(x):
        # Products before and sums after the quantizer, for XLA to contract and reassociate with it.
        fields = encode(x * jnp.float32(1))
        return jax.tree.map(lambda f: f, fields), qjax.dequantize(qjax.QTensor(fields, format)) + x

    def scanned(x):
        return jax.lax.scan(lambda carry, row: (carry, encode(row)), 0, x)[1]

    return {
        "eager": encode,
        "jit": jax.jit(encode),
        "jit of jit": jax.jit(lambda x: jax.jit(encode)(x)),
        "vmap": jax.vmap(encode),
        "jit of vmap": jax.jit(jax.vmap(encode)),
        "scan": scanned,
        "map": lambda x: jax.lax.map(encode, x),
        "larger program": jax.jit(lambda x: with_context(x)[0]),
        "larger program, all used": lambda x: jax.jit(with_context)(x)[0],
        "constant": lambda x: jax.jit(lambda: encode(x))(),
        "three axes": lambda x: [f.reshape(len(x), *f.shape[2:]) for f in encode(x.reshape(2, -1, *x.shape[1:]))],
    }


@pytest.mark.parametrize("call", callers(qjax.formats.get("Q4_0")))
@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0"])
def test_bytes_do_not_depend_on_the_caller(name, call):
    format = qjax.formats.get(name)
    x = np.concatenate([drawn(kind, 2**15) for kind in (weights.gaussian, weights.ties, weights.bfloat16)])
    fields = format.Fields(*callers(format)[call](jnp.asarray(x)))
    ggml.assert_same_bytes(format, qjax.QTensor(fields, format).to_bytes(), ggml.PEERS["gguf"](name, x), x)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 64), (1, 3 * 4096)])
def test_small_and_odd_shapes(name, shape):
    x = drawn(weights.bfloat16, 2**17).ravel()[: np.prod(shape)].reshape(shape)
    ours = our_bytes(name, x)
    assert ours.shape == (*shape[:-1], qjax.formats.get(name).nbytes(shape[-1:]))
    ggml.assert_same_bytes(qjax.formats.get(name), ours, ggml.PEERS["gguf"](name, x.reshape(-1, shape[-1])), x)


# Decoding.


def random_blocks(format, n_blocks, seed=0):
    """Every bit pattern of every field: scales that are denormal, infinite and NaN among them."""
    return np.random.default_rng(seed).integers(0, 256, (n_blocks, format.type_size), np.uint8)


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, *FLOAT_FORMATS])
def test_decoding_random_bytes_equals_gguf(name):
    format = qjax.formats.get(name)
    data = random_blocks(format, 2**15)
    tensor = qjax.QTensor.from_bytes(data, name, (len(data), format.block_size))
    ours, theirs = np.asarray(qjax.dequantize(tensor)), ggml.dequantize(name, data)
    finite = np.isfinite(theirs)
    assert 0.9 < finite.mean() < 1
    if name == "BF16":
        finite &= (np.abs(theirs) >= np.finfo(np.float32).tiny) | (theirs == 0)  # XLA flushes denormals
    np.testing.assert_array_equal(bits_of(ours)[finite], bits_of(theirs)[finite])
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    np.testing.assert_array_equal(ours[np.isinf(theirs)], theirs[np.isinf(theirs)])


@pytest.mark.parametrize("name", [n for n in qjax.formats.names() if qjax.formats.get(n).ggml_id is not None])
def test_any_bytes_survive_unpacking_and_packing(name):
    """NaN payloads included: nothing is converted on the way."""
    format = qjax.formats.get(name)
    data = random_blocks(format, 2**12)
    with jax.enable_x64(format.family == "wide"):
        tensor = qjax.QTensor.from_bytes(data, name, (len(data), format.block_size))
        assert tensor.to_bytes().dtype == np.uint8
        ggml.assert_same_bytes(format, tensor.to_bytes(), data)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_sizes_equal_ggufs(name):
    gguf = pytest.importorskip("gguf")
    format = qjax.formats.get(name)
    assert (format.block_size, format.type_size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert format.ggml_id == gguf.GGMLQuantizationType[name].value
    assert format.nbytes((6, 320)) == 60 * format.type_size
    assert qjax.formats.by_id(format.ggml_id) is format


# Many weights: the contract that the README states.

EXACT = (*SEARCHED, "Q8_0", "TQ1_0", "TQ2_0", "Q2_0", "Q1_0", "MXFP4", "NVFP4", "IQ4_NL", "IQ4_XS")


MANY = 2**22


@pytest.fixture(scope="module", params=[*weights.MODEL_LIKE, "tiny", "smollm2"])
def many_weights(request):
    if request.param == "tiny":
        return weights.tiny_model()
    if request.param == "smollm2":
        return weights.gguf_model(request.getfixturevalue("smollm2_path"), MANY)
    return weights.draw(weights.MODEL_LIKE[request.param], MANY)


@pytest.mark.exact
@pytest.mark.parametrize("name", EXACT)
def test_four_million_weights(name, many_weights):
    format, x = qjax.formats.get(name), many_weights
    for importance in [None, weights.importance(x.shape[1])] if format.uses_importance else [None]:
        ours = qjax.quantize(x, name, importance=importance).to_bytes()
        ggml.assert_same_bytes(format, ours, ggml.reference(name, x, importance), x)


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
