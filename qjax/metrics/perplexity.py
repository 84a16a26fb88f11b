"""Perplexity as llama-perplexity computes it (llama.cpp tools/perplexity/perplexity.cpp)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from qjax.errors import QjaxError
from qjax.metrics._record import mean_and_stderr, measures, rounded
from qjax.models.parts import on_host

Logits = Callable[[Any, int], Array]
"""(tokens (batch, seq), first) -> float32 logits (batch, seq - first, vocab) of the positions from `first`
on, each given all tokens up to it."""

MIN_CTX = 8

# As llama-perplexity: 2,048 tokens in one call; fewer where a large vocabulary makes the logits large.
_BATCH_TOKENS = 2048
_BATCH_BYTES = 2**28


def windows(
    tokens: Int[np.ndarray, " n"], n_ctx: int, chunks: int | None = None, bos_id: int | None = None
) -> Int32[np.ndarray, "chunks n_ctx"]:
    """Cut a text into windows that do not overlap, at most `chunks` of them; what is left over is dropped.

    bos_id: takes the place of the first token of each window; None for models that do without BOS.
    Raises QjaxError if there are fewer tokens than two windows need, or for an impossible n_ctx or chunks.
    """
    if n_ctx < MIN_CTX:
        raise QjaxError(f"n_ctx is {n_ctx}; a window needs at least {MIN_CTX} tokens. Give a larger one.")
    if chunks is not None and chunks < 1:
        raise QjaxError(f"chunks is {chunks}, expected at least 1 (or none given, for the whole text)")
    if len(tokens) < 2 * n_ctx:
        raise QjaxError(
            f"the text has {len(tokens)} tokens; two contexts of {n_ctx} need {2 * n_ctx}. "
            f"Give a longer text or a context size of at most {len(tokens) // 2}."
        )
    n = min(len(tokens) // n_ctx, chunks or len(tokens))
    return with_bos(tokens[: n * n_ctx].reshape(n, n_ctx), bos_id)


def with_bos(windows: Int[np.ndarray, "chunks n_ctx"], bos_id: int | None) -> Int32[np.ndarray, "chunks n_ctx"]:
    """The windows as a model is given them: BOS in the place of the first token, unless it is None."""
    windows = np.array(windows, np.int32)
    if bos_id is not None:
        windows[:, 0] = bos_id
    return windows


def scored(per_token: Any, n_ctx: int) -> Any:
    """The part (..., n_ctx - n_ctx // 2 - 1) of an array (..., n_ctx) that belongs to the scored tokens.

    Scored is what stands after the first half of a window, so that each prediction sees half a window.
    """
    return per_token[..., n_ctx // 2 + 1 :]


def batch_size(n_ctx: int, vocab: int) -> int:
    """How many windows to put in one call."""
    logits_bytes = 4 * vocab * (n_ctx - n_ctx // 2)
    return max(1, min(_BATCH_TOKENS // n_ctx, _BATCH_BYTES // logits_bytes))


def batches(windows: Int[np.ndarray, "chunks n_ctx"], size: int) -> Iterator[tuple[Int[Array, "batch n_ctx"], int]]:
    """The windows, `size` at a time, and how many of them are real: the last batch is filled up, so that one
    compiled program serves all."""
    size = min(size, len(windows))
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        filler = np.repeat(batch[-1:], size - len(batch), axis=0)
        yield jnp.asarray(np.concatenate([batch, filler])), len(batch)


def token_nll(
    logits: Logits, windows: Int[np.ndarray, "chunks n_ctx"], size: int
) -> Iterator[Float32[np.ndarray, "batch scored"]]:
    """Negative log-likelihood of each scored token in nats, `size` windows at a time."""
    n_ctx = windows.shape[1]
    for tokens, n in batches(windows, size):
        yield on_host(nll(logits(tokens[:, :-1], n_ctx // 2), scored(tokens, n_ctx)))[:n]


@jax.jit
def nll(logits: Float32[Array, "batch seq vocab"], targets: Int[Array, "batch seq"]) -> Float32[Array, "batch seq"]:
    """-log softmax(logits)[targets], in nats."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood of the scored tokens), and how it was measured."""

    value: float
    stderr: float
    """value × standard error of mean_nll, as if tokens were independent."""
    mean_nll: float
    """nats per token"""
    n_tokens: int
    """tokens scored, n_ctx - n_ctx // 2 - 1 in each chunk"""
    n_ctx: int
    chunks: int
    precision: str
    """what ran: float32, bfloat16 or int8"""
    reason: str
    """why that precision ran"""
    cache_k: str
    """cache type to which the keys were rounded: q8_0, for instance"""
    cache_v: str
    """and the values"""
    activations: str
    """how the inputs of the matrix products were rounded, int8-token for instance; "" if they were not"""
    time_s: float
    """wall time, compilation included"""

    # A ruined model has an infinite perplexity, and errors that are no numbers.
    @classmethod
    @np.errstate(over="ignore", invalid="ignore")
    def of(
        cls,
        nll: Float[np.ndarray, "chunks scored"],
        n_ctx: int,
        *,
        precision: str = "float32",
        reason: str = "as asked",
        cache: tuple[str, str] = ("f32", "f32"),
        activations: str = "",
        time_s: float = 0.0,
    ) -> "Perplexity":
        """From the nats of each scored token; `cache` names the types of keys and values."""
        mean, stderr = mean_and_stderr(nll.ravel())
        value = float(np.exp(mean))
        sizes = nll.size, n_ctx, len(nll)
        return cls(value, value * stderr, mean, *sizes, precision, reason, *cache, activations, time_s)

    def __str__(self) -> str:
        return (
            f"PPL = {self.value:.4f} ± {self.stderr:.4f} ({self.n_tokens:,} tokens scored in {self.chunks} "
            f"chunks of {self.n_ctx}, {rounded(self)}, {self.precision}: {self.reason})"
        )

    def _repr_html_(self) -> str:
        return measures(
            [
                ("perplexity", f"{self.value:.4f} ± {self.stderr:.4f}"),
                ("mean NLL", f"{self.mean_nll:.4f} nats per token"),
                ("tokens scored", f"{self.n_tokens:,} in {self.chunks} chunks of {self.n_ctx}"),
                ("precision", f"{self.precision} ({self.reason})"),
                ("cache types", f"{self.cache_k} keys, {self.cache_v} values"),
                *[("activations", self.activations)][: bool(self.activations)],
                ("time", f"{self.time_s:.1f} s"),
            ]
        )._repr_html_()
