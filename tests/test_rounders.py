"""GPTQ, clipping and HQQ beside the loops of textbooks in float64, and what holds whatever the format."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import sampled
from oracles.formats import LARGEST, drawn, label

import qjax
from qjax import formats
from qjax.data import tales
from qjax.errors import QjaxError
from qjax.formats import Affine, Scales
from qjax.methods import clip, gptq, hqq, pipeline, rtn, statistics
from qjax.methods.importance import Importance
from qjax.methods.statistics import Seen

ZERO_POINT = Affine(bits=3, block_size=64, symmetric=False, zero_point=True)
pytestmark = pytest.mark.in_haste

ODD = Affine(bits=3, block_size=24, symmetric=False)
CODED = (
    *(name for name in formats.names() if formats.get(name).levels is not None),
    Affine(bits=4),
    ODD,
    ZERO_POINT,
    Affine(bits=2, block_size="tensor"),
)


@functools.cache
def case():
    """Weights, and inputs of columns that are far from independent, which GPTQ lives on."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((256, 256)) * np.exp(rng.standard_normal(256))
    x = rng.standard_normal((2048, 256)) @ (np.eye(256) + mixing / 16)
    w = rng.standard_normal((64, 256)).astype(np.float32)
    return w, (x.T @ x / len(x)).astype(np.float32)


def seen(h) -> Seen:
    return Seen(jnp.asarray(h), jnp.sqrt(jnp.diag(h)), 2048)


def importance(h) -> rtn.Options:
    return rtn.Options(Importance({"w": np.diag(h)[None].copy()}))


def error(t, w, h) -> float:
    e = np.float64(qjax.dequantize(t)) - w
    return float(np.trace(e @ np.float64(h) @ e.T))


# ── codes of their own ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format", sampled(CODED, "Q4_0", "Q4_K", "IQ4_NL", "NVFP4", "NF4", ODD, ZERO_POINT), ids=label)
def test_weights_are_scales_times_levels(format):
    """Of codes at random, put into blocks whose scales a tensor has; the scales stay, bit for bit."""
    columns = 192 if format == ODD else 256
    t = drawn(format, 4, columns) if format in LARGEST else qjax.quantize(case()[0][:4, :columns], format)
    format = t.format
    blocks = (4, columns // format.block_size, format.block_size)
    codes = np.random.default_rng(1).integers(0, len(format.levels), blocks)
    coded = format.with_codes(t.fields, jnp.asarray(codes, jnp.uint8))
    scale, offset = format.scales(t.fields)
    for before, after in zip(Scales(scale, offset), format.scales(coded)):
        np.testing.assert_array_equal(before, after)
    expected = format.levels[codes].reshape(*scale.shape, -1) * np.float64(scale)[..., None]
    expected += 0 if offset is None else np.float64(offset)[..., None]
    np.testing.assert_allclose(format.decode(coded).reshape(expected.shape), expected, rtol=1e-6, atol=1e-6)
    assert (np.diff(format.levels) > 0).all()
    if format.with_scales is None:
        return
    same = format.with_scales(t.fields, Scales(scale, offset))
    for before, after in zip(t.fields, same):
        np.testing.assert_array_equal(before, after)
    # As near as the scales lie that can be stored: one step of the coarsest, a power of two, is a factor of 2.
    other = format.scales(format.with_scales(t.fields, Scales(scale * 0.7, offset))).scale
    assert (np.abs(other - 0.7 * scale) <= np.abs(scale - 0.7 * scale) + 1e-12).all()
    assert np.abs(np.asarray(other) - 0.7 * np.asarray(scale)).mean() < 0.25 * np.abs(scale).mean()


@pytest.mark.parametrize("format", ["IQ2_XXS", "IQ3_S", "IQ1_S"])
def test_formats_without_codes_are_refused(format):
    w, h = case()
    with pytest.raises(
        QjaxError, match=rf"w: gptq can not round to {format}, in which weights share codes. Use one of Q4_0, .*Q2_K"
    ):
        gptq.quantize("w", jnp.asarray(w), formats.get(format), seen(h), importance(h))


# ── gptq ─────────────────────────────────────────────────────────────────────────────────────────────


def textbook(w, h, scale, levels):
    """Algorithm 1 of the paper with blocks of one column, in float64: the codes."""
    w, hinv, group = np.float64(w), np.linalg.inv(h), w.shape[1] // scale.shape[1]
    u = np.linalg.cholesky(hinv).T
    codes = np.zeros(w.shape, int)
    for j in range(w.shape[1]):
        s = scale[:, j // group]
        codes[:, j] = np.abs(w[:, j, None] - s[:, None] * levels).argmin(axis=1)
        error = (w[:, j] - s * levels[codes[:, j]]) / u[j, j]
        w[:, j:] -= error[:, None] * u[j, j:]
    return codes


@pytest.mark.parametrize("format", ["Q4_0", "IQ4_NL"])
def test_codes_are_the_textbooks(format):
    """But where float32 falls to the other side of a middle, which changes the rest of its row."""
    w, h = case()
    h, t = gptq.damped(np.float64(h)), qjax.quantize(w, format)
    scale, _ = t.format.scales(t.fields)
    zeros = jnp.zeros_like(scale.T)
    ours, errors = gptq.round_columns(jnp.asarray(w.T), jnp.float32(gptq.upper(h)), scale.T, zeros, t.format.levels)
    expected = textbook(w, h, np.float64(scale), t.format.levels)
    same = (expected == np.asarray(ours).T).all(axis=1)
    assert same.mean() > 0.9
    # The squares of the errors on the way add up to the error that is left.
    e = np.float64(scale).repeat(32, axis=1) * t.format.levels[expected] - w
    np.testing.assert_allclose(np.sum(np.square(errors), axis=0)[same], np.sum((e @ h) * e, axis=1)[same], rtol=1e-3)


@functools.cache
def made(format, identity=False):
    w, h = case()
    h = np.eye(256, dtype=np.float32) if identity else h
    return gptq.quantize("w", jnp.asarray(w), formats.get(format), seen(h), importance(h))


SOME = ["Q4_0", "Q2_K", "NF4"]


@pytest.mark.parametrize(
    "format",
    [
        *sampled(SOME, "Q4_0", "NF4"),
        *(pytest.param(f, marks=pytest.mark.exact) for f in CODED if f not in SOME and f != ODD),
    ],
    ids=label,
)
def test_the_error_of_the_output_falls(format):
    w, h = case()
    nearest = rtn.quantize_tensor("w", jnp.asarray(w), formats.get(format), importance(h))
    t = made(format)
    assert t.format == nearest.format
    assert jax.tree.map(lambda a: (a.shape, a.dtype), t.fields) == jax.tree.map(
        lambda a: (a.shape, a.dtype), nearest.fields
    )
    few = len(t.format.levels) < 2**5
    assert error(t, w, h) < (0.75 if few else 1) * error(nearest, w, h)


@pytest.mark.parametrize("format", sampled(SOME, "Q4_0", "NF4"), ids=label)
def test_without_correlations_codes_are_the_nearest(format):
    w, _ = case()
    t = made(format, identity=True)
    scale, offset = (None if a is None else np.float64(a)[..., None, None] for a in t.format.scales(t.fields))
    every = scale * t.format.levels + (0 if offset is None else offset)
    groups = w.reshape(*scale.shape[:2], -1)
    best = np.abs(groups[..., None] - every).min(axis=-1).reshape(w.shape)
    np.testing.assert_allclose(np.abs(np.asarray(qjax.dequantize(t)) - w), best, atol=1e-6)


def test_no_other_code_of_one_weight_is_better():
    """What coordinate descent comes to; tried one by one."""
    w, h = case()
    w, h = w[:, :32], h[:32, :32]
    format, damped = formats.get("Q4_0"), gptq.damped(np.float64(h))
    nearest = qjax.quantize(w, format)
    arrays = jnp.float32(damped), jnp.float32(gptq.upper(damped))
    fields, codes = gptq.solve(jnp.asarray(w), nearest.fields, *arrays, format, sweeps=50)
    d = np.float64(fields.d)[..., None]
    e = (d * format.levels[np.asarray(codes)]).reshape(w.shape) - w
    least = np.sum((e @ damped) * e, axis=1)
    for j in range(32):
        for level in format.levels:
            other = e.copy()
            other[:, j] = d[:, 0, 0] * level - w[:, j]
            assert (np.sum((other @ damped) * other, axis=1) >= least * (1 - 1e-5)).all()


def test_experts_are_worked_one_by_one():
    w, h = case()
    both = Seen(jnp.stack([h, np.eye(256, dtype=np.float32)]), jnp.ones((2, 256)), np.array([2048, 0]))
    options = rtn.Options()
    t = gptq.quantize("w", jnp.stack([w, w]), formats.get("NF4"), both, options)
    for i, identity in enumerate((False, True)):
        np.testing.assert_array_equal(qjax.dequantize(t)[i], qjax.dequantize(made("NF4", identity)))


def test_the_aim_is_the_output_of_the_float_model():
    """Where the input is another than the float model's, which is seen beside it."""
    w, _ = case()
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2048, 256)) @ (np.eye(256) + rng.standard_normal((256, 256)) / 16)
    floats = x + 0.3 * rng.standard_normal((2048, 256)) + 0.2 * np.roll(x, 1, axis=1)
    h, with_floats = (jnp.asarray(a.T @ x / 2048, jnp.float32) for a in (x, floats))

    def deviation(aim):
        given = Seen(h, jnp.ones(256), 2048, with_floats if aim else None)
        t = gptq.quantize("w", jnp.asarray(w), formats.get("Q4_0"), given, importance(np.asarray(h)))
        return np.mean((x @ np.float64(qjax.dequantize(t)).T - floats @ np.float64(w).T) ** 2)

    best, *_ = np.linalg.lstsq(x, floats @ np.float64(w).T)
    least = np.mean((x @ best - floats @ np.float64(w).T) ** 2)
    alone, aimed = deviation(False), deviation(True)
    # What is left above the least there can be is the error of the codes.
    assert least < aimed < 0.7 * alone


def test_weights_of_16_bits():
    w, h = case()
    short = jnp.asarray(w, jnp.bfloat16)
    ours, same = (
        gptq.quantize("w", a, formats.get("Q4_0"), seen(h), importance(h)) for a in (short, jnp.float32(short))
    )
    np.testing.assert_array_equal(ours.to_bytes(), same.to_bytes())


def test_moments_that_are_none_are_refused():
    w, h = case()
    with pytest.raises(QjaxError, match=r"w: the second moment .* not positive definite.* calibration text"):
        gptq.quantize("w", jnp.asarray(w), formats.get("NF4"), seen(h - 2 * np.diag(np.diag(h))[::-1]), rtn.Options())


def test_a_rule_of_rounding_is_refused():
    w, h = case()
    with pytest.raises(QjaxError, match="leave rounding out"):
        gptq.quantize("w", jnp.asarray(w), Affine(bits=4), seen(h), rtn.Options(rounding="floor"))


@pytest.fixture(scope="module")
def text():
    """For calibration, 32 windows."""
    return "".join(tale.text for tale in tales.generate(tales.TRAINING, 400))


@pytest.mark.exact
@pytest.mark.parametrize(
    "format", ["Q4_0", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS", *(Affine(bits=b) for b in (4, 3, 2))], ids=label
)
def test_every_matrix_of_a_model_gains(tiny, text, format):
    windows = pipeline.windows(tiny.config, tiny.tokenizer, text, 512, 32)
    of_model, _ = statistics.moments(tiny.config, tiny.tensors, windows, 8)
    for name, of_input in of_model.items():
        w, h = tiny.tensors[name], np.asarray(of_input.second_moment)
        options = rtn.Options(Importance({name: of_input.importance[None]}))
        nearest = rtn.quantize_tensor(name, w, formats.get(format), options)
        assert error(gptq.quantize(name, w, formats.get(format), of_input, options), w, h) < 0.9 * error(nearest, w, h)


@pytest.mark.exact
@pytest.mark.parametrize("recipe", ["Q2_K", "Q4_0", "Q4_K_M"])
def test_the_divergence_of_a_model_falls(tiny, text, recipe):
    """By a quarter at least, beside what llama-quantize makes of an importance matrix."""
    other = "".join(tale.text for tale in tales.generate(0, 60))
    ours, theirs = (
        qjax.kl_divergence(tiny, tiny.quantize(recipe, method=method, calibrate=text, chunks=32), other, n_ctx=256)
        for method in ("gptq", "rtn")
    )
    assert ours.mean < 0.75 * theirs.mean


# ── clip ─────────────────────────────────────────────────────────────────────────────────────────────


def test_clipping_keeps_the_best_size_of_each_block():
    w, h = case()
    w = w * np.where(np.arange(256) % 5, 1, 3).astype(np.float32)
    format = Affine(bits=3, block_size=32, scale_dtype="float32")
    t = clip.quantize("w", jnp.asarray(w), format, seen(h), rtn.Options())
    d, rounded = np.asarray(t.fields.d), np.float64(qjax.dequantize(t)) - w
    blocks, shares = np.float64(w).reshape(64, 8, 32), np.float64(d) / qjax.quantize(w, format).fields.d
    within = np.float64(h).reshape(8, 32, 8, 32)[np.arange(8), :, np.arange(8)]

    def errors(e):
        return np.einsum("rbi,bij,rbj->rb", e, within, e)

    ours, tried = errors(rounded.reshape(64, 8, 32)), []
    for size in np.arange(0.5, 1.06, 0.05):
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
        steps = largest / -4 * size
        tried.append(errors(np.clip(np.round(blocks / steps), -4, 3) * steps - blocks))
    np.testing.assert_allclose(ours, np.min(tried, axis=0), rtol=1e-3)
    assert shares.min() < 0.75
    assert shares.max() > 0.95


def test_clipping_needs_blocks_of_their_own():
    w, h = case()
    with pytest.raises(
        QjaxError, match=r"w: clip can not round to NF4, in which blocks share a scale. Use one of Q4_0"
    ):
        clip.quantize("w", jnp.asarray(w), formats.get("NF4"), seen(h), rtn.Options())


# ── hqq ──────────────────────────────────────────────────────────────────────────────────────────────


def half_quadratic(w, bits, p=0.7, beta=10.0, growth=1.01, rounds=20):
    """The offset of one group and Σ |E|^p of the best round, from the range of its weights on."""
    top = 2**bits - 1
    d, m = np.ptp(w) / top, w.min()
    best, offset = np.inf, m
    for k in range(rounds + 1):
        e = w - (np.clip(np.round((w - m) / d), 0, top) * d + m)
        if np.sum(np.abs(e) ** p) < best:
            best, offset = np.sum(np.abs(e) ** p), m
        x = e / d
        with np.errstate(divide="ignore"):
            z = np.sign(x) * np.maximum(np.abs(x) - np.abs(x) ** (p - 1) / (beta * growth**k), 0)
        m = m + d * np.mean(x - z)
    return offset, best


def test_offsets_are_the_half_quadratic_ones():
    w, _ = case()
    format = Affine(bits=3, block_size=64, symmetric=False, scale_dtype="float32")
    t = hqq.quantize("w", jnp.asarray(w), format, None, rtn.Options())
    found = [half_quadratic(np.float64(group), 3) for group in w.reshape(-1, 64)]
    offset, cost = (np.array(a).reshape(64, 4) for a in zip(*found))
    ours = np.sum(np.abs(np.float64(qjax.dequantize(t)) - w).reshape(64, 4, 64) ** 0.7, axis=-1)
    plain = np.sum(np.abs(np.float64(qjax.dequantize(qjax.quantize(w, format))) - w).reshape(64, 4, 64) ** 0.7, axis=-1)
    # A code on the other side of a middle in float32 leads elsewhere.
    assert np.mean(np.abs(ours / cost - 1) < 1e-4) > 0.95
    assert np.mean(np.abs(t.fields.m - offset) < 1e-4) > 0.9
    assert (ours <= plain * (1 + 1e-5)).all()
    assert ours.sum() < 0.99 * plain.sum()


def test_formats_without_offsets_fit_their_scales():
    w, _ = case()
    t, plain = hqq.quantize("w", jnp.asarray(w), formats.get("Q4_0"), None, rtn.Options()), qjax.quantize(w, "Q4_0")
    cost, before = (np.sum(np.abs(np.float64(qjax.dequantize(a)) - w) ** 0.7) for a in (t, plain))
    assert cost < 0.99 * before
