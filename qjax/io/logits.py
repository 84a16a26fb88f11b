"""The file in which llama-perplexity keeps a base model's predictions (--kl-divergence-base).

    "_logits_"  n_ctx i32  vocab i32  chunks i32  tokens i32 (chunks, n_ctx)
    chunks × scored rows × [scale f32, minimum f32, codes u16 × vocab, one more where vocab is odd]

A row holds log p of the whole vocabulary after one token, in 65,536 steps down to 16 below the likeliest:
log p = scale · code + minimum.  Rows are those of the scored tokens, n_ctx - n_ctx // 2 - 1 in each chunk.
The tokens are the text's; a model with BOS puts it in the place of the first of each chunk.
Source: llama.cpp tools/perplexity/perplexity.cpp.
"""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt16

from qjax.errors import QjaxError
from qjax.io.atomic import atomic_write
from qjax.io.cursor import Cursor
from qjax.io.mapped import MappedFile

_MAGIC = b"_logits_"
_STEPS = 65535
_DEPTH = 16.0


class LogProbs(NamedTuple):
    """Log-probabilities in 16 bits."""

    scale: Float32[Array | np.ndarray, "*batch"]
    minimum: Float32[Array | np.ndarray, "*batch"]
    codes: UInt16[Array | np.ndarray, "*batch vocab"]

    def decode(self) -> Float32[Array, "*batch vocab"]:
        """Each to within half a step, but what is less likely than e^-16 times the likeliest."""
        scale, minimum, codes = (jnp.asarray(field, jnp.float32) for field in self)
        return scale[..., None] * codes + minimum[..., None]


@jax.jit
def encode(logits: Float[Array, "*batch vocab"]) -> LogProbs:
    """log softmax(logits) in 16 bits."""
    logits = logits.astype(jnp.float32)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    smallest = jnp.maximum(jnp.min(logits, axis=-1, keepdims=True), largest - _DEPTH)
    scale = (largest - smallest) / _STEPS
    steps = (logits - smallest) * jnp.where(scale > 0, 1 / scale, 0)
    codes = jnp.round(jnp.maximum(steps, 0)).astype(jnp.uint16)
    minimum = smallest - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return LogProbs(scale[..., 0], minimum[..., 0], codes)


# ── write ────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def writer(
    path: str | os.PathLike[str], tokens: Int[np.ndarray, "chunks n_ctx"], vocab: int
) -> Iterator[Callable[[LogProbs], None]]:
    """A function that appends the LogProbs (batch, scored, vocab) of the next windows to the file at `path`.

    tokens: those of the text, all windows.  The file appears when the block ends, all windows appended.
    """
    header = struct.pack("<8s3i", _MAGIC, tokens.shape[1], vocab, len(tokens))
    n_rows = 0
    with atomic_write(path) as file:

        def append(predictions: LogProbs) -> None:
            nonlocal n_rows
            scale, minimum, codes = (np.asarray(field) for field in predictions)
            if not (np.isfinite(scale).all() and np.isfinite(minimum).all()):
                raise QjaxError(f"{path}: the model's predictions are not finite, so nothing can be compared with them")
            rows = np.zeros((scale.size, _row(vocab)), "<u2")
            rows[:, :2] = scale.reshape(-1, 1).astype("<f4").view("<u2")
            rows[:, 2:4] = minimum.reshape(-1, 1).astype("<f4").view("<u2")
            rows[:, 4 : 4 + vocab] = codes.reshape(-1, vocab)
            file.write(rows.data)
            n_rows += len(rows)

        file.write(header + tokens.astype("<i4").tobytes())
        yield append
        assert n_rows == len(tokens) * _scored(tokens.shape[1])


def _row(vocab: int) -> int:
    """16-bit numbers in a row."""
    return 4 + vocab + vocab % 2


def _scored(n_ctx: int) -> int:
    return n_ctx - n_ctx // 2 - 1


# ── read ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, repr=False, eq=False)
class BasePredictions:
    """What a base model predicted on some windows of text, as far as a file knows it.

    tokens: those of the text.  The rows stay on disk until they are asked for.
    """

    path: Path
    tokens: Int32[np.ndarray, "chunks n_ctx"]
    vocab: int
    _file: MappedFile
    _start: int
    """Of the first row, in bytes."""

    def of(self, windows: Int[np.ndarray, "chunks n_ctx"]) -> Callable[[Any, int], LogProbs]:
        """The base model as the function that the metrics take, for the windows as they are put into a model: the
        first of them are those of the file, with BOS where the model has one."""
        chunk_of = {window[:-1].tobytes(): i for i, window in enumerate(windows.astype(np.int32))}

        def predictions(tokens: Any, first: int) -> LogProbs:
            assert first == self.tokens.shape[1] // 2
            return self._read([chunk_of[window.tobytes()] for window in np.asarray(tokens, np.int32)])

        return predictions

    def _read(self, chunks: list[int]) -> LogProbs:
        rows = np.stack([self._rows(chunk) for chunk in chunks])
        scale, minimum = (np.ascontiguousarray(rows[..., i : i + 2]).view("<f4")[..., 0] for i in (0, 2))
        if not (np.isfinite(scale).all() and np.isfinite(minimum).all()):
            raise QjaxError(f"{self.path}: it holds NaN or infinite predictions. Make it again from a sound model.")
        return LogProbs(scale, minimum, rows[..., 4 : 4 + self.vocab])

    def _rows(self, chunk: int) -> UInt16[np.ndarray, "scored row"]:
        n_scored, row = _scored(self.tokens.shape[1]), _row(self.vocab)
        start, n_bytes = self._start + 2 * chunk * n_scored * row, 2 * n_scored * row
        return self._file.read(start, start + n_bytes).view("<u2").reshape(n_scored, row)


def read(path: str | os.PathLike[str]) -> BasePredictions:
    """Open a file of predictions; only its tokens are read here.

    Raises QjaxError for another kind of file, one cut short, or tokens outside its vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise QjaxError(f"{path}: there is {'a folder, not a file' if path.is_dir() else 'no such file'}")
    size = path.stat().st_size
    if size < 20:
        raise QjaxError(f"{path}: {size} bytes are no file of predictions")
    file = MappedFile(path)
    cursor = Cursor(file.mapped, path)
    if (magic := bytes(cursor.take(8, "the magic number"))) != _MAGIC:
        cursor.fail(
            f"it begins with {magic!r}, expected {_MAGIC!r}. Make a file of predictions with `qjax perplexity BASE -f "
            "TEXT --kl-divergence-base FILE`.",
            at=0,
        )
    n_ctx, vocab, chunks = (cursor.number("i", what) for what in ("n_ctx", "the vocabulary", "the number of chunks"))
    if n_ctx < 3 or vocab < 1 or chunks < 1:
        cursor.fail(f"n_ctx {n_ctx}, vocabulary {vocab}, chunks {chunks}: the file is damaged, make it again", at=8)
    expected = 20 + 4 * chunks * n_ctx + 2 * chunks * _scored(n_ctx) * _row(vocab)
    if size != expected:
        raise QjaxError(
            f"{path}: {size} bytes, expected {expected} for {chunks} chunks of {n_ctx} tokens and a vocabulary of "
            f"{vocab}. It was not written to the end; make it again."
        )
    tokens = np.frombuffer(cursor.take(4 * chunks * n_ctx, "the tokens"), "<i4").astype(np.int32).reshape(chunks, n_ctx)
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise QjaxError(
            f"{path}: tokens from {tokens.min()} to {tokens.max()}, expected 0 to {vocab - 1}. Make it again."
        )
    return BasePredictions(path, tokens, vocab, file, cursor.at)
