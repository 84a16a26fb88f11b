"""Text generation: sampling as pure functions, and a decode loop that stays on the device.

    prompt ─ prefill ─► first token ─ decode ─► up to 32 tokens ─ decode ─► ...

prefill and decode are compiled once for a prompt's bucket and a cache's size; how many tokens decode makes,
and every sampling number but top_k, are run-time values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float32, Int, Int32

from qjax.errors import QjaxError
from qjax.models.cache import FLOAT16, Cache, CacheTypes
from qjax.models.config import Config
from qjax.models.parts import compiled, empty_cache, step, while_loop
from qjax.models.transformer import Params

# A prompt is read in pieces of one size: a power of two, at most the larger number, so that few are compiled.
_MIN_BUCKET, _MAX_BUCKET = 16, 512
MAX_CHUNK = 32
"""Tokens a decode call makes at most. The first calls of a stream make fewer, so that text soon appears."""


# ── sampling ───────────────────────────────────────────────────────────────────────────────────────────────


@partial(jax.tree_util.register_dataclass, data_fields=["temperature", "top_p", "min_p"], meta_fields=["top_k"])
@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the stages act in llama.cpp's order: top_k, top_p, min_p, temperature.

    temperature: 0 takes the most likely token (greedy). top_k: keep the k most likely, 0 for all. top_p: of
    those keep the fewest whose probabilities sum to at least p (Holtzman et al. 2019), 1 for all. min_p: keep
    those at least min_p times as likely as the most likely one, 0 for all.
    """

    temperature: float | Array = 0.8
    top_k: int = 40
    top_p: float | Array = 0.95
    min_p: float | Array = 0.05


GREEDY = Sampling(temperature=0.0, top_k=1)


def candidates(
    logits: Float32[Array, "*batch vocab"], sampling: Sampling
) -> tuple[Int32[Array, "*batch k"], Float32[Array, "*batch k"]]:
    """The ids that may be drawn, most likely first, and their probabilities (0 for those that were cut)."""
    vocab = logits.shape[-1]
    logits, ids = lax.top_k(logits, min(sampling.top_k or vocab, vocab))
    p = jax.nn.softmax(logits, axis=-1)
    # The token that carries the sum past top_p still belongs.
    keep = jnp.cumsum(p, axis=-1) - p < sampling.top_p
    keep &= p >= sampling.min_p * p[..., :1]
    best = jnp.arange(logits.shape[-1]) == 0
    temperature = jnp.asarray(sampling.temperature, jnp.float32)
    # Greedy is the limit of temperature 0, which the division cannot reach.
    keep = jnp.where(temperature > 0, keep | best, best)
    scaled = (logits - logits[..., :1]) / jnp.where(temperature > 0, temperature, 1)
    return ids, jax.nn.softmax(jnp.where(keep, scaled, -jnp.inf), axis=-1)


@jax.jit
def sample(key: Array, logits: Float32[Array, "*batch vocab"], sampling: Sampling) -> Int32[Array, "*batch"]:
    """Draw one token id for each row of logits."""
    ids, p = candidates(logits, sampling)
    choice = jax.random.categorical(key, jnp.log(p), axis=-1)
    return jnp.take_along_axis(ids, choice[..., None], axis=-1)[..., 0]


# ── the compiled parts ─────────────────────────────────────────────────────────────────────────────────────


class State(NamedTuple):
    """Where a generation stands: the last token of each sequence is chosen but not yet in the cache."""

    cache: tuple[Cache, ...]
    """of each part of the model"""
    tokens: Int32[Array, " batch"]
    done: Bool[Array, " batch"]
    """Whether the sequence has ended: its last token is a stop token, and stays so."""
    key: Array


@compiled(static_argnames=("config", "dtype"), donate_argnames=("cache",))
def prefill(
    config: Config,
    params: Params,
    prompt: Int[Array | np.ndarray, "batch seq"],
    n_tokens: Int[Array, ""] | int,
    cache: tuple[Cache, ...],
    key: Array,
    sampling: Sampling,
    stop_ids: Int[Array | np.ndarray, " n_stop"],
    *,
    dtype: DTypeLike = jnp.float32,
) -> State:
    """Read the first n_tokens of the (padded) prompt into the cache and choose the token that follows."""
    logits, cache = step(config, params, prompt, cache, n_tokens=n_tokens, dtype=dtype)
    key, draw = jax.random.split(key)
    tokens = sample(draw, logits, sampling)
    return State(cache, tokens, jnp.isin(tokens, stop_ids), key)


@compiled(static_argnames=("config", "dtype"), donate_argnames=("state",))
def decode(
    config: Config,
    params: Params,
    state: State,
    n_tokens: Int[Array, ""] | int,
    sampling: Sampling,
    stop_ids: Int[Array | np.ndarray, " n_stop"],
    *,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Int32[Array, "batch chunk"], Int32[Array, ""], State]:
    """Generate up to n_tokens (at most 32) more, fewer once every sequence has met a stop token.

    Returns the tokens, how many columns of them are filled, and the new state; the state given is donated.
    """
    out = jnp.zeros((state.tokens.shape[0], MAX_CHUNK), jnp.int32)

    def unfinished(loop: tuple[Array, Array, State]) -> Array:
        i, _, state = loop
        return (i < n_tokens) & ~state.done.all()

    def body(loop: tuple[Array, Array, State]) -> tuple[Array, Array, State]:
        i, out, state = loop
        logits, cache = step(config, params, state.tokens[:, None], state.cache, dtype=dtype)
        key, draw = jax.random.split(state.key)
        tokens = jnp.where(state.done, state.tokens, sample(draw, logits, sampling))
        state = State(cache, tokens, state.done | jnp.isin(tokens, stop_ids), key)
        return i + 1, lax.dynamic_update_slice(out, tokens[:, None], (0, i)), state

    n, out, state = while_loop(unfinished, body, (jnp.int32(0), out, state))
    return out, n, state


def cache_room(n_prompt: int, n_gen: int, n_depth: int = 0) -> int:
    """The max_seq of a cache for `read` to put n_prompt tokens into behind n_depth others, and n_gen to follow."""
    # Behind nothing the padded prompt fits wherever the prompt does, both being powers of two.
    padded = -(-n_prompt // _bucket(n_prompt)) * _bucket(n_prompt) if n_depth else n_prompt
    return _power_of_two(max(n_depth + padded + n_gen, _MIN_BUCKET))


def read(
    config: Config,
    params: Params,
    prompt: Sequence[int] | Int[np.ndarray, " n_prompt"],
    cache: tuple[Cache, ...],
    key: Array,
    sampling: Sampling,
    stop_ids: Int[Array | np.ndarray, " n_stop"],
    *,
    dtype: DTypeLike = jnp.float32,
) -> State:
    """Read a prompt of any length, piece by piece, into a cache with room for it (`cache_room`), which is donated."""
    bucket = _bucket(len(prompt))
    pieces = [np.asarray(prompt[start : start + bucket], np.int32) for start in range(0, len(prompt), bucket)]
    for piece in pieces:
        padded = np.pad(piece, (0, bucket - len(piece)))[None]
        state = prefill(config, params, padded, len(piece), cache, key, sampling, stop_ids, dtype=dtype)
        cache = state.cache
    return state


def _bucket(n_prompt: int) -> int:
    """Tokens in a piece of a prompt."""
    return _power_of_two(min(max(n_prompt, _MIN_BUCKET), _MAX_BUCKET))


# ── the stream ─────────────────────────────────────────────────────────────────────────────────────────────


FinishReason = Literal["stop", "length", "context"]


class Chunk(NamedTuple):
    """Some tokens of the text, and in the last chunk why it ends there."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    """"stop": a stop token came (it is not among the tokens); "length": max_tokens are made; "context": the
    context is full; None: more follows."""


def stream(
    config: Config,
    params: Params,
    prompt: Sequence[int],
    *,
    max_tokens: int | None = None,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),
    seed: int = 0,
    n_ctx: int | None = None,
    dtype: DTypeLike = jnp.float32,
    types: CacheTypes = FLOAT16,
    one_row: Params | None = None,
) -> Iterator[Chunk]:
    """Continue a prompt of token ids, chunk by chunk, until a stop token, max_tokens, or a full context.

    n_ctx: the most tokens, prompt included; default what the model was trained for. dtype: of the matrix
    products. types: how keys and values are held. one_row: the params as `for_one_row` lays them out, which read
    the prompt slower and make text faster. The same seed gives the same text.

    Raises QjaxError, before the first chunk, if the prompt is empty or fills the context, an id is not in the
    vocabulary, or a number is out of range.
    """
    n_ctx = config.n_ctx if n_ctx is None else n_ctx
    _check(config, prompt, n_ctx, max_tokens, sampling)
    room = n_ctx - len(prompt)
    limit, at_limit = (room, "context") if max_tokens is None or max_tokens > room else (max_tokens, "length")
    if limit == 0:
        yield Chunk((), at_limit)
        return

    cache = empty_cache(config, params, 1, cache_room(len(prompt), limit), types)
    stop = np.asarray(stop_ids, np.int32)
    state = read(config, params, prompt, cache, jax.random.key(seed), sampling, stop, dtype=dtype)

    new, made, chunk = [int(state.tokens[0])], 1, 1
    while True:
        stopped = bool(state.done[0])
        finish_reason = "stop" if stopped else at_limit if made == limit else None
        yield Chunk(tuple(new[:-1] if stopped else new), finish_reason)
        if finish_reason:
            return
        chunk = min(2 * chunk, MAX_CHUNK)
        out, n, state = decode(config, one_row or params, state, min(chunk, limit - made), sampling, stop, dtype=dtype)
        new = np.asarray(out)[0, : int(n)].tolist()
        made += len(new)


def _check(config: Config, prompt: Sequence[int], n_ctx: int, max_tokens: int | None, sampling: Sampling) -> None:
    if not len(prompt):
        raise QjaxError("generate: the prompt is empty; give at least one token (BOS, for instance)")
    if len(prompt) >= n_ctx:
        raise QjaxError(
            f"generate: the prompt's {len(prompt)} tokens leave no room in a context of {n_ctx}; "
            "shorten the prompt or raise n_ctx"
        )
    if config.traits.learned_positions and n_ctx > config.n_ctx:
        raise QjaxError(f"generate: n_ctx is {n_ctx}, but the model has no more than {config.n_ctx} positions")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab:
        raise QjaxError(
            f"generate: the prompt has token ids {min(prompt)} to {max(prompt)}, "
            f"expected 0 to {config.vocab - 1}; was it made by another model's tokenizer?"
        )
    numbers = {"max_tokens": (max_tokens or 0, np.inf), "temperature": (sampling.temperature, np.inf)}
    numbers |= {"top_k": (sampling.top_k, np.inf), "top_p": (sampling.top_p, 1), "min_p": (sampling.min_p, 1)}
    for name, (value, most) in numbers.items():
        if not 0 <= value <= most:
            raise QjaxError(f"generate: {name} is {value}, expected a number from 0 to {most}")


def _power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()
