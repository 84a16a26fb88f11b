"""Rounded activations: grids by hand, ranges by brute force, products of integers, whole models, llama.cpp."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fails
from oracles import programs
from test_evaluate import byte_tokenizer

import qjax
from qjax import evaluate, formats
from qjax.data import tales
from qjax.errors import QjaxError
from qjax.methods import activations as method
from qjax.methods.activations import Activations, Histogram
from qjax.model import Model
from qjax.models import transformer
from qjax.models.config import Config
from qjax.ops import activations as ops
from qjax.ops.activations import Blocks, Range, Rounded, Uniform
from qjax.ops.linear import explain_matmul, matmul
from qjax.quantize_file import quantize_file

pytestmark = pytest.mark.in_haste


@pytest.fixture(scope="module")
def x():
    """Rows with outliers in some columns, all positive in one row, and a row of zeros."""
    x = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    x[:, 5] *= 30
    x[1], x[2] = np.abs(x[1]), 0
    return x


@pytest.fixture(scope="module")
def w():
    return jnp.array(np.random.default_rng(1).normal(size=(24, 64)), jnp.float32)


# ── grids ────────────────────────────────────────────────────────────────────────────────────────────────


def by_hand(x, low, high, bits, symmetric):
    """In float64, from the definitions of SmoothQuant (eq. 1) and Nagel et al. (eq. 4 to 8)."""
    x, low, high = (np.asarray(a, np.float64) for a in (x, low, high))
    if symmetric:
        n = 2 ** (bits - 1) - 1
        step = np.maximum(abs(low), abs(high)) / n
        step = np.where(step > 0, step, 1)
        return step * np.clip(np.round(x / step), -n, n)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    step = (high - low) / (2**bits - 1)
    step = np.where(step > 0, step, 1)
    zero = np.round(-low / step)
    return step * (np.clip(np.round(x / step) + zero, 0, 2**bits - 1) - zero)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per", ops.PER)
def test_grids_are_those_of_the_definitions(x, bits, per, symmetric):
    rounding = Uniform(bits, per, symmetric)
    axis = {"token": 1, "tensor": None, "channel": 0}[per]
    low, high = x.min(axis=axis, keepdims=per == "token"), x.max(axis=axis, keepdims=per == "token")
    given = None if per == "token" else ops.as_range(low, high)
    found = np.asarray(rounding(jnp.array(x), None, given))
    np.testing.assert_allclose(found, by_hand(x, low, high, bits, symmetric), rtol=1e-5, atol=1e-6)
    step = np.asarray(rounding.of(jnp.array(x), given).step)
    assert (np.abs(found - x) <= step * (0.5 + 1e-4)).all()
    assert (found[2] == 0).all()
    codes = np.round(found / np.where(step > 0, step, 1))
    assert np.abs(found - codes * step).max() < 1e-5
    assert all(len(np.unique(row)) <= 2**bits for row in (codes.T if per == "channel" else codes))


def test_values_outside_a_range_become_its_ends():
    outside = jnp.array([[-9.0, 0.0, 0.3, 9.0]])
    symmetric = Uniform(8, "tensor")(outside, None, ops.as_range(-1, 2))
    np.testing.assert_allclose(symmetric, [[-2, 0, 0.3, 2]], atol=1 / 127 + 1e-6)
    asymmetric = Uniform(8, "tensor", symmetric=False)(outside, None, ops.as_range(-1, 2))
    np.testing.assert_allclose(asymmetric, [[-1, 0, 0.3, 2]], atol=3 / 255)
    assert asymmetric[0, 1] == 0
    # What lies on one side of zero spends no codes on the other.
    positive = jnp.array([[0.0, 1.0, 2.0, 3.0]])
    assert np.array_equal(Uniform(2, "token", symmetric=False)(positive), positive)


def test_static_is_dynamic_where_the_ranges_are_the_same(x):
    row = jnp.array(x[:1])
    for bits in (4, 8):
        one = Uniform(bits, "tensor")(row, None, ops.as_range(row.min(), row.max()))
        assert np.array_equal(one, Uniform(bits, "token")(row))


@pytest.mark.parametrize("name", ["Q8_0", "Q8_1", "Q4_0", "IQ4_NL", "F16"])
def test_blocks_are_those_of_the_format(x, name):
    format = formats.get(name)
    blocks = format.encode_activations(jnp.array(x).reshape(6, -1, format.block_size))
    assert np.array_equal(Blocks(format)(jnp.array(x)), format.decode(blocks).reshape(x.shape))
    assert not np.array_equal(Blocks(format)(jnp.array(x)), x)


# ggml-cpu.c type_traits_cpu, the member vec_dot_type.
IN_GGML = {
    "Q8_0": ("Q1_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"),
    "Q8_1": ("Q4_1", "Q5_1"),
    "Q8_K": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ2_XXS", "IQ3_S", "IQ4_XS", "TQ1_0", "TQ2_0"),
    "F16": ("F16",), "BF16": ("BF16",), "F32": ("F32",), None: ("NF4", "I8", "Q8_K"),
}  # fmt: skip


@pytest.mark.parametrize(("activations", "name"), [(a, name) for a, names in IN_GGML.items() for name in names])
def test_what_ggml_multiplies_with_a_format(activations, name):
    assert formats.get(name).activations == activations


def test_ggml_s_rounding_goes_by_the_weight(w):
    x = jnp.array(np.random.default_rng(2).normal(size=(3, 256)), jnp.float32)
    wide = jnp.array(np.random.default_rng(3).normal(size=(8, 256)), jnp.float32)
    for weight, name in (("Q4_K", "q8_k"), ("Q4_0", "q8_0"), ("Q5_1", "q8_1")):
        assert np.array_equal(Blocks()(x, qjax.quantize(wide, weight)), ops.rounding(name)(x))
    assert np.array_equal(Blocks()(x, wide), x)
    with pytest.raises(QjaxError, match="ggml has no products with Affine"):
        Blocks()(x, qjax.quantize(wide, qjax.Affine(bits=4)))
    with pytest.raises(QjaxError, match="row length 64 is not a multiple of 256"):
        ops.rounding("q8_k")(x[:, :64])


def test_names():
    for name in ("int8-token", "uint4-tensor", "int8-channel", "ggml", "q8_0", "iq4_nl"):
        assert ops.rounding(name.upper()).name == name
    for name in ("int9-token", "int8", "int8-row", "q8", "IQ2_XXS", "I8"):
        with pytest.raises(QjaxError, match="activations"):
            ops.rounding(name)
    with pytest.raises(QjaxError, match="expected 2 to 8 bits"):
        Uniform(16)


# ── products ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["int8-token", "int4-token", "int8-tensor"])
@pytest.mark.parametrize("weight", ["dense", "Q4_0"])
def test_products_of_codes(x, w, name, weight):
    """Sums of integers are exact, those of the same numbers as floats within n 2^-24 Σ|x̂ ŵ| (and some roundings)."""
    w = w if weight == "dense" else qjax.quantize(w, weight)
    rounding = ops.rounding(name)
    given = Range(jnp.float32(-20), jnp.float32(20)) if rounding.static else None
    rounded = Rounded(w, rounding, given)
    integers = matmul(jnp.array(x), rounded, jnp.int8)
    # Weights are rounded as rows of activations are.
    w_hat = Uniform(8, "token")(w if weight == "dense" else qjax.dequantize(w))
    x_hat = rounding(jnp.array(x), w, given)
    floats = matmul(jnp.array(x), Rounded(w_hat, rounding, given), jnp.float32)
    exact = np.asarray(x_hat, np.float64) @ np.asarray(w_hat, np.float64).T
    magnitudes = np.abs(np.asarray(x_hat, np.float64)) @ np.abs(np.asarray(w_hat, np.float64)).T
    assert (np.abs(floats - exact) <= 64 * 2.0**-24 * magnitudes).all()
    assert (np.abs(integers - exact) <= 4 * 2.0**-24 * magnitudes).all()
    assert (np.abs(np.asarray(integers, np.float64) - floats) <= 68 * 2.0**-24 * magnitudes).all()
    if name == "int8-token":
        assert np.array_equal(integers, matmul(jnp.array(x), w, jnp.int8))


def test_codes_of_several_steps_are_not_summed(x, w):
    columns = ops.as_range(x.min(0), x.max(0))
    for rounded in (
        Rounded(w, Uniform(8, "channel"), columns),
        Rounded(w, ops.rounding("q8_0")),
        Rounded(w, Uniform(8, "token", symmetric=False)),
    ):
        with pytest.raises(QjaxError, match="no codes that can be summed"):
            matmul(jnp.array(x), rounded, jnp.int8)
    assert explain_matmul(jnp.array(x), Rounded(w, Uniform())).body == "rounded"


# ── ranges ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def heavy():
    """Values of heavy tails, most of them positive, zeros among them."""
    rng = np.random.default_rng(4)
    values = rng.standard_t(3, size=(2, 400, 100)) + 0.5
    values[:, ::7] = 0
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def bins(heavy):
    return Histogram.of(np.asarray(method.histogram(jnp.array(heavy))))


def test_bins_hold_what_lies_between_their_ends(heavy, bins):
    values = heavy[heavy != 0].ravel()
    assert bins.counts.sum() == values.size
    assert (bins.high - bins.low <= np.minimum(abs(bins.low), abs(bins.high)) / 16).all()
    # Ends belong to the bin that lies on the side of larger magnitudes.
    ends = zip(bins.low, bins.high, bins.counts)
    for low, high, count in ends:
        inside = (values >= low) & (values < high) if low >= 0 else (values > low) & (values <= high)
        assert inside.sum() == count


@pytest.mark.parametrize("percent", [0.1, 50, 99, 99.9])
def test_percentiles_are_within_a_bin(heavy, bins, percent):
    values = heavy[heavy != 0].ravel()
    # To the bin's width, and to what lies between two neighbouring values.
    for found, of in ((bins.percentile(percent), values), (bins.magnitudes().percentile(percent), np.abs(values))):
        exact = [np.percentile(of, percent, method=side) for side in ("lower", "higher")]
        assert min(exact) - abs(exact[0]) / 16 <= found <= max(exact) + abs(exact[1]) / 16
    assert bins.percentile(100) == bins.high[-1]


@pytest.mark.parametrize("rounding", [Uniform(8, "tensor"), Uniform(4, "tensor"), Uniform(4, "tensor", False)])
@pytest.mark.parametrize("end", [1.0, 4.0, 30.0])
def test_the_error_of_bins_is_that_of_values_spread_over_them(bins, rounding, end):
    shares = (np.arange(2000) + 0.5) / 2000
    spread = bins.low[:, None] + shares * (bins.high - bins.low)[:, None]
    given = Range(-0.7 * end, end)
    error = by_hand(spread, *given, rounding.bits, rounding.symmetric) - spread
    assert bins.error(rounding, given) == pytest.approx(np.sum(bins.counts * np.mean(error**2, axis=1)), rel=1e-4)


@pytest.mark.parametrize("rounding", [Uniform(8, "tensor"), Uniform(4, "tensor"), Uniform(4, "tensor", False)])
def test_mse_finds_a_range_that_hardly_any_other_beats(heavy, bins, rounding):
    choose = method._chooser("mse")
    found = choose(np.asarray(method.histogram(jnp.array(heavy))), rounding)

    def error(low, high):
        return np.sum((by_hand(heavy, low, high, rounding.bits, rounding.symmetric) - heavy.astype(np.float64)) ** 2)

    low, high = heavy.min(), heavy.max()
    least = min(error(low * s, high * s) for s in np.geomspace(1, 1 / 64, 200))
    assert error(*found) <= 1.05 * least
    assert error(*found) < 0.9 * error(low, high)


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────


def weights_of(config):
    weights = transformer.init(config, jax.random.key(0))
    return {name: w * 3 if w.ndim > 1 else w for name, w in weights.items()}


@pytest.fixture(scope="module")
def small() -> Model:
    """Two layers, so that each has ranges of its own."""
    tokenizer = byte_tokenizer()
    config = Config("llama", 2, 32, 64, 2, 1, 32, tokenizer.vocab_size, 64, 1e-5, 1e4, True)
    return Model(config, transformer.stack(weights_of(config), config), tokenizer, name="small")


CALIBRATION = "".join(tale.text for tale in tales.generate(tales.TRAINING, 2))
N_CTX, CHUNKS = 32, 4


@pytest.fixture(scope="module")
def calibrated(small):
    return {
        (name, rule): evaluate.calibrate(small, CALIBRATION, name, rule, N_CTX, CHUNKS)
        for name, rule in [("int8-tensor", "minmax"), ("int8-channel", "minmax"), ("int4-tensor", "mse")]
    }


def test_extremes_are_those_of_the_inputs(small, calibrated):
    ids = np.asarray(small.tokenizer.encode(CALIBRATION))[: N_CTX * CHUNKS].reshape(CHUNKS, N_CTX)
    if small.tokenizer.add_bos:
        ids[:, 0] = small.tokenizer.bos_id
    _, seen = transformer.observe(small.config, small.params, jnp.array(ids), lambda h: h)
    inputs = seen.unstack(small.config)
    per_channel, per_tensor = (calibrated[name, "minmax"].ranges for name in ("int8-channel", "int8-tensor"))
    assert set(per_channel) == set(per_tensor) == set(inputs)
    for name, h in inputs.items():
        low, high = per_channel[name]
        np.testing.assert_allclose(low, h.min((0, 1)), atol=1e-4)
        np.testing.assert_allclose(high, h.max((0, 1)), atol=1e-4)
        assert (per_tensor[name].low, per_tensor[name].high) == (low.min(), high.max())


@pytest.mark.parametrize("name", ["q8_0", "int8-tensor", "int8-channel"])
def test_a_model_rounds_the_input_of_each_matrix(small, calibrated, name):
    """Its logits are those of a model whose products round what they get, each with its own range."""
    model = dataclasses.replace(small, activations=calibrated.get((name, "minmax")) or Activations.of(name))
    tokens = jnp.arange(3, 3 + N_CTX)[None]
    _, seen = transformer.observe(small.config, model.running, tokens, lambda h: h)
    inputs = seen.unstack(small.config)
    for name, weight in small.tensors.items():
        if name not in inputs:
            continue
        layer, matrix = int(name[4]) if name.startswith("blk.") else None, name[6:]
        rounded = model.running.output
        if layer is not None:
            rounded = jax.tree.map(lambda a, i=layer: a[i], model.running.runs[0][matrix])
        expected = model.activations.rounding(inputs[name], weight, model.activations.ranges.get(name))
        assert np.array_equal(rounded.round(inputs[name]), expected), name
        assert np.array_equal(rounded.weight, weight), name
    assert not np.array_equal(model.logits(tokens), small.logits(tokens))


def test_measures_say_how_activations_were_rounded(small, calibrated):
    text = evaluate.held_out_tales(8)
    model = dataclasses.replace(small, activations=calibrated["int4-tensor", "mse"])
    ppl = qjax.perplexity(model, text, N_CTX, CHUNKS, "float32")
    assert ppl.activations == "int4-tensor-mse"
    assert "activations int4-tensor-mse" in str(ppl)
    plain = qjax.perplexity(small, text, N_CTX, CHUNKS, "float32")
    assert plain.activations == ""
    assert ppl.value != plain.value
    divergence = qjax.kl_divergence(small, model, text, N_CTX, CHUNKS)
    assert divergence.ppl == pytest.approx(ppl.value, rel=1e-5)
    assert divergence.activations == "int4-tensor-mse"
    assert divergence.mean > 1e-3


def test_activations_stay_with_a_model_that_is_quantized(small, calibrated):
    model = dataclasses.replace(small, activations=calibrated["int8-tensor", "minmax"]).quantize("Q4_0")
    assert model.activations is calibrated["int8-tensor", "minmax"]
    assert model.generate("Once", max_tokens=2).tokens == model.generate("Once", max_tokens=2).tokens


EXPERTS = Config("llama", 2, 32, 64, 2, 1, 32, 96, 64, 1e-5, 1e4, tied=False, n_experts=4, n_experts_used=2)


def test_each_expert_has_ranges_of_the_tokens_it_gets():
    tensors, tokens = weights_of(EXPERTS), np.arange(64).reshape(2, 32)
    calibrate = functools.partial(method.calibrate, EXPERTS, tensors, tokens, 2, Uniform(8, "tensor"))
    found, percentile = calibrate(), calibrate("p100")
    for name in ("blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"):
        low, high = found.ranges[name]
        assert low.shape == (4,)
        assert len(set(high.tolist())) > 1
        largest = np.maximum(-low, high)
        assert ((percentile.ranges[name].high >= largest) & (percentile.ranges[name].high <= largest * 17 / 16)).all()
    params = transformer.stack(tensors, EXPERTS)
    plain = transformer.forward(EXPERTS, params, jnp.array(tokens))
    rounded = transformer.forward(EXPERTS, found.attach(params, EXPERTS), jnp.array(tokens))
    # A token may go to another expert; most do not.
    assert 0 < np.median(np.abs(rounded - plain)) < 0.02 * np.abs(plain).max()


def test_an_expert_without_tokens_has_the_range_of_the_others():
    kept = Range(np.array([[-1.0, -2], [0, 0], [-3, 0]]), np.array([[1.0, 0], [0, 0], [0, 4]]))
    found = method._experts(kept, method.EXTREMES)
    assert [own.low.tolist() for own in found] == [[-1, -2], [-3, -2], [-3, 0]]
    assert [own.high.tolist() for own in found] == [[1, 0], [1, 4], [0, 4]]
    counts = np.stack([np.asarray(method.histogram(jnp.full((1, 1, 2), v))) for v in (1.0, 0.0, -0.0, 2.0)])
    found = method._experts(counts, method.HISTOGRAM)
    assert [own.sum() for own in found] == [2, 8, 8, 2]


# ── files and refusals ───────────────────────────────────────────────────────────────────────────────────


def test_ranges_in_a_file(tmp_path, small, calibrated):
    for (name, rule), found in calibrated.items():
        found.write(tmp_path / "ranges.json")
        read = Activations.read(tmp_path / "ranges.json")
        assert (read.name, read.rounding, read.range_rule) == (f"{name}-{rule}", found.rounding, rule)
        assert all(np.array_equal(read.ranges[matrix], ends) for matrix, ends in found.ranges.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a file of activations"),
        ("[1]", "not a file of activations"),
        ('{"activations": "int8-tensor", "range_rule": "mse", "ranges": {"a": {"low": 1}}}', "not a file of activ"),
        (
            '{"activations": "int8-tensor", "range_rule": "", "ranges": {"a": {"low": 1, "high": [2]}}}',
            "a: ranges from",
        ),
        ('{"activations": "int8-tensor", "range_rule": "", "ranges": {"a": {"low": 3, "high": 2}}}', "a: ranges from"),
        ('{"activations": "int8-tensor", "range_rule": "", "ranges": {"a": {"low": NaN, "high": 2}}}', "all finite"),
        ('{"activations": "int8-tensor", "range_rule": "", "ranges": {"a": {"low": "x", "high": 2}}}', "not a file of"),
        ('{"activations": "int1-tensor", "range_rule": "", "ranges": {}}', "expected int8-token"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    (tmp_path / "ranges.json").write_text(content)
    with pytest.raises(QjaxError, match=message):
        Activations.read(tmp_path / "ranges.json")


def test_ranges_of_another_model_are_refused(small, calibrated):
    found = calibrated["int8-channel", "minmax"]
    fewer = {name: ends for name, ends in found.ranges.items() if name != "blk.1.attn_k.weight"}
    shorter = found.ranges | {"blk.1.attn_k.weight": Range(np.zeros(3), np.ones(3))}
    for ranges, message in ((fewer, "blk.1.attn_k.weight: in the model or"), (shorter, r"shape \(3,\) for its input")):
        model = dataclasses.replace(small, activations=dataclasses.replace(found, ranges=ranges))
        with pytest.raises(QjaxError, match=message):
            _ = model.running


@pytest.mark.parametrize(
    ("name", "rule", "message"),
    [
        ("int8-token", "minmax", "no ranges to find"),
        ("q8_0", "minmax", "no ranges to find"),
        ("int8-channel", "mse", "extremes; give minmax"),
        ("int8-tensor", "p101", "a percentile such as p99.9"),
        ("int8-tensor", "max", "expected minmax, mse"),
    ],
)
def test_what_cannot_be_calibrated(small, name, rule, message):
    with pytest.raises(QjaxError, match=message):
        evaluate.calibrate(small, CALIBRATION, name, rule, N_CTX, CHUNKS)
    with pytest.raises(QjaxError, match="takes ranges from a text"):
        Activations.of("int8-tensor")


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────


def test_cli(run, tmp_path, monkeypatch, small, calibrated):
    monkeypatch.setattr(qjax, "load", lambda *_, **__: small)
    (tmp_path / "text").write_text(CALIBRATION)
    measured = ("perplexity", "small", "-f", tmp_path / "text", "-c", N_CTX, "--chunks", CHUNKS, "--json")
    calibrated["int8-tensor", "minmax"].write(tmp_path / "ranges.json")
    found = {}
    for options in (
        (),
        ("--activations", "q4_0"),
        ("--activations", tmp_path / "ranges.json"),
        ("--activations", "int4-tensor", "--calibrate", tmp_path / "text", "--range", "p99"),
    ):
        code, out, err = run(*measured, "--precision", "float32", *options)
        assert code == 0, err
        record = json.loads(out)
        found[record["activations"]] = record["value"]
    assert list(found) == ["", "q4_0", "int8-tensor-minmax", "int4-tensor-p99"]
    assert len(set(found.values())) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--activations", "int8-tensor"), "give one (qjax.evaluate.calibrate, --calibrate)"),
        (("--activations", "int8-token", "--calibrate", "text"), "no ranges to find"),
        (("--activations", "int8-tensor", "--range", "mse"), "--range chooses among"),
        (("--calibrate", "text"), "give that too"),
        (("--activations", "missing.json"), "missing.json: cannot be read"),
        (("--activations", "q9"), "activations 'q9'"),
        (("--activations", "q8_0", "--precision", "int8"), "no codes that can be summed"),
    ],
)
def test_cli_refuses(run, tmp_path, monkeypatch, small, options, message):
    monkeypatch.setattr(qjax, "load", lambda *_, **__: small)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(CALIBRATION)
    fails(run("perplexity", "small", "-f", "text", "-c", N_CTX, "--chunks", 2, *options), message)


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.exact
@pytest.mark.parametrize(("file_type", "share"), [("Q4_0", 0.9), ("Q4_K_S", 0.5), ("Q6_K", 0.5)])
def test_llama_cpp_rounds_activations_so(llama_cpp, tmp_path, file_type, share):
    """Its predictions lie nearer to ours with its rounding than to ours without, and than to those with another.

    Not on them: where a last bit differs a code may be another, and a model whose norms are 3e-7 larger is as far from
    itself, 3.5e-5 nats for Q4_0 and 5.8e-5 for Q4_K_S.
    """
    text, base, path = tmp_path / "text", tmp_path / "base", tmp_path / "tiny.gguf"
    text.write_text(evaluate.held_out_tales() + "\n")
    quantize_file("tiny", path, file_type)
    command = [llama_cpp / "llama-perplexity", "-m", path, "-f", text, "-c", 512, "--chunks", 16]
    options = ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "--kl-divergence-base", base]
    theirs = re.search(r"PPL = ([\d.]+)", programs.output(*command, *options, last="Final estimate"))
    model = qjax.load(path)
    rounded = {
        name: evaluate.kl_divergence_from(base, dataclasses.replace(model, activations=name and Activations.of(name)))
        for name in (None, "ggml", "int8-token")
    }
    assert rounded["ggml"].mean < share * rounded[None].mean
    assert rounded["ggml"].mean < 0.3 * rounded["int8-token"].mean
    assert rounded["ggml"].mean < 1e-4
    assert rounded["ggml"].ppl == pytest.approx(float(theirs[1]), rel=5e-4)
