"""IQ1_S and IQ1_M against ggml."""

import functools

import jax
import numpy as np
import pytest
from oracles import ggml, weights

import qjax
from qjax.formats._grids import grid

NAMES = ("IQ1_S", "IQ1_M")
# libgguf knows IQ1_M by an older search.
REFERENCES = {"IQ1_S": ggml.reference, "IQ1_M": ggml.libggml_quantize}

# Without the kinds whose squares of squares leave float32: there XLA flushes what C keeps as denormal.
KINDS = {
    **weights.MODEL_LIKE,
    **{
        kind.__name__: kind
        for kind in (weights.zero_and_one_hot, weights.ties, weights.constant, weights.bfloat16, weights.negative_zero)
    },
}

drawn = functools.cache(weights.draw)


def assert_same_bytes(name, x, importance):
    ours = qjax.quantize(x, name, importance=importance).to_bytes()
    ggml.assert_same_bytes(qjax.formats.get(name), ours, REFERENCES[name](name, x, importance), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_equal_ggmls(name, kind):
    x = drawn(KINDS[kind], 2**16)
    assert_same_bytes(name, x, weights.importance(x.shape[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_iq1_m_without_importance(kind):
    """Only llama-quantize asks for it; C weighs the errors by the squares of the weights."""
    assert_same_bytes("IQ1_M", drawn(KINDS[kind], 2**16), None)


@pytest.mark.exact
@pytest.mark.parametrize("kind", [*weights.MODEL_LIKE, "tiny_model"])
@pytest.mark.parametrize(("name", "weighted"), [("IQ1_S", True), ("IQ1_M", True), ("IQ1_M", False)])
def test_bytes_of_many_weights(name, weighted, kind):
    x = weights.tiny_model() if kind == "tiny_model" else drawn(KINDS[kind], 2**22)
    assert_same_bytes(name, x, weights.importance(x.shape[1]) if weighted else None)


def test_iq1_s_needs_importance():
    with pytest.raises(qjax.QjaxError, match="IQ1_S needs an importance matrix"):
        qjax.quantize(drawn(weights.gaussian, 2**16), "IQ1_S")


@pytest.mark.parametrize("name", NAMES)
def test_decoding_random_bytes_equals_ggufs(name):
    format = qjax.formats.get(name)
    data = np.random.default_rng(0).integers(0, 256, (2**10, format.type_size), np.uint8)
    t = qjax.QTensor.from_bytes(data, name, (len(data), format.block_size))
    ggml.assert_same_values(format, qjax.dequantize(t), ggml.dequantize(name, data))
    np.testing.assert_array_equal(t.to_bytes(), data)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_equal_ggufs(name):
    gguf = pytest.importorskip("gguf")
    format = qjax.formats.get(name)
    assert (format.block_size, format.type_size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert format.ggml_id == gguf.GGMLQuantizationType[name].value


@pytest.mark.parametrize("name", NAMES)
def test_representable_weights_come_near(name):
    """Grid points times a scale are what the search looks for; only the stretch of d stands between."""
    rng = np.random.default_rng(0)
    points = grid("IQ1").points[rng.integers(0, 2048, (16, 512))].astype(np.float32) - 0.875
    x = points.reshape(16, 4096)
    decoded = np.asarray(qjax.dequantize(qjax.quantize(x, name, importance=np.ones(4096, np.float32))))
    assert (np.sign(decoded) == np.sign(x)).mean() > 0.999


def test_rows_do_not_matter_to_each_other():
    """The same bytes where each row is quantized alone, under vmap."""
    x = drawn(weights.gaussian, 2**16)
    importance = weights.importance(x.shape[1])

    def encode(x):
        return qjax.quantize(x, "IQ1_M", importance=importance)

    np.testing.assert_array_equal(jax.vmap(encode)(x).to_bytes(), encode(x).to_bytes())
