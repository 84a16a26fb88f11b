"""The metrics against algebra, against float64 numpy, and against llama.cpp's formulas written out."""

import math
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.data.tales import Probe
from qjax.errors import QjaxError
from qjax.metrics import (
    KLDivergence,
    Perplexity,
    TokenDivergence,
    ask,
    cached,
    likelihoods,
    tensor_error,
    token_divergence,
    token_nll,
    windows,
)

pytestmark = pytest.mark.in_haste

VOCAB = 11


def bigram(seed: int, scale: float = 2.0) -> np.ndarray:
    """Log-probabilities (vocab, vocab) of each next token given the last, float64."""
    x = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) * scale
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def as_logits(log_p: np.ndarray, calls: list | None = None):
    """A model that looks at the last token only. The constant it adds to its logits means nothing."""

    def logits(tokens, first):
        if calls is not None:
            calls.append(tokens.shape)
        return jnp.asarray(log_p + 3.0, jnp.float32)[tokens[:, first:]]

    return logits


def sample(log_p: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(n - 1):
        tokens.append(rng.choice(VOCAB, p=np.exp(log_p[tokens[-1]])))
    return np.array(tokens, np.int32)


def perplexity(log_p: np.ndarray, tokens: np.ndarray, n_ctx: int, size: int = 3) -> Perplexity:
    parts = list(token_nll(as_logits(log_p), windows(tokens, n_ctx), size))
    return Perplexity.of(np.concatenate(parts), n_ctx)


def divergence(base: np.ndarray, model: np.ndarray, tokens: np.ndarray, n_ctx: int = 32) -> TokenDivergence:
    cut = windows(tokens, n_ctx)
    return TokenDivergence.concatenate(list(token_divergence(as_logits(base), as_logits(model), cut, 3)))


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("n", "n_ctx", "chunks", "expected"),
    [(1024, 512, None, 2), (1535, 512, None, 2), (99, 10, 4, 4), (99, 10, 50, 9)],
)
def test_windows_follow_one_another(n, n_ctx, chunks, expected):
    tokens = np.arange(n)
    cut = windows(tokens, n_ctx, chunks)
    assert cut.shape == (expected, n_ctx)
    assert cut.ravel().tolist() == list(range(expected * n_ctx))


def test_bos_replaces_the_first_token_of_each_window():
    tokens = np.arange(100, 140)
    cut = windows(tokens, 10, None, bos_id=7)
    assert cut[:, 0].tolist() == [7, 7, 7, 7]
    assert cut[:, 1:].tolist() == windows(tokens, 10)[:, 1:].tolist()
    assert tokens[0] == 100


@pytest.mark.parametrize(
    ("n", "n_ctx", "chunks", "message"),
    [
        (1023, 512, None, "1023 tokens.* 1024.*at most 511"),
        (99, 4, None, "n_ctx is 4"),
        (99, 10, 0, "chunks is 0"),
    ],
)
def test_impossible_windows(n, n_ctx, chunks, message):
    with pytest.raises(QjaxError, match=message):
        windows(np.arange(n), n_ctx, chunks)


# ── perplexity ───────────────────────────────────────────────────────────────────────────────────────


def test_uniform_predictions_have_the_vocabulary_as_perplexity():
    result = perplexity(np.full((VOCAB, VOCAB), 5.0), sample(bigram(0), 200), 20)
    assert result.value == pytest.approx(VOCAB, rel=1e-6)
    assert result.stderr == pytest.approx(0, abs=1e-5)


def test_scored_tokens_are_those_of_llama_perplexity():
    """255 of 512: predictions at positions n_ctx // 2 to n_ctx - 2."""
    log_p, tokens = bigram(1), sample(bigram(1), 2000)
    result = perplexity(log_p, tokens, 512)
    expected = [-log_p[a, b] for w in windows(tokens, 512) for a, b in pairwise(w[256:])]
    assert result.n_tokens == len(expected) == 3 * 255
    assert result.mean_nll == pytest.approx(np.mean(expected), rel=1e-6)
    assert result.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-6)


@pytest.mark.parametrize("n_ctx", [8, 9, 16, 33])
def test_number_of_scored_tokens(n_ctx):
    result = perplexity(bigram(1), sample(bigram(1), 200), n_ctx)
    assert result.n_tokens == result.chunks * (n_ctx - n_ctx // 2 - 1)


def test_mean_nll_of_the_true_model_is_the_entropy_rate():
    log_p = bigram(2)
    p = np.exp(log_p)
    stationary = np.linalg.matrix_power(p, 200)[0]
    entropy = -(stationary @ (p * log_p).sum(axis=1))
    result = perplexity(log_p, sample(log_p, 20_000), 64)
    assert abs(result.mean_nll - entropy) < 4 * result.stderr / result.value
    assert perplexity(bigram(3), sample(log_p, 20_000), 64).mean_nll > entropy


def test_stderr_is_llama_perplexity_s():
    nll = np.random.default_rng(0).gamma(2.0, size=(5, 31)).astype(np.float32)
    total = total2 = 0.0
    for v in nll.ravel().tolist():
        total, total2 = total + v, total2 + v * v
    mean = total / nll.size
    expected = math.exp(mean) * math.sqrt((total2 / nll.size - mean**2) / (nll.size - 1))
    assert Perplexity.of(nll, 64).stderr == pytest.approx(expected, rel=1e-9)


def test_last_batch_has_the_shape_of_the_others():
    calls: list = []
    cut = windows(sample(bigram(0), 70), 10)
    parts = list(token_nll(as_logits(bigram(0), calls), cut, 3))
    assert calls == [(3, 9)] * 3
    assert [len(p) for p in parts] == [3, 3, 1]
    at_once = next(token_nll(as_logits(bigram(0)), cut, 100))
    np.testing.assert_array_equal(np.concatenate(parts), at_once)


def test_extreme_logits_stay_finite():
    log_p = np.where(np.eye(VOCAB, dtype=bool), 1e4, -1e4)
    result = perplexity(log_p, np.full(40, 3), 10)
    assert result.value == 1.0
    ruined = perplexity(log_p, np.arange(40) % VOCAB, 10)
    assert ruined.mean_nll == pytest.approx(2e4)
    assert ruined.value == math.inf


# ── divergence ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("seeds", "scale"), [((0, 1), 0.5), ((2, 3), 2.0), ((4, 5), 6.0)])
def test_divergence_of_tokens_equals_float64(seeds, scale):
    base, model = (bigram(seed, scale) for seed in seeds)
    tokens = sample(base, 300)
    found = divergence(base, model, tokens, 32)
    for w, kld, nll, nll_base, same in zip(windows(tokens, 32), *found):
        for i, (a, b) in enumerate(pairwise(w[16:])):
            likely = base[a] > -16
            expected = np.sum(np.exp(base[a][likely]) * (base[a] - model[a])[likely])
            assert kld[i] == pytest.approx(expected, rel=2e-5, abs=2e-6)
            assert nll[i] == pytest.approx(-model[a, b], rel=1e-5, abs=1e-5)
            assert nll_base[i] == pytest.approx(-base[a, b], rel=1e-5, abs=1e-5)
            assert same[i] == (base[a].argmax() == model[a].argmax())


@pytest.mark.parametrize(("log_p", "counts"), [(-15.9, True), (-16.1, False)])
def test_tokens_below_e_to_the_minus_16_do_not_count(log_p, counts):
    base, model = np.full((2, VOCAB, VOCAB), -math.log(VOCAB - 1))
    base[:, 0], model[:, 0] = log_p, -60.0
    kld = divergence(base, model, np.ones(64, np.int32)).kld
    expected = math.exp(log_p) * (log_p + 60) if counts else 0
    # The other tokens' rounding errors add up to less than this.
    assert kld[0, 0] == pytest.approx(expected, abs=5e-7)


def test_a_model_does_not_diverge_from_itself():
    tokens = sample(bigram(0), 400)
    k = KLDivergence.of(divergence(bigram(0), bigram(0), tokens), 32)
    for name in ("mean", "stderr", "max", "median", "min", "mean_dp", "rms_dp", "rms_dp_stderr"):
        assert getattr(k, name) == 0, name
    for name in ("ln_ratio", "ln_ratio_stderr", "ratio_stderr", "delta_ppl", "delta_ppl_stderr"):
        assert getattr(k, name) == 0, name
    assert (k.same_top, k.same_top_stderr, k.ratio) == (100, 0, 1)
    assert k.correlation == pytest.approx(100)
    own = perplexity(bigram(0), tokens, 32)
    assert (k.ppl, k.ppl_stderr) == pytest.approx((own.value, own.stderr), rel=1e-6)


def test_equally_likely_tokens_tie_to_the_first():
    base, model = np.full((2, VOCAB, VOCAB), -2.0)
    model[:, [0, 1]] = -1.0
    assert divergence(base, model, np.ones(64, np.int32)).same_top.all()


def random_tokens(n: int = 600, seed: int = 0) -> TokenDivergence:
    """Two runs that share most of what they do, as a model and its quantization."""
    rng = np.random.default_rng(seed)
    nll_base = rng.gamma(2.0, size=(n // 30, 30)).astype(np.float32)
    nll = np.maximum(nll_base + rng.normal(0.05, 0.2, nll_base.shape), 0.01).astype(np.float32)
    return TokenDivergence(
        rng.gamma(0.5, size=nll.shape).astype(np.float32), nll, nll_base, rng.random(nll.shape) < 0.8
    )


def test_statistics_are_llama_perplexity_s():
    """Its sums, means and covariances, and the errors it derives from them, written out in float64."""
    tokens = random_tokens()
    k = KLDivergence.of(tokens, 62)
    kld, a, b = (x.ravel().astype(float) for x in tokens[:3])
    n = len(a)

    def mean_err(sum1, sum2):
        return sum1 / n, math.sqrt((sum2 / n - (sum1 / n) ** 2) / (n - 1))

    (la, ea), (lb, eb) = mean_err(a.sum(), (a * a).sum()), mean_err(b.sum(), (b * b).sum())
    cov = ((a * b).sum() / n - la * lb) / (n - 1)
    ln_err = math.sqrt(ea**2 + eb**2 - 2 * cov)
    dp = np.exp(-a) - np.exp(-b)
    mean_dp, mean_dp2 = mean_err(dp.sum(), (dp**2).sum()), mean_err((dp**2).sum(), (dp**4).sum())
    rms = math.sqrt(mean_dp2[0])
    top = tokens.same_top.mean()
    pa, pb = math.exp(la), math.exp(lb)
    expected = {
        "mean": kld.mean(),
        "stderr": mean_err(kld.sum(), (kld**2).sum())[1],
        "ppl": pa,
        "ppl_stderr": pa * ea,
        "ppl_base": pb,
        "ppl_base_stderr": pb * eb,
        "correlation": 100 * cov / (ea * eb),
        "ln_ratio": la - lb,
        "ln_ratio_stderr": ln_err,
        "ratio": math.exp(la - lb),
        "ratio_stderr": math.exp(la - lb) * ln_err,
        "delta_ppl": pa - pb,
        "delta_ppl_stderr": math.sqrt((pa * ea) ** 2 + (pb * eb) ** 2 - 2 * pa * pb * cov),
        "mean_dp": 100 * mean_dp[0],
        "mean_dp_stderr": 100 * mean_dp[1],
        "rms_dp": 100 * rms,
        "rms_dp_stderr": 100 * 0.5 / rms * mean_dp2[1],
        "same_top": 100 * top,
        "same_top_stderr": 100 * math.sqrt(top * (1 - top) / (n - 1)),
    }
    for name, value in expected.items():
        assert getattr(k, name) == pytest.approx(value, rel=1e-6), name
    assert k.n_tokens == n


def test_percentiles_are_llama_perplexity_s():
    tokens = random_tokens(990)
    values = np.sort(tokens.kld.ravel().astype(float))
    k = KLDivergence.of(tokens, 62)
    for name, fraction in {
        "min": 0, "p00_1": 0.001, "p01": 0.01, "p05": 0.05, "p10": 0.1, "median": 0.5,
        "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999, "max": 1,
    }.items():  # fmt: skip
        below = min(int(fraction * (len(values) - 1)), len(values) - 2)
        rest = fraction * (len(values) - 1) - below
        assert getattr(k, name) == pytest.approx((1 - rest) * values[below] + rest * values[below + 1]), name


def test_paired_errors_agree_with_the_bootstrap():
    tokens = random_tokens(3000)
    k = KLDivergence.of(tokens, 62)
    a, b = tokens.nll.ravel().astype(float), tokens.nll_base.ravel().astype(float)
    draws = np.random.default_rng(1).integers(0, len(a), (3000, len(a)))
    ppl, ppl_base = np.exp(a[draws].mean(axis=1)), np.exp(b[draws].mean(axis=1))
    assert k.delta_ppl_stderr == pytest.approx((ppl - ppl_base).std(), rel=0.06)
    assert k.ratio_stderr == pytest.approx((ppl / ppl_base).std(), rel=0.06)
    # The errors of two runs on one text are correlated: taken apart they would say far less.
    assert k.delta_ppl_stderr < 0.2 * math.hypot(k.ppl_stderr, k.ppl_base_stderr)


def test_cached_computes_once_what_fits():
    calls: list = []
    first, second, third = (np.full((2, 9), i) for i in range(3))
    logits = cached(as_logits(bigram(0), calls), limit_bytes=2 * (2 * 5 * VOCAB * 4))
    for _ in range(2):
        for tokens in (first, second, third):
            np.testing.assert_array_equal(logits(tokens, 4), as_logits(bigram(0))(tokens, 4))
    assert len(calls) == 4  # the third does not fit
    assert logits(first, 3).shape == (2, 6, VOCAB)


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 500), st.floats(1e-6, 1e3), st.integers(0, 2**32 - 1))
def test_tensor_error_equals_float64(n, noise, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n).astype(np.float32)
    y = (x + noise * rng.normal(size=n)).astype(np.float32)
    a, b = x.astype(float), y.astype(float)
    e = tensor_error(x, jnp.asarray(y))
    assert e.mse == pytest.approx(np.mean((a - b) ** 2), rel=1e-6)
    assert e.max_error == pytest.approx(np.abs(a - b).max(), rel=1e-6)
    assert e.sqnr_db == pytest.approx(10 * math.log10((a @ a) / ((a - b) @ (a - b))), abs=1e-5)
    assert e.cosine == pytest.approx(a @ b / math.sqrt((a @ a) * (b @ b)), rel=1e-6)


def test_tensor_error_at_the_edges():
    x, zero = np.arange(1.0, 5.0, dtype=np.float32), np.zeros(4, np.float32)
    same, nothing, lost, invented = (tensor_error(*p) for p in ((x, x), (zero, zero), (x, zero), (zero, x)))
    assert (same.mse, same.sqnr_db, same.max_error) == (0, math.inf, 0)
    assert same.cosine == pytest.approx(1)
    assert (nothing.sqnr_db, nothing.cosine) == (math.inf, 1)
    assert (lost.sqnr_db, lost.cosine, lost.max_error) == (0, 0, 4)
    assert (invented.sqnr_db, invented.cosine) == (-math.inf, 0)


# ── probes ───────────────────────────────────────────────────────────────────────────────────────────


def letters(text: str) -> list[int]:
    return [ord(c) - ord("a") for c in text]


def test_probes_sum_the_log_likelihood_of_all_that_differs():
    log_p = bigram(7)
    endings = ("bcd", "bdd", "e", "kaaa")
    probes = [Probe("k", p, e, tuple(x for x in endings if x != e)) for p in "abcdefgh" for e in endings]
    result = ask(as_logits(log_p), letters, probes, size=3)

    def likelihood(text):
        return sum(log_p[a, b] for a, b in pairwise(letters(text)))

    right = [max(endings, key=lambda e, p=p: likelihood(p.prompt + e)) == p.answer for p in probes]
    assert result.accuracy == pytest.approx(np.mean(right))
    assert 0 < sum(right) == 8
    assert result.chance == 1 / 4
    assert result.n == 32


def test_probes_by_kind():
    log_p = np.full((VOCAB, VOCAB), -9.0)
    log_p[:, 1] = 0  # always b
    probes = [
        Probe("sum", "aa", "b", ("c",)),
        Probe("sum", "ca", "c", ("b",)),
        Probe("name", "a", "b", ("d", "e")),
    ]
    result = ask(as_logits(log_p), letters, probes)
    assert dict(result.by_kind) == {"name": 1.0, "sum": 0.5}
    assert result.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 7), (7, 7), (8, 10), (60, 64)])
def test_interval_is_wilson_s(right, n):
    """Its ends are the shares from which the one found lies 1.96 standard errors away."""
    log_p = np.full((VOCAB, VOCAB), -9.0)
    log_p[:, 1] = 0
    probes = [Probe("k", "a", *(("b", ("c",)) if i < right else ("c", ("b",)))) for i in range(n)]
    result = ask(as_logits(log_p), letters, probes)
    for end in (result.low, result.high):
        assert abs(result.accuracy - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-6)
    assert 0 <= result.low <= result.accuracy <= result.high <= 1


def test_wilson_s_interval_is_the_known_one():
    """10 of 20 at 95 %: 0.2993 to 0.7007 (Newcombe 1998 and R's prop.test without correction)."""
    log_p = np.full((VOCAB, VOCAB), -9.0)
    log_p[:, 1] = 0
    result = ask(as_logits(log_p), letters, [Probe("k", "a", *c) for c in 10 * [("b", ("c",)), ("c", ("b",))]])
    assert (result.low, result.high) == (pytest.approx(0.2993, abs=5e-5), pytest.approx(0.7007, abs=5e-5))


def test_normalized_likelihoods_are_means():
    log_p, probe = bigram(8), Probe("k", "ab", "cde", ("cd", "ef", "abcde"))
    sums, means = (likelihoods(as_logits(log_p), letters, [probe], normalized=n)[0] for n in (False, True))
    for i, ending in enumerate(("cde", "cd", "ef", "abcde")):
        terms = [log_p[a, b] for a, b in pairwise(letters("b" + ending))]
        assert sums[i] == pytest.approx(sum(terms), rel=1e-5)
        assert means[i] == pytest.approx(np.mean(terms), rel=1e-5)
    assert "per token" in str(ask(as_logits(log_p), letters, [probe], normalized=True))


def test_where_a_choice_begins_with_another_that_one_s_last_token_counts():
    log_p = bigram(9)
    found = likelihoods(as_logits(log_p), letters, [Probe("k", "a", "bc", ("bcd",))])[0]
    assert found == pytest.approx([log_p[1, 2], log_p[1, 2] + log_p[2, 3]], rel=1e-5)


@pytest.mark.parametrize(
    ("tail", "counted"),
    [
        # More than three tokens behind where the choices differ: of the tail all but the last.
        ("defg", {"b": ["bd", "de", "ef"], "c": ["cd", "de", "ef"]}),
        # Else from there on; the last is left out here too.
        ("de", {"b": ["ab", "bd"], "c": ["ac", "cd"]}),
        ("d", {"b": ["ab"], "c": ["ac"]}),
    ],
)
def test_tails_are_scored_as_winogrande(tail, counted):
    log_p = bigram(10)
    found = likelihoods(as_logits(log_p), letters, [Probe("k", "a", "b", ("c",), tail)], normalized=True)[0]
    for choice, log_likelihood in zip("bc", found):
        terms = [log_p[tuple(letters(pair))] for pair in counted[choice]]
        assert log_likelihood == pytest.approx(np.mean(terms), rel=1e-5)


def test_a_model_that_is_broken_answers_nothing():
    result = ask(as_logits(np.full((VOCAB, VOCAB), np.nan)), letters, [Probe("k", "a", "b", ("c",))])
    assert result.accuracy == 0


@pytest.mark.parametrize("probes", [[], [Probe("k", "", "a", ("b",))], [Probe("k", "a", "b", ("b",))]])
def test_probes_that_cannot_be_asked(probes):
    with pytest.raises(QjaxError, match="probe"):
        ask(as_logits(bigram(0)), letters, probes)
    with pytest.raises(QjaxError, match="this probe has 3 tokens, the model takes 2"):
        ask(as_logits(bigram(0)), letters, [Probe("k", "abc", "d", ("e",))], n_ctx=2)


# ── how records read ─────────────────────────────────────────────────────────────────────────────────


def test_records_read_well():
    nll = np.full((16, 255), math.log(29.2459), np.float32)
    text = str(Perplexity.of(nll, 512))
    assert text == "PPL = 29.2459 ± 0.0000 (4,080 tokens scored in 16 chunks of 512, cache f32/f32, float32: as asked)"
    lines = str(KLDivergence.of(random_tokens(), 62)).splitlines()
    assert [line.split(":")[0].strip() for line in lines[:8]] == [
        "Mean PPL(Q)", "Mean PPL(base)", "Cor(ln(PPL(Q)), ln(PPL(base)))", "Mean ln(PPL(Q)/PPL(base))",
        "Mean PPL(Q)/PPL(base)", "Mean PPL(Q)-PPL(base)", "Mean KLD", "Maximum KLD",
    ]  # fmt: skip
    for record in (Perplexity.of(nll, 512), KLDivergence.of(random_tokens(), 62), tensor_error(nll, nll)):
        assert record._repr_html_().startswith("<table>")
