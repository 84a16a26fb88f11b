"""Columns: products with one row against float64, and what they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.models import cache as caches
from qjax.models import transformer
from qjax.ops.kernels.columns import Columns, columns, multiply, quantize_activations
from qjax.ops.linear import matmul

PACKED = ("Q4_0", "Q4_1", "Q4_K")
BYTES = ("Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q5_K", "Q6_K")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("name", PACKED + BYTES)
def test_integers_are_the_weights(name):
    w = qjax.quantize(draw(8, 512), name)
    codes, scale, offset, (low, high) = w.format.integers(w.fields)
    assert low <= codes.min() < codes.max() <= high
    weights = codes * scale[..., None] + (0 if offset is None else offset[..., None])
    np.testing.assert_allclose(weights.reshape(w.shape), qjax.dequantize(w), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PACKED + BYTES)
def test_product_is_that_of_the_weights(name):
    """In float64 with the same activations, but for scales and offsets rounded to float16: by 2^-11 of each at most."""
    w, x = qjax.quantize(draw(96, 1024), name), draw(1024, seed=1)
    laid_out = jax.jit(columns)(w)
    assert isinstance(laid_out, Columns)
    assert laid_out.shape == w.shape
    assert laid_out.packed == (name in PACKED)
    exact = np.float64(qjax.dequantize(w))
    rounded, to_int8 = np.float64(x), 0
    if laid_out.packed:
        codes, scale = quantize_activations(x.reshape(-1, 32))
        rounded = (np.float64(codes) * np.float64(scale)[:, None]).ravel()
        # Half a step of each group's scale.
        to_int8 = np.abs(exact) @ (np.repeat(np.abs(x.reshape(-1, 32)).max(-1), 32) / 254)
    expected = exact @ rounded

    codes, scale, offset, (low, high) = w.format.integers(w.fields)
    centre = (high + 1) // 2 if low == 0 else 0
    rows = rounded.reshape(-1, codes.shape[-1])
    by_group = np.abs(scale) * np.abs(np.einsum("ngi,gi->ng", np.float64(codes) - centre, rows))
    by_group += 0 if offset is None else np.abs(offset + centre * scale) * np.abs(rows.sum(-1))
    bound = 2**-11 * by_group.sum(-1) + 1e-4
    assert (np.abs(jax.jit(multiply)(x, laid_out) - expected) <= bound).all()
    y = jax.jit(matmul)(x[None], laid_out)[0]
    assert (np.abs(y - expected) <= bound).all()
    assert (np.abs(y - exact @ np.float64(x)) <= bound + to_int8).all()


def test_extreme_codes_do_not_overflow():
    """32 products of the largest codes are the most that int16 has to hold."""
    fields = qjax.quantize(jnp.full((4, 32), -1.0), "Q4_0").fields
    w = qjax.tensor.QTensor(fields._replace(qs=jnp.zeros_like(fields.qs)), qjax.formats.get("Q4_0"))  # all -8
    y = multiply(jnp.ones(32), jax.jit(columns)(w))
    np.testing.assert_allclose(y, qjax.dequantize(w).sum(-1), rtol=1e-3)


def test_scales_far_from_one_survive():
    w = qjax.quantize(draw(8, 64) * 1e-4, "Q4_1")
    y = multiply(jnp.eye(64)[:1], jax.jit(columns)(w))[0]
    np.testing.assert_allclose(y, qjax.dequantize(w)[:, 0], atol=2**-10 * float(jnp.abs(qjax.dequantize(w)).max()))


@pytest.mark.parametrize("name", ["IQ4_NL", "MXFP4", "TQ2_0"])
def test_other_formats_stay_as_they_are(name):
    w = qjax.quantize(draw(4, 256), name)
    assert columns(w) is w


def test_without_int8_packed_codes_stay_as_they_are():
    assert columns(qjax.quantize(draw(4, 256), "Q4_0"), int8=False).format.name == "Q4_0"
    assert isinstance(columns(qjax.quantize(draw(4, 256), "Q8_0"), int8=False), Columns)


@pytest.fixture(scope="module")
def model():
    return qjax.load("tiny").quantize("Q4_0")


def test_perplexity_stays_within_a_fifth_of_a_percent(model):
    """Token by token through a cache, as text is generated, against float32."""
    text = "".join(tale.text for tale in qjax.data.tales.generate(7, 3))
    ids = np.asarray(model.encode(text)[:256], np.int32)
    one_by_one = mean_nll(model, ids, model.one_row)
    exact = jax.nn.log_softmax(model.logits(ids[None])[0])
    expected = -exact[np.arange(len(ids) - 1), ids[1:]].mean()
    assert isinstance(model.one_row.runs[0]["ffn_up.weight"], Columns)
    assert one_by_one == pytest.approx(float(expected), abs=0.002)


def mean_nll(model, ids, params):
    def add(carry, pair):
        cache, total = carry
        logits, cache = transformer.step(model.config, params, pair[:1][None], cache)
        return (cache, total - jax.nn.log_softmax(logits[0])[pair[1]]), None

    cache = caches.empty(model.config, 1, len(ids), caches.FLOAT32)
    pairs = jnp.stack([ids[:-1], ids[1:]], axis=-1)
    (_, total), _ = jax.jit(lambda params: jax.lax.scan(add, (cache, jnp.float32(0)), pairs))(params)
    return float(total) / len(pairs)


def test_codes_are_not_made_wide_for_the_whole_loop():
    """XLA would move the conversion of a matrix out of the loop over tokens."""
    w = jax.jit(columns)(qjax.quantize(draw(4096, 256), "Q8_0"))

    def loop(w, x):
        return jax.lax.fori_loop(0, 8, lambda i, x: multiply(x, w)[..., :256], x)

    compiled = jax.jit(loop).lower(w, draw(1, 256)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < w.codes.nbytes
