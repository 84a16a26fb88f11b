"""Files of questions: what is read, what is refused, which tasks are drawn; and llama-perplexity on the same files."""

import json
import random
import re
import struct

import numpy as np
import pytest
from conftest import fails
from oracles import programs, questions
from test_evaluate import random_model

import qjax
from qjax import evaluate
from qjax.data.tales import Probe
from qjax.errors import QjaxError
from qjax.io import probes
from qjax.metrics import likelihoods
from qjax.quantize_file import quantize_file

pytestmark = pytest.mark.in_haste

# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────


def test_hellaswag(tmp_path):
    (tmp_path / "tasks").write_text("Cooking: He\n1\ncries.\nstirs.\nflies.\nsings.\nB\n0\nw\nx\ny\nz\n")
    assert sorted(probes.read(tmp_path / "tasks", "hellaswag")) == [
        Probe("hellaswag", "B", " w", (" x", " y", " z")),
        Probe("hellaswag", "Cooking: He", " stirs.", (" cries.", " flies.", " sings.")),
    ]


def test_winogrande(tmp_path):
    (tmp_path / "tasks").write_text(
        '0,Ann saw Bo so _ waved to him.,Ann,Bo,1\n1,"Well, Bo hid as _ was shy.",Ann,Bo,2\n'
    )
    assert probes.read(tmp_path / "tasks", "winogrande") == [
        Probe("winogrande", "Ann saw Bo so ", "Ann", ("Bo",), " waved to him."),
        Probe("winogrande", "Well, Bo hid as ", "Bo", ("Ann",), " was shy."),
    ]


def test_multiple_choice(tmp_path):
    tasks = [("Is it?", ["yes", "nö"], 1), ("Why?", ["a", "b", "c"], 0)]
    assert probes.read(questions.multiple_choice(tmp_path / "tasks", tasks), "multiple-choice") == [
        Probe("multiple-choice", "Is it?", " nö", (" yes",)),
        Probe("multiple-choice", "Why?", " a", (" b", " c")),
    ]


def test_json_lines(tmp_path):
    lines = [
        {"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1},
        {"context": "He", "endings": ["runs", "a b", "sleeps"], "label": "0", "kind": "verbs", "id": 7},
    ]
    (tmp_path / "tasks").write_text("\n\n".join(map(json.dumps, lines)))
    assert probes.read(tmp_path / "tasks") == [
        Probe("question", "2 + 2 =", " 4", (" 3",)),
        Probe("verbs", "He", " runs", (" a b", " sleeps")),
    ]


TASK = "C\n0\na\nb\nc\nd\n"


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("hellaswag", TASK + "C\n", "7 lines; HellaSwag tasks have six"),
        ("hellaswag", TASK + TASK.replace("0", "4"), "line 8: '4', expected the number of the right ending"),
        ("hellaswag", TASK.replace("b", "a"), "line 3: two of the four endings are the same"),
        ("winogrande", "0,a _ b,x,y,1\n0,a _ b,x,1", "line 2: 4 fields, expected 5"),
        ("winogrande", "0,a b,x,y,1", "line 1: 'a b': expected a sentence"),
        ("winogrande", "0,a _,x,y,1", "goes on behind a gap"),
        ("winogrande", "0,a _ b,x,y,3", "line 1: answer '3', expected 1 or 2"),
        ("winogrande", "0,a _ b,x,x,1", "both choices are the same"),
        ("jsonl", '{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n{', "line 2: not JSON"),
        ("jsonl", "[" * 100_000, "line 1: not JSON"),
        ("jsonl", "[1]", "line 1: [1]: expected an object"),
        ("jsonl", '{"choices": ["b", "c"], "answer": 0}', "expected prompt or context: a text"),
        ("jsonl", '{"prompt": "a", "context": "a", "choices": ["b", "c"], "answer": 0}', "prompt or context"),
        ("jsonl", '{"prompt": "a", "choices": ["b", "b"], "answer": 0}', "a list of two different texts"),
        ("jsonl", '{"prompt": "a", "choices": ["b", 3], "answer": 0}', "a list of two different texts"),
        ("jsonl", '{"prompt": "a", "choices": ["b", ["c"]], "answer": 0}', "a list of two different texts"),
        ("jsonl", '{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer or label: a number from 0 to 1"),
        ("jsonl", '{"prompt": "a", "choices": ["b", "c"], "answer": true}', "answer or label: a number from 0"),
        ("jsonl", "\n", "there are no questions"),
        ("hellaswag", "", "there are no questions"),
        ("arc", "", "expected one of hellaswag, winogrande, multiple-choice, jsonl"),
    ],
)
def test_files_that_are_refused(tmp_path, kind, content, message):
    (tmp_path / "tasks").write_text(content)
    with pytest.raises(QjaxError, match=re.escape(message)):
        probes.read(tmp_path / "tasks", kind)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "tasks").write_bytes(b"\xff")
    with pytest.raises(QjaxError, match="not UTF-8 text"):
        probes.read(tmp_path / "tasks")
    with pytest.raises(QjaxError, match="missing: cannot be read"):
        probes.read(tmp_path / "missing", "winogrande")


@pytest.fixture
def binary(tmp_path):
    return questions.multiple_choice(tmp_path / "tasks", [("Q", ["a", "b"], 0), ("Why?", ["yes", "no"], 1)])


def test_binary_files_cut_short(binary):
    data = binary.read_bytes()
    for size in range(1, len(data)):
        binary.write_bytes(data[:size])
        with pytest.raises(QjaxError, match="cut short or damaged"):
            probes.read(binary, "multiple-choice")


@pytest.mark.parametrize(
    ("at", "number", "message"),
    [
        (0, 2**32 - 1, "the positions of 4294967295 tasks needs"),
        (12, 2**31, "the question of task 0 needs 2147483648 bytes"),
        (17, 101, "task 0 claims 101 answers, expected at most 100"),
        (31, 0, "task 0 has 2 answers, 0 of them right"),
        (35, 1, "task 0 has 2 answers, 2 of them right"),
    ],
)
def test_binary_files_that_claim_too_much(binary, at, number, message):
    data = bytearray(binary.read_bytes())
    struct.pack_into("<I", data, at, number)
    binary.write_bytes(data)
    with pytest.raises(QjaxError, match=message):
        probes.read(binary, "multiple-choice")


def test_answers_have_to_differ(tmp_path):
    for answers in (["a"], ["a", "a"], ["a", ""]):
        with pytest.raises(QjaxError, match="two different answers"):
            probes.read(questions.multiple_choice(tmp_path / "x", [("Q", answers, 0)]), "multiple-choice")


# ── which tasks ──────────────────────────────────────────────────────────────────────────────────────────


def test_numbers_are_those_of_c():
    """C++ names the 10,000th number of an mt19937 with the default seed, 5489 ([rand.predef])."""
    numbers = probes._Mt19937(5489)
    assert [numbers() for _ in range(10_000)][-1] == 4123659995
    assert {probes._Mt19937().below(3) for _ in range(5)} == {1}
    draw = probes._Mt19937()
    shares = np.bincount([draw.below(3) for _ in range(3000)]) / 3000
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)


@pytest.mark.parametrize("draw", [probes._draw_always, probes._draw_some])
def test_tasks_are_drawn_once(draw):
    for n, wanted in ((1, 1), (10, 4), (10, 0), (10, 10), (10, 99)):
        drawn = draw(n, wanted)
        assert len(set(drawn)) == len(drawn) == (wanted if 0 < wanted < n else n)
        assert set(drawn) <= set(range(n))
    assert probes._draw_some(5, 0) == list(range(5))
    assert probes._draw_always(50, 0) != list(range(50))
    assert probes._draw_always(50, 7) == probes._draw_always(50, 0)[:7]


# ── asking ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_likelihood_a_token_decides(tmp_path):
    model, rng = random_model(), random.Random(3)
    words = ["ab", "cdefg", "hi", "jklmnop", "q", "rst"]
    lines = [json.dumps({"prompt": p, "choices": rng.sample(words, 3), "answer": 0}) for p in 6 * words]
    (tmp_path / "tasks").write_text("\n".join(lines))
    right = []
    for p in probes.read(tmp_path / "tasks"):
        means = []
        for ending in (p.answer, *p.alternatives):
            ids = np.array(model.encode(p.prompt + ending))
            log_p = np.asarray(model.logits(np.pad(ids, (0, 32 - len(ids)))), np.float64)
            log_p -= np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
            # Every byte is a token; the blank is common to all choices.
            own = range(len(p.prompt) + 1, len(ids))
            means.append(np.mean([log_p[i - 1, ids[i]] for i in own]))
        right.append(np.argmax(means) == 0)
    result = evaluate.probe(model, probes.read(tmp_path / "tasks"), normalized=True)
    assert result.accuracy == pytest.approx(np.mean(right))
    assert 0 < result.accuracy < 1
    assert result.accuracy != evaluate.probe(model, probes.read(tmp_path / "tasks")).accuracy
    assert result.normalized


def test_cli(run, tmp_path, monkeypatch):
    monkeypatch.setattr(qjax, "load", lambda *_, **__: random_model())
    (tmp_path / "tasks").write_text(3 * TASK)
    code, out, err = run("probe", "small", "-f", tmp_path / "tasks", "--hellaswag", "--hellaswag-tasks", 2, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert (record["n"], record["chance"], record["normalized"]) == (2, 0.25, True)
    assert record["low"] < record["high"]
    code, out, _ = run("probe", "small", "-f", tmp_path / "tasks", "--hellaswag")
    assert "3 probes; hellaswag" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-f", "tasks", "--hellaswag", "--winogrande"), "--hellaswag and --winogrande: a file is of one kind"),
        (("--winogrande",), "give the file of the questions"),
        (("--tasks", 3), "give the file of the questions"),
        (("-f", "tasks"), "tasks: line 1: not JSON"),
        (("-f", "tasks", "--hellaswag", "--activations", "int8-tensor"), "takes ranges"),
    ],
)
def test_cli_refuses(run, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(qjax, "load", lambda *_, **__: random_model())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").write_text(TASK)
    fails(run("probe", "small", *options), message)


# ── llama-perplexity ─────────────────────────────────────────────────────────────────────────────────────


def their_answers(llama_cpp, model, *options):
    """Whether each task was answered rightly, and WinoGrande's two scores."""
    output = programs.output(llama_cpp / "llama-perplexity", "-m", model, "-c", 1024, *options, last="\n\n")
    if "--winogrande" in options:
        rows = re.findall(r"^\d+\t[\d.]+\t +([-\d.]+) +([-\d.]+) +(\d) +(\d)", output, re.MULTILINE)
        return [r[2] == r[3] for r in rows], [[float(r[i]) for i in ((0, 1), (1, 0))[r[3] == "2"]] for r in rows]
    share = np.array(re.findall(r"^\d+\t([\d.]+)", output, re.MULTILINE), float) / 100
    return (np.diff(np.round(share * np.arange(1, len(share) + 1)), prepend=0) == 1).tolist(), None


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    quantize_file("tiny", path, "F32")
    return path


@pytest.mark.exact
@pytest.mark.parametrize("n", [None, 9])
@pytest.mark.parametrize("kind", ["hellaswag", "winogrande", "multiple-choice"])
def test_the_same_tasks_and_the_same_answers_as_llama_cpp(llama_cpp, tmp_path, tiny_file, kind, n):
    path = tmp_path / "tasks"
    if kind == "winogrande":
        questions.winogrande(path, 24)
    else:
        questions.hellaswag(path, 40)
    if kind == "multiple-choice":
        tasks = [
            (p.prompt, [ending.strip() for ending in (*p.alternatives, p.answer)], 3)
            for p in probes.read(path, "hellaswag")
        ]
        questions.multiple_choice(path, tasks)
    model = qjax.load(tiny_file)
    asked = probes.read(path, kind, n)
    ours = likelihoods(evaluate.logits_of(model), model.encode, asked, normalized=True)
    option = "-bf" if kind == "multiple-choice" else "-f"
    some = [] if n is None else [f"--{kind}-tasks", n]
    right, scores = their_answers(llama_cpp, tiny_file, option, path, f"--{kind}", *some)
    assert [score[0] > max(score[1:]) for score in ours] == right
    if scores:
        np.testing.assert_allclose(ours, scores, atol=2e-3)
    else:
        assert n or 0 < sum(right) < len(right)
