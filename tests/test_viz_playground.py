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
from qjax.methods import recipes
from qjax.viz import trial as trials
from qjax.viz.playground import Playground
from qjax.viz.trial import BY_GROUP, GROUPS, STAGES, Settings, Trial, format_names, try_out, with_error

SMALL = Settings(attention="Q4_0", mlp="Q8_0", embedding="BF16", windows=2, max_tokens=8)


@pytest.fixture(scope="module")
def tiny():
    return qjax.load("tiny")


@pytest.fixture(scope="module")
def reports():
    return []


@pytest.fixture(scope="module")
def trial(reports) -> Trial:
    return try_out(SMALL, lambda *step: reports.append(step))


# ── the work ─────────────────────────────────────────────────────────────────────────────────────────


def test_is_what_the_package_says(trial, tiny):
    """Window by window, as the trial takes them: so nothing is compiled twice."""
    small = tiny.quantize(SMALL.formats)
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


def test_a_file_type_and_what_was_quantized_before(tiny, trial):
    """Bytes as `Model.quantize` makes them; the page says that errors add up."""
    base = tiny.quantize({"ffn_": "Q4_0"})
    small, plan = trials._quantize(base, Settings(recipe="Q8_0"), lambda *step: None, "")
    for name, tensor in base.quantize("Q8_0", allow_requantize=True).tensors.items():
        ours = small.tensors[name]
        assert isinstance(ours, qjax.QTensor) == isinstance(tensor, qjax.QTensor)
        if isinstance(tensor, qjax.QTensor):
            assert ours.format == tensor.format
            assert np.array_equal(ours.to_bytes(), tensor.to_bytes()), name
    assert trials._notes(tiny, plan) == ()
    notes = trials._notes(base, plan)
    assert len(notes) == 1
    assert "was quantized before" in notes[0]
    page = viz.trial_page(dataclasses.replace(trial, is_float=False, notes=notes))
    assert "as loaded" in page
    assert "float model" not in page
    assert f"<p>{notes[0]}.</p>" in page


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
    """Stages in order, each counted up to its end; a step is a tensor, a window, some tokens."""
    assert tuple(dict.fromkeys(stage for stage, _, _ in reports)) == STAGES
    for stage in STAGES:
        done = [d for s, d, _ in reports if s == stage]
        assert done == sorted(done)
        assert done[0] == 0
    totals = {stage: total for stage, _, total in reports}
    assert list(totals.values()) == [1, 8, len(tiny.tensors), 2, 8]
    assert reports[-1] == (STAGES[-1], 8, 8)


class Halt(Exception):
    pass


@pytest.mark.parametrize("stage", STAGES)
def test_ends_where_report_raises(stage):
    seen = []

    def report(*step):
        seen.append(step)
        if step[0] == stage:
            raise Halt

    with pytest.raises(Halt):
        try_out(SMALL, report)
    assert [s for s, _, _ in seen].count(stage) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "tinny"}, "tinny: no such file or folder"),
        ({"text": "nowhere.txt"}, "nowhere.txt: cannot be read"),
        ({"prompt": ""}, "prompt is empty"),
        ({"recipe": "Q4_KM"}, "unknown file type 'Q4_KM'. Did you mean Q4_K_M"),
        ({"recipe": "IQ2_XXS"}, "needs the tensor's importance"),
        ({"mlp": "Q8_0", "imatrix": "nowhere.gguf"}, "nowhere.gguf"),
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


def test_a_file_type_leaves_the_groups_no_choice():
    page = Playground()
    for recipe in ("Q4_K_M", BY_GROUP):
        page.controls["recipe"].value = recipe
        assert {page.controls[group].disabled for group in GROUPS} == {recipe != BY_GROUP}


def test_runs_and_shows(trial):
    """Run works in the background, with the settings of that moment; then the page is there."""
    go, asked = threading.Event(), []

    def run(settings, report):
        asked.append(settings)
        report(STAGES[2], 1, 2)
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

    def run(settings, report):
        for i in range(1000):
            report(STAGES[3], i, 1000)
            begun.set()
            assert step.wait(60)
        raise AssertionError("was not stopped")

    page = Playground(trial, run)
    page.stop()  # nothing to stop
    assert page.state == "idle"
    page.start()
    assert begun.wait(60)
    assert f"Step 4 of 5, {STAGES[3]}: 0 of 1000." in status(page)
    page.stop_button.click()
    assert page.state == "working"
    assert page.stop_button.disabled
    assert "Stopping" in status(page)
    step.set()
    page.wait(60)
    assert page.state == "stopped"
    assert "Stopped" in status(page)
    assert page._page.value == viz.trial_page(trial)
    page._run = lambda settings, report: trial
    page.start()
    page.wait(60)
    assert page.state == "idle"


def test_stops_the_real_work():
    page = Playground()
    seen = threading.Event()

    def run(settings, report):
        def watched(*step):
            if step[0] == STAGES[2] and step[1] == 3:
                page.stop()
                seen.set()
            report(*step)

        return try_out(SMALL, watched)

    page._run = run
    page.start()
    page.wait(120)
    assert seen.is_set()
    assert page.state == "stopped"
    assert page.trial is None


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (qjax.QjaxError("a <file>\nis broken"), "a &lt;file&gt; is broken"),
        (MemoryError("17 GiB"), "MemoryError: 17 GiB"),
    ],
)
def test_says_what_went_wrong(error, shown, trial, capfd):
    def run(settings, report):
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
