"""TQ1_0, TQ2_0, Q2_0 and Q1_0: their bits against the definition; see also test_bytes.py."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import qjax


def test_every_byte_of_five_trits():
    """The trits of all 3^5 tuples come back, each from its own byte: 256 t / 243 rounded up, t the base-3 number."""
    trits = np.array(list(itertools.product((-1, 0, 1), repeat=5)), np.float32)
    x = np.zeros((243, 256), np.float32)
    x[:, 0:160:32] = trits
    x[:, 255] = 1  # the scale
    t = qjax.quantize(x, "TQ1_0")
    np.testing.assert_array_equal(np.asarray(t.fields.qs)[:, 0, 0], -(-np.arange(243) * 256 // 243))
    np.testing.assert_array_equal(qjax.dequantize(t), x)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q2_0"])
def test_ternary_weights_survive(name):
    """-d, 0 and d are exact for any d that a float16 can hold, whatever their order."""
    rng = np.random.default_rng(0)
    x = (rng.integers(-1, 2, (8, 512)) * rng.choice([0.5, 3.0, 1e-3], (8, 1)).astype(np.float16)).astype(np.float32)
    np.testing.assert_array_equal(qjax.dequantize(qjax.quantize(x, name)), x)


def test_q1_0_is_sign_and_mean():
    x = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    mean = np.abs(x.astype(np.float64)).reshape(4, 2, 128).mean(axis=-1)
    decoded = np.asarray(qjax.dequantize(qjax.quantize(x, "Q1_0"))).reshape(4, 2, 128)
    np.testing.assert_array_equal(np.sign(decoded), np.where(x >= 0, 1, -1).reshape(4, 2, 128))
    np.testing.assert_allclose(np.abs(decoded), np.broadcast_to(mean[..., None], decoded.shape), rtol=2.0**-11)


def test_the_last_code_of_q2_0_is_twice_the_scale():
    d, qs = jnp.full((1, 1), 0.5, jnp.float16), jnp.full((1, 1, 16), 0b11_10_01_00, jnp.uint8)
    t = qjax.QTensor(qjax.formats.get("Q2_0").Fields(d=d, qs=qs), qjax.formats.get("Q2_0"))
    np.testing.assert_array_equal(qjax.dequantize(t)[0, :4], [-0.5, 0, 0.5, 1])
