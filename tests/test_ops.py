"""rms_norm, rope, attention and gated (swiglu) against the equations in float64 numpy (oracles/llama_numpy.py)."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import scipy.linalg
from oracles import llama_numpy as oracle

from qjax.ops import attention as module
from qjax.ops.hadamard import hadamard
from qjax.ops.mlp import gated
from qjax.ops.norm import rms_norm
from qjax.ops.rope import rope, rotation

pytestmark = pytest.mark.in_haste

# As one program each, as in a model; the start known when compiling, or not.
attention = jax.jit(module.attention, static_argnames="start")
attention_from = jax.jit(module.attention)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rms_norm(scale):
    x, weight = scale * normal(0, 2, 3, 64), normal(1, 64)
    expected = [[oracle.rms_norm(row.astype(np.float64), weight, 1e-5) for row in rows] for rows in x]
    np.testing.assert_allclose(jax.jit(lambda x, weight: rms_norm(x, weight, 1e-5))(x, weight), expected, rtol=2e-6)


def test_shapes_are_checked():
    """As they are written in the signatures, in all tests (see conftest.py)."""
    with pytest.raises(jaxtyping.TypeCheckError, match="d_model"):
        rms_norm(jnp.ones((2, 64)), jnp.ones(32), 1e-5)


def test_rms_norm_computes_in_float32():
    x = jnp.asarray(normal(0, 4, 512), jnp.bfloat16)
    expected = [oracle.rms_norm(row, np.ones(512), 1e-5) for row in np.asarray(x, np.float64)]
    np.testing.assert_allclose(rms_norm(x, jnp.ones(512), 1e-5), expected, rtol=2e-6)


def test_swiglu():
    x, gate, up, down = normal(0, 2, 5, 16), normal(1, 40, 16), normal(2, 40, 16), normal(3, 16, 40)
    expected = [[oracle.swiglu(row, gate, up, down) for row in rows] for rows in x.astype(np.float64)]
    y = np.asarray(jax.jit(gated)(x @ gate.T, x @ up.T)) @ down.T
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("theta", [1e4, 1e5])
def test_rope_turns_interleaved_pairs(theta):
    x = normal(0, 1, 9, 2, 64)
    y = np.asarray(jax.jit(lambda x, at: rope(x, rotation(at, 64, theta)))(x, np.arange(3, 12)))
    expected = [[oracle.rope(head.astype(np.float64), 3 + p, theta) for head in heads] for p, heads in enumerate(x[0])]
    np.testing.assert_allclose(y[0], expected, atol=5e-6)


def test_rope_scores_depend_on_the_distance_only():
    q, k = normal(0, 1, 1, 1, 64), normal(1, 1, 1, 1, 64)
    turned = jax.jit(lambda x, at: rope(x, rotation(at, 64, 1e4)))

    def score(p, r):
        return np.sum(np.asarray(turned(q, np.array([p]))) * np.asarray(turned(k, np.array([r]))))

    near = [score(p, p - 5) for p in (5, 17, 100, 505)]
    np.testing.assert_allclose(near, near[0], atol=2e-4)
    assert abs(score(100, 90) - near[0]) > 1e-2


def naive_attention(q, k, v, start):
    batch, seq, heads, _ = q.shape
    share = heads // k.shape[1]
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    out = np.empty(q.shape)
    for b, i, h in np.ndindex(batch, seq, heads):
        seen = slice(start + i + 1)
        out[b, i, h] = oracle.attention(q[b, i, h], k[b, h // share, seen], v[b, h // share, seen])
    return out


# 130 and 601 rows take several blocks, the last of them shorter.
@pytest.mark.parametrize(("seq", "start"), [(1, 0), (1, 37), (7, 0), (64, 3), (130, 0), (130, 20), (601, 0)])
@pytest.mark.parametrize("traced", [False, True])
def test_attention(seq, start, traced):
    heads, kv_heads, unwritten = 6, 2, 9
    q = normal(0, 2, seq, heads, 8)
    k, v = normal(1, 2, kv_heads, start + seq, 8), normal(2, 2, kv_heads, start + seq, 8)
    expected = naive_attention(q, k, v, start)
    # What a cache holds behind the last written row must not show.
    k, v = (np.pad(a, ((0, 0), (0, 0), (0, unwritten), (0, 0)), constant_values=1e4) for a in (k, v))
    y = (attention_from if traced else attention)(q, k, v, start)
    np.testing.assert_allclose(y, expected, atol=2e-6)


def test_grouped_queries_equal_repeated_keys():
    q, k, v = normal(0, 2, 20, 6, 16), normal(1, 2, 2, 20, 16), normal(2, 2, 2, 20, 16)
    grouped = attention(q, k, v)
    repeated = attention(q, *(a.repeat(3, axis=1) for a in (k, v)))
    np.testing.assert_allclose(grouped, repeated, atol=1e-6)


def test_attention_does_not_overflow():
    q = k = np.full((1, 4, 2, 8), 1e4, np.float32)
    v = normal(0, 1, 2, 4, 8)
    y = np.asarray(attention(q, k.swapaxes(1, 2), v))
    expected = np.cumsum(v, axis=2) / np.arange(1, 5)[:, None]
    np.testing.assert_allclose(y.swapaxes(1, 2), expected, rtol=1e-5)


def test_attention_gradient():
    q, k, v, to = (normal(i, 1, 130, 2, 4) for i in range(4))

    @jax.jit
    def loss(q):
        return jnp.sum(attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2)) * to)

    step = 1e-2
    numeric = (loss(q + step * to) - loss(q - step * to)) / (2 * step)
    np.testing.assert_allclose(np.vdot(jax.jit(jax.grad(loss))(q), to), numeric, rtol=1e-2)


@pytest.mark.parametrize("n", [1, 2, 64, 128])
def test_hadamard_rotates_each_n_neighbours(n):
    x = normal(0, 3, 5, 128)
    expected = x.astype(np.float64).reshape(3, 5, -1, n) @ scipy.linalg.hadamard(n) / n**0.5
    turned = jax.jit(hadamard, static_argnums=1)
    y = turned(x, n)
    np.testing.assert_allclose(y, expected.reshape(x.shape), atol=2e-6)
    np.testing.assert_allclose(turned(y, n), x, atol=2e-6)


def test_hadamard_keeps_inner_products_and_spreads_an_outlier():
    q, k = normal(0, 7, 64), normal(1, 7, 64)
    k[:, 5] += 30
    turned_q, turned_k = (np.asarray(jax.jit(hadamard, static_argnums=1)(x, 64)) for x in (q, k))
    np.testing.assert_allclose((turned_q * turned_k).sum(-1), (q * k).sum(-1), rtol=1e-5, atol=1e-4)
    # 30 in one number of 64 is 30/8 in each.
    assert (np.abs(k).max(-1) > 25).all()
    assert (np.abs(turned_k).max(-1) < 30 / 8 + 4).all()
