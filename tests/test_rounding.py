"""The rounding rules, against numpy on ties and against statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import sampled
from oracles import formats

import qjax
from qjax.formats import Affine

NUMPY_RULES = {
    "nearest_even": np.rint,
    "nearest_away": lambda v: np.sign(v) * np.floor(np.abs(v) + 0.5),
    "half_up": lambda v: np.floor(v + 0.5),
    "truncate": np.trunc,
    "floor": np.floor,
}

# format, the codes' range about the stored zero or minimum
GRIDS = {
    "Q4_0": (-8, 7),
    "Q5_1": (0, 31),
    "Q8_0": (-127, 127),
    Affine(bits=3): (-4, 3),
    Affine(bits=6, symmetric=False): (0, 63),
}


def grid_blocks(low, high, scale):
    """Blocks of all halves between two codes, both of them in each block, so that d is ``scale`` exactly."""
    codes = np.random.default_rng(0).integers(2 * low, 2 * high + 1, (256, 32)) / 2
    codes[:, 3], codes[:, 21] = low, high
    return (codes * scale).astype(np.float32)


@pytest.mark.parametrize("rule", NUMPY_RULES)
@pytest.mark.parametrize("format", GRIDS, ids=formats.label)
@pytest.mark.parametrize("scale", sampled([1.0, 2.0**-7], 1.0))
def test_ties_go_where_the_rule_says(format, rule, scale):
    low, high = GRIDS[format]
    x = grid_blocks(low, high, scale)
    expected = np.clip(NUMPY_RULES[rule](x / scale), low, high) * scale
    np.testing.assert_array_equal(qjax.dequantize(qjax.quantize(x, format, rounding=rule)), expected)


@pytest.mark.parametrize(("name", "own"), [("Q4_0", "half_up"), ("Q5_1", "half_up"), ("Q8_0", "nearest_away")])
def test_each_format_has_its_own_rule(name, own):
    low, high = GRIDS[name]
    x = grid_blocks(low, high, 1.0)
    by_default = qjax.quantize(x, name).to_bytes()
    same = {rule for rule in NUMPY_RULES if (qjax.quantize(x, name, rounding=rule).to_bytes() == by_default).all()}
    # Away from zero and up are one thing where no value is negative.
    assert same == {own} | ({"nearest_away"} if low == 0 else set())
    assert qjax.formats.get(name).rounding == own


@pytest.mark.parametrize("format", [*GRIDS], ids=formats.label)
def test_a_negative_scale_turns_the_direction_of_ties(format):
    low, high = GRIDS[format]
    x = -grid_blocks(low, high, 1.0)
    t = qjax.quantize(x, format, rounding="half_up")
    d = np.asarray(t.fields.d, np.float32)[..., None]
    m = np.asarray(t.fields.m, np.float32)[..., None] if low == 0 else 0
    np.testing.assert_array_equal(np.asarray(d) < 0, np.full(d.shape, low < 0 and format != "Q8_0"))
    expected = np.clip(np.floor((x.reshape(256, 1, -1) - m) / d + 0.5), low, high) * d + m
    np.testing.assert_array_equal(qjax.dequantize(t), expected.reshape(256, -1))


FORMAT = Affine(bits=4, scale_dtype="float32", symmetric=False)


def quantize_fractions(seeds):
    """Codes of blocks 0, f, 2 f ..., 15 for each seed, and the exact values, in code space."""
    x = np.linspace(0, 15, 32, dtype=np.float32).reshape(1, 32)
    draws = jax.vmap(lambda seed: qjax.dequantize(qjax.quantize(x, FORMAT, rounding="stochastic", seed=seed)))(seeds)
    return np.asarray(draws)[:, 0], x[0].astype(np.float64)


def test_stochastic_takes_one_of_the_two_neighbours_without_bias():
    n = 20_000
    codes, exact = quantize_fractions(jnp.arange(n))
    assert ((codes == np.floor(exact)) | (codes == np.ceil(exact))).all()
    fraction = exact - np.floor(exact)
    sigma = np.sqrt(fraction * (1 - fraction) / n)
    np.testing.assert_array_less(np.abs(codes.mean(axis=0, dtype=np.float64) - exact), 4 * sigma + 1e-7)


def test_stochastic_leaves_integers_alone():
    """floor(v + u) would not: for one in 2^19 of these the float32 sum rounds up to the next integer."""
    codes = np.random.default_rng(0).integers(64, 128, (2**15, 32)).astype(np.float32)
    codes[:, 0] = 127
    for seed in range(4):
        t = qjax.quantize(codes, "Q8_0", rounding="stochastic", seed=seed)
        np.testing.assert_array_equal(qjax.dequantize(t), codes)


def test_stochastic_is_reproducible_by_seed():
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)

    def draw(seed):
        return np.asarray(qjax.quantize(x, "Q4_0", rounding="stochastic", seed=seed).to_bytes())

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()
    traced = jax.jit(lambda seed: qjax.quantize(x, "Q4_0", rounding="stochastic", seed=seed).fields)(1)
    np.testing.assert_array_equal(qjax.QTensor(traced, qjax.formats.get("Q4_0")).to_bytes(), draw(1))


def test_errors_of_the_rules():
    """Nearest: no bias, mean square d^2/12.  Floor: bias -d/2, mean square d^2/3, four times as much."""
    n = 2**20
    x = np.random.default_rng(0).uniform(-1, 1, (64, n // 64)).astype(np.float32)
    format = Affine(bits=8, block_size="tensor", symmetric=False, scale_dtype="float32")
    d = np.ptp(x.astype(np.float64)) / 255
    errors = {
        rule: (np.asarray(qjax.dequantize(qjax.quantize(x, format, rounding=rule)), np.float64) - x) / d
        for rule in ("nearest_even", "floor", "stochastic")
    }
    # With the standard deviation of e^2, for e uniform over one step and the two points of stochastic.
    for rule, bias, mean_square, sd_square in [
        ("nearest_even", 0, 1 / 12, np.sqrt(1 / 180)),
        ("floor", -1 / 2, 1 / 3, np.sqrt(1 / 5 - 1 / 9)),
        ("stochastic", 0, 1 / 6, np.sqrt(1 / 10 - 1 / 36)),
    ]:
        e = errors[rule]
        assert abs(e.mean() - bias) < 4 * np.sqrt((mean_square - bias**2) / n) + 1e-6
        assert abs((e**2).mean() - mean_square) < 4 * sd_square / np.sqrt(n) + 1e-6


def test_errors_of_use():
    x = np.zeros((1, 32), np.float32)
    with pytest.raises(qjax.QjaxError, match=r"unknown rounding 'nearest_evn'\. Did you mean nearest_even"):
        qjax.quantize(x, "Q4_0", rounding="nearest_evn")
    with pytest.raises(qjax.QjaxError, match="F16 has no final rounding step"):
        qjax.quantize(x, "F16", rounding="floor")
    with pytest.raises(qjax.QjaxError, match="unknown rounding"):
        Affine(rounding="up")
