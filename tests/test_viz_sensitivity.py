"""Maps of tensors and pictures of mixtures: against sums and orders worked out by other means."""

import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from oracles.figures import assert_well_made

import qjax
from qjax import viz
from qjax.methods import plan, recipes
from qjax.viz.sensitivity import _format_colour, _place, affordable

pytestmark = pytest.mark.in_haste

KINDS = ("attn_q", "attn_v", "ffn_down")


def names(n_layers: int) -> list[str]:
    layers = [f"blk.{i}.{kind}.weight" for i in range(n_layers) for kind in KINDS]
    return ["output.weight", "token_embd.weight", *layers]


def costs(n_layers: int) -> dict[str, float]:
    """Powers of two, the last one largest."""
    return {name: 2.0**i * 1e-6 for i, name in enumerate(names(n_layers))}


def mixture(n_layers: int, *formats: str) -> dict[str, str]:
    return {name: formats[i % len(formats)] for i, name in enumerate(names(n_layers))}


def table() -> dict[str, list[viz.Allocation]]:
    sizes = ((3.0, 0.02), (5.0, 0.001), (4.0, 0.005))
    return {
        "uniform": [viz.Allocation(mixture(4, "Q4_K"), bpw, np.array([kld, 3 * kld]), 3.0) for bpw, kld in sizes],
        "greedy": [viz.Allocation(mixture(4, "Q4_K", "Q6_K"), bpw, np.array([kld]), 2.9) for bpw, kld in sizes],
    }


FIGURES = {
    "sensitivity": lambda: viz.plot_sensitivity(costs(4), dict.fromkeys(names(4), 100), "what it costs"),
    "sensitivity of 32 layers": lambda: viz.plot_sensitivity(
        {name: 1e-6 + i for i, name in enumerate(names(32))}, dict.fromkeys(names(32), 100), "what it costs"
    ),
    "formats": lambda: viz.plot_formats({"a": mixture(4, "Q2_K", "Q8_0"), "b": mixture(32, "Q4_K", "Q6_K")}),
    "importance": lambda: viz.plot_importance({"a": np.geomspace(1, 1e4, 300), "b": np.ones(256)}, "columns"),
    "allocations": lambda: viz.plot_allocations(table(), "what bits buy"),
    "allocation": lambda: viz.plot_allocation(table(), 4.5, "greedy"),
    "losses": lambda: viz.plot_losses({"a": [3.0, 2.0, 1.5], "b": [2.5, 2.4]}, "runs", "loss, nats"),
    "nothing affordable": lambda: viz.plot_allocation(table(), 2.0, "greedy"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure(name):
    assert_well_made(FIGURES[name]())


def shown(figure: viz.Figure) -> list[str]:
    return [text.get_text().strip() for text in figure.axes[0].texts]


def test_sensitivity_shows_shares_of_the_sum():
    """Of 1 + 2 + ... + 2^13; the last has half of it."""
    figure = FIGURES["sensitivity"]()
    n = len(names(4))
    shares = [100 * 2.0**i / (2**n - 1) for i in range(n)]
    assert sorted(map(float, shown(figure))) == pytest.approx(shares, rel=0.05)
    assert figure.alt.startswith("what it costs: ffn_down, layer 3 has 50 % of all KLDs, attn_v, layer 3 has 25 %")


def test_sensitivity_ranks_by_weight():
    """A small matrix that costs half as much is more fragile; the mean is that of all weights."""
    kld = {"blk.0.attn_v.weight": 1e-4, "blk.0.ffn_up.weight": 2e-4}
    figure = viz.plot_sensitivity(kld, {"blk.0.attn_v.weight": 100, "blk.0.ffn_up.weight": 500}, "two")
    # 3e-4 for 600 weights are 5e-7 for each; the first has 1e-6, the second 4e-7.
    assert "per weight attn_v, layer 0 2 times the mean, ffn_up, layer 0 0.8 times the mean" in figure.alt
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert labels == ["attn_v, layer 0", "ffn_up, layer 0"]


def test_map_puts_each_tensor_in_its_cell():
    """Layer across, kind down; colours are those of the legend."""
    mixed = mixture(4, "Q2_K", "Q4_K", "Q8_0")
    figure = viz.plot_formats({"mixed": mixed})
    (cells,) = figure.axes[0].collections
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["token_embd", "attn_q", "attn_v", "ffn_down", "output"]
    for name, path, colour in zip(mixed, cells.get_paths(), cells.get_facecolors()):
        layer, kind = _place(name)
        (left, top), (right, bottom) = path.get_extents().get_points()
        assert (int(left), round(right)) == ((0, 4) if layer is None else (layer, layer + 1))
        assert int((top + bottom) / 2) == rows.index(kind)
        assert to_rgb(colour) == pytest.approx(to_rgb(_format_colour(mixed[name])))
    assert sorted(shown(figure)) == sorted(mixed.values())


def test_formats_get_darker_with_their_bits():
    """So that a map can be read in grey."""
    names = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
    grey = [np.dot(to_rgb(_format_colour(name)), (0.299, 0.587, 0.114)) for name in names]
    assert np.diff(grey).max() < -0.04


def test_formats_says_what_a_recipe_gives():
    """Half of the layers get Q6_K for two kinds of matrices (`use_more_bits`), and the head."""
    model = qjax.load("tiny")
    steps = plan.plan(model.tensors, recipes.recipe("Q4_K_M"), model.metadata).steps
    mixed = {step.name: step.format.name for step in steps if len(step.shape) > 1}
    more = "Q6_K for 5 tensors (token_embd; attn_v and ffn_down of layers 2 and 3)"
    assert viz.plot_formats({"tiny": mixed}).alt == f"tiny: Q4_K for 24 tensors, {more}"


def raised(kind: str, *layers: int) -> dict[str, str]:
    return {f"blk.{i}.{kind}": "Q6_K" for i in layers}


@pytest.mark.parametrize(
    ("n_layers", "others", "said"),
    [
        (4, {}, ""),
        (4, {"output": "Q6_K"}, "Q6_K for 1 tensor (output)"),
        (4, {"output": "Q6_K", "token_embd": "Q6_K"}, "Q6_K for 2 tensors (token_embd and output)"),
        (4, raised("attn_v", 1), "Q6_K for 1 tensor (attn_v of layer 1)"),
        (4, raised("attn_v", 0, 1, 2, 3), "Q6_K for 4 tensors (attn_v of all 4 layers)"),
        (32, raised("attn_v", 0, 1, 2, 5, 6, 30), "Q6_K for 6 tensors (attn_v of layers 0 to 2, 5, 6 and 30)"),
        # Too many to be named.
        (32, raised("attn_v", *range(0, 32, 2)), "Q6_K for 16 tensors (attn_v of 16 of 32 layers)"),
        (
            4,
            raised("attn_v", 0, 2) | raised("ffn_down", 3) | {"blk.0.attn_q": "Q8_0"},
            "Q6_K for 3 tensors (attn_v of layers 0 and 2; ffn_down of layer 3), Q8_0 for 1 tensor (attn_q of layer 0)",
        ),
    ],
)
def test_formats_names_what_differs(n_layers, others, said):
    """The most frequent format is only counted; a reader who cannot see the map learns who has another."""
    mixed = mixture(n_layers, "Q4_K") | {f"{name}.weight": format for name, format in others.items()}
    usual = f"Q4_K for {len(mixed) - len(others)} tensors"
    assert viz.plot_formats({"a": mixed}).alt == "a: " + ", ".join(filter(None, (usual, said)))


def test_importance_says_what_the_largest_have():
    x = np.ones(200)
    x[[3, 77]] = 99  # 2 of 200 are 1 %, and have 198 of 396
    alt = viz.plot_importance({"uneven": x, "even": np.ones(100)}, "columns").alt
    assert "of uneven have 50 %" in alt
    assert "of even have 1 %" in alt


@pytest.mark.parametrize(("budget", "bpw"), [(2.9, None), (3.0, 3.0), (4.5, 4.0), (9.0, 5.0)])
def test_affordable_is_the_closest_that_fits(budget, bpw):
    bought = affordable(table()["greedy"], budget)
    assert (bought and bought.bpw) == bpw


def test_affordable_minds_kld_not_size():
    """Larger is not always better."""
    rows = [viz.Allocation({}, bpw, np.array([kld]), 3.0) for bpw, kld in ((4.0, 0.001), (5.0, 0.002))]
    assert affordable(rows, 6) is rows[0]


def test_allocation_says_what_was_bought():
    alt = FIGURES["allocation"]().alt
    assert alt.startswith("greedy, 4.00 of 4.5 bits per weight: KLD 0.005, PPL 2.900; Q4_K for 7 tensors; Q6_K for 7")
    assert alt.endswith("(token_embd; attn_q and ffn_down of layers 1 and 3; attn_v of layers 0 and 2)")
    assert FIGURES["nothing affordable"]().alt == "2 bits per weight buy no greedy mixture"


def test_allocations_are_drawn_by_size():
    """Lines do not run back and forth, whatever the order of the table."""
    lines = FIGURES["allocations"]().axes[0].lines
    assert [list(line.get_xdata()) for line in lines] == [[3, 4, 5]] * 2
    assert re.search(r"greedy from 0\.02 at 3\.00 to 0\.001 at 5\.00", FIGURES["allocations"]().alt)


def test_losses_are_drawn_by_step():
    """Steps are counted from 1; runs may be of different lengths."""
    figure = FIGURES["losses"]()
    a, b = figure.axes[0].lines
    assert [list(a.get_xdata()), list(a.get_ydata())] == [[1, 2, 3], [3.0, 2.0, 1.5]]
    assert [list(b.get_xdata()), list(b.get_ydata())] == [[1, 2], [2.5, 2.4]]
    assert figure.alt == "runs: loss, nats, by step, a from 3 to 1.5; b from 2.5 to 2.4"
