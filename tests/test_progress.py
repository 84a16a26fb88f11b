"""Progress: a bar for people, steps for who observes, an end for who has enough."""

import io
import threading

import pytest

from qjax.progress import Step, Stopped, observed, progress


def test_steps_are_counted():
    steps = []
    with observed(steps.append):
        assert list(progress("abc", desc="letters", unit="letter")) == list("abc")
        assert list(progress(iter([20, 22]), desc="bytes", total=42, unit="B", size=int)) == [20, 22]
        assert list(progress(iter(()), desc="nothing")) == []
    assert steps[:4] == [Step("letters", done, 3, "letter") for done in range(4)]
    assert steps[4:7] == [Step("bytes", done, 42, "B") for done in (0, 20, 42)]
    assert steps[7:] == [Step("nothing", 0, None, "it")]


def test_a_step_is_told_when_its_work_is_done():
    log = []
    with observed(log.append):
        for item in progress([7, 8], desc="items"):
            log.append(item)
    assert [x if isinstance(x, int) else x.done for x in log] == [0, 7, 1, 8, 2]


def test_stops_whatever_handles_errors():
    worked = []

    def enough(step):
        if step.done == 2:
            raise Stopped

    def work():
        try:
            for item in progress(range(9), desc="items"):
                worked.append(item)
        except Exception:
            worked.append("handled")

    with pytest.raises(Stopped), observed(enough):
        work()
    assert worked == [0, 1]
    work()
    assert worked == [0, 1, *range(9)], "nobody observes it any more"


def test_observers_nest_and_belong_to_their_thread():
    outer, inner, items = [], [], [1, 2]
    with observed(outer.append):
        with observed(inner.append):
            list(progress(items, desc="inner"))
        list(progress(items, desc="outer"))
        thread = threading.Thread(target=lambda: list(progress(items, desc="elsewhere")))
        thread.start()
        thread.join()
    assert {step.desc for step in outer} == {"outer"}
    assert {step.desc for step in inner} == {"inner"}


@pytest.mark.parametrize("options", [{}, {"label": str}, {"size": int}, {"unit": "B", "size": int, "total": 3}])
def test_a_bar_is_drawn_for_people_only(monkeypatch, options):
    for watched in (True, False):
        stderr = io.StringIO()
        stderr.isatty = lambda watched=watched: watched
        monkeypatch.setattr("sys.stderr", stderr)
        assert progress(items := [1, 2], desc="in tests", **options) is items
        with monkeypatch.context() as patch:
            patch.delenv("PYTEST_CURRENT_TEST")
            assert list(progress(items, desc="counting", **options)) == items
        assert ("counting" in stderr.getvalue()) == watched
        assert "in tests" not in stderr.getvalue()
