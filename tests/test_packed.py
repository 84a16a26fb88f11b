"""The GPU kernel: its arithmetic in interpret mode against float64, that it lowers for CUDA, and on a GPU for real."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import sampled
from oracles import formats

import qjax
from qjax.formats import Affine
from qjax.models import cache as caches
from qjax.models import transformer
from qjax.models.config import Config
from qjax.ops import linear
from qjax.ops.kernels import packed

pytestmark = pytest.mark.in_haste

FORMATS = (
    "Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS",
    Affine(), Affine(bits=1), Affine(bits=3, symmetric=False), Affine(bits=5, block_size=64, scale_dtype="bfloat16"),
    Affine(bits=4, block_size=128, symmetric=False, zero_point=True),
    Affine(bits=8, block_size="row", scale_dtype="float32"), Affine(bits=7, block_size="tensor", symmetric=False),
)  # fmt: skip
by_format = pytest.mark.parametrize("format", FORMATS, ids=formats.label)

# Fewer rows than a tile has, rows that leave some over, blocks that fill a tile and blocks that do not; (d_out, d_in).
SHAPES = ((1, 256), (37, 768), (130, 8448))
# The tiling knows of a format how many weights its blocks and runs have: one of each kind meets all shapes.
ALL_SHAPES = ("Q4_0", "Q8_0", "Q5_K", "IQ4_XS", *FORMATS[-2:])


@functools.cache
def weights(format, d_out, d_in):
    """Every value that a field of codes can hold."""
    if isinstance(format, Affine) and format.block_size == "tensor":  # one scale, not one for each block
        return qjax.quantize(np.random.default_rng(0).standard_normal((d_out, d_in)).astype(np.float32), format)
    return formats.drawn(format, d_out, d_in)


def activations(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape).astype(np.float32))


@jax.jit
def decoded(w):
    """The weights, and the offset that is part of each."""
    whole = qjax.dequantize(w)
    if "m" in w.fields._fields:
        offset = jnp.repeat(w.by_rows().fields.m.astype(jnp.float32), w.format.block_size, axis=-1)
    elif w.format.integers and (offset := w.format.integers(w.fields).offset) is not None:
        offset = jnp.repeat(offset, 32, axis=-1)
    else:
        offset = jnp.zeros_like(whole)
    return whole, offset


def expected(x, w):
    """The product in float64, and the bound that `matmul` states: a weight is one product and one sum, rounded, then
    come d_in products and as many sums (Higham 2002, section 3.1)."""
    exact, offset = (np.asarray(part, np.float64) for part in decoded(w))
    x = np.asarray(x).astype(np.float64)
    magnitude = np.abs(exact - offset) + np.abs(offset)
    return x @ exact.T, (x.shape[-1] + 2) * 2.0**-24 * (np.abs(x) @ magnitude.T)


def check(y, x, w):
    exact, bound = expected(x, w)
    assert (y.shape, y.dtype) == (exact.shape, jnp.float32)
    assert (np.abs(y - exact) <= bound).all()


interpreted = jax.jit(functools.partial(packed.multiply, interpret=True))


@pytest.mark.parametrize(
    ("format", "shape"),
    [
        pytest.param(format, shape, id=f"{formats.label(format)}-{shape}",
                     marks=() if shape == SHAPES[1] else
                     pytest.mark.thorough if format in ALL_SHAPES else pytest.mark.exact)
        for format in FORMATS for shape in SHAPES
    ],
)  # fmt: skip
def test_the_product_is_that_of_float64(format, shape):
    w, x = weights(format, *shape), activations(2, shape[1])
    check(interpreted(x, w), x, w)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (16,), (2, 5)], ids=str)
def test_leading_axes(batch):
    w, x = weights("Q8_0", 37, 768), activations(*batch, 768)  # a format that compiles quickly
    check(interpreted(x, w), x, w)


def test_each_weight_is_met_with_its_activation():
    """Ones in turn give the columns of w one by one, exactly, in the order that the file has them."""
    ones = np.eye(768, dtype=np.float32).reshape(-1, 2, 768)
    for format in ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS"):
        w = weights(format, 37, 768)
        columns = [interpreted(two, w) for two in ones]  # two at a time, as above, for which it is compiled already
        np.testing.assert_allclose(np.concatenate(columns).T, qjax.dequantize(w), rtol=1e-6, atol=1e-6)


def test_bfloat16_activations_meet_weights_that_are_not_rounded():
    w, x = weights("Q8_0", 37, 768), activations(3, 768).astype(jnp.bfloat16)
    check(interpreted(x, w), x, w)


def test_an_infinite_weight_spoils_its_row_alone():
    w, x = weights("Q8_0", 37, 768), activations(768)
    d = np.array(w.fields.d)
    d[36, 23] = np.inf
    y = np.asarray(interpreted(x, qjax.QTensor(w.fields._replace(d=d), w.format)))
    assert not np.isfinite(y[36])
    check(y[:36], x, jax.tree.map(lambda field: np.asarray(field)[:36], w))


def test_under_vmap_and_scan():
    w, x = weights("Q8_0", 37, 768), activations(2, 768)
    layers = jax.tree.map(lambda field: np.stack([field, field[::-1]]), w)
    for y in (
        jax.vmap(interpreted, in_axes=(None, 0))(x, layers),
        jax.lax.scan(lambda x, w: (x, interpreted(x, w)), x, layers)[1],
    ):
        y = np.asarray(y)
        check(y[0], x, w)
        check(y[1][:, ::-1], x, w)


# ── for CUDA, without a GPU ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What is traced is what a GPU would make of it."""
    jax.clear_caches()
    monkeypatch.setattr(linear, "_platform", lambda w: "gpu")
    yield
    jax.clear_caches()


def lowered(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def largest_of_floats(text):
    shapes = re.findall(r"tensor<((?:\d+x)+)(?:f16|bf16|f32|f64)>", text)
    return max(math.prod(map(int, shape.split("x")[:-1])) for shape in shapes)


@pytest.mark.parametrize("n_rows", sampled([1, 7, 16], 7))
@by_format
def test_lowers_for_cuda_without_the_dense_matrix(format, n_rows, as_on_a_gpu):
    w, x = weights(format, 130, 8448), activations(n_rows, 8448)
    text = lowered(qjax.matmul, x, w)
    assert "triton" in text
    assert largest_of_floats(text) < w.size / 4
    # As the other body has it, tile by tile: the check above can fail.
    assert largest_of_floats(lowered(lambda x, w: qjax.matmul(x, w, body="tiles"), x, w)) >= w.size / 4


def test_where_it_is_compiled_for_a_cpu_tiles_run(as_on_a_gpu):
    """Layers that stay on the CPU beside a GPU: a tracer does not say where it will be."""
    w, x = weights("Q4_K", 37, 768), activations(3, 768)
    assert jax.jit(qjax.matmul).trace(x, w).jaxpr.pretty_print().count("pallas_call") == 1
    check(jax.jit(qjax.matmul)(x, w), x, w)


def test_gradients_go_through_x(as_on_a_gpu):
    w, x, out = weights("Q4_K", 37, 768), activations(5, 768), activations(5, 37)
    gradient = jax.jit(jax.grad(lambda x: (qjax.matmul(x, w) * out).sum()))(x)
    exact = np.asarray(qjax.dequantize(w), np.float64)
    bound = 37 * 2.0**-24 * (np.abs(np.float64(out)) @ np.abs(exact))
    assert (np.abs(gradient - np.float64(out) @ exact) <= bound).all()


SHAPE = dict(architecture="llama", n_layers=3, d_model=256, d_ff=512, n_heads=4, n_kv_heads=2, head_dim=64)
CONFIG = Config(**SHAPE, vocab=512, n_ctx=64, norm_eps=1e-5, rope_theta=1e4, tied=True)


def decoder(format):
    """A quantized model, a token and an empty cache; layers stacked, so the kernel runs in `lax.scan`."""
    tensors = {
        name: formats.drawn(format, *shape, size=shape[-1] ** -0.5) if len(shape) == 2 else jnp.ones(shape)
        for name, shape in transformer.tensor_shapes(CONFIG).items()
    }
    params = transformer.stack(tensors, CONFIG)
    return params, np.array([[5]], np.int32), caches.empty(CONFIG, 1, 16, caches.FLOAT32)


def test_a_step_lowers_for_cuda(as_on_a_gpu):
    trace = transformer.step.trace(CONFIG, *decoder("Q4_K"))
    text = trace.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" in text
    # Each shape of a product in the layers, and the head.
    assert text.count("triton") >= 5
    assert largest_of_floats(text) < 128 * 256  # the smallest matrix, attn_k


def test_a_step_gives_the_dense_models_logits(as_on_a_gpu, monkeypatch):
    params, tokens, cache = decoder("Q8_0")  # few operations, for XLA takes long to compile them on a CPU
    monkeypatch.setattr(linear, "_packed", interpreted)
    logits, _ = transformer.step(CONFIG, params, tokens, cache)
    is_matrix = lambda leaf: isinstance(leaf, qjax.QTensor)  # noqa: E731
    dense = jax.tree.map(lambda w: qjax.dequantize(w) if is_matrix(w) else w, params, is_leaf=is_matrix)
    assert np.std(logits) > 0.1
    np.testing.assert_allclose(logits, transformer.forward(CONFIG, dense, tokens)[:, 0], atol=1e-5)


# ── on a GPU ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def gpu():
    found = [device for device in jax.devices() if device.platform in ("gpu", "cuda")]
    if not found:
        pytest.skip("JAX has no GPU here")
    return found[0]


@pytest.mark.parametrize("n_rows", [1, 4, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@by_format
def test_on_a_gpu(format, shape, n_rows, gpu):
    w, x = jax.device_put((weights(format, *shape), activations(n_rows, shape[1])), gpu)
    assert qjax.explain_matmul(x, w).body == "pallas"
    check(jax.jit(qjax.matmul)(x, w), x, w)
