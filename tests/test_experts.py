"""Mixtures of experts: routing and blocks against the sum they stand for; only the experts that are used are read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.ops.experts import mixture, route

pytestmark = pytest.mark.in_haste

D = 8


def drawn(rows, n_experts):
    rng = np.random.default_rng([rows, n_experts])
    h, logits = rng.standard_normal((rows, D)), rng.standard_normal((rows, n_experts))
    return *(a.astype(np.float32) for a in (h, logits)), rng.standard_normal((n_experts, D, D)).astype(np.float32)


def mixed(h, ids, shares, matrices):
    @jax.jit
    def run(h, ids, shares, matrices):
        return mixture(h, ids, shares, len(matrices), lambda rows, e: rows @ matrices[e].T)

    return np.asarray(run(h, ids, shares, matrices))


@pytest.mark.parametrize("normed", [True, False])
def test_routing(normed):
    _, logits, _ = drawn(5, 6)
    ids, shares = map(np.asarray, route(jnp.asarray(logits), 2, normed))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    best = np.argsort(-p, axis=1)[:, :2]
    np.testing.assert_array_equal(ids, best)
    expected = np.take_along_axis(p, best, axis=1)
    np.testing.assert_allclose(shares, expected / (expected.sum(axis=1, keepdims=True) if normed else 1), rtol=1e-5)


# One block for each pair, blocks that are filled up, an expert with more rows than a block, and one with all of them.
@pytest.mark.parametrize(("rows", "n_experts", "n_used"), [(1, 8, 3), (3, 8, 2), (40, 4, 2), (300, 4, 1), (20, 1, 1)])
def test_the_blocks_make_the_sum(rows, n_experts, n_used):
    h, logits, matrices = drawn(rows, n_experts)
    logits[:, 0] += 1
    ids, shares = map(np.asarray, route(jnp.asarray(logits), n_used, True))
    of_all = np.einsum("nd,eod->neo", h, matrices)
    chosen = np.take_along_axis(of_all, ids[..., None], axis=1)
    expected = (shares[..., None] * chosen).sum(axis=1)
    np.testing.assert_allclose(mixed(h, ids, shares, matrices), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 40])
def test_experts_that_no_row_uses_are_not_read(rows):
    h, _, matrices = drawn(rows, 8)
    matrices[[0, 2, 5, 6, 7]] = np.nan
    ids = np.tile([[1, 4]], (rows, 1)).astype(np.int32)
    ids[rows // 2 :, 1] = 3
    shares = np.full((rows, 2), 0.5, np.float32)
    expected = sum(np.einsum("nd,nod->no", h, matrices[ids[:, k]]) for k in range(2)) / 2
    np.testing.assert_allclose(mixed(h, ids, shares, matrices), expected, rtol=1e-5, atol=1e-5)


def test_gradients_go_through():
    h, logits, matrices = drawn(6, 4)

    def of_blocks(h):
        ids, shares = route(jnp.asarray(logits) + h[:, :4], 2, True)
        return jnp.sum(mixture(h, ids, shares, 4, lambda rows, e: rows @ jnp.asarray(matrices)[e].T) ** 2)

    def of_all(h):
        ids, shares = route(jnp.asarray(logits) + h[:, :4], 2, True)
        made = jnp.einsum("nd,eod->neo", h, matrices)
        return jnp.sum(jnp.sum(shares[..., None] * jnp.take_along_axis(made, ids[..., None], axis=1), axis=1) ** 2)

    np.testing.assert_allclose(jax.grad(of_blocks)(h), jax.grad(of_all)(h), rtol=1e-4, atol=1e-4)
