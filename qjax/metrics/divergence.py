"""Kullback-Leibler divergence from a base model, as llama-perplexity --kl-divergence reports it.

Source: llama.cpp tools/perplexity/perplexity.cpp (kl_divergence). There the base log-probabilities pass
through a file that holds them in 16 bits (io/logits.py); here they are exact, or come from such a file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from qjax.io.logits import LogProbs
from qjax.metrics._record import mean_and_stderr, measures, rounded
from qjax.metrics.perplexity import Logits, batches, scored
from qjax.models.parts import on_host

# Tokens less likely than e^-16 under the base model are left out of the sum, as in llama.cpp.
_MIN_LOG_P = -16.0

_PERCENTILES = {
    "max": 100, "p99_9": 99.9, "p99": 99, "p95": 95, "p90": 90, "median": 50,
    "p10": 10, "p05": 5, "p01": 1, "p00_1": 0.1, "min": 0,
}  # fmt: skip
_DP_PERCENTILES = {
    "max_dp": 100, "p99_9_dp": 99.9, "p99_dp": 99, "p95_dp": 95, "p90_dp": 90, "p75_dp": 75, "median_dp": 50,
    "p25_dp": 25, "p10_dp": 10, "p05_dp": 5, "p01_dp": 1, "p00_1_dp": 0.1, "min_dp": 0,
}  # fmt: skip


def cached(logits: Logits, limit_bytes: int = 2**29) -> Logits:
    """`logits`, remembering its results until they fill `limit_bytes`; beyond that it computes anew."""
    kept: dict[tuple[bytes, int], Array] = {}

    def remember(tokens: Any, first: int) -> Array:
        key = np.asarray(tokens).tobytes(), first
        if key in kept:
            return kept[key]
        result = logits(tokens, first)
        if sum(a.nbytes for a in kept.values()) + result.nbytes <= limit_bytes:
            kept[key] = result
        return result

    return remember


class TokenDivergence(NamedTuple):
    """What is known of each scored token; every array (chunks, scored)."""

    kld: Float32[np.ndarray, "chunks scored"]
    """Σ p_base (log p_base - log p) over the vocabulary, in nats"""
    nll: Float32[np.ndarray, "chunks scored"]
    nll_base: Float32[np.ndarray, "chunks scored"]
    same_top: Bool[np.ndarray, "chunks scored"]
    """whether both models find the same token most likely"""

    @classmethod
    def concatenate(cls, parts: "list[TokenDivergence]") -> "TokenDivergence":
        return cls(*map(np.concatenate, zip(*parts)))


def token_divergence(
    base: Logits | Callable[[Any, int], LogProbs],
    model: Logits,
    windows: Int[np.ndarray, "chunks n_ctx"],
    size: int,
) -> Iterator[TokenDivergence]:
    """Compare two models on every scored token, `size` windows at a time; of the base, its LogProbs will do."""
    n_ctx = windows.shape[1]
    for tokens, n in batches(windows, size):
        inputs, first = tokens[:, :-1], n_ctx // 2
        result = _divergence(base(inputs, first), model(inputs, first), scored(tokens, n_ctx))
        yield TokenDivergence(*(on_host(values)[:n] for values in result))


@jax.jit
def _divergence(
    base: Float32[Array, "batch seq vocab"] | LogProbs,
    model: Float32[Array, "batch seq vocab"],
    targets: Int[Array, "batch seq"],
) -> tuple[Array, Array, Array, Array]:
    # What was stored need not add up to 1, and llama.cpp leaves it so.
    log_p_base, order = (base.decode(), base.codes) if isinstance(base, LogProbs) else (jax.nn.log_softmax(base), base)
    log_p = jax.nn.log_softmax(model)
    terms = jnp.exp(log_p_base) * (log_p_base - log_p)
    kld = jnp.sum(jnp.where(log_p_base > _MIN_LOG_P, terms, 0), axis=-1)
    nll, nll_base = (-jnp.take_along_axis(a, targets[..., None], axis=-1)[..., 0] for a in (log_p, log_p_base))
    return kld, nll, nll_base, jnp.argmax(order, axis=-1) == jnp.argmax(model, axis=-1)


@dataclass(frozen=True)
class KLDivergence:
    """How far a model's predictions lie from the base model's, over the scored tokens of a text.

    KLD in nats per token. Errors are standard errors as if tokens were independent; those that involve both
    models (ln_ratio, ratio, delta_ppl) are paired: what the runs have in common cancels.
    """

    mean: float
    stderr: float
    max: float
    p99_9: float
    p99: float
    p95: float
    p90: float
    median: float
    p10: float
    p05: float
    p01: float
    p00_1: float
    min: float
    same_top: float
    """percent of tokens where both models find the same token most likely"""
    same_top_stderr: float
    mean_dp: float
    """mean Δp in percentage points, Δp = p(correct token) - p_base(correct token)"""
    mean_dp_stderr: float
    max_dp: float
    """percentage points, like the percentiles that follow"""
    p99_9_dp: float
    p99_dp: float
    p95_dp: float
    p90_dp: float
    p75_dp: float
    median_dp: float
    p25_dp: float
    p10_dp: float
    p05_dp: float
    p01_dp: float
    p00_1_dp: float
    min_dp: float
    rms_dp: float
    """√mean(Δp²) in percentage points"""
    rms_dp_stderr: float
    ppl: float
    ppl_stderr: float
    ppl_base: float
    ppl_base_stderr: float
    correlation: float
    """Cor(ln PPL, ln PPL base) in percent; nan where either does not vary"""
    ln_ratio: float
    """ln(PPL / PPL base)"""
    ln_ratio_stderr: float
    ratio: float
    """PPL / PPL base"""
    ratio_stderr: float
    delta_ppl: float
    """PPL - PPL base"""
    delta_ppl_stderr: float
    n_tokens: int
    n_ctx: int
    chunks: int
    precision: str
    cache_k: str
    """cache type to which the model's keys were rounded: q8_0, for instance"""
    cache_v: str
    """and its values"""
    activations: str
    """how the inputs of its matrix products were rounded; "" if they were not"""
    time_s: float
    """wall time, compilation included"""

    # A ruined model has an infinite perplexity, and errors that are no numbers.
    @classmethod
    @np.errstate(over="ignore", invalid="ignore")
    def of(
        cls,
        tokens: TokenDivergence,
        n_ctx: int,
        *,
        precision: str = "float32",
        cache: tuple[str, str] = ("f32", "f32"),
        activations: str = "",
        time_s: float = 0.0,
    ) -> "KLDivergence":
        """From what is known of each scored token; `cache` names the types of the model's keys and values."""
        kld, nll, nll_base = (a.ravel().astype(np.float64) for a in tokens[:3])
        mean, stderr = mean_and_stderr(kld)
        percentiles = np.percentile(kld, list(_PERCENTILES.values())).tolist()

        same_top = float(np.mean(tokens.same_top))
        dp = np.exp(-nll) - np.exp(-nll_base)
        mean_dp, mean_dp_stderr = mean_and_stderr(dp)
        mean_dp2, mean_dp2_stderr = mean_and_stderr(dp**2)
        rms_dp = mean_dp2**0.5

        ln_ppl, ln_ppl_stderr = mean_and_stderr(nll)
        ln_base, ln_base_stderr = mean_and_stderr(nll_base)
        ppl, ppl_base = float(np.exp(ln_ppl)), float(np.exp(ln_base))
        # The spread of the per-token difference is llama.cpp's a² + b² - 2 cov(a, b), without cancellation.
        ln_ratio, ln_ratio_stderr = mean_and_stderr(nll - nll_base)
        ratio = float(np.exp(ln_ratio))
        _, delta_stderr = mean_and_stderr(ppl * nll - ppl_base * nll_base)
        varies = ln_ppl_stderr > 0 and ln_base_stderr > 0
        return cls(
            mean=mean,
            stderr=stderr,
            **dict(zip(_PERCENTILES, percentiles)),
            same_top=100 * same_top,
            same_top_stderr=100 * (same_top * (1 - same_top) / (kld.size - 1)) ** 0.5,
            mean_dp=100 * mean_dp,
            mean_dp_stderr=100 * mean_dp_stderr,
            **dict(zip(_DP_PERCENTILES, np.percentile(100 * dp, list(_DP_PERCENTILES.values())).tolist())),
            rms_dp=100 * rms_dp,
            # d√x = dx / 2√x
            rms_dp_stderr=100 * mean_dp2_stderr / (2 * rms_dp) if rms_dp else 0.0,
            ppl=ppl,
            ppl_stderr=ppl * ln_ppl_stderr,
            ppl_base=ppl_base,
            ppl_base_stderr=ppl_base * ln_base_stderr,
            correlation=100 * float(np.corrcoef(nll, nll_base)[0, 1]) if varies else float("nan"),
            ln_ratio=ln_ratio,
            ln_ratio_stderr=ln_ratio_stderr,
            ratio=ratio,
            ratio_stderr=ratio * ln_ratio_stderr,
            delta_ppl=ppl - ppl_base,
            delta_ppl_stderr=delta_stderr,
            n_tokens=kld.size,
            n_ctx=n_ctx,
            chunks=len(tokens.kld),
            precision=precision,
            cache_k=cache[0],
            cache_v=cache[1],
            activations=activations,
            time_s=time_s,
        )

    def _lines(self) -> list[tuple[str, str]]:
        """The lines of llama-perplexity's report, under its names."""
        return [
            ("Mean PPL(Q)", f"{self.ppl:.6f} ± {self.ppl_stderr:.6f}"),
            ("Mean PPL(base)", f"{self.ppl_base:.6f} ± {self.ppl_base_stderr:.6f}"),
            ("Cor(ln(PPL(Q)), ln(PPL(base)))", f"{self.correlation:.2f} %"),
            ("Mean ln(PPL(Q)/PPL(base))", f"{self.ln_ratio:.6f} ± {self.ln_ratio_stderr:.6f}"),
            ("Mean PPL(Q)/PPL(base)", f"{self.ratio:.6f} ± {self.ratio_stderr:.6f}"),
            ("Mean PPL(Q)-PPL(base)", f"{self.delta_ppl:.6f} ± {self.delta_ppl_stderr:.6f}"),
            ("Mean KLD", f"{self.mean:.6f} ± {self.stderr:.6f}"),
            *((f"{_rank(p)} KLD", f"{getattr(self, name):.6f}") for name, p in _PERCENTILES.items()),
            ("Mean Δp", f"{self.mean_dp:.3f} ± {self.mean_dp_stderr:.3f} %"),
            *((f"{_rank(p)} Δp", f"{getattr(self, name):.3f} %") for name, p in _DP_PERCENTILES.items()),
            ("RMS Δp", f"{self.rms_dp:.3f} ± {self.rms_dp_stderr:.3f} %"),
            ("Same top p", f"{self.same_top:.3f} ± {self.same_top_stderr:.3f} %"),
        ]

    def __str__(self) -> str:
        lines = self._lines()
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}} : {value}" for name, value in lines)

    def _repr_html_(self) -> str:
        caption = (
            f"{self.n_tokens:,} tokens scored in {self.chunks} chunks of {self.n_ctx}, {rounded(self)}, "
            f"{self.precision}"
        )
        return measures(self._lines(), caption)._repr_html_()


def _rank(percent: float) -> str:
    named: dict[float, str] = {100: "Maximum", 50: "Median", 0: "Minimum"}
    return named.get(percent, f"{percent:.1f}%")
