"""Which matrix gets which format: the knapsack beside all choices, costs beside the metric, llama-quantize."""

import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fails
from oracles.programs import output

import qjax
from qjax import QjaxError, formats
from qjax.data import tales
from qjax.io import gguf
from qjax.methods import knapsack, pipeline, recipes, rtn, sensitivity, solver
from qjax.methods import plan as planning
from qjax.methods.knapsack import Option
from qjax.methods.pipeline import Method
from qjax.metrics import perplexity as ppl
from qjax.models import transformer
from qjax.quantize_file import quantize_file

pytestmark = pytest.mark.in_haste

# ── the knapsack ─────────────────────────────────────────────────────────────────────────────────────


def random_groups(rng, n_groups, n_options, size):
    return [
        [Option(int(s), float(c)) for s, c in zip(rng.integers(0, size, n), rng.random(n))]
        for n in rng.integers(1, n_options + 1, n_groups)
    ]


def test_no_choice_is_better():
    rng = np.random.default_rng(0)
    for budget in rng.integers(0, 120, 200):
        groups = random_groups(rng, rng.integers(1, 6), 4, 30)
        choices = [c for c in itertools.product(*groups) if sum(o.size for o in c) <= budget]
        packed = knapsack.solve(groups, int(budget))
        assert (packed is None) == (not choices)
        if packed:
            best = min(sum(o.cost for o in c) for c in choices)
            picked = [options[i] for options, i in zip(groups, packed.chosen)]
            assert packed.size == sum(o.size for o in picked) <= budget
            assert packed.cost == pytest.approx(sum(o.cost for o in picked)) == pytest.approx(best)
            assert packed.bound <= best + 1e-12


def test_negative_costs_count():
    groups = [[Option(4, -1.0), Option(8, -3.0)], [Option(2, 0.5), Option(6, -2.0)]]
    assert knapsack.solve(groups, 10).chosen == (0, 1)
    assert knapsack.solve(groups, 14).chosen == (1, 1)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_large_ones_are_close_to_what_mixing_options_would_reach(share):
    """225 matrices of an 8B model's shapes, 12 formats; an option's cost falls by 4 with each bit."""
    rng, bits = np.random.default_rng(1), np.array([1.6, 2.1, 2.3, 2.6, 3.1, 3.4, 4.3, 4.5, 5.5, 6.6, 8.5, 16])
    n, fragile = rng.choice([4096 * 4096, 4096 * 14336, 1024 * 4096], 225), np.exp(rng.normal(size=225))
    groups = [[Option(int(w * b) // 256 * 32, float(s * 4**-b)) for b in bits] for w, s in zip(n, fragile)]
    smallest, largest = (sum(options[i].size for options in groups) for i in (0, -1))
    budget = int(smallest + share * (largest - smallest))
    packed, front = knapsack.solve(groups, budget), knapsack.front(groups)
    mixed = np.interp(budget, [point.size for point in front], [point.cost for point in front])
    assert packed.bound == pytest.approx(mixed)
    assert packed.size <= budget
    assert mixed * (1 - 1e-12) <= packed.cost < min(point.cost for point in front if point.size <= budget)


def test_the_front_is_convex_and_each_point_is_the_best_of_its_size():
    groups = random_groups(np.random.default_rng(2), 4, 6, 40)
    front = knapsack.front(groups)
    sizes, costs = (np.array([getattr(point, key) for point in front]) for key in ("size", "cost"))
    assert (np.diff(sizes) > 0).all()
    slopes = np.diff(costs) / np.diff(sizes)
    assert (slopes < 0).all()
    assert (np.diff(slopes) >= -1e-12).all()
    for point in front:
        assert knapsack.solve(groups, point.size).cost == pytest.approx(point.cost)


def test_dropping_states_is_owned_up_to(monkeypatch):
    """With one partial choice at a time the result may be worse, but it fits, and the bound stands."""
    monkeypatch.setattr(knapsack, "MAX_STATES", 1)
    rng = np.random.default_rng(3)
    for _ in range(20):
        groups = random_groups(rng, 5, 4, 30)
        packed = knapsack.solve(groups, 60)
        best = min(
            (sum(o.cost for o in c) for c in itertools.product(*groups) if sum(o.size for o in c) <= 60), default=None
        )
        if packed:
            assert packed.size <= 60
            assert packed.bound <= best + 1e-12 <= packed.cost + 2e-12


# ── costs ────────────────────────────────────────────────────────────────────────────────────────────

N_CTX = 128
SOME = ("Q4_0", "Q4_K", "Q5_0", "Q6_K", "Q8_0")
HEAD, DOWN, QUERY = "token_embd.weight", "blk.3.ffn_down.weight", "blk.0.attn_q.weight"


@pytest.fixture(scope="module")
def model():
    return qjax.load("tiny").quantize("F32")


@pytest.fixture(scope="module")
def text():
    return "".join(tale.text for tale in tales.generate(tales.TRAINING, 12))


@pytest.fixture(scope="module")
def trial(model, text):
    windows = pipeline.windows(model.config, model.tokenizer, text, N_CTX, 6)
    # All batches are full, and small: the programs are the same for all tests.
    return replace(sensitivity.Trial.of(model.config, model.tensors, windows), size=2)


@pytest.fixture(scope="module")
def costs(trial):
    candidates = {name: [formats.get(f) for f in SOME] for name in (HEAD, DOWN, QUERY)}
    return {how: way(trial, candidates) for how, way in sensitivity.WAYS.items()}


def test_measured_is_the_metric(model, trial, costs):
    """The KLD of qjax.kl_divergence, for a matrix quantized with what the text shows as its importance."""
    weighed = rtn.Options(pipeline.weighed(rtn.Options(), DOWN, trial.seen[DOWN]).importance)
    packed = rtn.quantize_tensor(DOWN, model.tensors[DOWN], formats.get("Q4_K"), weighed)
    changed = transformer.stack({**model.tensors, DOWN: qjax.dequantize(packed)}, model.config)
    ids = trial.windows.reshape(-1)
    expected = qjax.kl_divergence(model, replace(model, params=changed), ids, n_ctx=N_CTX)
    assert costs["measured"].kld[DOWN][formats.get("Q4_K")] == pytest.approx(expected.mean, rel=1e-3)
    assert costs["measured"].n_tokens == expected.n_tokens == ppl.scored(trial.windows, N_CTX).size


def test_estimated_foretells_measured(costs):
    """In order, and each to within a factor of 3, over four orders of magnitude."""
    pairs = [(name, f) for name, of in costs["measured"].kld.items() for f in of]
    measured, estimated = (np.array([costs[how].kld[n][f] for n, f in pairs]) for how in ("measured", "estimated"))
    assert measured.max() > 1000 * measured.min() > 0
    np.testing.assert_allclose(np.log(estimated / measured), 0, atol=np.log(3))
    ranks = [np.argsort(np.argsort(values)) for values in (measured, estimated)]
    assert np.corrcoef(*ranks)[0, 1] > 0.95


def test_the_fisher_information_of_the_head_is_known():
    """Of logits W h it is E[p (1 - p) h²] for row v and column j, whatever was drawn."""
    config = qjax.load("tiny").config
    config = replace(config, n_layers=1, d_model=64, d_ff=64, n_heads=1, n_kv_heads=1, vocab=32, n_ctx=64, tied=False)
    tensors = transformer.init(config, jax.random.key(0))
    tensors["output.weight"] *= 50
    windows = np.random.default_rng(0).integers(0, 32, (4, 64)).astype(np.int32)
    trial = sensitivity.Trial.of(config, tensors, windows)
    logits, seen = transformer.observe(config, transformer.stack(tensors, config), jnp.asarray(windows), lambda h: h)
    p, h = (np.float64(a[:, 32:-1].reshape(-1, a.shape[-1])) for a in (jax.nn.softmax(logits), seen.head))
    expected = (p * (1 - p)).T @ h**2 / len(p)
    found = np.float64(trial.fisher["output.weight"])
    assert found.sum() == pytest.approx(expected.sum(), rel=0.05)
    assert np.corrcoef(found.sum(1), expected.sum(1))[0, 1] > 0.9


@pytest.mark.thorough
def test_from_a_mixture_costs_are_differences(trial):
    """The first order is the derivative of the mixture's KLD: beside finite differences, one format to the next."""
    at = {name: formats.get("Q4_0") for name in (HEAD, DOWN, QUERY)}
    near = {name: [formats.get("Q4_0"), formats.get("Q5_0")] for name in at}
    found = {how: way(trial, near, at) for how, way in sensitivity.WAYS.items()}
    for how in found.values():
        assert how.origin == pytest.approx(trial.kld(at), rel=1e-5)
        assert how.of(at) == how.origin
        assert all(of[formats.get("Q5_0")] < 0 for name, of in how.kld.items() if name != QUERY)
    kld, slope = trial.kld(at), trial.slope(at)
    step = trial.rounded(DOWN, formats.get("Q5_0")) - trial.rounded(DOWN, formats.get("Q4_0"))

    class Nudged(sensitivity.Trial):
        """As `trial`, its matrix moved by a part of the step."""

        def rounded(self, name, format):
            return trial.rounded(name, format) + (0.1 * step if name == DOWN else 0)

    there = Nudged(*(getattr(trial, key) for key in trial.__dataclass_fields__)).kld(at)
    assert there - kld == pytest.approx(0.1 * float(jnp.vdot(slope[DOWN], step)), rel=0.2)


# ── the solution ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def matrices(model):
    return planning.matrices(model.tensors, model.metadata)


def test_which_tensors_are_chosen_for(model, matrices):
    steps = planning.plan(model.tensors, recipes.recipe("Q4_0"), model.metadata).steps
    assert matrices == tuple(step.name for step in steps if step.changes)
    assert len(matrices) == 29


@pytest.fixture(scope="module")
def budget(model, matrices):
    """What all matrices take in Q5_0."""
    plan = planning.plan(model.tensors, recipes.recipe("Q5_0", pure=True), model.metadata)
    budget = solver.budget_of(plan, matrices, bpw=plan.bpw)
    assert budget == sum(solver.padded(formats.get("Q5_0"), model.tensors[name].shape) for name in matrices)
    return budget


@pytest.fixture(scope="module")
def solution(trial, matrices, budget):
    return solver.solve(trial, matrices, budget, candidates=SOME, tries=2)


@pytest.mark.thorough
def test_a_mixture_beats_one_format_of_its_size(trial, matrices, budget, solution):
    uniform = dict.fromkeys(matrices, formats.get("Q5_0"))
    assert solution.size_bytes <= budget
    assert solution.expected <= solution.costs.of(uniform)
    assert solution.kld == pytest.approx(trial.kld(solution.mixture))
    assert solution.kld < 0.8 * trial.kld(uniform)
    first = solver.solve(trial, matrices, budget, candidates=SOME, tries=0)
    assert solution.kld <= first.kld
    assert first.expected == pytest.approx(first.kld, rel=0.5)
    assert first.bound <= first.expected


@pytest.mark.thorough
def test_it_is_written_as_data(solution, tmp_path):
    solution.write(tmp_path / "r.txt")
    solution.write(tmp_path / "r.json")
    lines = (tmp_path / "r.txt").read_text().split()
    assert recipes.assignments(lines) == solver.exactly(solution.mixture)
    assert r"^blk\.0\.attn_q\.weight$=" in " ".join(lines)
    read = json.loads((tmp_path / "r.json").read_text())
    assert read["formats"] == {name: format.name for name, format in solution.mixture.items()}
    assert read["size_bytes"] == solution.size_bytes
    assert f"{solution.bpw:.3f} bpw" in str(solution)
    assert "expected KLD" in str(solution)
    with pytest.raises(QjaxError, match="cannot be said in REGEX=TYPE"):
        solver.tensor_type_file({"a=b": formats.get("Q4_0")})


@pytest.mark.thorough
def test_its_recipe_gives_each_matrix_its_format(model, solution):
    plan = planning.plan(model.tensors, solution.recipe(), model.metadata)
    found = {step.name: step.format for step in plan.steps if step.name in solution.mixture}
    assert found == solution.mixture
    assert sum(solver.padded(f, model.tensors[name].shape) for name, f in found.items()) == solution.size_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 1000}, r"the target leaves 1,000 bytes .* smallest formats they take [\d,]+ \(4.500\)"),
        ({"candidates": ["IQ2_XXS", "F32"]}, "token_embd.weight: none of the formats .*, expected one of"),
        ({"candidates": ["Q9"]}, "unknown format 'Q9'"),
        ({"sensitivity": "guessed"}, "sensitivity is 'guessed', expected measured or estimated"),
    ],
)
def test_what_cannot_be_solved(trial, matrices, budget, change, message):
    unseen = replace(trial, seen={})
    given = {"budget": budget, "candidates": SOME} | change
    with pytest.raises(QjaxError, match=message):
        solver.solve(unseen, matrices, given.pop("budget"), **given)


def test_a_cost_that_is_no_number_names_its_matrix(monkeypatch, trial):
    monkeypatch.setattr(sensitivity, "DRAWS", 1)
    broken = replace(trial, rounder=Method("", rounds=lambda name, w, *_: jnp.full_like(w, jnp.nan)), _kept={})
    for way in sensitivity.WAYS.values():
        with pytest.raises(QjaxError, match=r"^blk.0.attn_q.weight: in Q4_0 its KL divergence is nan"):
            way(broken, {QUERY: [formats.get("Q4_0")]})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "expected one target"),
        ({"bpw": 4.0, "file_bytes": 10**6}, "expected one target"),
        ({"bpw": float("nan")}, "target of nan bits per weight, expected a positive number"),
        ({"bpw": 32.0}, r"\(32.000 bits per weight\), but they have .* \(32.000\) as they are"),
    ],
)
def test_bad_targets(model, matrices, target, message):
    plan = planning.plan(model.tensors, recipes.recipe("Q8_0"), model.metadata)
    with pytest.raises(QjaxError, match=message):
        solver.budget_of(plan, matrices, **target)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def quick(monkeypatch, trial, text, tmp_path):
    """Options of a command, with the costs of the other tests."""
    monkeypatch.setattr(sensitivity.Trial, "of", lambda *_: trial)
    (tmp_path / "text").write_text(text)
    return ("--calibrate", tmp_path / "text", "-c", N_CTX, "--chunks", 6, "--formats", ",".join(SOME))


@pytest.mark.thorough
def test_the_file_is_as_large_as_was_asked_for(run, tmp_path, quick):
    target = tmp_path / "t.gguf"
    code, out, err = run("quantize", "tiny", target, "--target-size", "2.4M", "--recipe-out", tmp_path / "r", *quick)
    assert code == 0
    assert "expected KLD" in err
    assert "mixture-" in out
    # The smallest upgrade is of 128 rows of 256, by half a bit.
    assert 2_400_000 - 2048 <= target.stat().st_size <= 2_400_000
    mixture = recipes.assignments((tmp_path / "r").read_text().split())
    found = gguf.read(target).tensors
    assert {f"^{n}$".replace(".", r"\."): t.format for n, t in found.items() if len(t.shape) > 1} == mixture


@pytest.mark.thorough
def test_what_the_command_says_without_a_file(run, tmp_path, quick):
    code, out, _ = run("quantize", "tiny", tmp_path / "t.gguf", "--target-bpw", 5, "--dry-run", "--json", *quick)
    assert code == 0
    assert json.loads(out)["sensitivity"] == "estimated"
    assert not (tmp_path / "t.gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("OUT", "--target-bpw", 4), "expected IN OUT --calibrate TEXT"),
        (("OUT", "Q4_0", "--target-bpw", 4, "--calibrate", "TEXT"), "expected IN OUT --calibrate TEXT"),
        (("OUT", "Q4_0", "--formats", "Q4_0"), "--formats, --sensitivity and --recipe-out go with"),
        (("OUT", "--target-bpw", 17, "--calibrate", "TEXT"), "as they are. Give a smaller target"),
        (("OUT", "--target-size", "2.5Q", "--calibrate", "TEXT"), "size '2.5Q': expected a number of bytes"),
        (("OUT", "--target-bpw", 4, "--calibrate", "SHORT"), "calibration text: the text has"),
    ],
)
def test_command_refuses(run, tmp_path, text, arguments, message):
    (tmp_path / "TEXT").write_text(text)
    (tmp_path / "SHORT").write_text("One day.")
    named = {"OUT": tmp_path / "t.gguf", "TEXT": tmp_path / "TEXT", "SHORT": tmp_path / "SHORT"}
    fails(run("quantize", "tiny", *(named.get(a, a) for a in arguments)), message)


def test_llama_quantize_makes_the_same_of_it(llama_cpp, solution, tmp_path):
    """Of the tensor types in a file, with any file type beside them."""
    solution.write(tmp_path / "r.txt")
    quantize_file("tiny", tmp_path / "f32.gguf", "F32")
    command = [llama_cpp / "llama-quantize", "--tensor-type-file", tmp_path / "r.txt", tmp_path / "f32.gguf"]
    output(*command, tmp_path / "theirs.gguf", solution.recipe().file_type)
    quantize_file(tmp_path / "f32.gguf", tmp_path / "ours.gguf", solution.recipe())
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
