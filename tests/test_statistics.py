"""What calibration text shows of a model's inputs, beside algebra and the importance matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.data import tales
from qjax.errors import QjaxError
from qjax.methods import pipeline, recipes, statistics

pytestmark = pytest.mark.in_haste


@pytest.fixture(scope="module")
def model():
    return qjax.load("tiny").quantize("F32")


@pytest.fixture(scope="module")
def windows(model):
    text = "".join(tale.text for tale in tales.generate(tales.TRAINING, 40))
    return pipeline.windows(model.config, model.tokenizer, text, 128, 6)


@pytest.fixture(scope="module")
def seen(model, windows):
    return statistics.moments(model.config, model.tensors, windows, 4)[0]


def test_the_first_layer_sees_the_normed_embedding(model, windows, seen):
    x = np.float64(model.tensors["token_embd.weight"][windows.reshape(-1)])
    x /= np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + model.config.norm_eps)
    x *= np.float64(model.tensors["blk.0.attn_norm.weight"])
    for name in ("attn_q", "attn_k", "attn_v"):
        found = seen[f"blk.0.{name}.weight"]
        np.testing.assert_allclose(found.second_moment, x.T @ x / len(x), rtol=1e-4, atol=1e-4 * np.mean(x**2))
        np.testing.assert_allclose(found.largest, np.abs(x).max(axis=0), rtol=1e-5)
        assert found.n_tokens == windows.size


def test_the_diagonal_is_the_importance_matrix(model, windows, seen):
    imatrix, _ = qjax.imatrix(model, windows.reshape(-1), n_ctx=128, score=False)
    assert {*seen} - {*imatrix.entries} == {"token_embd.weight"}
    for name in imatrix.entries:
        np.testing.assert_allclose(seen[name].importance, imatrix.importance(name)[0], rtol=1e-4)


def test_layers_see_what_replaced_layers_before_them_give(model, windows, seen):
    """With the first layer's matrices at zero, x passes it as it is."""

    def change(matrices, of_layer):
        inputs.update(of_layer)
        return {n: jnp.zeros_like(w) if n.startswith("blk.0.") else w for n, w in matrices.items()}

    inputs: dict = {}
    _, changed = statistics.moments(model.config, model.tensors, windows, 4, change=change)
    alone = {n: jnp.zeros_like(w) if n.startswith("blk.0.") and w.ndim > 1 else w for n, w in model.tensors.items()}
    expected, _ = statistics.moments(model.config, alone, windows, 4)
    for name in ("blk.1.attn_q.weight", "blk.3.ffn_down.weight", "token_embd.weight"):
        np.testing.assert_array_equal(inputs[name].second_moment, expected[name].second_moment)
        assert not np.allclose(inputs[name].second_moment, seen[name].second_moment, rtol=0.01)
    assert not changed["blk.0.attn_q.weight"].any()


def test_the_float_model_beside(model, windows, seen):
    """Its inputs with those of a model whose first layer is zero."""

    def change(matrices, of_layer):
        inputs.update(of_layer)
        return {n: jnp.zeros_like(w) if n.startswith("blk.0.") else w for n, w in matrices.items()}

    inputs: dict = {}
    statistics.moments(model.config, model.tensors, windows, 4, change=change, beside_floats=True)
    first, second = inputs["blk.0.attn_q.weight"], inputs["blk.1.ffn_down.weight"]
    np.testing.assert_allclose(first.with_floats, first.second_moment, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first.second_moment, seen["blk.0.attn_q.weight"].second_moment, rtol=1e-4, atol=1e-4)
    # The second moment of the difference x' - x, from those of both, has no negative eigenvalue.
    floats = np.float64(seen["blk.1.ffn_down.weight"].second_moment)
    ours, products = np.float64(second.second_moment), np.float64(second.with_floats)
    eigenvalues = np.linalg.eigvalsh(floats + ours - products - products.T)
    assert eigenvalues.min() > -1e-5 * eigenvalues.max()
    assert eigenvalues.max() > 0.1 * np.linalg.eigvalsh(floats).max()
    assert inputs["token_embd.weight"].with_floats is None


def test_a_damaged_model_is_named(model, windows):
    broken = dict(model.tensors)
    broken["blk.1.attn_norm.weight"] = broken["blk.1.attn_norm.weight"].at[3].set(np.nan)
    with pytest.raises(QjaxError, match=r"blk\.1\.attn_[qkv]\.weight: its input has NaN"):
        statistics.moments(model.config, broken, windows, 4)


# ── chains ───────────────────────────────────────────────────────────────────────────────────────────


def test_calibration_text_serves_as_importance_matrix(model, windows):
    """Layers behind the first see other inputs once those before are quantized, so the first is compared."""
    text = windows.reshape(-1)
    imatrix, _ = qjax.imatrix(model, text, n_ctx=128, score=False)
    ours, its = model.quantize("Q2_K", calibrate=text, n_ctx=128), model.quantize("Q2_K", imatrix=imatrix)
    name = "blk.0.attn_q.weight"
    plain = qjax.quantize(model.tensors[name], "Q2_K")

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


def test_too_little_text(model):
    with pytest.raises(QjaxError, match=r"calibration text: the text has \d+ tokens; two contexts of 512 need 1024"):
        model.quantize("Q4_0", calibrate="Once there was a text.")


def test_what_is_quantized_is_not_quantized_again(model, windows):
    packed = model.quantize("Q4_0")
    with pytest.raises(QjaxError, match="allow_requantize"):
        packed.quantize("Q2_K", calibrate=windows.reshape(-1), n_ctx=128)


def test_a_recipe_that_copies_changes_nothing(model, windows):
    made = pipeline.quantize(model.config, model.tensors, recipes.COPY, pipeline.chain("rtn"), windows)
    assert all(made.tensors[name] is tensor for name, tensor in model.tensors.items())
