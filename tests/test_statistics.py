"""What calibration text shows of a model's inputs, beside algebra and the importance matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import QjaxError
from qjax.methods import pipeline, recipes, statistics

pytestmark = pytest.mark.in_haste


def test_the_first_layer_sees_the_normed_embedding(tiny, tiny_windows, tiny_seen):
    x = np.float64(tiny.tensors["token_embd.weight"][tiny_windows.reshape(-1)])
    x /= np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + tiny.config.norm_eps)
    x *= np.float64(tiny.tensors["blk.0.attn_norm.weight"])
    for name in ("attn_q", "attn_k", "attn_v"):
        found = tiny_seen[f"blk.0.{name}.weight"]
        np.testing.assert_allclose(found.second_moment, x.T @ x / len(x), rtol=1e-4, atol=1e-4 * np.mean(x**2))
        np.testing.assert_allclose(found.largest, np.abs(x).max(axis=0), rtol=1e-5)
        assert found.n_tokens == tiny_windows.size


def test_the_diagonal_is_the_importance_matrix(tiny, tiny_windows, tiny_seen):
    imatrix, _ = qjax.imatrix(tiny, tiny_windows.reshape(-1), n_ctx=128, score=False)
    assert {*tiny_seen} - {*imatrix.entries} == {"token_embd.weight"}
    for name in imatrix.entries:
        np.testing.assert_allclose(tiny_seen[name].importance, imatrix.importance(name)[0], rtol=1e-4)


def test_layers_see_what_replaced_layers_before_them_give(tiny, tiny_windows, tiny_seen):
    """With the first layer's matrices at zero, x passes it as it is."""

    def change(matrices, of_layer):
        inputs.update(of_layer)
        return {n: jnp.zeros_like(w) if n.startswith("blk.0.") else w for n, w in matrices.items()}

    inputs: dict = {}
    _, changed = statistics.moments(tiny.config, tiny.tensors, tiny_windows, 4, change=change)
    alone = {n: jnp.zeros_like(w) if n.startswith("blk.0.") and w.ndim > 1 else w for n, w in tiny.tensors.items()}
    expected, _ = statistics.moments(tiny.config, alone, tiny_windows, 4)
    for name in ("blk.1.attn_q.weight", "blk.3.ffn_down.weight", "token_embd.weight"):
        np.testing.assert_array_equal(inputs[name].second_moment, expected[name].second_moment)
        assert not np.allclose(inputs[name].second_moment, tiny_seen[name].second_moment, rtol=0.01)
    assert not changed["blk.0.attn_q.weight"].any()


def test_the_float_model_beside(tiny, tiny_windows, tiny_seen):
    """Its inputs with those of a model whose first layer is zero."""

    def change(matrices, of_layer):
        inputs.update(of_layer)
        return {n: jnp.zeros_like(w) if n.startswith("blk.0.") else w for n, w in matrices.items()}

    inputs: dict = {}
    statistics.moments(tiny.config, tiny.tensors, tiny_windows, 4, change=change, beside_floats=True)
    first, second = inputs["blk.0.attn_q.weight"], inputs["blk.1.ffn_down.weight"]
    np.testing.assert_allclose(first.with_floats, first.second_moment, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        first.second_moment, tiny_seen["blk.0.attn_q.weight"].second_moment, rtol=1e-4, atol=1e-4
    )
    # The second moment of the difference x' - x, from those of both, has no negative eigenvalue.
    floats = np.float64(tiny_seen["blk.1.ffn_down.weight"].second_moment)
    ours, products = np.float64(second.second_moment), np.float64(second.with_floats)
    eigenvalues = np.linalg.eigvalsh(floats + ours - products - products.T)
    assert eigenvalues.min() > -1e-5 * eigenvalues.max()
    assert eigenvalues.max() > 0.1 * np.linalg.eigvalsh(floats).max()
    assert inputs["token_embd.weight"].with_floats is None


def test_a_damaged_model_is_named(tiny, tiny_windows):
    broken = dict(tiny.tensors)
    broken["blk.1.attn_norm.weight"] = broken["blk.1.attn_norm.weight"].at[3].set(np.nan)
    with pytest.raises(QjaxError, match=r"blk\.1\.attn_[qkv]\.weight: its input has NaN"):
        statistics.moments(tiny.config, broken, tiny_windows, 4)


# ── chains ───────────────────────────────────────────────────────────────────────────────────────────


def test_calibration_text_serves_as_importance_matrix(tiny, tiny_windows):
    """Layers behind the first see other inputs once those before are quantized, so the first is compared."""
    text = tiny_windows.reshape(-1)
    imatrix, _ = qjax.imatrix(tiny, text, n_ctx=128, score=False)
    ours, its = tiny.quantize("Q4_0", calibrate=text, n_ctx=128), tiny.quantize("Q4_0", imatrix=imatrix)
    name = "blk.0.attn_q.weight"
    plain = qjax.quantize(tiny.tensors[name], "Q4_0")

    def differing(a, b):
        return float(np.mean(np.asarray(a.to_bytes()) != np.asarray(b.to_bytes())))

    assert {n: t.format for n, t in ours.tensors.items() if t.ndim > 1} == {
        n: t.format for n, t in its.tensors.items() if t.ndim > 1
    }
    ours, its = (made.tensors[name] for made in (ours, its))
    assert differing(ours, its) < 0.02 < differing(ours, plain)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gtpq", "unknown method 'gtpq'"),
        ("rtn+rtn", "rtn rounds the weights, so it has to be the last"),
    ],
)
def test_chains_that_are_none(method, message):
    with pytest.raises(QjaxError, match=message):
        pipeline.chain(method)


def test_too_little_text(tiny):
    with pytest.raises(QjaxError, match=r"calibration text: the text has \d+ tokens; two contexts of 512 need 1024"):
        tiny.quantize("Q4_0", calibrate="Once there was a text.")


def test_what_is_quantized_is_not_quantized_again(tiny, tiny_windows):
    packed = tiny.quantize("Q4_0")
    with pytest.raises(QjaxError, match="allow_requantize"):
        packed.quantize("Q2_K", calibrate=tiny_windows.reshape(-1), n_ctx=128)


def test_a_recipe_that_copies_changes_nothing(tiny, tiny_windows):
    made = pipeline.quantize(tiny.config, tiny.tensors, recipes.COPY, pipeline.chain("rtn"), tiny_windows)
    assert all(made.tensors[name] is tensor for name, tensor in tiny.tensors.items())
