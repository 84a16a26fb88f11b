"""The scale searches and their lanes, against the definition of least squares and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import weights

from qjax.formats._lanes import block_sums, map_blocks
from qjax.formats._search import make_q3_quants, make_qkx2_quants, make_qp_quants, make_qx_quants

pytestmark = pytest.mark.in_haste

N, LANES = 16, 512


def blocks(kind=weights.gaussian, seed=0):
    return weights.draw(kind, 2**13, seed).reshape(LANES, N).T


def weighted_error(x, w, fitted):
    return (w.astype(np.float64) * (x.astype(np.float64) - fitted) ** 2).sum(axis=0)


def test_sums_run_first_to_last_in_float32():
    """Terms of all magnitudes, for which the order decides."""
    x = blocks(weights.log_uniform)
    expected = np.zeros(LANES, np.float32)
    for row in x:
        expected = expected + row
    ours, doubled = jax.jit(lambda x: block_sums(lambda row: (row, 2 * row), x))(x)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(doubled, 2 * expected)
    assert (x.sum(axis=0, dtype=np.float64).astype(np.float32) != expected).any()


@pytest.mark.parametrize("shape", [(1, 8), (3, 1500, 8), (2, 2, 5, 8), (4200, 8)])
def test_lanes_come_back_where_they_were(shape):
    """Slabs are padded and cut again, and the importance of a column reaches it in every row."""
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    importance = np.random.default_rng(0).random(shape[-2:], np.float32)

    def search(x, importance, absent):
        assert absent is None
        assert x.shape == importance.shape
        assert x.ndim == 2
        return {"product": x * importance, "first": x[0]}

    found = map_blocks(search, jnp.asarray(x), importance, None)
    np.testing.assert_array_equal(found["product"], x * importance)
    np.testing.assert_array_equal(found["first"], x[..., 0])


@pytest.mark.parametrize("kind", [weights.gaussian, weights.student_t, weights.ties])
def test_qx_is_no_worse_than_the_scale_of_the_largest(kind):
    """And d is the least-squares scale of its codes, which are in range."""
    x, nmax = blocks(kind), 8
    w = np.abs(blocks(seed=1)) + np.float32(1e-3)
    d, q = map(np.asarray, jax.jit(lambda x, w: make_qx_quants(x, w, nmax))(x, w))
    assert q.min() >= 0
    assert q.max() <= 2 * nmax - 1
    signed = q.astype(np.float64) - nmax
    best = (w * x * signed).sum(axis=0) / (w * signed**2).sum(axis=0)
    np.testing.assert_allclose(d, best, rtol=1e-5)
    largest = x[np.abs(x).argmax(axis=0), np.arange(LANES)].astype(np.float64)
    plain = np.clip(np.rint(x * (-nmax / largest)), -nmax, nmax - 1)
    fit = (w * x * plain).sum(axis=0) / (w * plain**2).sum(axis=0)
    error, plain_error = weighted_error(x, w, d * signed), weighted_error(x, w, fit * plain)
    assert (error <= plain_error * (1 + 1e-5)).all()
    assert (error < plain_error * 0.99).mean() > 0.3 or kind is weights.ties


@pytest.mark.parametrize("kind", [weights.gaussian, weights.student_t, weights.constant])
def test_qkx2_is_no_worse_than_the_plain_range(kind):
    x, nmax = blocks(kind), 15
    w = np.abs(blocks(seed=1)) + np.float32(1e-3)
    d, m, q = map(np.asarray, jax.jit(lambda x, w: make_qkx2_quants(x, w, nmax, -0.9, 0.05, 36))(x, w))
    assert min(q.min(), m.min(), d.min()) >= 0
    assert q.max() <= nmax
    low = np.minimum(x.min(axis=0), 0).astype(np.float64)
    step = (x.max(axis=0) - low) / nmax
    plain = low + step * np.rint((x - low) / np.where(step > 0, step, 1))
    largest = np.abs(x).max(axis=0)
    slack = w.sum(axis=0) * (largest * 1e-6) ** 2
    assert (
        weighted_error(x, w, d.astype(np.float64) * q - m) <= weighted_error(x, w, plain) * (1 + 1e-4) + slack
    ).all()


def test_qp_and_q3_moves_end_where_no_single_move_helps():
    """Of the blocks that settle within five rounds: nearly all."""
    x = blocks(weights.student_t)
    w = np.abs(blocks(seed=1)) + np.float32(1e-3)

    def ratio(x, w, q):
        return (w * x * q).sum(axis=0) ** 2 / (w * q * q).sum(axis=0)

    cases = [
        (np.abs(x), w, 0, 15, jax.jit(lambda x, w: make_qp_quants(x, w, 15)), 0),
        (x, x * x, -4, 3, jax.jit(lambda x, _: make_q3_quants(x, 4)), 4),
    ]
    for x, w, lowest, highest, search, offset in cases:
        d, q = (np.asarray(a, np.float64) for a in search(x, w))
        q = q - offset
        assert q.min() >= lowest
        assert q.max() <= highest
        x, w = x.astype(np.float64), w.astype(np.float64)
        np.testing.assert_allclose(d, (w * x * q).sum(axis=0) / (w * q * q).sum(axis=0), rtol=1e-5)
        settled = np.ones(LANES, bool)
        for i in range(N):
            others = np.arange(N) != i
            # Where no other code counts there is no scale to move to.
            scale = (w * x * q)[others].sum(axis=0) / np.maximum((w * q * q)[others].sum(axis=0), 1e-30)
            moved = q.copy()
            moved[i] = np.where(scale > 0, np.clip(np.rint(x[i] / np.maximum(scale, 1e-30)), lowest, highest), q[i])
            settled &= ~(ratio(x, w, moved) > ratio(x, w, q) * (1 + 1e-5))
        assert settled.mean() > 0.95


@pytest.mark.parametrize("search", [lambda x: make_qx_quants(x, x * x, 4), lambda x: make_q3_quants(x, 4)])
def test_blocks_of_zeros(search):
    """ggml stores code 0 where there is nothing to scale, though the weight 0 has another code elsewhere."""
    x = np.zeros((N, 4), np.float32)
    x[3, 1], x[3, 2] = 1e-16, 1
    d, q = map(np.asarray, jax.jit(search)(x))
    np.testing.assert_array_equal(d[[0, 1, 3]], 0)
    np.testing.assert_array_equal(q[:, [0, 1, 3]], 0)
    assert d[2] != 0
    assert q[:, 2].any()
