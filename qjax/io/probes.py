"""Files of questions with several endings, in the formats that llama-perplexity takes, and as JSON lines.

    --hellaswag        text, six lines a task: context, number of the right ending (0 to 3), four endings
    --winogrande       CSV, one line a task: index, sentence with _ for a gap, two choices, which is right (1 or 2)
    --multiple-choice  binary: n u32, n positions u32, n tasks; a task is a question and two lists of answers, of which
                       the first has one right answer; a list is n u32, n strings, n labels i32 (1: right); a string
                       is n u32 and n bytes
    (else)             JSON lines: {"prompt": "...", "choices": ["...", ...], "answer": 0}; context, endings and label
                       are other names, and "kind" groups them

Source: llama.cpp tools/perplexity/perplexity.cpp, which also says which tasks are taken where not all are.
"""

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qjax.data.tales import Probe
from qjax.errors import QjaxError
from qjax.io.cursor import Cursor, shorten
from qjax.io.mapped import MappedFile

MAX_ANSWERS = 100


def read(path: str | os.PathLike[str], kind: str = "jsonl", n_tasks: int | None = None) -> list[Probe]:
    """The questions of a file.

    kind: hellaswag, winogrande, multiple-choice or jsonl.
    n_tasks: so many of them, those that llama-perplexity draws; 0 all; default 400 of HellaSwag, else all, as there.
    Raises QjaxError naming the line, or the byte, and what is wrong with it; and if there are no questions.
    """
    if kind not in KINDS:
        raise QjaxError(f"questions of kind {kind!r}: expected one of {', '.join(KINDS)}")
    format = KINDS[kind]
    probes = format.read(Path(path))
    if not probes:
        raise QjaxError(f"{path}: there are no questions in it")
    n = format.default_n if n_tasks is None else n_tasks
    return [probes[i] for i in format.draw(len(probes), n)]


# ── the formats ──────────────────────────────────────────────────────────────────────────────────────


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise QjaxError(f"{path}: not UTF-8 text (byte {error.start}). Convert the file to UTF-8.") from error
    except OSError as error:
        raise QjaxError(f"{path}: cannot be read: {error.strerror or error}") from error
    return lines[:-1] if not lines[-1] else lines


def _fail(path: Path, line: int, message: str) -> NoReturn:
    raise QjaxError(f"{path}: line {line}: {message}")


def _probe(kind: str, prompt: str, endings: Sequence[str], right: int) -> Probe:
    endings = [f" {ending}" for ending in endings]
    return Probe(kind, prompt, endings.pop(right), tuple(endings))


def _hellaswag(path: Path) -> list[Probe]:
    lines = _lines(path)
    if len(lines) % 6:
        raise QjaxError(f"{path}: {len(lines)} lines; HellaSwag tasks have six each: context, number, four endings")
    probes = []
    for start in range(0, len(lines), 6):
        context, right, *endings = lines[start : start + 6]
        if right.strip() not in ("0", "1", "2", "3"):
            _fail(path, start + 2, f"{shorten(right)}, expected the number of the right ending, 0 to 3")
        if len(set(endings)) < 4:
            _fail(path, start + 3, "two of the four endings are the same")
        probes.append(_probe("hellaswag", context, endings, int(right)))
    return probes


def _winogrande(path: Path) -> list[Probe]:
    probes = []
    for i, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            fields = next(csv.reader([line]))
        except csv.Error as error:
            _fail(path, i, f"not CSV ({error})")
        if len(fields) != 5:
            _fail(path, i, f"{len(fields)} fields, expected 5: index, sentence, two choices, answer")
        _, sentence, *choices, answer = fields
        before, gap, after = sentence.partition("_")
        if not gap or not after.strip():
            _fail(path, i, f"{shorten(sentence)}: expected a sentence that goes on behind a gap (_)")
        if (answer := answer.strip()) not in ("1", "2"):
            _fail(path, i, f"answer {shorten(answer)}, expected 1 or 2")
        if choices[0] == choices[1]:
            _fail(path, i, "both choices are the same")
        right = int(answer) - 1
        probes.append(Probe("winogrande", before, choices[right], (choices[1 - right],), after))
    return probes


def _multiple_choice(path: Path) -> list[Probe]:
    cursor = Cursor(MappedFile(path).mapped, path)
    n = cursor.number("I", "the number of tasks")
    cursor.take(4 * n, f"the positions of {n} tasks")
    return [_task(cursor, i) for i in range(n)]


def _task(cursor: Cursor, i: int) -> Probe:
    start = cursor.at
    question = _string(cursor, f"the question of task {i}")
    answers, labels = _answers(cursor, f"task {i}")
    _answers(cursor, f"task {i}")
    if not question or not all(answers) or labels.count(1) != 1 or len(set(answers)) < max(2, len(answers)):
        cursor.fail(
            f"task {i} has {len(answers)} answers, {labels.count(1)} of them right; expected a question and at least "
            "two different answers, one of them right",
            at=start,
        )
    return _probe("multiple-choice", question, answers, labels.index(1))


def _answers(cursor: Cursor, what: str) -> tuple[list[str], list[int]]:
    n = cursor.number("I", f"the number of answers of {what}")
    if n > MAX_ANSWERS:
        cursor.fail(f"{what} claims {n} answers, expected at most {MAX_ANSWERS}", at=cursor.at - 4)
    answers = [_string(cursor, f"answer {i} of {what}") for i in range(n)]
    return answers, [cursor.number("i", f"label {i} of {what}") for i in range(n)]


def _string(cursor: Cursor, what: str) -> str:
    data = cursor.take(cursor.number("I", f"the length of {what}"), what)
    return str(data, "utf-8", "replace")


def _jsonl(path: Path) -> list[Probe]:
    probes = []
    for i, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                task = json.loads(line)
            except (ValueError, RecursionError) as error:
                _fail(path, i, f"not JSON ({error})")
            if not isinstance(task, dict):
                _fail(path, i, f"{shorten(task)}: expected an object with prompt, choices and answer")
            probes.append(_of_json(path, i, task))
    return probes


def _of_json(path: Path, line: int, task: dict[str, Any]) -> Probe:
    def value(names: tuple[str, ...], fits: Callable[[Any], bool], expected: str) -> Any:
        found = [task[name] for name in names if name in task]
        if len(found) != 1 or not fits(found[0]):
            _fail(path, line, f"expected {' or '.join(names)}: {expected}")
        return found[0]

    prompt = value(("prompt", "context"), lambda v: isinstance(v, str) and v != "", "a text")
    choices = value(
        ("choices", "endings"),
        lambda v: (
            isinstance(v, list) and len(v) > 1 and all(isinstance(c, str) and c for c in v) and len({*v}) == len(v)
        ),
        "a list of two different texts or more",
    )
    numbers = range(len(choices))
    right = value(("answer", "label"), lambda v: str(v) in map(str, numbers), f"a number from 0 to {numbers[-1]}")
    return _probe(str(task.get("kind", "question")), prompt, choices, int(right))


# ── which tasks ──────────────────────────────────────────────────────────────────────────────────────


class _Mt19937:
    """C++'s std::mt19937, which NumPy's seeds and numbers are, too."""

    def __init__(self, seed: int = 1):
        self._state = np.random.RandomState(seed)

    def __call__(self) -> int:
        """A number below 2^32."""
        return int(self._state.randint(0, 2**32, dtype=np.uint32))

    def below(self, n: int) -> int:
        """What libstdc++'s uniform_int_distribution makes of it: Lemire 2019, "Fast Random Integer Generation"."""
        while True:
            high, low = divmod(self() * n, 2**32)
            if low >= -(2**32) % n:
                return high


def _draw_always(n: int, wanted: int) -> list[int]:
    """HellaSwag's: in random order, also where all are taken."""
    left, random = list(range(n)), _Mt19937()
    return [left.pop(random.below(len(left))) for _ in range(min(wanted or n, n))]


def _draw_some(n: int, wanted: int) -> list[int]:
    """The others': in the file's order where all are taken.  Their numbers are float32, and the last task left takes
    the place of one that was drawn."""
    if not 0 < wanted < n:
        return list(range(n))
    left, random, drawn = list(range(n)), _Mt19937(), []
    for _ in range(wanted):
        i = min(int(np.float32(random()) * np.float32(2.0**-32) * np.float32(len(left))), len(left) - 1)
        drawn.append(left[i])
        left[i] = left[-1]
        left.pop()
    return drawn


@dataclass(frozen=True)
class _Kind:
    read: Callable[[Path], list[Probe]]
    draw: Callable[[int, int], list[int]] = _draw_some
    default_n: int = 0


KINDS = {
    "hellaswag": _Kind(_hellaswag, _draw_always, 400),
    "winogrande": _Kind(_winogrande),
    "multiple-choice": _Kind(_multiple_choice),
    "jsonl": _Kind(_jsonl),
}
