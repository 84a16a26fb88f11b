"""Columns: products with one row against float64, and what they take."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import formats

import qjax
from qjax.formats._format import Integers
from qjax.models import cache as caches
from qjax.models import transformer
from qjax.ops.kernels.columns import Columns, columns, joined, multiply, quantize_activations
from qjax.ops.linear import embed, matmul

pytestmark = pytest.mark.in_haste

FOUR_BITS = (
    "Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", qjax.Affine(bits=4, block_size=128, symmetric=False, zero_point=True),
)  # fmt: skip
EIGHT_BITS = ("Q5_0", "Q5_1", "Q8_0", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
FORMATS = FOUR_BITS + EIGHT_BITS
by_format = pytest.mark.parametrize("name", FORMATS, ids=formats.label)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class Case(NamedTuple):
    """A matrix as it is, laid out anew, and in numpy: its weights in float64, and its integers."""

    w: qjax.QTensor
    laid_out: Columns
    exact: np.ndarray
    integers: Integers


@functools.cache
def case(name):
    """Of one shape, for each program takes longer to compile than to run."""
    w = formats.drawn(name, 96, 1024)
    integers = jax.tree.map(np.asarray, jax.jit(lambda w: w.format.integers(w.fields))(w))
    return Case(w, columns(w), np.float64(qjax.dequantize(w)), integers)


@by_format
def test_integers_are_the_weights(name):
    w, _, exact, (codes, scale, offset, (low, high)) = case(name)
    assert low <= codes.min() < codes.max() <= high
    weights = codes * scale[..., None] + (0 if offset is None else offset[..., None])
    np.testing.assert_allclose(weights.reshape(w.shape), exact, rtol=1e-6, atol=1e-6)


def in_int8(x, group):
    """Activations as they are multiplied with codes, in float64."""
    codes, scale = jax.jit(quantize_activations)(x.reshape(-1, group))
    return (np.float64(codes) * np.float64(scale)[:, None]).ravel()


@by_format
def test_product_is_that_of_the_weights(name):
    """In float64 with the same activations, but for scales and offsets rounded to float16: by 2^-11 of each at most."""
    w, laid_out, exact, (codes, scale, offset, (low, high)) = case(name)
    x = np.asarray(draw(1024, seed=1))
    assert isinstance(laid_out, Columns)
    assert laid_out.shape == w.shape
    assert laid_out.bits == (4 if name in FOUR_BITS else 8)
    group = codes.shape[-1]
    assert laid_out.group == group
    rounded = in_int8(x, group)
    # Half a step of each group's scale.
    to_int8 = np.abs(exact) @ (np.repeat(np.abs(x.reshape(-1, group)).max(-1), group) / 254)
    expected = exact @ rounded

    centre = (high + 1) // 2 if low == 0 else 0
    rows = rounded.reshape(-1, group)
    by_group = np.abs(scale) * np.abs(np.einsum("ngi,gi->ng", np.float64(codes) - centre, rows))
    by_group += 0 if offset is None else np.abs(offset + centre * scale) * np.abs(rows.sum(-1))
    bound = 2**-11 * by_group.sum(-1) + 1e-4
    assert (np.abs(jax.jit(multiply)(x, laid_out) - expected) <= bound).all()
    y = np.asarray(jax.jit(matmul)(x[None], laid_out))[0]
    assert (np.abs(y - expected) <= bound).all()
    assert (np.abs(y - exact @ np.float64(x)) <= bound + to_int8).all()


@pytest.mark.parametrize("sign", [1, -1])
@by_format
def test_extreme_codes_do_not_overflow(name, sign):
    """int16 has to hold sums of products of the largest codes of both factors; the least code is that of bits 0."""
    fields = case(name).w.fields
    parts = {"qs", "qh", "ql", "hmask"} & set(fields._fields)
    least = {part: jnp.full_like(getattr(fields, part), -128 if name == "Q8_0" else 0) for part in parts}
    w = qjax.QTensor(fields._replace(**least), qjax.formats.get(name))
    codes, _, _, (low, _) = w.format.integers(w.fields)
    assert (codes == low).all()
    y = jax.jit(multiply)(np.full(1024, sign, np.float32), columns(w))
    exact = sign * np.float64(qjax.dequantize(w)).sum(-1)
    np.testing.assert_allclose(y, exact, atol=2e-3 * np.abs(exact).max())


def test_scales_far_from_one_survive():
    w = formats.drawn("Q4_1", 96, 1024, size=1e-4)
    one, exact = np.eye(1, 1024, dtype=np.float32)[0], np.asarray(qjax.dequantize(w))
    y = jax.jit(multiply)(one, columns(w))
    np.testing.assert_allclose(y, exact[:, 0], atol=2**-10 * np.abs(exact).max())


@pytest.mark.parametrize("name", ["NF4", "TQ2_0"])
def test_other_formats_stay_as_they_are(name):
    w = formats.drawn(name, 4, 256)
    assert columns(w) is w


@pytest.mark.parametrize("name", ["Q8_0", "Q5_0"])
def test_words_that_share_a_place_in_the_cache_are_moved_apart(name):
    w = formats.drawn(name, 2048, 256)
    laid_out = columns(w)
    assert laid_out.shape == w.shape
    assert laid_out.codes.shape[-1] * 2 % 4096 == 64
    x = np.asarray(draw(256, seed=1))
    exact = np.float64(qjax.dequantize(w))
    y = jax.jit(multiply)(x, laid_out)
    np.testing.assert_allclose(y, exact @ in_int8(x, 32), atol=2**-10 * np.abs(exact @ x).max())
    many = jax.jit(multiply)(np.eye(40, 256, dtype=np.float32), laid_out)
    np.testing.assert_allclose(many, exact.T[:40], atol=2**-10 * np.abs(exact).max())
    np.testing.assert_array_equal(jax.jit(embed)(laid_out, np.arange(2040, 2048)).T[:40], many[:, 2040:])


@pytest.fixture(scope="module")
def model():
    return qjax.load("tiny").quantize("Q4_0")


@pytest.mark.thorough
def test_perplexity_stays_within_a_fifth_of_a_percent(model):
    """Token by token through a cache, as text is generated, against float32."""
    text = "".join(tale.text for tale in qjax.data.tales.generate(7, 3))
    ids = np.asarray(model.encode(text)[:256], np.int32)
    one_by_one = mean_nll(model, ids, model.one_row)
    exact = np.asarray(jax.nn.log_softmax(model.logits(ids[None])[0]))
    expected = -exact[np.arange(len(ids) - 1), ids[1:]].mean()
    run, config = model.one_row.runs[0], model.config
    assert {"attn_k.weight", "attn_v.weight", "ffn_up.weight"}.isdisjoint(run)
    assert isinstance(run["ffn_gate.weight"], Columns)
    assert run["ffn_gate.weight"].shape == (config.n_layers, 2 * config.d_ff, config.d_model)
    assert one_by_one == pytest.approx(float(expected), abs=0.002)


def mean_nll(model, ids, params):
    def add(carry, pair):
        cache, total = carry
        logits, cache = transformer.step(model.config, params, pair[:1][None], cache)
        return (cache, total - jax.nn.log_softmax(logits[0])[pair[1]]), None

    cache = caches.empty(model.config, 1, len(ids), caches.FLOAT32)
    pairs = np.stack([ids[:-1], ids[1:]], axis=-1)
    (_, total), _ = jax.jit(lambda params: jax.lax.scan(add, (cache, jnp.float32(0)), pairs))(params)
    return float(total) / len(pairs)


def test_codes_are_not_made_wide_for_the_whole_loop():
    """XLA would move the conversion of a matrix out of the loop over tokens."""
    w = jax.jit(columns)(formats.drawn("Q8_0", 4096, 256))

    def loop(w, x):
        return jax.lax.fori_loop(0, 8, lambda i, x: multiply(x, w)[..., :256], x)

    compiled = jax.jit(loop).lower(w, draw(1, 256)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < w.codes.nbytes


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q6_K"])
def test_codes_of_stacked_layers_are_read_where_they_lie(name):
    """A copy of those of a layer, which XLA makes if they are cut out first, would not fit the memory asked for."""
    stack = formats.drawn(name, 4, 1024, 256)
    layers = jax.jit(columns)(stack)

    def products(w, x):
        return jax.lax.map(lambda i: multiply(x, w.of_layer(i)), jnp.arange(4))

    x = draw(1, 256)
    compiled = jax.jit(products).lower(layers, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < layers.codes[0].nbytes
    for i, y in enumerate(np.asarray(compiled(layers, x))):
        w = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], stack)
        np.testing.assert_array_equal(y, jax.jit(multiply)(x, columns(w)))


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0"])
def test_matrices_joined_to_one_keep_their_products(name):
    """Each row has scales of its own, so that it does not matter which matrix it lies in.  The rows of one of these
    make lines of padding (see `test_words_that_share_a_place_in_the_cache_are_moved_apart`)."""
    pair = [columns(formats.drawn(name, 2, n, 256, seed=n)) for n in (2048, 96)]
    both = joined(*pair)
    assert both.shape == (2, 2144, 256)
    assert both.codes.shape[-1] == 2144
    assert pair[0].codes.shape[-1] > 2048 or name == "Q4_1"
    x = draw(1, 256)
    for i in range(2):
        products = [jax.jit(multiply)(x, w.of_layer(i)) for w in pair]
        np.testing.assert_array_equal(jax.jit(multiply)(x, both.of_layer(i)), np.concatenate(products, axis=-1))


def test_only_matrices_of_a_kind_are_joined():
    """Q4_K_M has attn_v in Q6_K in some layers: there its codes take 8 bits, those of attn_q and attn_k 4."""
    model = qjax.load("tiny").quantize("Q4_K_M")
    for exact, run in zip(model.params.runs, model.one_row.runs):
        apart = exact["attn_v.weight"].format != exact["attn_q.weight"].format
        assert ("attn_v.weight" in run) == apart
        assert "attn_k.weight" not in run
    assert len({"attn_v.weight" in run for run in model.one_row.runs}) == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@by_format
def test_many_rows_meet_the_weights_themselves(name, dtype):
    """No activation is rounded to int8; against float64, scales and offsets to float16."""
    _, laid_out, exact, (codes, scale, offset, _) = case(name)
    x = np.asarray(draw(40, 1024, seed=1)).astype(dtype)
    x64 = np.float64(x)
    size = np.abs(np.float64(codes) * scale[..., None]) + (0 if offset is None else 2 * np.abs(offset)[..., None])
    rounded = 2**-10 * size.reshape(exact.shape) + float(jnp.finfo(dtype).eps) / 2 * np.abs(exact)
    bound = np.abs(x64) @ rounded.T
    y = qjax.matmul(jnp.asarray(x), laid_out)
    assert (np.abs(y - x64 @ exact.T) <= bound).all()
    assert bound.max() < 0.2 * np.abs(x64 @ exact.T).max()


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_rows_of_an_embedding(name):
    _, laid_out, exact, _ = case(name)
    ids = np.array([[3, 95], [0, 3]])
    rows, expected = jax.jit(embed)(laid_out, ids), exact[ids]
    assert rows.shape == (2, 2, 1024)
    np.testing.assert_allclose(rows, expected, atol=2**-10 * np.abs(expected).max())


@pytest.fixture(scope="module")
def only_generates(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("columns") / "tiny-Q4_0.gguf"
    model.save(path)
    return qjax.load(path, only_generate=True)


def test_a_model_that_only_generates_holds_its_weights_once(model, only_generates):
    assert only_generates.params.token_embd.shape == model.params.token_embd.shape
    matrices = jax.tree.leaves(only_generates.params, is_leaf=lambda leaf: isinstance(leaf, (Columns, qjax.QTensor)))
    assert not any(isinstance(matrix, qjax.QTensor) for matrix in matrices)
    for ours, theirs in zip(jax.tree.leaves(only_generates.one_row), jax.tree.leaves(only_generates.params)):
        assert ours is theirs
    assert only_generates.n_weights == model.n_weights


def test_where_a_dtype_is_named_activations_are_not_rounded(model, tmp_path):
    path = tmp_path / "tiny-Q4_0.gguf"
    model.save(path)
    exact = qjax.load(path, dtype="float32", only_generate=True)
    assert exact.one_row is exact.params
    assert isinstance(exact.params.runs[0]["ffn_up.weight"], qjax.QTensor)


def test_a_model_that_only_generates_makes_the_same_text(model, only_generates):
    prompt = "Once upon a time"
    assert only_generates.generate(prompt, max_tokens=24).tokens == model.generate(prompt, max_tokens=24).tokens


def test_a_model_that_only_generates_does_nothing_else(only_generates, tmp_path):
    ids = only_generates.encode("Once upon a time")
    for needs_exact_weights in (
        lambda: only_generates.logits(ids),
        lambda: only_generates.tensors,
        lambda: only_generates.quantize("Q8_0"),
        lambda: only_generates.save(tmp_path / "model.gguf"),
        lambda: qjax.perplexity(only_generates, "Once upon a time there was a fox. " * 40, n_ctx=32),
    ):
        with pytest.raises(qjax.QjaxError, match="loaded to generate text only.*without only_generate"):
            needs_exact_weights()
