"""Plots and controls: what they show, how large, how fast to see."""

import base64
import dataclasses
import io
import math
import re
from statistics import NormalDist

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.text import Text
from PIL import Image

import qjax
from qjax import viz
from qjax.comparison import Comparison, Row
from qjax.viz import plots, tradeoff
from qjax.viz.figure import css_size, png

pytestmark = pytest.mark.in_haste

RULES = qjax.formats.rounding_names()


def weights(rows: int = 64, columns: int = 96) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


def row(format: str, family: str, bpw: float, kld: float) -> Row:
    return Row(
        format=format, family=family, bpw=bpw, size_bytes=int(bpw * 1000), ppl=3 * (1 + kld), ppl_stderr=0.02,
        delta_ppl=3 * kld, delta_ppl_stderr=0.01, kld=kld, kld_stderr=kld / 10, same_top=99.0, accuracy=0.9,
        accuracy_low=0.8, accuracy_high=0.95, tokens_per_s=1000.0,
    )  # fmt: skip


@pytest.fixture
def comparison() -> Comparison:
    rows = (
        row("base", "base", 32, 0),
        row("Affine(2 bits, block 32, symmetric)", "affine", 2.5, 0.5),
        row("Q4_0", "legacy", 4.5, 0.02),
        row("Q4_1", "legacy", 5, 0.01),
        row("F16", "plain", 16, 1e-7),
        row("F32", "plain", 32, 0),
        row("X9", "a family of tomorrow", 9, 1e-4),
    )
    return Comparison({"model": "tiny", "text": "held-out tales"}, 4080, 2.9, rows, {})


FORMATS = [qjax.formats.get(name) for name in qjax.formats.names()]
STORED = [format for format in FORMATS if format.family not in ("plain", "integer", "wide")]

# So many decibels for all formats, and fewer for one.
SQNR = {format: 5.2 * format.bpw for format in STORED} | {qjax.formats.get("Q4_0"): 20.0}

SAMPLES = dict.fromkeys(["Affine(2 bits, block 32, symmetric)", "Q4_0", "Q4_1", "F16", "F32", "X9"], " a fox. " * 30)

FIGURES = {
    "panels": lambda c: viz.plot_panels(weights(), qjax.quantize(weights(), "Q4_0")),
    "panels of a small matrix": lambda c: viz.plot_panels(weights(3, 32), qjax.quantize(weights(3, 32), "Q8_0")),
    "panels without error": lambda c: viz.plot_panels(np.zeros((4, 32)), qjax.quantize(np.zeros((4, 32)), "Q4_1")),
    "histogram": lambda c: viz.plot_error_histogram({"a": weights() / 10, "b": weights() / 20 - 0.5}),
    "dot": lambda c: viz.plot_dot_error([16, 256], {"floor": [1.0, 16.0], "nearest": [1.0, 4.0]}),
    "divergences": lambda c: viz.plot_divergences([3, 4], {"floor": [9.0, 0.02], "nearest": [0.02, 0.005]}),
    "trade-off, PPL": lambda c: viz.plot_tradeoff(c),
    "trade-off, KLD": lambda c: viz.plot_tradeoff(c, "kld"),
    "levels": lambda c: viz.plot_levels(["Q4_0", "NF4", "MXFP4", "TQ2_0"], weights()),
    "rate": lambda c: viz.plot_rate(SQNR, "weights"),
    "gap": lambda c: viz.plot_gap(SQNR, "weights"),
    "gap of a family": lambda c: viz.plot_gap(SQNR, "weights", "kquants"),
    "gap above the bound": lambda c: viz.plot_gap({format: 7 * format.bpw for format in STORED}, "weights"),
    "gains": lambda c: viz.plot_gains(SQNR, dict(list({f: s + 1 for f, s in SQNR.items()}.items())[:7]), "luck"),
    "budget": lambda c: viz.plot_budget(c, 4.6, SAMPLES, "Once upon"),
    "budget for nothing": lambda c: viz.plot_budget(c, 1, SAMPLES),
} | {f"rounding, {rule}": lambda c, rule=rule: viz.plot_rounding(4, rule) for rule in RULES}


@pytest.mark.parametrize("name", FIGURES)
def test_figure(name, comparison):
    """An opaque picture of the promised size, small enough to store, not cut off, and described in words."""
    figure = FIGURES[name](comparison)
    data, metadata = figure._repr_png_()
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    assert len(data) < 80_000
    assert np.allclose(picture.size, figure.get_size_inches() * figure.dpi, atol=1)
    assert np.allclose((metadata["width"], metadata["height"]), figure.get_size_inches() * 96, atol=1)
    assert picture.getextrema()[3] == (255, 255), "opaque, for dark pages"
    assert min(picture.getpixel((0, 0))[:3]) > 240, "a light ground"
    assert len(picture.getcolors()) > 20, "empty"

    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= drawn.x0 < drawn.x1 <= width, drawn
    assert 0 <= drawn.y0 < drawn.y1 <= height, drawn
    assert all(text.get_fontsize() >= 10 for text in figure.findobj(Text))

    assert metadata["alt"] == figure.alt != viz.Figure.alt
    assert repr(figure) == f"Figure: {figure.alt}"


def test_a_figure_leaves_nothing_behind():
    """The settings of other figures do not change."""
    before = dict(matplotlib.rcParams)
    png(viz.plot_rounding(4, "floor"))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", qjax.Affine(bits=3, symmetric=False)])
def test_codes(format):
    """codes · d (+ m) are the weights, bit for bit; a block of zeros has codes of zero."""
    w = weights()
    w[5, 32:64] = 0
    t = qjax.quantize(w, format)
    q = viz.codes(t)
    d = np.repeat(np.asarray(t.fields.d, np.float32), 32, axis=-1)
    m = np.repeat(np.asarray(t.fields.m, np.float32), 32, axis=-1) if "m" in t.fields._fields else 0
    assert np.array_equal(q, np.rint(q))
    assert np.array_equal(np.float32(q) * d + np.float32(m), np.asarray(qjax.dequantize(t)))
    assert not q[5, 32:64].any()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("rule", "mean", "mse"),
    [("nearest_even", 0, 1 / 12), ("floor", -1 / 2, 1 / 3), ("stochastic", 0, 1 / 6)],
)
def test_rounding_figure_shows_what_theory_says(rule, mean, mse, bits):
    shown = re.search(r"mean (\S+) Δ and mean square (\S+) Δ²", viz.plot_rounding(bits, rule).alt)
    assert float(shown[1]) == pytest.approx(mean, abs=0.02)
    assert float(shown[2]) == pytest.approx(mse, abs=0.006)
    assert shown[1] != "-0.00"


def test_levels():
    """Of formats whose values are known from elsewhere: QLoRA's quantiles, OCP's E2M1 with the 6 out of reach."""
    quantiles = [NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    negative = [-NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    nf4 = np.sort([*negative, 0, *quantiles]) / quantiles[0]
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4]) / 4
    expected = {"NF4": nf4, "MXFP4": np.union1d(e2m1, -e2m1), "Q4_0": np.arange(-8, 8) / 8, "TQ1_0": [-1, 0, 1]}
    for name, values in expected.items():
        assert viz.levels(name) == pytest.approx(values, abs=1e-3)


def test_gap_and_front():
    """Of formats at 5.2 dB per bit none beats another; of two of one size only the better one is named."""
    alt = viz.plot_gap(SQNR, "weights", "legacy").alt
    gap = {name: float(value) for name, value in re.findall(r"(Q\d_\d) (-?\d+\.\d)", alt)}
    assert gap["Q5_0"] == pytest.approx(5.5 * (20 * math.log10(2) - 5.2), abs=0.05)
    assert gap["Q4_0"] == pytest.approx(4.5 * 20 * math.log10(2) - 20, abs=0.05)
    best = viz.plot_rate({f: s for f, s in SQNR.items() if f.name in ("Q4_0", "Q4_K", "Q4_1", "Q8_0")}, "weights").alt
    assert re.findall(r"(\w+) \(", best) == ["Q4_K", "Q4_1", "Q8_0"]


@pytest.mark.parametrize("name", ["gap", "gap above the bound"])
def test_names_of_points_do_not_overlap(name):
    figure = FIGURES[name](None)
    png(figure)
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without the lines to the points
    assert len(boxes) > 10
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), figure.axes[0].texts[i]


def test_every_family_has_a_colour_of_its_own():
    families = {format.family for format in FORMATS} - {"integer", "wide"} | {"affine"}
    assert families <= set(tradeoff._FAMILIES)
    assert len(set(tradeoff._FAMILIES.values())) == len(tradeoff._FAMILIES)


def test_best_within_budget(comparison):
    assert "4.6 bits per weight buy Q4_0: KLD 0.02" in viz.plot_budget(comparison, 4.6, SAMPLES).alt
    assert "buy none" in viz.plot_budget(comparison, 2, SAMPLES).alt


def test_every_format_is_in_the_tradeoff(comparison):
    figure = viz.plot_tradeoff(comparison)
    texts = {t.get_text() for t in figure.axes[0].texts}
    assert {"Q4_0", "Q4_1", "F16", "2 bits", "X9", "lowest possible: 2.900"} <= {text.split(" ↑")[0] for text in texts}
    assert {"legacy", "affine"} <= {text.get_text() for text in figure.axes[0].get_legend().texts}
    assert "F32" not in {t.get_text() for t in viz.plot_tradeoff(comparison, "kld").axes[0].texts}


def test_a_perplexity_far_above_stands_beside_the_name(comparison):
    far = dataclasses.replace(comparison.rows[2], ppl=3172.4, format="TQ1_0", family="ternary")
    ax = viz.plot_tradeoff(dataclasses.replace(comparison, rows=(*comparison.rows, far))).axes[0]
    assert "TQ1_0 ↑ 3,172" in {text.get_text() for text in ax.texts}
    assert ax.get_ylim()[1] < 2 * comparison.rows[0].ppl


@pytest.mark.parametrize("measure", ["ppl", "kld"])
def test_names_in_the_tradeoff_do_not_overlap(comparison, measure):
    rows = [row(f.name, f.family, f.bpw, 4 ** (1.5 - f.bpw)) for f in STORED]
    figure = viz.plot_tradeoff(dataclasses.replace(comparison, rows=(comparison.rows[0], *rows)), measure)
    png(figure)
    texts = figure.axes[0].texts
    boxes = [Text.get_window_extent(text) for text in texts]
    assert len(boxes) >= len(rows)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i]


def test_a_tradeoff_without_losses_is_drawn(comparison):
    """Without a warning, which would be an error here."""
    same = dataclasses.replace(comparison, rows=(comparison.rows[0], comparison.rows[5]))
    assert len(viz.plot_tradeoff(same, "kld").axes[0].texts) == 0


# ── explore ────────────────────────────────────────────────────────────────────────────────────────────────


def picture(bits=3, rule="floor"):
    return viz.plot_rounding(bits, rule)


def controls(explorer):
    return explorer.children[0].children


def shown(explorer):
    return explorer.children[1].value


def as_html(figure):
    """What the widget shows for a figure."""
    width, height = css_size(figure)
    return re.compile(
        f'<img alt="{re.escape(figure.alt)}" width="{width}" height="{height}" [^>]*'
        f'src="data:image/png;base64,{re.escape(base64.b64encode(png(figure)).decode())}">'
    )


def test_explore_shows_the_defaults_at_once():
    explorer = viz.explore(picture, bits=[2, 3, 8], rule=["truncate", "floor"])
    assert as_html(picture()).fullmatch(shown(explorer))
    assert [c.value for c in controls(explorer)] == [3, "floor"]
    assert not any(c.continuous_update for c in controls(explorer))
    assert repr(explorer) == "Explorer(bits: 3 stops, rule: 2 stops)"


def test_explore_follows_the_controls():
    explorer = viz.explore(picture, bits=[2, 3, 8], rule=["truncate", "floor"])
    for stop in explorer.stops:
        for control in controls(explorer):
            control.value = stop[control.description]
        assert as_html(picture(**stop)).fullmatch(shown(explorer))
    assert len(explorer.stops) == 6


def test_explore_draws_a_stop_once():
    calls = []

    def render(n):
        calls.append(n)
        return f"<b>{n}</b>"

    explorer = viz.explore(render, n=[1, 2])
    slider = controls(explorer)[0]
    for n in (2, 1, 2, 1):
        slider.value = n
        assert shown(explorer) == f"<b>{n}</b>"
    assert calls == [1, 2]


def test_explore_shows_errors_and_recovers():
    def render(name="good"):
        if name == "bad":
            raise qjax.QjaxError("row length 100 <is> wrong")
        return picture()

    explorer = viz.explore(render, name=["good", "bad"])
    controls(explorer)[0].value = "bad"
    assert shown(explorer) == "<p><b>QjaxError</b>: row length 100 &lt;is&gt; wrong</p>"
    controls(explorer)[0].value = "good"
    assert as_html(picture()).fullmatch(shown(explorer))


def test_explore_takes_any_matplotlib_figure():
    def render(n=1):
        figure = MatplotlibFigure()
        figure.add_subplot().plot([0, n])
        return figure

    assert shown(viz.explore(render, n=[1])).startswith('<img alt="a figure" width="614" height="461"')


@pytest.mark.parametrize("options", [{"bits": []}, {"bits": [2, 4]}, {"bits": [3], "rule": ["nearest_even"]}])
def test_explore_refuses_what_it_cannot_show(options):
    with pytest.raises(ValueError, match=r"explore: (bits|rule) can be one of"):
        viz.explore(picture, **options)


def test_rounding_to_a_step():
    assert plots.round_to_step(np.array([0.3, -0.3, 0.55]), 0.5, "floor").tolist() == [0.0, -0.5, 0.5]
