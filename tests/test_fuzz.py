"""Readers of strangers' files take what is valid and refuse the rest, in one line, in time and in little memory.

Each target of tests/fuzz, shortly: its seeds, what fuzzing once found, and inputs that hypothesis draws.  For long runs
see tests/fuzz/__main__.py.
"""

import json
import random
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from fuzz import covered, running
from fuzz.cases import CASES
from fuzz.mutation import Input, Mutator
from fuzz.running import runner
from fuzz.targets import TARGETS, Target, words
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import QjaxError

pytestmark = pytest.mark.in_haste

EXAMPLES = 40
"""inputs for each target"""


@pytest.mark.parametrize("name", TARGETS)
def test_reader(name):
    target = TARGETS[name]
    mutate = Mutator(target.seeds, words(target.modules))
    with runner(target) as run:
        for what, case in CASES.items():
            if case.target == name:
                assert run(case.input) is None, what
                assert refusal(run, case) == case.refused, what

        # An input is a seed and the numbers of what is done to it, so hypothesis finds the shortest that fails.
        @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
        @given(st.sampled_from(range(len(target.seeds))), st.lists(st.integers(0, 2**32), min_size=1, max_size=5))
        def takes(seed, numbers):
            changed = Input(target.seeds[seed], [])
            for number in numbers:
                changed = mutate(changed, random.Random(number))
            assert run(changed) is None, changed

        takes()


def refusal(run, case):
    """Whether the reader refuses a case."""
    try:
        run.read(case.input)
    except QjaxError:
        return True
    return False


# ── what counts as a finding ─────────────────────────────────────────────────────────────────────────


def found(read):
    """What running a reader of nothing gives, but for where."""
    calls = iter([lambda folder: None, read])
    with runner(Target(lambda folder: next(calls)(folder), [{}], "errors", 1)) as run:
        finding = run(Input({}, []))
    return finding and finding.kind.split(" in ")[0].split(" from ")[0]


def raises(error):
    def read(folder):
        raise error

    return read


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (QjaxError("model.gguf: wrong"), None),
        (ValueError("wrong"), "ValueError"),
        (KeyError("wrong"), "KeyError"),
        (RecursionError("wrong"), "RecursionError"),
        (QjaxError(""), "empty message"),
    ],
    ids=repr,
)
def test_only_one_error_is_allowed(error, kind):
    assert found(raises(error)) == kind


def test_messages_are_one_line():
    error = QjaxError("wrong")
    error.args = ("two\nlines",)
    assert found(raises(error)) == "unprintable message"


def test_warnings_of_libraries_count():
    import numpy as np

    assert found(lambda folder: np.float32(3e38) * np.float32(10)) == "RuntimeWarning"


@pytest.mark.skipif(not running._HAS_CLOCK, reason="no timers here")
def test_time_is_bounded(monkeypatch):
    monkeypatch.setattr(running, "MAX_SECONDS", 0.02)

    def read(folder):
        while True:
            time.monotonic()

    assert found(read) == "TooLong"


@pytest.mark.skipif(not running._CAN_LIMIT_MEMORY, reason="no limits here")
def test_memory_is_bounded():
    assert found(lambda folder: bytearray(running.MAX_BYTES * 2)) == "MemoryError"
    assert found(lambda folder: bytearray(running.MAX_BYTES // 4)) is None


@pytest.mark.parametrize(("module", "functions"), covered.READERS.items())
def test_what_coverage_leaves_out_is_there(module, functions):
    path = ROOT / "qjax" / f"{module.replace('.', '/')}.py"
    assert covered.lines_of(path, functions.split()) or not functions


@pytest.mark.exact
def test_the_long_run(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz", "--executions", "4000", "--targets", "logits", "probes"]
    command += ["--folder", str(tmp_path / "fuzz"), "--json", str(tmp_path / "fuzz.json")]
    for n_runs in (1, 2):
        subprocess.run(command, cwd=ROOT, check=True)
        record = json.loads((tmp_path / "fuzz.json").read_text(encoding="utf-8"))
        assert record["executions"] == sum(row["executions"] for row in record["targets"].values())
        assert record["executions"] >= 4000 * n_runs
