"""Measuring models: against float64 numpy on the model's own logits, and against llama.cpp on SmolLM2."""

import dataclasses
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared

from qjax import evaluate, machine
from qjax.data import tales
from qjax.errors import QjaxError
from qjax.io.tokenizer import Tokenizer
from qjax.io.vocabulary import BYTE_OF
from qjax.metrics import perplexity as ppl
from qjax.model import Model, load
from qjax.models import cache as caches
from qjax.models import transformer
from qjax.models.config import Config

pytestmark = pytest.mark.in_haste

N_CTX, CHUNKS = 32, 5


def byte_tokenizer(extra: tuple[str, ...] = (), **settings) -> Tokenizer:
    """Every byte is a token, and what `extra` adds."""
    tokens = [*BYTE_OF, *extra]
    entries = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [1] * len(tokens),
        "merges": [],
    }
    return Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in (entries | settings).items()})


def random_model(seed: int = 0, tokenizer: Tokenizer | None = None, scale: float = 3.0) -> Model:
    """A small Llama whose predictions are far from uniform, with nothing rounded."""
    tokenizer = tokenizer or byte_tokenizer()
    config = Config("llama", 1, 32, 64, 2, 1, 32, tokenizer.vocab_size, 64, 1e-5, 1e4, True)
    weights = transformer.init(config, jax.random.key(seed))
    scaled = {name: w * scale if w.ndim == 2 else w for name, w in weights.items()}
    params = transformer.stack(scaled, config)
    return Model(config, params, tokenizer, name=f"random-{seed}", cache_k="f32", cache_v="f32")


TEXT = evaluate.held_out_tales(2)


def log_p(model: Model, window: np.ndarray) -> np.ndarray:
    """Float64 log-probabilities after each token of a window."""
    logits = np.asarray(model.logits(window), np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def scored(model: Model, tokens: list[int], bos: int | None = None):
    """(log-probabilities, next token) of each prediction that llama-perplexity scores."""
    for start in range(0, CHUNKS * N_CTX, N_CTX):
        window = np.array(tokens[start : start + N_CTX])
        window[0] = window[0] if bos is None else bos
        yield from list(zip(log_p(model, window), window[1:]))[N_CTX // 2 :]


# ── perplexity ───────────────────────────────────────────────────────────────────────────────────────


def test_perplexity_equals_float64():
    model = random_model()
    nll = [-p[t] for p, t in scored(model, model.tokenizer.encode(TEXT))]
    result = evaluate.perplexity(model, TEXT, N_CTX, CHUNKS, "float32")
    assert result.mean_nll == pytest.approx(np.mean(nll), rel=1e-6)
    assert result.value == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
    assert (result.n_tokens, result.n_ctx, result.chunks) == (len(nll), N_CTX, CHUNKS)
    assert (result.precision, result.reason) == ("float32", "as asked")
    ids = model.tokenizer.encode(TEXT)
    assert evaluate.perplexity(model, ids, N_CTX, CHUNKS, "float32").value == result.value


def test_perplexity_begins_each_window_with_bos():
    tokenizer = byte_tokenizer(("<s>",), bos_token_id=256, add_bos_token=True)
    model = random_model(tokenizer=tokenizer)
    nll = [-p[t] for p, t in scored(model, tokenizer.encode(TEXT), bos=256)]
    result = evaluate.perplexity(model, TEXT, N_CTX, CHUNKS, "float32")
    assert result.mean_nll == pytest.approx(np.mean(nll), rel=1e-6)


def test_bfloat16_is_run_and_named():
    model = random_model()
    exact, rough = (evaluate.perplexity(model, TEXT, N_CTX, CHUNKS, p) for p in ("float32", "bfloat16"))
    assert rough.precision == "bfloat16"
    assert 0 < abs(rough.value / exact.value - 1) < 0.05


def test_perplexity_and_divergence_go_through_the_cache_types():
    """Each window read token by token through a cache gives the same."""
    base = random_model(scale=20.0)
    model = dataclasses.replace(base, cache_k="q4_0", cache_v="Q5_1")
    windows = evaluate.cut(model, TEXT, N_CTX, CHUNKS)
    cache, stepped = caches.empty(model.config, CHUNKS, N_CTX, model.cache_types("f32")), []
    for at in range(N_CTX - 1):
        logits, cache = transformer.step(model.config, model.params, windows[:, at : at + 1], cache)
        stepped.append(jax.nn.log_softmax(logits))
    p = np.stack(stepped, axis=1)[:, N_CTX // 2 :].astype(np.float64)
    nll = -np.take_along_axis(p, windows[:, N_CTX // 2 + 1 :, None], axis=-1)
    exact = evaluate.perplexity(base, TEXT, N_CTX, CHUNKS, "float32")
    result = evaluate.perplexity(model, TEXT, N_CTX, CHUNKS, "float32")
    assert (result.cache_k, result.cache_v) == ("q4_0", "q5_1")
    assert (exact.cache_k, exact.cache_v) == ("f32", "f32")
    assert abs(result.mean_nll - nll.mean()) < 0.05 * abs(result.mean_nll - exact.mean_nll)

    k = evaluate.kl_divergence(base, model, TEXT, N_CTX, CHUNKS)
    q = np.concatenate([log_p(base, window[:-1])[N_CTX // 2 :] for window in windows])
    kld = np.sum(np.where(q > -16, np.exp(q) * (q - p.reshape(q.shape)), 0), axis=-1)
    assert (k.cache_k, k.cache_v) == ("q4_0", "q5_1")
    assert k.mean == pytest.approx(kld.mean(), rel=0.05)
    assert k.ppl == pytest.approx(result.value, rel=1e-6)


@pytest.mark.parametrize(
    ("speedup", "tolerance", "ran", "reason"),
    [
        (0.95, 1.0, "float32", "products of bfloat16 run at 0.95 times float32's speed here, no gain"),
        (2.0, 1.0, "bfloat16", "run at 2.00 times float32's speed here; .* PPL on the first 1 window$"),
        (2.0, 1e-9, "float32", "would change PPL by more than .* on the first 5 windows"),
    ],
)
def test_auto_takes_the_fastest_that_is_right(monkeypatch, speedup, tolerance, ran, reason):
    monkeypatch.setattr(machine, "bfloat16_speedup", lambda: speedup)
    monkeypatch.setattr(evaluate, "_TOLERANCE", tolerance)
    model = random_model()
    result = evaluate.perplexity(model, TEXT, N_CTX, CHUNKS, "auto")
    assert result.precision == ran
    assert re.search(reason, result.reason)
    assert result.value == evaluate.perplexity(model, TEXT, N_CTX, CHUNKS, ran).value


def test_auto_sees_how_much_perplexity_changes(monkeypatch):
    """Its figures are those of both precisions on the same windows."""
    monkeypatch.setattr(machine, "bfloat16_speedup", lambda: 2.0)
    monkeypatch.setattr(evaluate, "_TOLERANCE", 0.0)
    model = random_model(scale=20.0)
    reason = evaluate.perplexity(model, TEXT, N_CTX, 3).reason
    found = re.search(r"\((\S+)% ± (\S+)% PPL", reason)
    assert found, reason
    change, stderr = map(float, found.groups())
    windows = evaluate.cut(model, TEXT, N_CTX, 3)
    nll = {name: next(ppl.token_nll(evaluate.logits_of(model, name), windows, 3)) for name in evaluate.PRECISIONS}
    difference = (nll["bfloat16"] - nll["float32"]).ravel().astype(np.float64)
    assert change == pytest.approx(100 * np.expm1(difference.mean()), abs=1e-3)
    assert stderr == pytest.approx(100 * difference.std(ddof=1) / difference.size**0.5, abs=1e-3)
    assert stderr > 0.01


def test_auto_measures():
    model = random_model(scale=1.0)
    result = evaluate.perplexity(model, TEXT, N_CTX, CHUNKS)
    exact = evaluate.perplexity(model, TEXT, N_CTX, CHUNKS, "float32")
    assert result.reason.startswith("auto: ")
    assert result.value == pytest.approx(exact.value, rel=0.002)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": 65}, "n_ctx is 65, but random-0 was trained for at most 64"),
        ({"text": TEXT[:127], "n_ctx": 64}, "127 tokens.*128"),
        ({"precision": "float16"}, "float16.*float32, bfloat16, int8 or auto"),
        ({"chunks": 0}, "chunks is 0"),
    ],
)
def test_perplexity_refuses(options, message):
    with pytest.raises(QjaxError, match=message):
        evaluate.perplexity(random_model(), **{"text": TEXT, "n_ctx": N_CTX} | options)


# ── divergence ───────────────────────────────────────────────────────────────────────────────────────


def test_divergence_equals_float64():
    base, model = random_model(0), random_model(1)
    ids = base.tokenizer.encode(TEXT)
    kld, dp, same = [], [], []
    for (p, token), (q, _) in zip(scored(base, ids), scored(model, ids)):
        kld.append(np.sum((np.exp(p) * (p - q))[p > -16]))
        dp.append(np.exp(q[token]) - np.exp(p[token]))
        same.append(p.argmax() == q.argmax())
    k = evaluate.kl_divergence(base, model, TEXT, N_CTX, CHUNKS)
    assert k.mean == pytest.approx(np.mean(kld), rel=1e-5)
    assert k.median == pytest.approx(np.median(kld), rel=1e-5)
    assert k.max == pytest.approx(max(kld), rel=1e-5)
    assert k.mean_dp == pytest.approx(100 * np.mean(dp), rel=1e-4)
    assert k.same_top == pytest.approx(100 * np.mean(same))
    own = evaluate.perplexity(model, TEXT, N_CTX, CHUNKS, "float32")
    assert (k.ppl, k.ppl_stderr) == pytest.approx((own.value, own.stderr), rel=1e-6)


def test_divergence_needs_one_vocabulary():
    base = random_model()
    larger = random_model(tokenizer=byte_tokenizer(("<s>",)))
    with pytest.raises(QjaxError, match="257 tokens, random-0 one of 256"):
        evaluate.kl_divergence(base, larger, TEXT, N_CTX, CHUNKS)
    permuted = byte_tokenizer(tokens=list(BYTE_OF)[::-1])
    with pytest.raises(QjaxError, match="different tokens"):
        evaluate.kl_divergence(base, random_model(1, permuted), TEXT, N_CTX, CHUNKS)
    with pytest.raises(QjaxError, match="auto"):
        evaluate.kl_divergence(base, base, TEXT, N_CTX, CHUNKS, "auto")


# ── probes and texts ─────────────────────────────────────────────────────────────────────────────────


def test_probe_takes_the_likeliest_continuation():
    model = random_model()
    # 40 characters of prompt are enough for a random model, and fit its context.
    probes = [p._replace(prompt=p.prompt[-40:]) for p in tales.probes(1, 12)]
    right = []
    for p in probes:
        likelihood = []
        for end in (p.answer, *p.alternatives):
            ids = np.array(model.tokenizer.encode(p.prompt + end))
            table = log_p(model, ids)
            likelihood.append(sum(table[i][b] for i, (_, b) in enumerate(itertools.pairwise(ids))))
        right.append(np.argmax(likelihood) == 0)
    result = evaluate.probe(model, probes)
    assert result.accuracy == pytest.approx(np.mean(right))
    assert 0 < result.accuracy < 1
    assert set(result.by_kind) == {p.kind for p in probes}


def test_held_out_tales_are_not_trained_on():
    assert evaluate.held_out_tales(3) == "".join(t.text for t in tales.generate(0, 3))
    assert 0 < tales.HELD_OUT <= tales.TRAINING


@pytest.mark.parametrize(
    ("content", "text"), [(b"a\n\n", "a\n"), (b"a\r\nb\r\n", "a\r\nb\r"), (b"", ""), ("é".encode(), "é")]
)
def test_read_text(tmp_path, content, text):
    (tmp_path / "text").write_bytes(content)
    assert evaluate.read_text(tmp_path / "text") == text


def test_read_text_refuses(tmp_path):
    (tmp_path / "latin1").write_bytes("né".encode("latin-1"))
    with pytest.raises(QjaxError, match=r"latin1: not UTF-8 text .byte 1"):
        evaluate.read_text(tmp_path / "latin1")
    with pytest.raises(QjaxError, match=r"missing: cannot be read: No such file"):
        evaluate.read_text(tmp_path / "missing")


# ── SmolLM2 against llama.cpp ────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def smollm2(smollm2_path) -> Model:
    return load(smollm2_path)


@pytest.mark.exact
def test_smollm2_perplexity_is_llama_cpp_s(smollm2):
    peer = json.loads(shared("peers/smollm2-135m-instruct.json").read_text())["perplexity"][0]
    text = evaluate.read_text(shared("corpora/wiki.test.raw"))
    result = evaluate.perplexity(smollm2, text, peer["n_ctx"], peer["chunks"], "float32")
    assert result.value == pytest.approx(peer["value"], abs=0.02)
    assert result.stderr == pytest.approx(peer["stderr"], abs=0.001)


@pytest.mark.exact
def test_smollm2_divergence_is_llama_cpp_s(smollm2):
    """Q4_0 as llama-quantize makes it, both models in float32; llama-perplexity keeps the base's in a file."""
    peer = json.loads(shared("peers/smollm2-135m-instruct.json").read_text())["kl_divergence"]
    text = evaluate.read_text(shared("corpora/wiki.test.raw"))
    model = smollm2.quantize("Q4_0", allow_requantize=True)
    found = evaluate.kl_divergence(smollm2, model, text, peer["n_ctx"], peer["chunks"])
    names = {
        "mean_ppl_q": "ppl",
        "mean_ppl_base": "ppl_base",
        "cor_ln_ppl_pct": "correlation",
        "mean_ln_ratio": "ln_ratio",
        "mean_kld": "mean",
        "mean_kld_stderr": "stderr",
        "max_kld": "max",
        "p999_kld": "p99_9",
        "p99_kld": "p99",
        "p95_kld": "p95",
        "p90_kld": "p90",
        "median_kld": "median",
        "p10_kld": "p10",
        "p05_kld": "p05",
        "p01_kld": "p01",
        "mean_dp_pct": "mean_dp",
        "rms_dp_pct": "rms_dp",
        "same_top_pct": "same_top",
    }
    values = dataclasses.asdict(found)
    differing = {k: (peer[k], values[v]) for k, v in names.items() if values[v] != pytest.approx(peer[k], rel=0.01)}
    assert not differing


@pytest.mark.exact
def test_smollm2_least_divergence_is_llama_cpp_s(smollm2):
    """The least KLD of all tokens, 1.1e-4 nats, is small enough to show how llama.cpp computes.

    The peer's file has 0.000114, from a float16 cache and flash attention; with -ctk f32 -ctv f32 -fa off, that is in
    float32 as here, the same two files give 0.000110.  Both pass the base's log-probabilities through 16 bits.
    """
    text = evaluate.read_text(shared("corpora/wiki.test.raw"))
    model = smollm2.quantize("Q4_0", allow_requantize=True)
    base, quantized = evaluate.logits_of(smollm2), evaluate.logits_of(model)
    least = min(
        float(jnp.min(kld_through_a_logits_file(base(w, 256), quantized(w, 256))))
        for w in np.split(evaluate.cut(smollm2, text, 512, 8)[:, :-1], 2)
    )
    printed_to = 0.5e-6
    assert least == pytest.approx(0.000110, abs=0.01 * 0.000110 + printed_to)


@jax.jit
def kld_through_a_logits_file(base, logits):
    """KLD of each token, the base's log-probabilities in 16 bits as llama-perplexity stores them."""
    log_p = jax.nn.log_softmax(base)
    top = log_p.max(-1, keepdims=True)
    low = jnp.maximum(log_p.min(-1, keepdims=True), top - 16)
    step = (top - low) / 65535
    log_p = jnp.maximum(jnp.round((log_p - low) / step), 0) * step + low
    terms = jnp.exp(log_p) * (log_p - jax.nn.log_softmax(logits))
    return jnp.sum(jnp.where(log_p > -16, terms, 0), -1)
