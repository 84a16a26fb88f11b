"""The playground: its numbers are the package's, it stops when told to, and what goes wrong is said on the page."""

import dataclasses
import io
import re
import threading

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

import qjax
from qjax import evaluate, formats, viz
from qjax.methods import plan as planning
from qjax.methods import recipes
from qjax.progress import Step, Stopped, observed, progress
from qjax.viz.playground import Playground
from qjax.viz.trial import (
    BY_BUDGET,
    BY_GROUP,
    GROUPS,
    STAGES,
    TRIAL,
    Settings,
    Trial,
    format_names,
    try_out,
    with_error,
)

pytestmark = pytest.mark.in_haste

SMALL = Settings(attention="Q4_0", mlp="Q8_0", embedding="BF16", windows=2, max_tokens=8)


@pytest.fixture(scope="module")
def tiny():
    return qjax.load("tiny")


@pytest.fixture(scope="module")
def reports():
    return []


@pytest.fixture(scope="module")
def trial(reports) -> Trial:
    with observed(reports.append):
        return try_out(SMALL)


# ── the work ─────────────────────────────────────────────────────────────────────────────────────────


def test_is_what_the_package_says(trial, tiny):
    """Window by window, as the trial takes them: so nothing is compiled twice."""
    small = tiny.quantize(trial.plan.recipe)
    assert trial.plan == SMALL.plan(tiny)
    assert trial.plan.bpw == small.bpw
    tokens = tiny.tokenizer.encode(evaluate.held_out_tales(60))
    for side, model in ((trial.base, tiny), (trial.quantized, small)):
        assert (side.size_bytes, side.bpw) == (model.nbytes, model.bpw)
        assert side.generation == model.generate(SMALL.prompt, max_tokens=8)
        assert side.tokens_per_s > 0
    first, second = (qjax.kl_divergence(tiny, small, tokens[start:], chunks=1) for start in (0, 512))
    for name in ("mean", "stderr", "p99", "same_top", "ppl", "ppl_stderr", "ppl_base", "delta_ppl", "delta_ppl_stderr"):
        assert getattr(trial.after(1), name) == pytest.approx(getattr(first, name), rel=1e-5), name
    k = trial.divergence
    assert k.mean == pytest.approx((first.mean + second.mean) / 2, rel=1e-5)
    assert k.n_tokens == first.n_tokens + second.n_tokens
    for ppl, model in ((k.ppl, small), (k.ppl_base, tiny)):
        parts = [qjax.perplexity(model, tokens[start:], chunks=1, precision="float32") for start in (0, 512)]
        assert np.log(ppl) == pytest.approx(sum(p.mean_nll for p in parts) / 2, rel=1e-5)
    assert trial.is_float
    assert not trial.notes


def test_what_was_quantized_before(tiny, trial):
    """The page says that errors add up."""
    plan = Settings(recipe="Q8_0").plan(tiny.quantize({"ffn_": "Q4_0"}))
    again = dataclasses.replace(trial, plan=plan)
    assert not again.is_float
    assert len(again.notes) == 1
    assert "was quantized before" in again.notes[0]
    page = viz.trial_page(again)
    assert "as loaded" in page
    assert "float model" not in page
    assert f"<p>{again.notes[0]}.</p>" in page


def described(model):
    return {key: value for key, (_, value) in model.config.to_gguf().items()}


def test_a_budget_buys_the_largest_file_type(tiny, trial):
    """Nothing that was left out is larger and fits; the note says which it is and what it takes."""
    others = set(recipes.names()) - set(recipes.FOR_FEW_MODELS)
    rivals = {other: planning.plan(tiny.tensors, recipes.recipe(other), described(tiny)) for other in others}
    for budget, name in ((3.5, "Q2_K"), (4.82, "IQ4_NL"), (5, "Q4_K_S"), (5.7, "Q5_K_S"), (99, "Q8_0")):
        plan = Settings(recipe=BY_BUDGET, budget=budget).plan(tiny)
        assert plan.recipe.name == name
        assert plan.bpw <= budget
        for other, rival in rivals.items():
            lacking = any(step.lacks_imatrix for step in rival.steps)
            grows = rival.bpw >= rival.source_bpw
            assert lacking or grows or rival.bpw > budget or rival.bpw <= plan.bpw, other
    assert Settings(recipe=BY_BUDGET, budget=99).plan(tiny).bpw == tiny.quantize("Q8_0").bpw
    settings = Settings(recipe=BY_BUDGET, budget=5)
    found = dataclasses.replace(trial, settings=settings, plan=settings.plan(tiny))
    assert found.notes == ("Q4_K_S is the largest file type within 5 bits per weight: it takes 4.847",)
    assert str(settings) == "tiny, at most 5 bits per weight"


def test_an_imatrix_lets_a_budget_buy_more(tiny):
    """With it the file types of two bits may be had."""
    matrix, _ = evaluate.imatrix(tiny, evaluate.held_out_tales(60), chunks=2, score=False)
    plan = Settings(recipe=BY_BUDGET, budget=3).plan(tiny, matrix)
    assert plan.recipe.name == "IQ2_S"
    with pytest.raises(qjax.QjaxError, match="smallest possible for this model is IQ1_S with 2.217$"):
        Settings(recipe=BY_BUDGET, budget=2).plan(tiny, matrix)
    small = tiny.quantize({".*": "TQ2_0"})
    with pytest.raises(qjax.QjaxError, match="no file type makes this model smaller"):
        Settings(recipe=BY_BUDGET, budget=9).plan(small)


def test_groups_hold_each_matrix_once(tiny):
    for name, tensor in tiny.tensors.items():
        if len(tensor.shape) > 1:
            assert sum(bool(re.search(pattern, name)) for pattern in GROUPS.values()) == 1, name


def test_everything_offered_is_known():
    assert all(formats.get(name).for_weights for name in format_names())
    assert {"BF16", "Q4_0", "Q6_K", "NF4", "MXFP4"} <= set(format_names())
    assert all(recipes.recipe(name) for name in recipes.names())


def test_text_of_ones_own(tmp_path, trial):
    """A text file is read instead of the tales."""
    path = tmp_path / "a <text>.txt"
    path.write_text(evaluate.held_out_tales(60), encoding="utf-8")
    found = try_out(dataclasses.replace(SMALL, text=str(path)))
    assert found.divergence == trial.divergence
    assert "a &lt;text&gt;.txt" in viz.trial_page(found)


def test_reports_each_step(trial, reports, tiny):
    """Stages in order, in each the steps of its loops counted up to their end: tensors, windows, tokens."""
    assert [step for step in reports if step.desc == TRIAL] == [Step(TRIAL, i, 5, "step") for i in range(6)]
    loops = dict.fromkeys(step.desc for step in reports)
    assert tuple(loops) == (TRIAL, "loading tiny", STAGES[1], "quantizing to custom", STAGES[3], STAGES[4])
    n_tensors = len(tiny.tensors)
    ends = [Step("loading tiny", n_tensors, n_tensors, "tensor"), Step(STAGES[1], 8, 8, "token")]
    ends += [Step("quantizing to custom", n_tensors, n_tensors, "tensor"), Step(STAGES[3], 2, 2, "window")]
    ends += [Step(STAGES[4], 8, 8, "token")]
    for loop, end in zip(list(loops)[1:], ends):
        steps = [step for step in reports if step.desc == loop]
        assert [step.done for step in steps] == sorted(step.done for step in steps)
        assert steps[0].done == 0
        assert steps[-1] == end


@pytest.mark.parametrize("stage", ["loading tiny", STAGES[1], "quantizing to custom", STAGES[3], STAGES[4]])
def test_is_stopped_in_each_stage(stage):
    seen = []

    def show(step):
        seen.append(step)
        if step.desc == stage and step.done:
            raise Stopped

    with pytest.raises(Stopped), observed(show):
        try_out(SMALL)
    assert [step.done > 0 for step in seen if step.desc == stage] == [False, True]
    assert seen[-1].desc == stage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "tinny"}, "tinny: no such file or folder"),
        ({"text": "nowhere.txt"}, "nowhere.txt: cannot be read"),
        ({"prompt": ""}, "prompt is empty"),
        ({"recipe": "Q4_KM"}, "unknown file type 'Q4_KM'. Did you mean Q4_K_M"),
        ({"recipe": "IQ2_XXS"}, "needs the tensor's importance"),
        ({"mlp": "Q8_0", "imatrix": "nowhere.gguf"}, "nowhere.gguf"),
        (
            {"recipe": BY_BUDGET, "budget": 3},
            "no file type fits into 3 bits per weight: the smallest possible for this model is Q2_K with 3.467; the "
            "file types below need an importance matrix",
        ),
        ({"recipe": BY_BUDGET, "budget": float("nan")}, "no file type fits into nan"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(qjax.QjaxError, match=re.escape(message)):
        try_out(dataclasses.replace(SMALL, **change))


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────


def test_page_shows_the_numbers(trial):
    page, k = viz.trial_page(trial), trial.divergence
    cells = re.findall("<td[^>]*>([^<]*)", page)
    assert {with_error(k.ppl, k.ppl_stderr), with_error(k.mean, k.stderr)} <= set(cells)
    assert with_error(k.delta_ppl, k.delta_ppl_stderr, "+") in cells
    assert f"{trial.quantized.bpw:.2f}" in cells
    assert f"{trial.quantized.tokens_per_s:.0f}" in cells
    assert "7.0 MiB" in cells
    assert f"{trial.quantized.bpw:.2f} bits per weight" in page.alt


def with_texts(trial: Trial, *texts: str) -> Trial:
    sides = [
        dataclasses.replace(side, generation=dataclasses.replace(side.generation, text=text))
        for side, text in zip((trial.base, trial.quantized), texts)
    ]
    return dataclasses.replace(trial, base=sides[0], quantized=sides[1])


@pytest.mark.parametrize(
    ("texts", "underlined"),
    [
        ((" a red fox ran.", " a red fig fell."), ["fox", "fig"]),
        ((" a red", " a red fox"), ["red", "red"]),
        ((" a red.\n\nOne", " a red.\n\nTwo"), ["One", "Two"]),
        ((" a", ""), ["a"]),
        (("same", "same"), []),
        (("one", "two"), ["one", "two"]),
        ((" <b>", " <i>&"), ["&lt;b&gt;", "&lt;i&gt;&amp;"]),
    ],
)
def test_difference_is_underlined(trial, texts, underlined):
    page = viz.trial_page(with_texts(trial, *texts))
    assert re.findall("<u><b>(.*?)</b></u>", page) == underlined
    assert ("Both write the same." in page) == (texts[0] == texts[1])


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ((2.8367, 0.0688), "2.837 ± 0.069"),
        ((0.0072, 0.0027, "+"), "+0.0072 ± 0.0027"),
        ((-0.0001, 0.01, "+"), "-0.000 ± 0.010"),
        ((1234.5, 99.0), "1234 ± 99"),
        ((1234.5, 250.0), "1234 ± 250"),
        ((0.0, 0.0), "0"),
        ((float("inf"), float("nan")), "inf"),
    ],
)
def test_with_error(arguments, shown):
    assert with_error(*arguments) == shown


def test_certainty(trial):
    pictures = [viz.plot_certainty(trial, windows) for windows in (1, 2)]
    for windows, figure in zip((1, 2), pictures):
        data, _ = figure._repr_png_()
        k, drawn, (width, height) = trial.after(windows), figure.get_tightbbox(), figure.get_size_inches()
        assert len(data) < 80_000
        assert len(Image.open(io.BytesIO(data)).convert("RGB").getcolors()) > 20
        assert 0 <= drawn.x0 < drawn.x1 <= width
        assert 0 <= drawn.y0 < drawn.y1 <= height
        assert all(text.get_fontsize() >= 10 for text in figure.findobj(Text))
        assert f"after {windows} windows: ΔPPL {with_error(k.delta_ppl, k.delta_ppl_stderr, '+')}" in figure.alt
    assert trial.after(2) == trial.divergence


# ── the controls ─────────────────────────────────────────────────────────────────────────────────────


def status(page: Playground) -> str:
    return page._status.value


def test_opens_with_what_it_is_given(trial):
    page = Playground(trial)
    assert page.settings == SMALL
    assert page._page.value == viz.trial_page(trial)
    assert page.state == "idle"
    assert (page.run_button.disabled, page.stop_button.disabled) == (False, True)
    assert repr(page) == f"Playground({SMALL}; idle)"
    assert Playground().settings == Settings()
    assert set(page.controls) == {field.name for field in dataclasses.fields(Settings)}


def test_only_the_controls_that_count_can_be_set():
    page = Playground()
    for recipe in ("Q4_K_M", BY_BUDGET, BY_GROUP):
        page.controls["recipe"].value = recipe
        assert {page.controls[group].disabled for group in GROUPS} == {recipe != BY_GROUP}
        assert page.controls["budget"].disabled == (recipe != BY_BUDGET)


def test_offers_the_models_at_hand(monkeypatch):
    monkeypatch.setattr("qjax.io.repository.cached_names", lambda: ("org/a", "org/b:m-Q4_0.gguf"))
    assert Playground().controls["model"].options == (*qjax.io.hub.names(), "org/a", "org/b:m-Q4_0.gguf")


def test_runs_and_shows(trial):
    """Run works in the background, with the settings of that moment; then the page is there."""
    go, asked = threading.Event(), []

    def run(settings):
        asked.append(settings)
        assert go.wait(60)
        return trial

    page, states = Playground(run=run), []
    page.observe(lambda change: states.append(change.new), names="state")
    page.controls["model"].value = " some/model "
    page.run_button.click()
    page.start()  # is under way already
    assert page.state == "working"
    assert (page.run_button.disabled, page.stop_button.disabled) == (True, False)
    go.set()
    page.wait(60)
    assert [settings.model for settings in asked] == ["some/model"]
    assert states == ["working", "idle"]
    assert (page.run_button.disabled, page.stop_button.disabled) == (False, True)
    assert page.trial is trial
    assert page._page.value == viz.trial_page(trial)
    assert "Done." in status(page)


def test_stops_after_the_step(trial):
    """The page from before stays, and Run works again."""
    begun, step = threading.Event(), threading.Event()

    def run(settings):
        stages = iter(progress(STAGES, desc=TRIAL))
        next(stages), next(stages)
        for _ in progress(range(1000), desc="a <loop>", unit="window"):
            begun.set()
            assert step.wait(60)
        raise AssertionError("was not stopped")

    page = Playground(trial, run)
    page.stop()  # nothing to stop
    assert page.state == "idle"
    page.start()
    assert begun.wait(60)
    assert "Step 2 of 5, a &lt;loop&gt;: 0 of 1000 windows." in status(page)
    page.stop_button.click()
    assert page.state == "working"
    assert page.stop_button.disabled
    assert "Stopping" in status(page)
    step.set()
    page.wait(60)
    assert page.state == "stopped"
    assert "Stopped" in status(page)
    assert page._page.value == viz.trial_page(trial)
    page._run = lambda settings: trial
    page.start()
    page.wait(60)
    assert page.state == "idle"


def test_stops_the_real_work():
    page = Playground()

    def run(settings):
        page.stop()
        return try_out(SMALL)

    page._run = run
    page.start()
    page.wait(120)
    assert page.state == "stopped"
    assert page.trial is None


@pytest.mark.parametrize(
    ("sizes", "total", "shown"),
    [([3_000_000], 98_362_432, "3 of 99 MB"), ([3_000_000], None, "3 MB")],
)
def test_says_how_far_a_download_is(sizes, total, shown):
    page = Playground()

    def run(settings):
        for _ in progress(iter([*sizes, 0]), desc="downloading it", total=total, unit="B", size=int):
            pass
        page.stop()
        next(iter(progress([0], desc="downloading it")))

    said = []
    page._status.observe(lambda change: said.append(change.new), names="value")
    page._run = run
    page.start()
    page.wait(60)
    assert page.state == "stopped"
    assert any(f"downloading it: {shown}." in text for text in said)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (qjax.QjaxError("a <file>\nis broken"), "a &lt;file&gt;\\nis broken"),
        (MemoryError("17 GiB"), "MemoryError: 17 GiB"),
    ],
)
def test_says_what_went_wrong(error, shown, trial, capfd):
    def run(settings):
        raise error

    page = Playground(trial, run)
    page.start()
    page.wait(60)
    assert page.state == "failed"
    assert f"<b>Failed:</b> {shown}</div>" in status(page)
    assert page.trial is trial
    assert (page.run_button.disabled, page.stop_button.disabled) == (False, True)
    assert capfd.readouterr() == ("", "")


def test_an_error_of_the_package_is_one_line_on_the_page(capfd):
    page = Playground()
    page.controls["model"].value = "tinny"
    page.start()
    page.wait(60)
    assert page.state == "failed"
    assert "tinny: no such file or folder" in status(page)
    assert "Did you mean tiny?" in status(page)
    assert capfd.readouterr() == ("", "")
