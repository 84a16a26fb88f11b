"""qjax bench: the figures, under llama-bench's names, and what work they are of."""

import csv
import json
import statistics

import jax
import numpy as np
import pytest
from conftest import fails
from oracles import programs

import qjax
from qjax.bench import Test as Row
from qjax.bench import bench
from qjax.machine import memory_status
from qjax.models import cache as caches
from qjax.models import generate
from qjax.models.parts import empty_cache
from qjax.quantize_file import quantize_file

pytestmark = pytest.mark.in_haste

TESTS = ("-p", "16", "-n", "4", "-pg", "8,4", "-d", "0,20", "-r", "2")
# What llama-bench does not measure.
OWN = {"load_ns", "first_token_ns", "compile_ns", "peak_rss", "anonymous_rss"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    target = tmp_path_factory.mktemp("bench") / "tiny-Q4_0.gguf"
    quantize_file("tiny", target, "Q4_0")
    return target


@pytest.fixture(scope="module")
def record(path):
    return bench(path, n_prompt=(16,), n_gen=(4,), n_pg=((8, 4),), n_depth=(0, 20), repetitions=2)


def llama_bench(llama_cpp, path, output):
    """What it prints.  Without repacked weights, for the code for these is miscompiled by some GCCs."""
    command = (llama_cpp / "llama-bench", "-m", path, *TESTS, "-t", "2", "--repack", "0", "-o", output)
    return programs.output(*command).split("\nbuild:")[0]


def test_json_has_the_names_types_and_facts_of_llama_bench(llama_cpp, path, record):
    ours, theirs = record.to_json(), json.loads(llama_bench(llama_cpp, path, "json"))
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs):
        assert a.keys() - b.keys() == OWN
        assert {key: type(a[key]) for key in a.keys() & b.keys()} == {key: type(b[key]) for key in a.keys() & b.keys()}
        assert {*map(type, a["samples_ns"] + b["samples_ns"])} == {int}
        for key in ("model_filename", "model_size", "model_n_params", "type_k", "type_v", "n_threads", "cpu_info"):
            assert a[key] == b[key], key
        assert [a[key] for key in ("n_prompt", "n_gen", "n_depth")] == [
            b[key] for key in ("n_prompt", "n_gen", "n_depth")
        ]
        assert len(a["samples_ts"]) == len(b["samples_ts"]) == 2
    json.dumps(ours)


def test_csv_has_the_form_of_llama_bench(llama_cpp, path, record):
    ours, theirs = record.csv().splitlines(), llama_bench(llama_cpp, path, "csv").strip().splitlines()
    assert {*ours[0].split(",")} - {*theirs[0].split(",")} == OWN
    for text in (ours, theirs):
        assert all(line[0] == line[-1] == '"' and line.count('","') == text[0].count(",") for line in text[1:])
    rows = list(csv.DictReader(ours))
    assert [float(row["avg_ts"]) for row in rows] == [test.avg_ts for test in record.tests]


def test_table_is_that_of_llama_bench(llama_cpp, path, record):
    def cells(text):
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]

    ours, theirs = cells(str(record)), cells(llama_bench(llama_cpp, path, "md"))
    # A column for the option given.
    at = theirs[0].index("rpk")
    theirs = [row[:at] + row[at + 1 :] for row in theirs]
    assert ours[0] == theirs[0]
    sides = [[rule.endswith(":") for rule in table[1]] for table in (ours, theirs)]
    assert sides[0] == sides[1]
    same = [ours[0].index(name) for name in ("size", "params", "backend", "threads", "test")]
    assert [[row[i] for i in same] for row in ours[2:]] == [[row[i] for i in same] for row in theirs[2:]]


def test_figures_of_a_test():
    row = Row(n_prompt=512, n_gen=128, n_depth=1024, test_time="", samples_ns=(2 * 10**9, 10**9), compile_ns=0)
    assert row.label == "pp512+tg128 @ d1024"
    assert row.samples_ts == (320, 640)
    assert (row.avg_ns, row.avg_ts) == (1.5e9, 480)
    assert row.stddev_ts == pytest.approx(statistics.stdev([320, 640]))
    assert row.stddev_ns == int(statistics.stdev([2 * 10**9, 10**9]))
    single = Row(n_prompt=0, n_gen=128, n_depth=0, test_time="", samples_ns=(10**9,), compile_ns=0)
    assert (single.label, single.stddev_ts, single.stddev_ns) == ("tg128", 0, 0)


def test_the_record(record, path):
    assert [test.label for test in record.tests] == [
        "pp16", "tg4", "pp8+tg4", "pp16 @ d20", "tg4 @ d20", "pp8+tg4 @ d20"
    ]  # fmt: skip
    assert record.model_type == "llama 4M Q4_0"
    assert record.first_token_ns == record.tests[0].avg_ns
    assert record.load_ns > 0
    assert all(ns > 0 for test in record.tests for ns in test.samples_ns)
    assert all(test.compile_ns >= 0 for test in record.tests)
    if memory_status():
        assert record.model_size < record.anonymous_rss <= record.peak_rss
    below = str(record).splitlines()[-1]
    assert all(word in below for word in ("load", "first token", "compilation"))


THOROUGHLY = [pytest.param(*n, marks=pytest.mark.thorough) for n in ((0, 40, 0), (28, 3, 100))]


@pytest.mark.parametrize(("n_prompt", "n_gen", "n_depth"), [(20, 0, 0), (0, 3, 17), *THOROUGHLY])
def test_each_repetition_does_what_the_test_says(monkeypatch, n_prompt, n_gen, n_depth):
    lengths, made = [], []

    def decode(config, params, state, n_tokens, *rest, **options):
        out, n, state = real_decode(config, params, state, n_tokens, *rest, **options)
        made.append(int(n))
        lengths.append(int(state.cache[0].length))
        assert state.cache[0].max_seq >= n_depth + n_prompt + n_gen
        return out, n, state

    def prefill(config, params, prompt, n_tokens, cache, *rest, **options):
        # XLA would move rows that do not fit, without a word.
        assert int(cache[0].length) + prompt.shape[1] <= cache[0].max_seq
        state = real_prefill(config, params, prompt, n_tokens, cache, *rest, **options)
        lengths.append(int(state.cache[0].length))
        return state

    real_decode, real_prefill = generate.decode, generate.prefill
    monkeypatch.setattr(generate, "decode", decode)
    monkeypatch.setattr(generate, "prefill", prefill)
    options = dict(n_prompt=(n_prompt,) if not n_gen else (), n_gen=(n_gen,) if not n_prompt else ())
    options |= dict(n_pg=((n_prompt, n_gen),)) if n_prompt and n_gen else {}
    bench("tiny", n_depth=(n_depth,), repetitions=2, **options)
    assert max(lengths) == lengths[-1] == n_depth + n_prompt + n_gen
    # One run to warm up, two that count.
    assert sum(made) == 3 * n_gen
    assert lengths.count(n_depth + n_prompt + n_gen) == 3


def test_a_prompt_may_be_read_behind_another():
    """As when it is read in one."""
    model = qjax.load("tiny", cache_k="f32", cache_v="f32")
    tokens = np.random.default_rng(0).integers(model.config.vocab, size=128)

    def read(pieces, room):
        cache = empty_cache(model.config, model.params, 1, room, caches.FLOAT32)
        for piece in pieces:
            arguments = (cache, jax.random.key(0), generate.GREEDY, np.empty(0, np.int32))
            state = generate.read(model.config, model.params, piece, *arguments)
            cache = state.cache
        return state

    whole = read([tokens], generate.cache_room(128, 0))
    parts = read([tokens[:100], tokens[100:]], generate.cache_room(28, 0, 100))
    assert whole.cache[0].max_seq == 128
    assert int(parts.cache[0].length) == int(whole.cache[0].length) == 128
    np.testing.assert_allclose(
        qjax.dequantize(parts.cache[0].k)[..., :128, :], qjax.dequantize(whole.cache[0].k), rtol=1e-4, atol=1e-4
    )
    assert int(parts.tokens[0]) == int(whole.tokens[0])


def test_the_command(run):
    code, out, err = run("bench", "tiny", "-p", "16,8", "-n", 2, "-r", 1, "-o", "json", "-ctk", "f32")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [(16, 0), (8, 0), (0, 2)]
    assert {(row["type_k"], row["type_v"]) for row in rows} == {("f32", "f16")}
    one = ("bench", "tiny", "-p", 8, "-n", 0, "-r", 1, "-ctk", "f32")
    assert json.loads(run(*one, "--json")[1])[0].keys() == rows[0].keys()
    code, out, _ = run(*one)
    assert code == 0
    assert out.startswith("| model ")
    code, out, _ = run(*one, "-o", "csv")
    assert out.splitlines()[0].startswith("model_filename,model_type,")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "-p", "0", "-n", "0"], "nothing to measure"),
        (["tiny", "-p", "-8"], "a number of tokens is -8"),
        (["tiny", "-d", "-1"], "a number of tokens is -1"),
        (["tiny", "-p", "many"], "expected numbers, as in -p 128,512"),
        (["tiny", "-pg", "512"], "expected two numbers"),
        (["tiny", "-o", "sql"], "expected md, csv or json"),
        (["absent.gguf"], "absent.gguf"),
    ],
)
def test_bad_input(run, arguments, message):
    fails(run("bench", *arguments), message)
