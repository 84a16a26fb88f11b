"""The comparison table: its numbers, its marks, and that an interrupted run goes on where it stopped."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import Affine, evaluate, formats
from qjax import comparison as engine
from qjax.comparison import Comparison, Row, compare, default_types, tales_floor
from qjax.data import tales
from qjax.errors import QjaxError
from qjax.io import imatrix as imatrix_files
from qjax.io.imatrix import Entry, Imatrix
from qjax.io.tokenizer import Tokenizer
from qjax.io.vocabulary import BYTE_OF
from qjax.methods import recipes
from qjax.metrics import windows
from qjax.model import Model
from qjax.models import transformer
from qjax.models.config import Config
from qjax.tensor import QTensor, dequantize

pytestmark = pytest.mark.in_haste

OPTIONS = dict(n_ctx=32, chunks=6, say=lambda message: None)
TYPES = ["Q8_0", "Q4_0", Affine(bits=2)]
TEXT = evaluate.held_out_tales(2)


def tokenizer_of(merges: list[str]) -> Tokenizer:
    tokens = [*BYTE_OF, *(merge.replace(" ", "") for merge in merges)]
    entries = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [1] * len(tokens),
        "merges": merges,
    }
    return Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in entries.items()})


def random_model(seed: int = 0, d_model: int = 32) -> Model:
    config = Config("llama", 1, d_model, 64, 1, 1, 32, 256, 1024, 1e-5, 1e4, True)
    rng, shapes = np.random.default_rng(seed), transformer.tensor_shapes(config)
    weights = {
        name: 0.06 * rng.standard_normal(shape) if len(shape) == 2 else np.ones(shape) for name, shape in shapes.items()
    }
    params = transformer.stack({name: jnp.asarray(w, jnp.float32) for name, w in weights.items()}, config)
    return Model(config, params, tokenizer_of([]), name=f"random-{seed}")


def numbers(comparison: Comparison) -> list[dict]:
    """The rows without their speed, which no two runs share."""
    return [dataclasses.asdict(row) | {"tokens_per_s": None} for row in comparison.rows]


def decoded(model: Model) -> Model:
    """With float32 weights, as small models are measured."""
    weights = {
        name: dequantize(w) if isinstance(w, QTensor) else jnp.asarray(w, jnp.float32)
        for name, w in model.tensors.items()
    }
    return dataclasses.replace(model, params=transformer.stack(weights, model.config))


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


@pytest.fixture(scope="module")
def comparison(model) -> Comparison:
    return compare(model, TEXT, TYPES, **OPTIONS)


def test_rows_hold_what_the_single_measures_say(model, comparison):
    base, *rows = comparison.rows
    assert [row.format for row in rows] == [Affine(bits=2).name, "Q4_0", "Q8_0"]  # by size
    for row in rows:
        format = Affine(bits=2) if row.family == "affine" else row.format
        quantized = model.quantize({".*": format} if isinstance(format, str) else format)
        k = evaluate.kl_divergence(decoded(model), decoded(quantized), TEXT, 32, 6)
        found = row.kld, row.kld_stderr, row.ppl, row.delta_ppl, row.delta_ppl_stderr, row.same_top
        assert found == pytest.approx((k.mean, k.stderr, k.ppl, k.delta_ppl, k.delta_ppl_stderr, k.same_top))
        assert row.accuracy is None
        assert row.tokens_per_s is None
    assert (base.format, base.kld, base.delta_ppl, base.same_top, base.bpw) == ("base", 0, 0, 100, 32)
    assert base.size_bytes == 4 * sum(w.size for w in model.tensors.values())
    assert comparison.n_tokens == 6 * 15
    assert comparison.floor is None


def test_divergence_falls_with_bits(comparison):
    klds = [row.kld for row in comparison.rows[1:]]
    assert klds == sorted(klds, reverse=True)
    assert klds[0] > 10 * klds[-1] > 0


def test_sizes_are_those_of_the_formats(model, comparison):
    matrices = sum(w.size for w in model.tensors.values() if w.ndim == 2)
    norms = sum(w.size for w in model.tensors.values() if w.ndim == 1)
    for row, bpw in zip(comparison.rows[1:], (2.5, 4.5, 8.5)):
        assert row.size_bytes == matrices * bpw / 8 + norms * 4
        assert row.bpw == pytest.approx(8 * row.size_bytes / (matrices + norms))


def test_large_models_are_measured_packed(model, comparison, monkeypatch):
    monkeypatch.setattr(engine, "_DENSE_BYTES", 0)
    packed = compare(model, TEXT, TYPES, speed=True, **OPTIONS)
    for row, of_decoded in zip(packed.rows, comparison.rows):
        assert row.tokens_per_s is not None
        assert row.tokens_per_s > 0
        assert (row.format, row.size_bytes) == (of_decoded.format, of_decoded.size_bytes)
        assert (row.ppl, row.kld) == pytest.approx((of_decoded.ppl, of_decoded.kld), rel=1e-5, abs=1e-7)
    assert "tokens/s" in str(packed)
    assert "tokens/s" not in str(comparison)


# ── resuming ─────────────────────────────────────────────────────────────────────────────────────────


def test_an_interrupted_run_resumes(model, comparison, tmp_path, monkeypatch):
    out, measured = tmp_path / "out.json", []
    quantize = Model.quantize

    def watched(self, format, **options):
        measured.append(format.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return quantize(self, format, **options)

    monkeypatch.setattr(Model, "quantize", watched)
    with pytest.raises(KeyboardInterrupt):
        compare(model, TEXT, TYPES, out=out, **OPTIONS)
    assert [row.format for row in Comparison.read(out).rows] == ["base", "Q8_0"]

    messages: list[str] = []
    resumed = compare(model, TEXT, TYPES, out=out, **OPTIONS | {"say": messages.append})
    assert measured == ["Q8_0", "Q4_0", "Q4_0", Affine(bits=2).name]
    assert numbers(resumed) == numbers(comparison)
    assert numbers(Comparison.read(out)) == numbers(comparison)
    assert "resuming, 2 of the rows" in messages[0]
    assert "2 models to measure, about" in messages[1]

    again = compare(model, TEXT, ["Q4_0"], out=out, **OPTIONS)
    assert len(measured) == 4
    assert [row.format for row in again.rows] == ["base", "Q4_0"]
    assert len(Comparison.read(out).rows) == 4


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"base": random_model(1)}, "model, model_sha256"),
        ({"text": TEXT[1:]}, "tokens_sha256"),
        ({"chunks": 5}, "tokens_sha256, chunks"),
        ({"precision": "bfloat16"}, "precision"),
    ],
)
def test_another_comparison_starts_over(model, comparison, tmp_path, change, differs):
    out, messages = tmp_path / "out.json", []
    comparison.write(out)
    options = OPTIONS | {"base": model, "text": TEXT, "types": ["Q8_0"], "out": out, "say": messages.append}
    fresh = compare(**options | change)
    assert f"({differs} differ); starting over" in messages[0]
    assert [row.format for row in fresh.rows] == ["base", "Q8_0"]
    assert Comparison.read(out) == fresh


def test_a_file_that_is_no_comparison_is_not_overwritten(model, tmp_path):
    for content in ("not json", "[]", json.dumps({"rows": []})):
        (tmp_path / "mine.json").write_text(content)
        with pytest.raises(QjaxError, match=r"mine\.json: not a comparison"):
            compare(model, TEXT, TYPES, out=tmp_path / "mine.json", **OPTIONS)
        assert (tmp_path / "mine.json").read_text() == content


# ── formats ──────────────────────────────────────────────────────────────────────────────────────────


def test_formats_that_do_not_fit_are_left_out_and_named(monkeypatch):
    uneven = random_model(d_model=48)
    monkeypatch.setattr(engine, "default_types", lambda: (Affine(bits=4), Affine(bits=4, block_size=16)))
    result = compare(uneven, TEXT, **OPTIONS)
    assert [row.format for row in result.rows] == ["base", Affine(bits=4, block_size=16).name]
    assert list(result.skipped) == [Affine(bits=4).name]
    assert "48 is not a multiple of 32" in result.skipped[Affine(bits=4).name]
    assert "left out: " in str(result)
    with pytest.raises(QjaxError, match="48 is not a multiple of 32"):
        compare(uneven, TEXT, ["Q4_0"], **OPTIONS)


def test_default_types_are_every_format_of_weights():
    names = [format.name for format in default_types()]
    assert {"F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"} <= set(names)
    assert not {"F32", "F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"} & set(names)
    assert len(set(names)) == len(names)


def test_refusals(model):
    with pytest.raises(QjaxError, match=r"unknown format 'Q4_9'.*Q4_0"):
        compare(model, TEXT, ["Q4_9"], **OPTIONS)
    with pytest.raises(QjaxError, match="auto"):
        compare(model, TEXT, TYPES, precision="auto", **OPTIONS)


def test_best_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    blank = dict.fromkeys((f.name for f in dataclasses.fields(Row)), 0) | {"imatrix": False}
    points = [tuple(map(float, p)) for p in rng.integers(0, 6, (12, 2))]
    rows = [Row(**blank | {"format": str(i), "family": "", "bpw": b, "kld": k}) for i, (b, k) in enumerate(points)]
    base = Row(**blank | {"format": "base", "family": "base"})
    expected = set()
    for i, (bpw, kld) in enumerate(points):
        if not any((b <= bpw and k < kld) or (b < bpw and k <= kld) for b, k in points):
            expected.add(str(i))
    assert set(Comparison({}, 0, None, (base, *rows), {}).best) == expected


# ── importance ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def needy(monkeypatch) -> None:
    """Q4_0 counts as a format that is garbage without an importance matrix; the real ones want wider rows."""
    monkeypatch.setattr(recipes, "NEED_IMATRIX", (("", "Q4_0"),))


def kld(model: Model, text: str, imatrix: Imatrix) -> float:
    quantized = model.quantize({".*": "Q4_0"}, imatrix=imatrix)
    return evaluate.kl_divergence(decoded(model), decoded(quantized), text, 32, 6).mean


@pytest.mark.thorough
@pytest.mark.usefixtures("needy")
def test_on_tales_what_needs_an_imatrix_gets_one_from_other_tales(model, monkeypatch):
    monkeypatch.setattr(engine, "N_PROBES", 0)
    result = compare(model, types=["Q4_0"], **OPTIONS)
    other = "".join(tale.text for tale in tales.generate(tales.TRAINING, 20))
    seen, _ = evaluate.imatrix(model, other, n_ctx=32, chunks=engine.CALIBRATION_CHUNKS, score=False)
    # Nothing is known of the columns of the embedding.
    ones = {"token_embd.weight": Entry(np.ones((1, 32), np.float32), np.ones(1, np.float32))}
    expected = dataclasses.replace(seen, entries=ones | dict(seen.entries))
    assert [(row.format, row.imatrix) for row in result.rows] == [("base", False), ("Q4_0", True)]
    assert result.rows[1].kld == pytest.approx(kld(model, evaluate.held_out_tales(), expected))
    assert "Q4_0 †" in str(result)
    assert "† errors weighed by an importance matrix" in result._repr_html_()


@pytest.mark.usefixtures("needy")
def test_on_another_text_it_is_left_out(model, monkeypatch):
    monkeypatch.setattr(engine, "default_types", lambda: (formats.get("Q8_0"), formats.get("Q4_0")))
    result = compare(model, TEXT, **OPTIONS)
    assert [row.format for row in result.rows] == ["base", "Q8_0"]
    assert "qjax imatrix" in result.skipped["Q4_0"]
    with pytest.raises(QjaxError, match="needs the tensor's importance"):
        compare(model, TEXT, ["Q4_0"], **OPTIONS)


def test_a_given_imatrix_serves_all_that_can_use_one(model, comparison, tmp_path):
    imatrix, _ = evaluate.imatrix(model, TEXT, n_ctx=32, chunks=4, score=False, dataset="it")
    imatrix_files.write(tmp_path / "imatrix.gguf", imatrix)
    options = OPTIONS | {"imatrix": tmp_path / "imatrix.gguf", "out": tmp_path / "out.json"}
    result = compare(model, TEXT, ["Q8_0", "Q4_0"], **options)
    assert [row.imatrix for row in result.rows] == [False, True, False]
    assert result.rows[1].kld == pytest.approx(kld(model, TEXT, imatrix))
    assert result.rows[1].kld != comparison.rows[2].kld

    messages: list[str] = []
    compare(model, TEXT, [], **options | {"imatrix": None, "say": messages.append})
    assert "(imatrix_sha256 differ); starting over" in messages[0]


# ── the floor ────────────────────────────────────────────────────────────────────────────────────────


def test_floor_is_the_likelihood_of_the_scored_characters():
    """With bytes as tokens, a choice is scored when its first character is."""
    nats = dict.fromkeys(range(len(TEXT)), 0.0)
    for offset, cost in tales.trace(TEXT):
        nats[offset] += cost
    assert sum(nats.values()) == pytest.approx(tales.nll(TEXT))
    tokenizer = tokenizer_of([])
    cut = windows(np.array(tokenizer.encode(TEXT)), 64)
    scored = [nats[64 * w + i] for w in range(len(cut)) for i in range(33, 64)]
    assert tales_floor(TEXT, tokenizer, cut) == pytest.approx(np.exp(np.mean(scored)))


def test_floor_with_tokens_of_several_characters():
    tokenizer = tokenizer_of(["t h", "th e", "a n", "an d", "Ġ the", "e r", "Ġ w"])
    ids = tokenizer.encode(TEXT)
    assert len(ids) < 0.95 * len(TEXT)
    cut = windows(np.array(ids), 64)
    token_at = [i for i, id in enumerate(ids) for _ in tokenizer.decode([id])]
    total = n = 0.0
    for offset, cost in tales.trace(TEXT):
        window, position = divmod(token_at[offset], 64)
        total += cost if window < len(cut) and position > 32 else 0
    n = len(cut) * 31
    assert tales_floor(TEXT, tokenizer, cut) == pytest.approx(np.exp(total / n))


def test_tales_bring_floor_and_tasks(model, monkeypatch):
    monkeypatch.setattr(engine, "N_PROBES", 5)
    result = compare(model, types=["Q8_0"], **OPTIONS)
    assert result.settings["text"] == "held-out tales"
    assert all(row.ppl > result.floor > 1 for row in result.rows)
    assert all(row.accuracy_low <= row.accuracy <= row.accuracy_high for row in result.rows)
    lines = str(result).splitlines()
    assert "entropy floor: PPL" in lines[0]
    assert lines[1].split()[:4] == ["format", "bpw", "MiB", "PPL"]
    base, quantized = ([i for i, character in enumerate(line) if character == "±"] for line in lines[2:4])
    assert base == quantized
    assert len(base) == 3
    assert result._repr_html_().count("<tr>") == 3
