"""IQ4_NL and IQ4_XS against ggml."""

import functools

import jax
import numpy as np
import pytest
from oracles import ggml, weights

import qjax

NAMES = ("IQ4_NL", "IQ4_XS")
VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml-common.h

# Without the kinds whose squares of squares leave float32: there XLA flushes what C keeps as denormal.
KINDS = {
    **weights.MODEL_LIKE,
    **{
        kind.__name__: kind
        for kind in (
            weights.cauchy,
            weights.zero_and_one_hot,
            weights.ties,
            weights.constant,
            weights.bfloat16,
            weights.some_denormal,
            weights.negative_zero,
        )
    },
}

drawn = functools.cache(weights.draw)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_equal_ggmls(name, kind, weighted):
    x = drawn(KINDS[kind], 2**16)
    importance = weights.importance(x.shape[1]) if weighted else None
    ours = qjax.quantize(x, name, importance=importance).to_bytes()
    ggml.assert_same_bytes(qjax.formats.get(name), ours, ggml.reference(name, x, importance), x)


@pytest.mark.parametrize("name", NAMES)
def test_where_the_scale_is_zero_in_float16(name):
    """There, and only there, the search may end elsewhere; the decoded zeros are equal."""
    format = qjax.formats.get(name)
    x = drawn(weights.float16_denormal_scale, 2**16)
    ours, theirs = (
        np.asarray(data).reshape(-1, format.type_size)
        for data in (qjax.quantize(x, name).to_bytes(), ggml.reference(name, x))
    )
    kept = (theirs[:, :2].copy().view(np.float16) != 0)[:, 0]
    assert kept.mean() > 0.2
    ggml.assert_same_bytes(format, ours[kept], theirs[kept])
    np.testing.assert_array_equal(ggml.dequantize(name, ours), ggml.dequantize(name, theirs))


@pytest.mark.parametrize("name", NAMES)
def test_decoding_random_bytes_equals_ggufs(name):
    format = qjax.formats.get(name)
    data = np.random.default_rng(0).integers(0, 256, (2**10, format.type_size), np.uint8)
    ours = qjax.dequantize(qjax.QTensor.from_bytes(data, name, (len(data), format.block_size)))
    ggml.assert_same_values(format, ours, ggml.dequantize(name, data))


@pytest.mark.parametrize("name", NAMES)
def test_sizes_equal_ggufs(name):
    gguf = pytest.importorskip("gguf")
    format = qjax.formats.get(name)
    assert (format.block_size, format.type_size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert format.ggml_id == gguf.GGMLQuantizationType[name].value


@pytest.mark.parametrize("name", NAMES)
def test_representable_weights_survive(name):
    """A block of table entries has a scale without any error, so the search takes that or an equal one."""
    rng = np.random.default_rng(0)
    x = rng.choice(VALUES, (32, 256)).astype(np.float32)
    x[:, ::32] = -127
    x *= 2.0 ** rng.integers(-8, 0, (32, 1))
    np.testing.assert_array_equal(qjax.dequantize(qjax.quantize(x, name)), x)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_do_not_depend_on_the_caller(name):
    x = drawn(weights.gaussian, 2**13)[:, :1024]
    importance = weights.importance(1024)

    def encode(x):
        return qjax.quantize(x, name, importance=importance).fields

    alone = jax.vmap(encode)(x)
    for ours, theirs in zip(jax.jit(lambda x: encode(x.reshape(1, 2, -1)))(x), alone):
        np.testing.assert_array_equal(ours[0], theirs)


@pytest.mark.parametrize("name", NAMES)
def test_no_rounding_to_replace(name):
    with pytest.raises(qjax.QjaxError, match=f"{name} has no final rounding step"):
        qjax.quantize(np.ones((1, 256), np.float32), name, rounding="floor")
