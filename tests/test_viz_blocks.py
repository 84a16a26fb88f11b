"""The plots about outliers, clips and block sizes: what they claim in words, against theory and plain numpy."""

import io
import re

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from qjax import viz
from qjax.viz.blocks import peak_sqnr_db

pytestmark = pytest.mark.in_haste

AT = (3, 40)


def weights(outlier: float = 64.0) -> np.ndarray:
    w = np.random.default_rng(0).standard_normal((32, 128)).astype(np.float32)
    w[AT] = outlier
    return w


def others() -> np.ndarray:
    mask = np.ones((32, 128), bool)
    mask[AT] = False
    return mask


def rounded(w: np.ndarray, group: int, bits: int) -> np.ndarray:
    """Multiples of a step for each group, which its largest magnitude sets."""
    groups = w.reshape(-1, group)
    step = np.abs(groups).max(axis=1, keepdims=True) / 2 ** (bits - 1)
    return (np.rint(groups / step) * step).reshape(w.shape)


def comb(group: int, bits: int, outlier: float = 64.0):
    w = weights(outlier)
    return viz.plot_comb(w, rounded(w, group, bits), AT, group, bits)


CLIPS = np.arange(0.5, 6, 0.05)
SIZES = [8, 16, 32, 64, 128, 256]


def sqnr_of_sizes(loss_db: float, bits: int) -> list[float]:
    """So many decibels less for each doubling of the block."""
    return [6 * bits - loss_db * i for i in range(len(SIZES))]


FIGURES = {
    "reach": lambda: viz.plot_reach(weights(), {"all": 0 * weights(), "row": rounded(weights(), 128, 4)}, others()),
    "outlier": lambda: viz.plot_outlier(
        [4, 8, 16, 64], {b: peak_sqnr_db(b, np.array([4.0, 8, 16, 64])) for b in (4, 8)}
    ),
    "clip": lambda: viz.plot_clip(CLIPS, {b: 6 * b - (CLIPS - 2) ** 2 for b in (2, 4, 8)}),
    "block sizes": lambda: viz.plot_block_sizes(
        SIZES, {b: sqnr_of_sizes(1, b) for b in (3, 4, 5)}, {"real": sqnr_of_sizes(1, 4), "wild": sqnr_of_sizes(2, 4)}
    ),
    "channels": lambda: viz.plot_channels({"a.weight": weights(0), "b.weight": weights(20).T}),
    "comb of one line": lambda: comb(32, 4),
    "comb of many lines": lambda: comb(4096, 8, outlier=8),
    "comb of a small group": lambda: comb(16, 3),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure(name):
    """Small enough to store, nothing cut off, legible, and described in words."""
    figure = FIGURES[name]()
    data, metadata = figure._repr_png_()
    assert len(data) < 80_000
    assert len(Image.open(io.BytesIO(data)).convert("RGB").getcolors(2**16)) > 20, "empty"
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= drawn.x0 < drawn.x1 <= width, drawn
    assert 0 <= drawn.y0 < drawn.y1 <= height, drawn
    assert all(text.get_fontsize() >= 10 for text in figure.findobj(Text))
    assert metadata["alt"] == figure.alt != viz.Figure.alt
    assert "\n" not in figure.alt


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("peak", [4, 8])
def test_the_formula_is_what_rounding_does(peak, bits):
    x = np.random.default_rng(1).standard_normal(2**18).clip(-peak, peak)
    step = peak / 2 ** (bits - 1)
    error = np.rint(x / step) * step - x
    assert peak_sqnr_db(bits, np.array([float(peak)])) == pytest.approx(-10 * np.log10(np.mean(error**2)), abs=0.05)


def test_reach_leaves_the_outlier_out():
    """Weights that are all lost are at 0 dB, whatever became of the outlier; a row in 32 lost is at 15."""
    w = weights()
    lost_row = np.where(np.arange(32)[:, None] == AT[0], 0, w)
    alt = viz.plot_reach(w, {"all": 0 * w, "kept": np.where(others(), 0, w), "row": lost_row}, others()).alt
    assert re.findall(r"(\w+): SQNR of the others (\d+) dB", alt) == [("all", "0"), ("kept", "0"), ("row", "15")]


@pytest.mark.parametrize(("group", "bits"), [(32, 4), (128, 8), (4096, 6)])
def test_comb_counts_what_the_outlier_takes_down(group, bits):
    w = weights()
    alt = comb(group, bits).alt
    step, zeros = re.search(r"steps of (\S+) σ around it, where (\d+)% become zero", alt).groups()
    first = (AT[0] * 128 + AT[1]) // group * group
    sharing = np.delete(w.ravel()[first : first + group], AT[0] * 128 + AT[1] - first)
    sigma = w[others()].std()
    assert float(step) == pytest.approx(64 / 2 ** (bits - 1) / sigma, rel=0.05)
    assert float(zeros) == pytest.approx(100 * np.mean(np.abs(sharing) < 64 / 2**bits), abs=0.5)
    assert f"{bits + 16 / group:.2f} bpw" in alt


def test_best_clip_and_best_block_are_the_maxima():
    clip = FIGURES["clip"]().alt
    assert [float(c) for c in re.findall(r"bits (\d\.\d\d) σ", clip)] == pytest.approx([2, 2, 2])
    # Doubling a block saves half of scale_bits / n, at 6.02 dB a bit: with 16 bits 3.0, 1.5, 0.75 dB from 16, 32, 64.
    sizes = FIGURES["block sizes"]().alt
    best = re.findall(r"(real|wild) with scales of (\d+) bits (\d+)", sizes)
    assert best == [("real", "16", "64"), ("real", "8", "32"), ("wild", "16", "32"), ("wild", "8", "16")]


def test_channels_find_the_row_and_the_column_that_stand_out():
    w = np.ones((8, 16), np.float32)
    w[2] *= 3
    w[:, 5] *= 2
    alt = viz.plot_channels({"w": w}).alt
    rms = np.sqrt(np.mean(w**2))
    row, column = (np.sqrt(np.mean(v**2)) / rms for v in (w[2], w[:, 5]))
    assert f"w: rows up to {row:.1f}; w: columns up to {column:.1f}" in alt


def test_channels_shows_the_wildest_of_many():
    """The matrix of the wildest row and that of the wildest column, each once, and none that is tame."""
    tame, row, column = (np.ones((8, 16), np.float32) for _ in range(3))
    row[2] *= 3
    column[:, 5] *= 2
    alt = viz.plot_channels({"tame": tame, "row": row, "column": column}).alt
    assert re.findall(r"; (\w+): rows", alt) == ["row", "column"]
    both = viz.plot_channels({"tame": tame, "both": row * column}).alt
    assert re.findall(r"; (\w+): rows", both) == ["both"]
