"""The file of a base model's predictions: against its description in C, float64, and llama-perplexity."""

import dataclasses
import math
import re
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fails
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles.programs import output
from test_evaluate import TEXT, byte_tokenizer, random_model

import qjax
from qjax import evaluate
from qjax.errors import QjaxError
from qjax.io import logits
from qjax.metrics import KLDivergence, TokenDivergence
from qjax.models import transformer
from qjax.quantize_file import quantize_file

N_CTX, CHUNKS = 32, 3
SCORED = N_CTX - N_CTX // 2 - 1


# ── 16 bits ──────────────────────────────────────────────────────────────────────────────────────────


def in_c(row):
    """(scale, minimum, codes) of a row of logits, in the float32 steps of llama.cpp's log_softmax."""
    f = np.float32
    top, low = row.max(), max(row.min(), row.max() - f(16))
    log_sum = f(math.log(sum(math.exp(float(x) - float(top)) for x in row)))
    scale = (top - low) / f(65535)
    if not scale:
        return scale, low - top - log_sum, np.zeros(len(row), int)
    inverse = f(1) / scale
    codes = [int(np.rint(inverse * (x - low))) if x > low else 0 for x in row]
    return scale, low - top - log_sum, np.array(codes)


ROWS = np.random.default_rng(0).standard_normal((6, 33)).astype(np.float32) * np.float32(
    [[0.01], [1], [4], [9], [30], [0]]
)


def test_encoded_as_in_c():
    encoded = logits.encode(jnp.asarray(ROWS))
    for i, row in enumerate(ROWS):
        scale, minimum, codes = in_c(row)
        assert encoded.scale[i] == scale
        assert encoded.minimum[i] == pytest.approx(minimum, rel=1e-6)
        np.testing.assert_array_equal(encoded.codes[i], codes)


@settings(deadline=None)
@given(hnp.arrays(np.float32, (3, 7), elements=st.floats(-100, 100, width=32)))
def test_decoded_to_within_half_a_step(rows):
    decoded = np.asarray(logits.encode(jnp.asarray(rows)).decode(), np.float64)
    x = rows.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    expected = np.maximum(x, -16) - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    assert np.abs(decoded - expected).max() <= 16 / 65535 / 2 + 5e-5


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model():
    """With BOS, and a vocabulary of 257, so that rows are padded."""
    return random_model(tokenizer=byte_tokenizer(("!!",), bos_token_id=7, add_bos_token=True))


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    """The file of a model, written two windows at a time."""
    path = tmp_path_factory.mktemp("base") / "base.bin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.ppl, "batch_size", lambda n_ctx, vocab: 2)
        evaluate.save_base(model, TEXT, path, N_CTX, CHUNKS)
    return path


def test_layout(model, base):
    raw = base.read_bytes()
    vocab = 257
    assert struct.unpack("<8s3i", raw[:20]) == (b"_logits_", N_CTX, vocab, CHUNKS)
    tokens = np.frombuffer(raw, "<i4", CHUNKS * N_CTX, 20)
    # The text's own; BOS is what a reader puts in the first place.
    np.testing.assert_array_equal(tokens, model.tokenizer.encode(TEXT)[: CHUNKS * N_CTX])
    rows = np.frombuffer(raw, "<u2", offset=20 + tokens.nbytes).reshape(CHUNKS, SCORED, 4 + vocab + 1)

    windows = tokens.reshape(CHUNKS, N_CTX).copy()
    windows[:, 0] = 7
    predicted = np.asarray(model.logits(windows))[:, N_CTX // 2 : -1]
    for chunk, at in ((0, 0), (1, 7), (2, SCORED - 1)):
        scale, minimum, codes = in_c(predicted[chunk, at])
        row = rows[chunk, at]
        assert row[:4].view("<f4") == pytest.approx([scale, minimum], rel=1e-5)
        assert np.abs(row[4 : 4 + vocab].astype(int) - codes).max() <= 1
    assert (rows[..., -1] == 0).all()


def test_saving_measures_perplexity(model, base, tmp_path):
    saved = evaluate.save_base(model, TEXT, tmp_path / "b", N_CTX, CHUNKS)
    measured = evaluate.perplexity(model, TEXT, N_CTX, CHUNKS, "float32")
    assert dataclasses.replace(saved, time_s=0) == dataclasses.replace(measured, time_s=0)
    assert (tmp_path / "b").stat().st_size == base.stat().st_size


def test_divergence_from_a_file_equals_float64(model, base):
    """All the statistics, from what the file says and float64 predictions of another model."""
    other = random_model(1, model.tokenizer)
    found = evaluate.kl_divergence_from(base, other)
    file = logits.read(base)
    windows = file.tokens.copy()
    windows[:, 0] = 7
    x = np.asarray(other.logits(windows), np.float64)[:, N_CTX // 2 : -1]
    log_p = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True))).reshape(-1, file.vocab)
    rows = np.frombuffer(base.read_bytes(), "<u2", offset=20 + windows.nbytes).reshape(len(log_p), -1)
    scale, minimum = rows[:, :4].copy().view("<f4").astype(np.float64).T
    log_p_base = scale[:, None] * rows[:, 4:-1] + minimum[:, None]

    kld = np.where(log_p_base > -16, np.exp(log_p_base) * (log_p_base - log_p), 0).sum(axis=-1)
    targets = windows[:, N_CTX // 2 + 1 :].ravel()
    nll, nll_base = (-a[np.arange(len(a)), targets] for a in (log_p, log_p_base))
    dp = 100 * (np.exp(-nll) - np.exp(-nll_base))
    expected = {
        "mean": kld.mean(), "max": kld.max(), "min": kld.min(), "median": np.median(kld),
        "p10": np.percentile(kld, 10), "ppl": np.exp(nll.mean()), "ppl_base": np.exp(nll_base.mean()),
        "ln_ratio": (nll - nll_base).mean(), "mean_dp": dp.mean(), "rms_dp": np.sqrt((dp**2).mean()),
        "max_dp": dp.max(), "p75_dp": np.percentile(dp, 75), "median_dp": np.median(dp), "min_dp": dp.min(),
        "same_top": 100 * np.mean(log_p.argmax(-1) == log_p_base.argmax(-1)),
    }  # fmt: skip
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=2e-4, abs=1e-6), name
    assert (found.n_tokens, found.n_ctx, found.chunks) == (CHUNKS * SCORED, N_CTX, CHUNKS)


def test_a_model_does_not_diverge_from_its_own_file(model, base):
    found = evaluate.kl_divergence_from(base, model, chunks=1)
    assert (found.same_top, found.chunks) == (100, 1)
    # The rounding to 16 bits, and what lies below e^-16.
    assert abs(found.mean) < 1e-4
    assert abs(found.max_dp) < 0.02


def test_percentiles_of_dp():
    """At whole positions of the sorted values no interpolation is needed: 1,001 values, every 0.1 %."""
    p_base = np.full(1001, 0.25)
    p = np.random.default_rng(0).permutation(np.linspace(0.05, 0.45, 1001))
    tokens = TokenDivergence(
        np.zeros((1, 1001), np.float32),
        *(-np.log(a)[None].astype(np.float32) for a in (p, p_base)),
        np.ones((1, 1001), bool),
    )
    found = KLDivergence.of(tokens, 2003)
    for name, percent in {
        "min_dp": 0, "p00_1_dp": 0.1, "p01_dp": 1, "p05_dp": 5, "p10_dp": 10, "p25_dp": 25, "median_dp": 50,
        "p75_dp": 75, "p90_dp": 90, "p95_dp": 95, "p99_dp": 99, "p99_9_dp": 99.9, "max_dp": 100,
    }.items():  # fmt: skip
        assert getattr(found, name) == pytest.approx(-20 + 0.4 * percent, abs=1e-4), name


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────


def changed(raw, at, code, value):
    packed = struct.pack("<" + code, value)
    return raw[:at] + packed + raw[at + len(packed) :]


def test_predictions_that_are_not_finite_are_refused(model, base, tmp_path):
    header = 20 + 4 * CHUNKS * N_CTX
    for at in (header, header + 4):
        (tmp_path / "b").write_bytes(changed(base.read_bytes(), at, "f", math.nan))
        with pytest.raises(QjaxError, match="NaN or infinite predictions"):
            evaluate.kl_divergence_from(tmp_path / "b", model, chunks=1)
    broken = dict(model.tensors)
    broken["output_norm.weight"] = broken["output_norm.weight"].at[0].set(jnp.nan)
    params = transformer.stack(broken, model.config)
    with pytest.raises(QjaxError, match="predictions are not finite"):
        evaluate.save_base(dataclasses.replace(model, params=params), TEXT, tmp_path / "c", N_CTX, CHUNKS)
    assert not (tmp_path / "c").exists()


def test_another_vocabulary_is_refused(base):
    with pytest.raises(QjaxError, match=r"vocabulary of 257 tokens; random-0 has 256\. Use models that share"):
        evaluate.kl_divergence_from(base, random_model())


def test_a_longer_context_than_the_model_has_is_refused(model, base):
    config = dataclasses.replace(model.config, n_ctx=16)
    with pytest.raises(QjaxError, match="n_ctx is 32, but random-0 was trained for at most 16"):
        evaluate.kl_divergence_from(base, dataclasses.replace(model, config=config))


# ── command line ─────────────────────────────────────────────────────────────────────────────────────


def test_command(run, tmp_path, model, base, monkeypatch):
    monkeypatch.setattr(qjax, "load", lambda name, **options: model, raising=False)
    text, path = tmp_path / "t.txt", tmp_path / "b"
    text.write_text(TEXT + "\n")
    code, out, err = run("perplexity", "m", "-f", text, "-c", N_CTX, "--chunks", CHUNKS, "--kl-divergence-base", path)
    assert (code, err) == (0, "")
    assert re.fullmatch(r"PPL = .* chunks of 32, cache f32/f32, float32: as asked\)\n", out)
    assert path.read_bytes()[:20] == base.read_bytes()[:20]
    code, out, _ = run("perplexity", "m", "--kl-divergence", "--kl-divergence-base", path)
    labels = [line.split(" : ")[0].strip() for line in out.splitlines()]
    assert len(labels) == 34
    assert labels[-3:] == ["Minimum Δp", "RMS Δp", "Same top p"]
    for extra in ((), ("--kl-divergence-base", path, "-f", text)):
        fails(run("perplexity", "m", "--kl-divergence", *extra), "--kl-divergence takes --kl-divergence-base FILE")


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────────

WINDOWS = ("-c", 128, "--chunks", 4)


PRECISE = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")


@pytest.fixture(scope="module")
def peers(llama_cpp, tmp_path_factory):
    """A folder with the tiny model, its Q4_0 decoded, a text, and llama-perplexity's file of the first."""
    folder = tmp_path_factory.mktemp("kld")
    quantize_file("tiny", folder / "base.gguf", "F32")
    quantize_file("tiny", folder / "q4.gguf", "Q4_0")
    quantize_file(folder / "q4.gguf", folder / "decoded.gguf", "F32", allow_requantize=True)
    (folder / "text").write_text(evaluate.held_out_tales(40) + "\n")
    options = ("-m", folder / "base.gguf", "-f", folder / "text", *WINDOWS)
    output(llama_cpp / "llama-perplexity", *options, *PRECISE, "--kl-divergence-base", folder / "theirs")
    return folder


def test_the_file_is_llama_perplexity_s(peers):
    text = evaluate.read_text(peers / "text")
    evaluate.save_base(qjax.load(peers / "base.gguf"), text, peers / "ours", 128, 4)
    ours, theirs = ((peers / name).read_bytes() for name in ("ours", "theirs"))
    header = 20 + 4 * 4 * 128
    assert ours[:header] == theirs[:header]
    assert len(ours) == len(theirs)
    a, b = (np.frombuffer(raw, "<u2", offset=header).reshape(4 * 63, -1)[:, 4:].astype(int) for raw in (ours, theirs))
    # Sums in another order change logits in the seventh digit.
    assert np.abs(a - b).max() <= 2
    assert np.mean(a != b) < 0.05


def table(printed):
    """The statistics in the order of printing, each a list of value and error, as they are printed."""
    lines = printed[printed.index("Mean PPL(Q)") :].splitlines()
    values = [re.findall(r"-?\d+\.\d+", line.rpartition(":")[2]) for line in lines if ":" in line]
    return [found for found in values if found][:34]


@pytest.mark.parametrize("file", ["theirs", "ours"])
def test_the_table_is_llama_perplexity_s(llama_cpp, peers, file):
    """Whoever wrote the file, both read it alike."""
    model = qjax.load(peers / "decoded.gguf")
    if file == "ours":
        evaluate.save_base(qjax.load(peers / "base.gguf"), evaluate.read_text(peers / "text"), peers / "ours", 128, 4)
    options = ("-m", peers / "decoded.gguf", *WINDOWS, "--kl-divergence", "--kl-divergence-base", peers / file)
    theirs = table(output(llama_cpp / "llama-perplexity", *options, *PRECISE, last="Same top p:"))
    ours = table(str(evaluate.kl_divergence_from(peers / file, model)))
    assert len(ours) == len(theirs) == 34
    for found, expected in zip(ours, theirs):
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            # Three digits, or the last that is printed.
            last = 10.0 ** -len(b.partition(".")[2])
            assert float(a) == pytest.approx(float(b), rel=0.0005, abs=1.01 * last), (ours, theirs)
