"""Plots of how errors travel through a model: against models and arithmetic whose result is known."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.figures import assert_well_made

import qjax
from qjax import viz
from qjax.machine import Limits, ProductRate

pytestmark = pytest.mark.in_haste

FORMATS = ("Q8_0", "Q4_0", "2 bits")
ERRORS = {"Q8_0": [0.005, 0.007, 0.006], "Q4_0": [0.09, 0.1, 0.12], "2 bits": [0.4, 0.5, 0.6]}
PARTS = ("token_embd", "blk.0.attn", "blk.0.ffn", "blk.1.attn", "blk.1.ffn", "output.weight")
SQUARES = {part: np.linspace(1, 0.5, 5) * 1e-3 for part in PARTS}
KLDS = {part: 0.001 * (i + 1) for i, part in enumerate(PARTS)}


def mixtures() -> dict[tuple[str, ...], viz.Mixture]:
    """Of two groups, each of which costs bits and saves KLD by its format alone."""
    bits, kld = dict(zip(FORMATS, (8.5, 4.5, 2.5))), dict(zip(FORMATS, (1e-5, 5e-3, 0.2)))
    return {
        (a, b): viz.Mixture((bits[a] + bits[b]) / 2, kld[a] + 2 * kld[b], ERRORS[b]) for a in FORMATS for b in FORMATS
    }


def activations() -> np.ndarray:
    x = np.random.default_rng(0).standard_normal(96).astype(np.float32)
    x[40] = 50
    return x


FIGURES = {
    "depth": lambda: viz.plot_depth(ERRORS, "three formats"),
    "depth of 30 layers": lambda: viz.plot_depth({"Q4_0": np.linspace(0.1, 0.3, 61)}, "one format"),
    "sources": lambda: viz.plot_sources(SQUARES, [0.08, 0.07, 0.06, 0.06, 0.05], KLDS, 0.02),
    "mixture": lambda: viz.plot_mixture(mixtures(), ("Q8_0", "2 bits")),
    "activation": lambda: viz.plot_activation(activations(), {"one": 0.4, "many": np.linspace(0.01, 0.4, 96)}),
    "roofline": lambda: viz.plot_roofline(
        Limits(20, 120, 400),
        {
            name: [ProductRate(n, n * intensity, min(15 * n * intensity, 100)) for n in (1, 4, 16, 64, 256)]
            for name, intensity in {"F32": 0.5, "Q8_0": 1.9, "Q4_0": 3.6}.items()
        },
    ),
    "offload": lambda: viz.plot_offload({"F16": np.geomspace(5, 30, 34)}, {"F16": 12}, "the card's memory"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure(name):
    assert_well_made(FIGURES[name]())


def test_relative_error():
    """Each row counts by its own length: here they are off by 3/4 and by 1/2."""
    original = np.array([[0.0, 4.0], [6.0, 8.0]])
    y = original + np.array([[3.0, 0.0], [3.0, -4.0]])
    assert viz.relative_error(y, original) == pytest.approx(((9 / 16 + 1 / 4) / 2) ** 0.5)


@pytest.fixture(scope="module")
def model():
    return qjax.load("tiny").quantize("F32")


def test_depth_errors(model):
    """None without a change; of the embedding what its rows have, where the norm before attention weighs it."""
    ids = np.arange(40).reshape(2, 20)
    assert np.array_equal(viz.depth_errors(model, model, ids), np.zeros(2 * model.config.n_layers + 1))

    rough = model.quantize({"token_embd": qjax.Affine(bits=3), ".*": "F32"}).quantize("F32", allow_requantize=True)
    x, y = (np.asarray(m.tensors["token_embd.weight"], np.float64)[:40] for m in (model, rough))
    g, eps = np.asarray(model.tensors["blk.0.attn_norm.weight"], np.float64), model.config.norm_eps
    x, y = (rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + eps) * g for rows in (x, y))
    expected = np.sqrt(np.mean(np.sum((y - x) ** 2, axis=1) / np.sum(x**2, axis=1)))
    errors = viz.depth_errors(model, rough, ids)
    assert errors[0] == pytest.approx(expected, rel=1e-4)
    assert (errors[1:] > 0).all()


def test_depth_errors_see_one_part(model):
    """What lies before the part that was changed reads what it read before."""
    rough = model.quantize({r"blk\.2\.ffn_down": "Q4_0", ".*": "F32"}).quantize("F32", allow_requantize=True)
    errors = viz.depth_errors(model, rough, np.arange(20)[None])
    assert not errors[:6].any()
    assert errors[6:].all()


def test_common_share(model):
    """Of the first part, by the angle to a vector of ones; of a vector of ones itself it is all."""
    ids = np.arange(12)[None]
    x, g = (np.asarray(model.tensors[f"{n}.weight"], np.float64) for n in ("token_embd", "blk.0.attn_norm"))
    x = x[:12] * g
    cosines = x @ np.ones(len(g)) / np.linalg.norm(x, axis=1) / np.sqrt(len(g))
    share = viz.common_share(model, ids)
    assert share[0] == pytest.approx(np.mean(cosines**2), rel=1e-4)
    assert share.shape == (2 * model.config.n_layers + 1,)
    assert ((share > 0) & (share < 0.1)).all()

    params = jax.tree.map(jnp.ones_like, model.params)
    assert viz.common_share(dataclasses.replace(model, params=params), ids) == pytest.approx(1)


def test_sources_say_their_sums():
    alt = FIGURES["sources"]().alt
    assert re.search(r"add up to 0\.003, with all parts quantized at once it is 0\.0025", alt)
    assert re.search(r"add up to 0\.021, all at once have 0\.02, and most comes from the output\.weight", alt)


def test_mixtures_are_measured_as_they_are_named(model):
    """Each group gets its format, and the size is that of the model when it is quantized so."""
    packed = {name: model.quantize(name, allow_requantize=True) for name in ("Q8_0", "Q4_0")}
    names = "blk.0.attn_q.weight", "blk.3.ffn_up.weight", "token_embd.weight", "output.weight"
    table = viz.mixtures(packed, lambda chosen: (sum(map(ord, chosen(names[0]))), [chosen(name) for name in names]))
    assert len(table) == 8
    mixed = table["Q8_0", "Q4_0", "Q8_0"]
    assert mixed.errors == ["Q8_0", "Q4_0", "Q8_0", "Q8_0"]
    whole = model.quantize({"attn|token_embd": "Q8_0", "ffn": "Q4_0"}, allow_requantize=True)
    assert mixed.bpw == pytest.approx(whole.bpw)


@pytest.mark.parametrize(
    ("choice", "remark"),
    [
        (("Q8_0", "Q8_0"), "nothing better is as small"),
        (("Q4_0", "Q4_0"), "nothing better is as small"),
        # 5.5 bits: worse than Q4_0 throughout, and than 2 bits for the first and more for the second.
        (("Q8_0", "2 bits"), "3 are better and no larger"),
    ],
)
def test_mixture_counts_what_beats_it(choice, remark):
    assert remark in viz.plot_mixture(mixtures(), choice).alt


def test_activation_counts_zeros():
    """Those that rounding to the nearest multiple of the scale makes zero."""
    x, scales = activations(), {"one": 0.4, "many": np.linspace(0.01, 0.4, 96)}
    shown = re.findall(r"(one|many) (\d+) %", viz.plot_activation(x, scales).alt)
    assert shown == [(name, f"{100 * np.mean(np.rint(x / scale) == 0):.0f}") for name, scale in scales.items()]
