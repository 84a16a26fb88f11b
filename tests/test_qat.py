"""Quantization-aware training: forward against the file that is written, backward and the optimizer against algebra."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fails
from test_evaluate import byte_tokenizer

import qjax
from qjax import QjaxError, evaluate, formats, train
from qjax.io import gguf
from qjax.io.gguf import Metadata, Value, ValueType
from qjax.io.imatrix import Entry, Imatrix
from qjax.methods import importance, plan, qat, recipes, training
from qjax.methods.training import Checkpoint, Options
from qjax.model import Model
from qjax.models import transformer
from qjax.models.config import Config
from qjax.progress import Stopped, observed
from qjax.tensor import QTensor, dequantize, quantize

TEXT = evaluate.held_out_tales(4)
MIXED = {"attn_[qkv]": "MXFP4", "attn_output": "BF16", "ffn_": "Q4_0", "token_embd": "Q8_0"}
COARSE = {"attn|ffn": "Q2_0", "token_embd": "Q8_0"}
SHORT = dataclasses.replace(train.QAT, steps=4, batch=2, n_ctx=16, rate=3e-3, warmup=0.5)


def small_model() -> Model:
    """A Llama of one layer whose predictions are far from uniform, with what a file says of it."""
    config = Config("llama", 1, 64, 64, 2, 1, 32, 256, 64, 1e-5, 1e4, True)
    weights = {name: 3 * w if w.ndim == 2 else w for name, w in transformer.init(config, jax.random.key(0)).items()}
    described = {key: Value(ValueType[kind.upper()], value) for key, (kind, value) in config.to_gguf().items()}
    tokenizer = byte_tokenizer()
    metadata = Metadata(described) | tokenizer.to_gguf()
    return Model(config, transformer.stack(weights, config), tokenizer, "small", metadata)


@pytest.fixture
def model() -> Model:
    return small_model()


# ── through the formats ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name",
    [
        *("Q4_0", "MXFP4", "TQ2_0", "NF4"),
        *(
            pytest.param(name, marks=pytest.mark.exact)
            for name in ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_XXS")
        ),
    ],
)
def test_forward_is_the_format_and_backward_the_identity(name):
    """Also where the two are one program, in which XLA would rather keep more digits."""
    w, up = (jax.random.normal(jax.random.key(i), (4, 256)) * 0.05 for i in (0, 1))
    w = w.at[0, 0].set(9.0)  # so that the others of its block are all rounded to little
    format = formats.get(name).resolve(w.shape)
    columns = jnp.linspace(0.5, 2, 256) if format.needs_importance else None
    made, back = jax.jit(lambda w: jax.vjp(lambda w: qat.fake_quantize(w, format, columns), w))(w)
    np.testing.assert_array_equal(made, dequantize(quantize(w, format, importance=columns)))
    assert not np.array_equal(made, w)
    np.testing.assert_array_equal(jax.jit(back)(up)[0], up)


@pytest.mark.thorough
@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "imatrix"])
def test_the_model_in_training_is_the_model_in_the_file(model, tmp_path, weighed):
    """Weights and logits, bit for bit, of a mixture of formats."""
    imatrix = None
    if weighed:
        draw = np.random.default_rng(0)
        sums = {
            n: draw.uniform(0.1, 2, (1, t.shape[-1])).astype(np.float32) for n, t in model.tensors.items() if t.ndim > 1
        }
        imatrix = Imatrix({name: Entry(x, np.ones(1, np.float32)) for name, x in sums.items()}, (), 1, 64)
    weights, recipe, found = qat.start(model.tensors), recipes.recipe(MIXED), importance.select(imatrix)
    planned = plan.plan(weights, recipe, {}, found)
    made = jax.jit(lambda weights: qat.quantized(weights, planned, found))(weights)
    model.quantize(recipe, imatrix=imatrix).save(tmp_path / "m.gguf")
    written = qjax.load(tmp_path / "m.gguf")
    assert {t.format.name for t in gguf.read(tmp_path / "m.gguf").tensors.values()} == {"F32", *MIXED.values()}
    for name, t in written.tensors.items():
        np.testing.assert_array_equal(made[name], dequantize(t) if isinstance(t, QTensor) else t, err_msg=name)


@pytest.mark.thorough
def test_training_brings_the_predictions_nearer(model):
    """Those of the model that is written; its bytes are those of the trained weights."""
    windows = training.windows_of(evaluate.tokens_of(model, TEXT), dataclasses.replace(SHORT, batch=8))(0)
    base = model.logits(windows)

    def divergence(other):
        return float(training.text_loss(other.logits(windows), windows, base, 1.0))

    options = dataclasses.replace(SHORT, steps=40, rate=3e-3)
    trained = train.qat(model, COARSE, TEXT, options=options)
    assert divergence(trained.model) < 0.7 * divergence(model.quantize(COARSE))
    report = trained.report
    assert (report.steps, report.n_tokens, len(report.losses)) == (40, 40 * 2 * 16, 40)
    tokens = training.windows_of(evaluate.tokens_of(model, TEXT), options)(0)
    logits, base = (m.logits(tokens[:, :-1]) for m in (model.quantize(COARSE), model))
    first = training.text_loss(logits, tokens[:, 1:], base, 1.0)
    assert report.losses[0] == pytest.approx(float(first), rel=1e-5), "that of the model quantized as it is"
    assert f"loss {np.mean(report.losses[:4]):.4f} to {np.mean(report.losses[-4:]):.4f}" in str(report)


# ── scales ───────────────────────────────────────────────────────────────────────────────────────────


def test_gradients_of_scales_are_those_of_algebra():
    """w = d (q - 8): the derivative by the relative change of d is Σ up · d (q - 8) over the block."""
    t = quantize(jax.random.normal(jax.random.key(0), (4, 256)) * 0.05, "Q4_0")
    up = jax.random.normal(jax.random.key(1), (4, 256))
    weights = qat.scales({"w": t, "norm": jnp.ones(3)})
    assert {name: x.shape for name, x in weights.items()} == {"w:d": (4, 8), "norm": (3,)}

    def loss(weights):
        return jnp.sum(up * dequantize(qat.rescaled(weights, {"w": t})["w"]))

    gradient = jax.jit(jax.grad(loss))(weights)["w:d"]
    np.testing.assert_allclose(gradient, (up * dequantize(t)).reshape(4, 8, 32).sum(-1), rtol=1e-5, atol=1e-6)
    weights["w:d"] = weights["w:d"] + 0.1
    seen, stored = (qat.rescaled(weights, {"w": t}, traced=traced)["w"] for traced in (True, False))
    assert stored.fields.d.dtype == jnp.float16
    np.testing.assert_array_equal(dequantize(seen), dequantize(stored))
    np.testing.assert_array_equal(stored.fields.qs, t.fields.qs)
    np.testing.assert_allclose(dequantize(stored), 1.1 * dequantize(t), rtol=1e-3)


@pytest.mark.thorough
def test_scales_alone(model, tmp_path):
    """The codes of the file stay, and the loss falls."""
    options = dataclasses.replace(SHORT, steps=20, rate=1e-2)
    trained = train.qat(model, MIXED, TEXT, options=options, only_scales=True)
    assert np.mean(trained.report.losses[-5:]) < 0.9 * np.mean(trained.report.losses[:5])
    trained.save(tmp_path / "m.gguf")
    before, after = model.quantize(MIXED).tensors, qjax.load(tmp_path / "m.gguf").tensors
    changed = [
        n for n, t in after.items() if isinstance(t, QTensor) and not np.array_equal(t.fields[0], before[n].fields[0])
    ]
    assert "blk.0.ffn_up.weight" in changed
    assert all(np.array_equal(t.fields[-1], before[n].fields[-1]) for n, t in after.items() if isinstance(t, QTensor))
    with pytest.raises(QjaxError, match="no scale can be trained: MXFP4 has none that is a float"):
        qat.scales({"w": quantize(jnp.ones((2, 32)), "MXFP4")})


# ── the loop, on two small tensors ───────────────────────────────────────────────────────────────────

WEIGHTS = {"a": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.array([0.5, -2.0])}
LOOP = Options(steps=7, batch=1, n_ctx=8, rate=0.1, warmup=0.3, clip=0.8, weight_decay=0.05, save_every=2)


def batches(step):
    return np.full((1, 2), step, np.int32)


def toy(weights, fixed, tokens):
    return jnp.sum((weights["a"] - fixed) ** 2) + jnp.sum(jnp.sin(weights["b"] * (1 + tokens[0, 0])))


def test_steps_are_those_of_adamw():
    """Against numpy: gradients clipped together, decay of matrices alone, the schedule."""
    fitted = training.fit(toy, WEIGHTS, jnp.float32(0.3), batches, LOOP)
    w = {name: np.asarray(x, np.float64) for name, x in WEIGHTS.items()}
    m, v = ({name: np.zeros_like(x) for name, x in w.items()} for _ in range(2))
    for i in range(LOOP.steps):
        g = {"a": 2 * (w["a"] - 0.3), "b": np.cos(w["b"] * (1 + i)) * (1 + i)}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        warm = 0.3 * 7
        left = min((7 - i) / (7 - warm), 1)
        rate = 0.1 * min(1, (i + 1) / warm) * (1 - math.cos(math.pi * left)) / 2
        for name, x in g.items():
            x = x * min(1, 0.8 / norm)
            m[name], v[name] = 0.9 * m[name] + 0.1 * x, 0.95 * v[name] + 0.05 * x * x
            step = m[name] / (1 - 0.9 ** (i + 1)) / (np.sqrt(v[name] / (1 - 0.95 ** (i + 1))) + 1e-8)
            w[name] = w[name] - rate * (step + (0.05 * w[name] if name == "a" else 0))
    for name, x in w.items():
        np.testing.assert_allclose(fitted.weights[name], x, rtol=1e-4, atol=1e-5)
    assert len(fitted.losses) == 7
    assert fitted.losses[0] == pytest.approx(float(toy(WEIGHTS, 0.3, batches(0))))


def test_a_run_that_was_interrupted_ends_with_the_same_bytes(tmp_path):
    whole = training.fit(toy, WEIGHTS, jnp.float32(0.3), batches, LOOP)
    about = training.about(LOOP, of="this")

    def stop(step):
        if step.done == 5:
            raise Stopped

    with pytest.raises(Stopped), observed(stop):
        training.fit(toy, WEIGHTS, jnp.float32(0.3), batches, LOOP, checkpoint=Checkpoint(tmp_path, about))
    with pytest.raises(QjaxError, match="is there already"):
        training.fit(toy, WEIGHTS, jnp.float32(0.3), batches, LOOP, checkpoint=Checkpoint(tmp_path, about))
    again = Checkpoint(tmp_path, about, resume=True)
    resumed = training.fit(toy, WEIGHTS, jnp.float32(0.3), batches, LOOP, checkpoint=again)
    assert resumed.first_step == 4
    assert resumed.losses == whole.losses
    for name, x in whole.weights.items():
        np.testing.assert_array_equal(resumed.weights[name], x)
    other = Checkpoint(tmp_path, about | {"rate": 0.2}, resume=True)
    with pytest.raises(QjaxError, match=r"of another run, whose rate is 0.1 and not 0.2"):
        training.fit(toy, WEIGHTS, jnp.float32(0.3), batches, LOOP, checkpoint=other)
    with pytest.raises(QjaxError, match="has another shape or type"):
        training.fit(toy, WEIGHTS | {"b": jnp.ones(3)}, jnp.float32(0.3), batches, LOOP, checkpoint=again)
    with pytest.raises(QjaxError, match="has other tensors than this run"):
        training.fit(toy, WEIGHTS | {"c": jnp.ones(3)}, jnp.float32(0.3), batches, LOOP, checkpoint=again)
    again.path.write_bytes(again.path.read_bytes()[:100])
    with pytest.raises(QjaxError, match="no checkpoint, or a damaged one"):
        training.fit(toy, WEIGHTS, jnp.float32(0.3), batches, LOOP, checkpoint=again)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("gradient", "step 3: the loss is 3, the gradient of b has NaN or infinite values. Train with a smaller"),
        ("loss", "step 3: the loss is nan, the gradient of a has NaN or infinite values, and that of 1 more of 2"),
    ],
)
def test_what_is_not_finite_stops_the_run(tmp_path, at, message):
    def loss(weights, fixed, tokens):
        bad = jnp.where(tokens[0, 0] == 3, jnp.nan if at == "loss" else 0.0, 1.0)
        if at == "loss":
            return bad * sum(jnp.sum(x) for x in weights.values())
        # The derivative of a root at 0, times 0.
        return 3 + jnp.sum(jnp.sqrt(bad + 0 * weights["b"])) - 2 * bad + 0 * jnp.sum(weights["a"])

    checkpoint = Checkpoint(tmp_path, {})
    with pytest.raises(QjaxError, match=message) as caught:
        training.fit(loss, WEIGHTS, None, batches, LOOP, checkpoint=checkpoint)
    assert "is of an earlier step" in str(caught.value)
    saved = dataclasses.replace(checkpoint, resume=True)
    fitted = training.fit(toy, WEIGHTS, jnp.float32(0.3), batches, dataclasses.replace(LOOP, steps=2), checkpoint=saved)
    assert fitted.first_step == 2
    assert all(np.isfinite(x).all() for x in fitted.weights.values())


# ── data and bad input ───────────────────────────────────────────────────────────────────────────────


def test_windows_depend_on_seed_and_step_alone(model):
    tokens = np.arange(1000)
    windows = training.windows_of(tokens, SHORT)
    assert windows(3).shape == (2, 17)
    np.testing.assert_array_equal(windows(3), training.windows_of(tokens, dataclasses.replace(SHORT, steps=9))(3))
    assert not np.array_equal(windows(3), windows(4))
    assert not np.array_equal(windows(3), training.windows_of(tokens, dataclasses.replace(SHORT, seed=1))(3))
    assert all((np.diff(row) == 1).all() for step in range(20) for row in windows(step))
    assert (training.windows_of(tokens, SHORT, bos_id=7)(3)[:, 0] == 7).all()
    with pytest.raises(QjaxError, match=r"the text has 33 tokens; a step takes 2 windows of 17, 34 in all"):
        training.windows_of(np.arange(33), SHORT)
    told = train._tales(model, SHORT)
    assert told(0).shape == (2, 17)
    assert not np.array_equal(told(0), told(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"rate": math.nan}, "rate is nan, expected a positive number"),
        ({"warmup": 1.5}, "warmup is 1.5, expected a share from 0 to 1"),
        ({"decay": "step"}, "decay is 'step', expected one of cosine, linear, constant"),
    ],
)
def test_options_that_are_refused(changes, message):
    with pytest.raises(QjaxError, match=message):
        Options(**changes)


def test_what_cannot_be_trained(model, monkeypatch):
    with pytest.raises(QjaxError, match="COPY quantizes no matrix"):
        train.qat(model, "COPY", TEXT, options=SHORT)
    with pytest.raises(QjaxError, match="n_ctx is 512"):
        train.qat(model, MIXED, TEXT, options=dataclasses.replace(SHORT, n_ctx=512))
    with pytest.raises(QjaxError, match="precision is 'int8', expected float32 or bfloat16"):
        train.qat(model, MIXED, TEXT, options=SHORT, precision="int8")
    monkeypatch.setitem(__import__("sys").modules, "optax", None)
    with pytest.raises(QjaxError, match=r"training needs optax: pip install 'qjax\[train\]'"):
        train.qat(model, MIXED, TEXT, options=SHORT)


def test_command_line(model, run, tmp_path):
    """It writes what the function makes; resumed, the same file."""
    source = tmp_path / "base.gguf"
    model.save(source)
    (tmp_path / "text.txt").write_text(f"{TEXT}\n")  # of which the last newline is not read
    out, saved = tmp_path / "m.gguf", tmp_path / "saved"
    options = ("-f", tmp_path / "text.txt", "--steps", 2, "-b", 2, "-c", 16, "--lr", 1e-3, "--json")
    command = ("train", source, out, "--qat", "q8_0", *options)
    code, printed, err = run(*command, "--checkpoint", saved)
    assert (code, err) == (0, "")
    assert json.loads(printed)["method"] == "qat"
    expected = dataclasses.replace(train.QAT, steps=2, batch=2, n_ctx=16, rate=1e-3)
    train.qat(qjax.load(source), "Q8_0", TEXT, options=expected).save(tmp_path / "expected.gguf")
    written = out.read_bytes()
    assert written == (tmp_path / "expected.gguf").read_bytes()
    fails(run(*command, "--checkpoint", saved), "is there already. Resume it (--resume)")
    out.unlink()
    code, printed, _ = run(*command, "--checkpoint", saved, "--resume")
    assert (code, json.loads(printed)["first_step"]) == (0, 2)
    assert out.read_bytes() == written
    fails(run("train", source, out), "give either --qat TYPE or --lora")
    fails(run("train", source, out, "--qat", "q8_0"), "give a text to train on (-f FILE), or -f tales")
    fails(run("train", source, out, "--lora", "--distill", 0.5), "--distill goes with --qat, not with --lora")
    fails(run("train", source, tmp_path / "m", "--qat", "q8_0", *options), "a name that ends in .gguf")
    fails(run(*command, "--resume"), "--resume goes on with a --checkpoint")
