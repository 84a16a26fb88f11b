"""Measure a model: perplexity, divergence from a base model, importance, probes. Models in, records out."""

import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from qjax import machine
from qjax.data import tales
from qjax.data.tales import Probe
from qjax.errors import QjaxError
from qjax.io import logits as logits_file
from qjax.io.imatrix import Imatrix
from qjax.methods.activations import Activations
from qjax.methods.activations import calibrate as find_ranges
from qjax.methods.imatrix import collect, imatrix_of
from qjax.metrics import KLDivergence, Logits, Perplexity, ProbeResult, TokenDivergence, ask, token_divergence
from qjax.metrics import perplexity as ppl
from qjax.metrics._record import mean_and_stderr
from qjax.model import Model
from qjax.models.parts import data_width, forward
from qjax.ops import activations
from qjax.progress import progress

Text = str | Sequence[int] | Int[np.ndarray, " n"]
"""A text, or its token ids."""

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8}

# What `auto` accepts: so much of float32's perplexity may change, and so much faster its products have to be.
_TOLERANCE = 0.002
_WORTHWHILE = 1.1


def perplexity(
    model: Model, text: Text, n_ctx: int = 512, chunks: int | None = None, precision: str = "auto"
) -> Perplexity:
    """Perplexity of a text as llama-perplexity computes it, keys and values rounded to the model's cache types.

    text: the text or its token ids. It is cut into windows of `n_ctx` tokens, at most `chunks` of them, and
    the second half of each is scored.
    precision: of the matrix products' factors, float32, bfloat16 or int8 (see `matmul`). auto: of the first two the
    faster one whose perplexity stays within 0.2 % of float32's on the first windows; the record says which.

    Raises QjaxError for a text shorter than two windows, a window longer than the model's context, an unknown
    precision.
    """
    start = time.perf_counter()
    if precision not in (*PRECISIONS, "auto"):
        raise QjaxError(f"precision is {precision!r}, expected {_any_of((*PRECISIONS, 'auto'))}")
    if precision == "auto" and jax.process_count() > 1:
        raise QjaxError(
            "precision auto goes by time, and hosts could choose differently; give float32, bfloat16 or int8"
        )
    windows = cut(model, text, n_ctx, chunks)
    size = _batch_size(model, n_ctx)
    if precision == "auto":
        ran, reason, per_token = _fastest(model, windows, size)
    else:
        ran, reason, per_token = precision, "as asked", ppl.token_nll(logits_of(model, precision), windows, size)

    parts: list[np.ndarray] = []
    bar = _batches_bar(per_token, "perplexity", len(windows), size)
    for part in bar:
        parts.append(part)
        _annotate(bar, f"PPL {math.exp(np.mean(np.concatenate(parts), dtype=np.float64)):.4f}")
    time_s = time.perf_counter() - start
    return Perplexity.of(np.concatenate(parts), n_ctx, precision=ran, reason=reason, **_rounded(model), time_s=time_s)


def kl_divergence(
    base: Model,
    model: Model,
    text: Text,
    n_ctx: int = 512,
    chunks: int | None = None,
    precision: str = "float32",
) -> KLDivergence:
    """How far the predictions of `model` lie from those of `base` (llama-perplexity --kl-divergence).

    Keys and values of each are rounded to its own cache types.

    text, n_ctx, chunks: as for `perplexity`.
    precision: float32, bfloat16 or int8, for both models; there is no auto, because a rounding that leaves
    perplexity alone may exceed the divergence of a fine format.

    Raises QjaxError as `perplexity` does, and where the two models do not share vocabulary and tokens.
    """
    start = time.perf_counter()
    check_precision(precision)
    if base.config.vocab != model.config.vocab:
        raise QjaxError(
            f"{model.name} has a vocabulary of {model.config.vocab} tokens, {base.name} one of "
            f"{base.config.vocab}: their predictions cannot be compared. Use models that share a tokenizer."
        )
    windows, own = (cut(m, text, n_ctx, chunks) for m in (base, model))
    if not np.array_equal(windows, own):
        raise QjaxError(
            f"{model.name} and {base.name} read this text as different tokens, so their predictions cannot "
            "be compared. Use models that share a tokenizer."
        )
    return _divergence(logits_of(base, precision), model, windows, precision, start)


def save_base(
    model: Model,
    text: Text,
    path: str | os.PathLike[str],
    n_ctx: int = 512,
    chunks: int | None = None,
    precision: str = "float32",
) -> Perplexity:
    """Perplexity, and the model's predictions in a file, for `kl_divergence_from` and llama-perplexity to compare
    others with: two bytes for each token of the vocabulary and each scored token of the text.

    The arguments and what is raised are as for `kl_divergence`.
    """
    start = time.perf_counter()
    check_precision(precision)
    tokens = tokens_of(model, text)
    windows = cut(model, tokens, n_ctx, chunks)
    size = _batch_size(model, n_ctx)
    logits = logits_of(model, precision)
    parts: list[np.ndarray] = []
    with logits_file.writer(path, ppl.windows(tokens, n_ctx, chunks), model.config.vocab) as append:
        bar = _batches_bar(ppl.batches(windows, size), "saving predictions", len(windows), size)
        for batch, n in bar:
            predicted = logits(batch[:, :-1], n_ctx // 2)
            append(logits_file.LogProbs(*(field[:n] for field in logits_file.encode(predicted))))
            parts.append(np.asarray(ppl.nll(predicted, ppl.scored(batch, n_ctx)))[:n])
            _annotate(bar, f"PPL {math.exp(np.mean(np.concatenate(parts), dtype=np.float64)):.4f}")
    time_s = time.perf_counter() - start
    return Perplexity.of(np.concatenate(parts), n_ctx, precision=precision, **_rounded(model), time_s=time_s)


def kl_divergence_from(
    path: str | os.PathLike[str], model: Model, chunks: int | None = None, precision: str = "float32"
) -> KLDivergence:
    """`kl_divergence` from a base model of which there is a file, by `save_base` or llama-perplexity; the text and
    its windows, at most `chunks` of them, are those of the file.

    Raises QjaxError for a damaged file, and one of another vocabulary or a context longer than the model's.
    """
    start = time.perf_counter()
    check_precision(precision)
    base = logits_file.read(path)
    if base.vocab != model.config.vocab:
        raise QjaxError(
            f"{path}: predictions of a model with a vocabulary of {base.vocab} tokens; {model.name} has "
            f"{model.config.vocab}. Use models that share a tokenizer."
        )
    n_ctx = base.tokens.shape[1]
    check_n_ctx(model, n_ctx)
    windows = ppl.with_bos(base.tokens[:chunks], bos_of(model))
    return _divergence(base.of(windows), model, windows, precision, start)


def _divergence(
    base: Any, model: Model, windows: Int[np.ndarray, "chunks n_ctx"], precision: str, start: float
) -> KLDivergence:
    n_ctx = windows.shape[1]
    size = _batch_size(model, n_ctx)
    parts: list[TokenDivergence] = []
    divergence = token_divergence(base, logits_of(model, precision), windows, size)
    bar = _batches_bar(divergence, "KL divergence", len(windows), size)
    for part in bar:
        parts.append(part)
        _annotate(bar, f"KLD {np.mean(np.concatenate([p.kld for p in parts])):.5f}")
    time_s = time.perf_counter() - start
    return KLDivergence.of(
        TokenDivergence.concatenate(parts), n_ctx, precision=precision, **_rounded(model), time_s=time_s
    )


def imatrix(
    model: Model,
    text: Text,
    n_ctx: int = 512,
    chunks: int | None = None,
    *,
    first_chunk: int = 0,
    process_output: bool = False,
    parse_special: bool = False,
    score: bool = True,
    dataset: str = "",
) -> tuple[Imatrix, Perplexity | None]:
    """Importance matrix of a text, as llama-imatrix collects it, and the perplexity unless `score` is False.

    text, n_ctx, chunks: as for `perplexity`; the first `first_chunk` windows are passed over. All tokens of a window
    count.
    process_output: also the head's input, unless the token embedding serves as the head.
    parse_special: <|...|> in the text are special tokens. dataset: what the text is called in the file.

    Raises QjaxError as `perplexity` does, and for a model whose activations are not finite.
    """
    start = time.perf_counter()
    tokens = model.tokenizer.encode(text, parse_special=parse_special) if isinstance(text, str) else text
    if first_chunk and (first_chunk + 2) * n_ctx >= len(tokens):
        raise QjaxError(
            f"the text has {len(tokens)} tokens; after {first_chunk} chunks of {n_ctx} fewer than two are left. Begin "
            "earlier or give a longer text."
        )
    windows = cut(model, tokens[first_chunk * n_ctx :], n_ctx, chunks)
    size = _batch_size(model, n_ctx)
    batches = collect(model.config, model.params, windows, size, process_output=process_output, score=score)
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    parts: list[np.ndarray] = []
    bar = _batches_bar(batches, "importance", len(windows), size)
    for seen in bar:
        sums = {name: sums.get(name, 0) + values for name, values in seen.sums.items()}
        counts = {name: counts.get(name, 0) + values for name, values in seen.counts.items()}
        parts.append(seen.nll)
        if score:
            _annotate(bar, f"PPL {math.exp(np.mean(np.concatenate(parts), dtype=np.float64)):.4f}")
    time_s = time.perf_counter() - start
    scored = Perplexity.of(np.concatenate(parts), n_ctx, precision="float32", time_s=time_s) if score else None
    return imatrix_of(sums, dataset, len(windows), n_ctx, counts), scored


def calibrate(
    model: Model, text: Text, rounding: str, range: str = "minmax", n_ctx: int = 512, chunks: int | None = None
) -> Activations:
    """A static rounding of a model's activations, its ranges from a text: what `Model.activations` may be.

    rounding: int8-tensor, int8-channel, or of other bits; see `qjax.ops.activations.rounding`.
    range: minmax, mse, or a percentile such as p99.9; see `qjax.methods.activations.calibrate`.
    text, n_ctx, chunks: as for `perplexity`.

    Raises QjaxError as `perplexity` does, for an unknown or dynamic rounding or an unknown range, and for a model whose
    activations are not finite.
    """
    found = activations.rounding(rounding)
    windows = cut(model, text, n_ctx, chunks)
    size = _batch_size(model, n_ctx)
    return find_ranges(model.config, model.tensors, windows, size, found, range)


def probe(model: Model, probes: Sequence[Probe], *, normalized: bool = False) -> ProbeResult:
    """How often the model finds the right answer likelier than the others; see `qjax.data.tales.probes`, and
    `qjax.io.probes.read` for files of them.

    normalized: by the mean of a choice's tokens instead of their sum, as usual for HellaSwag and other such sets.
    Raises QjaxError as `qjax.metrics.probes.likelihoods` does.
    """
    size = _batch_size(model, 256)
    return ask(logits_of(model), model.encode, probes, size, normalized=normalized, n_ctx=model.config.n_ctx)


def held_out_tales(n: int = 300) -> str:
    """The first `n` tales that no training has seen, as one text; the tiny model's own test set."""
    return "".join(tale.text for tale in tales.generate(0, n))


def read_text(path: str | os.PathLike[str], whole: bool = False) -> str:
    """A UTF-8 text file, as llama-perplexity reads it: without its last newline, unless ``whole``.

    Raises QjaxError if it cannot be read.
    """
    try:
        text = Path(path).read_bytes().decode()
        return text if whole else text.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise QjaxError(f"{path}: not UTF-8 text (byte {error.start}). Convert the file to UTF-8.") from error
    except OSError as error:
        raise QjaxError(f"{path}: cannot be read: {error.strerror or error}") from error


def cut(model: Model, text: Text, n_ctx: int, chunks: int | None) -> Int[np.ndarray, "chunks n_ctx"]:
    """The windows of a text in the model's tokens. Raises QjaxError as `perplexity` does."""
    check_n_ctx(model, n_ctx)
    return ppl.windows(tokens_of(model, text), n_ctx, chunks, bos_of(model))


def tokens_of(model: Model, text: Text) -> Int[np.ndarray, " n"]:
    """The ids of a text, without BOS."""
    return np.asarray(model.tokenizer.encode(text) if isinstance(text, str) else text, np.int32)


def bos_of(model: Model) -> int | None:
    """What stands first in a window; None for models that do without."""
    return model.tokenizer.bos_id if model.tokenizer.add_bos else None


def _batch_size(model: Model, n_ctx: int) -> int:
    return ppl.batch_size(n_ctx, model.config.vocab) * data_width(model.params)


def check_n_ctx(model: Model, n_ctx: int) -> None:
    """Raises QjaxError if it is more than the model was trained for."""
    if n_ctx > model.config.n_ctx:
        raise QjaxError(
            f"n_ctx is {n_ctx}, but {model.name} was trained for at most {model.config.n_ctx} tokens; beyond "
            "that its predictions mean little. Give a smaller context size."
        )


def _any_of(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def check_precision(precision: str) -> None:
    """Raises QjaxError for an unknown one; `auto` is none."""
    if precision not in PRECISIONS:
        raise QjaxError(f"precision is {precision!r}, expected {_any_of(PRECISIONS)}")


def logits_of(model: Model, precision: str = "float32") -> Logits:
    """The model as the function that the metrics take; keys and values are rounded to the cache types it names."""
    dtype, types = PRECISIONS[precision], model.cache_types("f32")

    def logits(tokens: Any, first: int) -> Array:
        tokens = jnp.asarray(tokens)
        return forward(model.config, model.running, tokens, first=first, dtype=dtype, types=types)

    return logits


def _rounded(model: Model) -> dict[str, Any]:
    """What a record says of cache types and activations."""
    k, v = model.cache_types("f32")
    return {"cache": (k.name, v.name), "activations": model.activations.name if model.activations else ""}


def _fastest(
    model: Model, windows: Int[np.ndarray, "chunks n_ctx"], size: int
) -> tuple[str, str, Iterator[Float32[np.ndarray, "batch scored"]]]:
    """The precision to use for many windows, why, and what `token_nll` makes of them in it.

    float32 where products of bfloat16 are not faster.  Else the first `size` windows are read in bfloat16, and one
    after another in float32 until perplexity is seen to change by a standard error less than the tolerance; after the
    last of them, whatever the error, the change they show decides.
    """
    float32 = ppl.token_nll(logits_of(model, "float32"), windows, size)
    speedup = machine.bfloat16_speedup()
    faster = f"products of bfloat16 run at {speedup:.2f} times float32's speed here"
    if speedup < _WORTHWHILE:
        return "float32", f"auto: {faster}, no gain", float32
    bfloat16 = ppl.token_nll(logits_of(model, "bfloat16"), windows, size)
    first = next(bfloat16)
    change, found, differences = math.inf, "", []
    for seen, exact in zip(first, ppl.token_nll(logits_of(model, "float32"), windows[: len(first)], 1)):
        differences.append(seen - exact[0])
        mean, stderr = mean_and_stderr(np.concatenate(differences))
        change = math.expm1(mean)
        n = len(differences)
        found = f"{change:+.3%} ± {stderr:.3%} PPL on the first {n} window{'s' * (n > 1)}"
        if abs(change) + stderr <= _TOLERANCE:
            break
    if abs(change) > _TOLERANCE:
        return "float32", f"auto: bfloat16 would change PPL by more than {_TOLERANCE:.1%} ({found})", float32
    return "bfloat16", f"auto: {faster}; {found}", itertools.chain([first], bfloat16)


def _batches_bar(parts: Iterable[Any], desc: str, n_windows: int, size: int) -> Iterable[Any]:
    return progress(parts, desc=desc, total=math.ceil(n_windows / size), unit="batch")


def _annotate(bar: Iterable[Any], text: str) -> None:
    """The running estimate beside the progress bar, where one is shown."""
    if hasattr(bar, "set_postfix_str"):
        bar.set_postfix_str(text)  # pyright: ignore[reportAttributeAccessIssue]
