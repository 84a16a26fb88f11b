"""Changes that leave what a model computes as it is: of every architecture, and what each is for."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fails, sampled
from oracles import programs
from test_architectures import COMMON, FOLDERS, TOKENS, drawn

import qjax
from qjax import QjaxError, formats
from qjax.data import tales
from qjax.methods import folding, recipes, rotation, scaling, statistics
from qjax.methods.folding import Job
from qjax.methods.plan import plan
from qjax.models import transformer
from qjax.models.config import Config
from qjax.ops import hadamard

pytestmark = pytest.mark.in_haste

KINDS = [name for name in FOLDERS if "," not in name] + ["llama, tied", "llama, biases"]
UNTURNED = ("gemma2", "gemma3", "gpt2")
FOUR_BITS = formats.Affine(bits=4, block_size="row")
UNSEEN = Job(plan({}, recipes.COPY, {}), {})


def model_of(kind):
    config = Config.from_hf(COMMON | FOLDERS[kind])
    shapes = transformer.tensor_shapes(config)
    return config, {n: jnp.asarray(config.factors.get(n, drawn(n, shape))) for n, shape in shapes.items()}


def logits(config, tensors):
    return np.asarray(transformer.forward(config, transformer.stack(tensors, config), jnp.asarray(TOKENS)))


def differing(before, after):
    return {name for name, w in after.items() if name not in before or not np.array_equal(w, before[name])}


# ── every architecture ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", sampled(KINDS, "llama, biases", "qwen3moe", "gpt2"))
def test_a_model_computes_the_same(kind):
    """With channels scaled, and with the stream turned where it can be."""
    config, tensors = model_of(kind)
    expected, rng, made = logits(config, tensors), np.random.default_rng(0), tensors
    for which in folding.channels(config):
        scales = np.exp(rng.standard_normal((*tensors[which.makes[0].name].shape[:-2], which.n)))
        before, made = made, made | folding.scaled(made, which, jnp.asarray(scales, jnp.float32))
        assert differing(before, made) == {rows.name for rows in which.makes} | {*which.reads}
    np.testing.assert_allclose(logits(config, made), expected, atol=2e-4)
    matrices = {name for name, w in tensors.items() if w.ndim > 1 and name.startswith("blk.")}
    unscaled = {f"blk.{i}.ffn_down.weight" for i in range(config.n_layers) if not config.traits.gated}
    assert matrices - unscaled <= differing(tensors, made)

    if kind in UNTURNED:
        with pytest.raises(QjaxError, match=f"rotate: the norms of {kind} .* which no rotation passes; leave it out"):
            rotation.rotate(config, tensors, UNSEEN)
        return
    turned, made = rotation.rotate(config, tensors, UNSEEN)
    assert turned == dataclasses.replace(config, tied=False)
    np.testing.assert_allclose(logits(turned, made), expected, atol=2e-4)
    assert matrices | {"token_embd.weight", "output.weight"} <= differing(tensors, made)


# ── what they are for ────────────────────────────────────────────────────────────────────────────────


def job(model, recipe, seen):
    described = {key: value for key, (_, value) in model.config.to_gguf().items()}
    return Job(plan(model.tensors, recipes.recipe(recipe), described), seen)


def test_an_outlier_is_spread():
    config, tensors = model_of("llama")
    tensors["token_embd.weight"] = tensors["token_embd.weight"].at[:, 7].multiply(100)
    _, made = rotation.rotate(config, tensors, UNSEEN)
    size = {n: float(jnp.abs(w).max() / jnp.sqrt(jnp.mean(w**2))) for n, w in (tensors | made).items() if w.ndim > 1}
    assert (
        float(jnp.abs(tensors["token_embd.weight"]).max() / jnp.sqrt(jnp.mean(tensors["token_embd.weight"] ** 2))) > 15
    )
    assert size["token_embd.weight"] < 5
    norms = [made[name] for name in made if name.endswith("norm.weight")]
    assert all((weight == 1).all() for weight in norms)


@pytest.mark.parametrize("n", [1, 2, 16, 12, 20, 28, 36, 44, 60, 84, 48, 576, 896])
def test_hadamard_matrices(n):
    h = hadamard.matrix(n)
    np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-5)
    np.testing.assert_allclose(np.abs(h), n**-0.5, rtol=1e-6)


def test_where_there_is_no_hadamard_matrix():
    with pytest.raises(QjaxError, match="no Hadamard matrix of order 90"):
        hadamard.matrix(90)
    r = np.asarray(rotation.orthogonal(90))
    np.testing.assert_allclose(r @ r.T, np.eye(90), atol=1e-5)
    assert np.abs(r).max() < 0.5


def test_smoothquant_makes_outliers_of_both_alike(tiny, tiny_windows, tiny_seen):
    """Half way, each channel's largest activation and its largest weight are in one proportion."""
    _, made = scaling.smooth(tiny.config, tiny.tensors, job(tiny, "Q8_0", tiny_seen))
    after, _ = statistics.moments(tiny.config, made, tiny_windows, 4)
    for names in (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"), ("ffn_down",)):
        for tensors, moments, spread in ((tiny.tensors, tiny_seen, (1.3, 1e9)), (made, after, (1, 1.01))):
            weights = [np.abs(tensors[f"blk.1.{name}.weight"]).max(axis=0) for name in names]
            ratio = np.asarray(moments[f"blk.1.{names[0]}.weight"].largest) / np.max(weights, axis=0)
            assert spread[0] <= ratio.max() / ratio.min() <= spread[1], names


def test_awq_takes_the_exponents_with_the_smallest_error(tiny, tiny_seen):
    """Of two kinds of channels: those of a norm, that two matrices read, and rows of ffn_up.  A few matter."""
    names = {"ffn_norm.weight": ("ffn_gate.weight", "ffn_up.weight"), "ffn_up.weight": ("ffn_down.weight",)}
    seen = dict(tiny_seen)
    for name in ("blk.2.ffn_gate.weight", "blk.2.ffn_up.weight", "blk.2.ffn_down.weight"):
        size = jnp.where(jnp.arange(len(seen[name].largest)) % 20, 1, 10)
        seen[name] = dataclasses.replace(seen[name], second_moment=seen[name].second_moment * jnp.outer(size, size))
    _, made = scaling.awq(tiny.config, tiny.tensors, job(tiny, {r"blk\.2\.ffn_": FOUR_BITS}, seen))
    assert {name.split(".", 2)[2] for name in differing(tiny.tensors, made)} == {
        *names,
        "ffn_gate.weight",
        "ffn_down.weight",
    }

    def error(name, s):
        w, h = np.asarray(tiny.tensors[name]), np.float64(seen[name].second_moment)
        delta = np.asarray(qjax.dequantize(qjax.quantize(w * s, FOUR_BITS))) / s - w
        return float(np.sum(delta @ h * delta))

    for reads in names.values():
        reads = [f"blk.2.{name}" for name in reads]
        rms, errors = np.sqrt(seen[reads[0]].importance), []
        largest = np.max([np.abs(tiny.tensors[name]).max(axis=0) for name in reads], axis=0)
        for alpha, beta in itertools.product(np.arange(10) / 10, (0, 0.3)):
            s = rms**alpha / largest**beta
            errors.append(sum(error(name, s / np.exp(np.log(s).mean())) for name in reads))
        down = np.asarray(made["blk.2.ffn_down.weight"] / tiny.tensors["blk.2.ffn_down.weight"])[0]
        norm = np.asarray(tiny.tensors["blk.2.ffn_norm.weight"] / made["blk.2.ffn_norm.weight"])
        s = down if len(reads) == 1 else norm
        taken = sum(error(name, s) for name in reads)
        np.testing.assert_allclose(taken, min(errors), rtol=1e-3)
        assert taken < 0.8 * errors[0]


def test_awq_leaves_alone_what_is_not_rounded(tiny, tiny_seen):
    _, made = scaling.awq(tiny.config, tiny.tensors, job(tiny, "F16", tiny_seen))
    assert differing(tiny.tensors, made) == set()


@pytest.mark.thorough
def test_chains_in_files(run, tmp_path, tiny):
    """A rotation unties the head; what is folded in is in the file, which needs no word of it."""
    text = tmp_path / "text.txt"
    text.write_text("".join(tale.text for tale in tales.generate(tales.TRAINING, 30)))
    target = tmp_path / "turned.gguf"
    method = ("--method", "rotate+smooth", "--calibrate", text, "--chunks", "2")
    code, _, err = run("quantize", "tiny", target, "Q8_0", *method)
    assert code == 0, err
    loaded = qjax.load(target)
    assert not loaded.config.tied
    tokens = tiny.encode(tales.generate(0, 1)[0].text)
    expected, found = (np.asarray(jax.nn.log_softmax(m.logits(tokens))) for m in (tiny, loaded))
    assert 0 < np.abs(found - expected).mean() < 0.1
    assert np.mean(np.argmax(found, -1) == np.argmax(expected, -1)) > 0.9


def test_an_importance_matrix_is_of_the_model_before(run, tmp_path, tiny, tiny_windows):
    imatrix, _ = qjax.imatrix(tiny, tiny_windows.reshape(-1), n_ctx=128, score=False)
    with pytest.raises(QjaxError, match=r"method rotate\+rtn changes the columns that an importance matrix is about"):
        tiny.quantize("Q4_0", method="rotate", imatrix=imatrix)
    fails(run("quantize", "tiny", tmp_path / "x.gguf", "Q4_0", "--method", "awq"), "awq+rtn needs calibration text")


def test_llama_cpp_reads_a_turned_model_as_the_same(tiny, llama_cpp, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(tale.text for tale in tales.generate(0, 40)))
    found = []
    for name, method in (("as it is", "rtn"), ("turned", "rotate")):
        path = tmp_path / f"{name}.gguf"
        tiny.quantize("F32", method=method).save(path)
        command = (llama_cpp / "llama-perplexity", "-m", path, "-f", text, "-c", 256, "--chunks", 4, "-t", 2)
        printed = programs.output(*command, last="Final estimate")
        found.append(float(printed.split("Final estimate: PPL = ")[1].split()[0]))
    assert found[1] == pytest.approx(found[0], abs=2e-4)
