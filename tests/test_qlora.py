"""Adapters beside packed weights: gradients against dense autodiff and algebra, memory, files against llama.cpp."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fails
from oracles.programs import output
from test_evaluate import TEXT
from test_qat import small_model

import qjax
from qjax import QjaxError, train
from qjax.data import tales
from qjax.io import lora as files
from qjax.methods import qlora, training
from qjax.models import transformer
from qjax.models.config import Config
from qjax.ops.adapted import Adapted
from qjax.tensor import QTensor, dequantize, quantize

pytestmark = pytest.mark.in_haste

SHORT = dataclasses.replace(train.QLORA, steps=3, batch=2, n_ctx=16, rate=1e-2)
RANK, SCALE = 4, 1.5
NOT_TRAINED = train.TrainingReport("drawn", "none", 0, 0, 0, 0, (), 0.0, None)


def drawn(shape, i=0, size=0.3):
    return size * jax.random.normal(jax.random.key(i), shape)


@pytest.mark.parametrize("base", ["Q4_0", "NF4", None])
def test_products_and_gradients_are_those_of_the_dense_matrix(base):
    """The weights alone have none."""
    dense, x, a, b = drawn((96, 64)), drawn((5, 64), 1, 1), drawn((RANK, 64), 2), drawn((96, RANK), 3)
    held = dense if base is None else quantize(dense, base)
    dense = dense if base is None else dequantize(held)

    def packed(x, a, b):
        return jnp.sum(jnp.sin(qjax.matmul(x, Adapted(held, a, b, SCALE))))

    def merged(x, a, b):
        return jnp.sum(jnp.sin(jnp.matmul(x, (dense + SCALE * b @ a).T, precision="highest")))

    np.testing.assert_allclose(Adapted(held, a, b, SCALE).merged(), dense + SCALE * b @ a, atol=1e-6)
    for ours, theirs in zip(jax.jit(jax.grad(packed, (0, 1, 2)))(x, a, b), jax.grad(merged, (0, 1, 2))(x, a, b)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    choice = qjax.explain_matmul(x, Adapted(held, a, b, SCALE))
    assert repr(choice) == f"adapted: w has an adapter of rank {RANK}"
    frozen = jax.grad(lambda w: jnp.sum(qjax.matmul(x, Adapted(w, a, b, SCALE))))(dense)
    assert not frozen.any()


@pytest.mark.thorough
def test_gradients_of_a_model_are_those_of_its_dense_weights():
    """With W' = W + s B A: ∂A = s Bᵀ ∂W', ∂B = s ∂W' Aᵀ, of every matrix of every layer, past checkpoints and scans."""
    config = Config("llama", 2, 32, 64, 2, 1, 32, 256, 64, 1e-5, 1e4, True)
    tensors = {name: 3 * w if w.ndim == 2 else w for name, w in transformer.init(config, jax.random.key(0)).items()}
    tensors = {name: quantize(w, "Q4_0") if w.ndim == 2 else w for name, w in tensors.items()}
    shapes, params = qlora.matrices(config), transformer.stack(tensors, config)
    weights = {name: drawn(x.shape, i) for i, (name, x) in enumerate(qlora.start(shapes, RANK, 0).items())}
    tokens = np.random.default_rng(0).integers(0, 256, (2, 17))

    def loss(params, remat=False):
        return training.text_loss(transformer.forward(config, params, tokens[:, :-1], remat=remat), tokens[:, 1:])

    got = jax.jit(jax.grad(lambda weights: loss(qlora.adapted(params, weights, SCALE), remat=True)))(weights)
    dense = transformer.unstack(qlora.adapted(params, weights, SCALE), config)
    assert isinstance(dense["token_embd.weight"], QTensor)
    dense = {name: dequantize(w) if isinstance(w, QTensor) else w for name, w in dense.items()}
    of_dense = jax.grad(lambda tensors: loss(transformer.stack(tensors, config)))(dense)
    assert len(got) == 2 * len(shapes) == 14
    for name in shapes:
        a, b = weights[f"{name}.lora_a"], weights[f"{name}.lora_b"]
        for i in range(config.n_layers):
            of_matrix = of_dense[name.replace("*", str(i))]
            np.testing.assert_allclose(got[f"{name}.lora_a"][i], SCALE * b[i].T @ of_matrix, rtol=2e-3, atol=1e-5)
            np.testing.assert_allclose(got[f"{name}.lora_b"][i], SCALE * of_matrix @ a[i].T, rtol=2e-3, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("base", ["Q4_0", "NF4"])
def test_dense_weights_are_not_kept(base):
    """Of 12 layers of 0.8 million weights, 3 MB each in float32, a step has few in memory at a time, by XLA's account;
    without `remat` and the decoding anew on the way back it has all."""
    config = Config("llama", 12, 256, 768, 2, 2, 128, 256, 64, 1e-5, 1e4, True)
    shapes = transformer.tensor_shapes(config)
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    params = jax.eval_shape(
        lambda ts: transformer.stack(
            {name: quantize(t, base) if len(t.shape) == 2 else t for name, t in ts.items()}, config
        ),
        shapes,
    )
    weights = jax.eval_shape(lambda: qlora.start(qlora.matrices(config), RANK, 0))
    tokens = jax.ShapeDtypeStruct((1, 17), jnp.int32)
    update = jax.grad(
        lambda weights, params, tokens: training.text_loss(
            transformer.forward(config, qlora.adapted(params, weights, 1.0), tokens[:, :-1], remat=True), tokens[:, 1:]
        )
    )
    memory = jax.jit(update).lower(weights, params, tokens).compile().memory_analysis()
    layers = 4 * sum(np.prod(t.shape) for name, t in shapes.items() if name.startswith("blk"))
    assert layers > 37e6
    assert memory.temp_size_in_bytes < 0.3 * layers


def test_training_lowers_the_loss_and_files_say_the_same(tmp_path):
    """An adapter of NF4 weights, on a text; as a file it adds what it adds here."""
    model = small_model()
    options = dataclasses.replace(SHORT, steps=30)
    trained = train.qlora(model, TEXT, rank=RANK, alpha=6.0, options=options)
    losses = trained.report.losses
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert trained.report.n_trained == sum(pair.a.size + pair.b.size for pair in trained.adapter.pairs.values())
    held = trained.model.params.runs[0]["attn_q.weight"]
    assert held.base.format.name == "NF4"
    assert not isinstance(trained.model.params.runs[0]["attn_norm.weight"], Adapted)

    trained.save(tmp_path / "a.gguf")
    model.save(tmp_path / "base.gguf")
    read = files.read(tmp_path / "a.gguf", model.config)
    assert (read.alpha, len(read.pairs)) == (6.0, 7)
    merged = qjax.load(tmp_path / "base.gguf", lora=tmp_path / "a.gguf")
    added = merged.tensors["blk.0.ffn_up.weight"] - model.tensors["blk.0.ffn_up.weight"]
    ours = trained.model.tensors["blk.0.ffn_up.weight"] - dequantize(
        QTensor(*held_fields(trained.model, "ffn_up.weight"))
    )
    assert np.abs(added).max() > 1e-3
    np.testing.assert_allclose(added, ours, atol=1e-5)


def held_fields(model, name):
    base = model.params.runs[0][name].base
    return jax.tree.map(lambda x: x[0], base.fields), base.format


@pytest.mark.thorough
def test_the_model_runs_packed_and_the_file_beside_its_own(tmp_path):
    """A quantized file stays what it is; what is trained is what runs here and with load(lora=)."""
    model = small_model()
    model.quantize("Q8_0").save(tmp_path / "q.gguf")
    quantized = qjax.load(tmp_path / "q.gguf")
    trained = train.qlora(quantized, TEXT, rank=RANK, targets=("attn_q", "ffn_down"), options=SHORT)
    trained.save(tmp_path / "a.gguf")
    assert isinstance(trained.model.params.runs[0]["attn_v.weight"], QTensor)
    tokens = np.arange(20)
    expected = qjax.load(tmp_path / "q.gguf", lora=tmp_path / "a.gguf").logits(tokens)
    np.testing.assert_allclose(trained.model.logits(tokens), expected, atol=2e-4)
    assert np.abs(trained.model.logits(tokens) - quantized.logits(tokens)).max() > 1e-3
    assert trained.model.generate("Once", max_tokens=2).tokens


def test_command_line(run, tmp_path):
    small_model().save(tmp_path / "m.gguf")
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("-f", tmp_path / "text.txt", "--steps", 3, "-b", 2, "-c", 16, "--lr", 0.01, "--json")
    options += ("--lora", "--rank", RANK, "--base", "q8_0", "--targets", "attn_q,ffn_down")
    code, out, err = run("train", tmp_path / "m.gguf", tmp_path / "a.gguf", *options)
    assert (code, err) == (0, "")
    assert json.loads(out)["method"] == "qlora"
    pairs = files.read(tmp_path / "a.gguf", small_model().config).pairs
    assert {*pairs} == {"blk.0.attn_q.weight", "blk.0.ffn_down.weight"}
    fails(run("train", tmp_path / "m.gguf", tmp_path / "a.gguf", *options[:-1], "attn"), "no matrix 'attn' to adapt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0, expected 1 to 32"),
        ({"rank": 33}, "rank is 33, expected 1 to 32"),
        ({"targets": ("output",)}, "no matrix 'output' to adapt"),
        ({"alpha": 0.0}, "alpha is 0.0, expected a positive number"),
        ({"options": dataclasses.replace(SHORT, distill=0.5)}, "an adapter has no teacher"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(QjaxError, match=message):
        train.qlora(small_model(), TEXT, base=None, **options)


def test_llama_perplexity_takes_the_adapter(llama_cpp, tmp_path):
    """Beside the tiny model in float32, for llama.cpp rounds activations to int8 where weights are packed."""
    from qjax.quantize_file import quantize_file

    text = "".join(tale.text for tale in tales.generate(1, 8))
    (tmp_path / "text.txt").write_text(text)
    quantize_file("tiny", tmp_path / "q.gguf", "F32")
    model = qjax.load(tmp_path / "q.gguf")
    shapes = qlora.matrices(model.config)
    weights = {name: x + drawn(x.shape, 7, 0.1) for name, x in qlora.start(shapes, RANK, 0).items()}
    params = qlora.adapted(model.params, weights, 6.0 / RANK)
    adapter = qlora.adapter(model.config, weights, 6.0)
    trained = train.Trained(dataclasses.replace(model, params=params), NOT_TRAINED, adapter)
    trained.save(tmp_path / "a.gguf")
    command = [llama_cpp / "llama-perplexity", "-m", tmp_path / "q.gguf", "-f", tmp_path / "text.txt", "-c", 64]
    command += ["--chunks", 4, "-b", 64]
    theirs, plain = (
        float(re.search(r"PPL = ([\d.]+)", output(*command, *more, last="Final estimate"))[1])
        for more in (("--lora", tmp_path / "a.gguf"), ())
    )
    ours = qjax.perplexity(trained.model, text, 64, 4, "float32").value
    assert abs(ours / plain - 1) > 0.05, "the adapter makes a difference"
    assert ours == pytest.approx(theirs, rel=1e-3)
