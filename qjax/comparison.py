"""The main job: quantize a model to many formats and see what each costs and what it saves."""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Int

import qjax
from qjax import evaluate, formats
from qjax.data import tales
from qjax.data.tales import Probe
from qjax.errors import QjaxError
from qjax.formats import Affine, Format
from qjax.io import imatrix as imatrix_files
from qjax.io.atomic import atomic_write
from qjax.io.imatrix import Entry, Imatrix
from qjax.io.tokenizer import Tokenizer
from qjax.methods import recipes, rtn
from qjax.methods.training import sha256
from qjax.metrics import KLDivergence, Logits, TokenDivergence, ask, cached, token_divergence
from qjax.metrics import perplexity as ppl
from qjax.model import Model
from qjax.models.memory import give_back_memory
from qjax.progress import progress
from qjax.table import Table
from qjax.tensor import QTensor, dense

T, R = TypeVar("T"), TypeVar("R")

TALES_CHUNKS = 16
N_PROBES = 64
PROBES_SEED = 1

CALIBRATION_CHUNKS = 16
# More than enough for that many windows.
_CALIBRATION_TALES = 120

_BASE = "base"
# The base model's logits are kept for all formats where they take no more than this, and a model of so few bytes in
# float32 is decoded before it is evaluated: then one program serves all formats.
_CACHE_BYTES = _DENSE_BYTES = 2**29

# For the estimate: what encoding a model takes, compilation included, and what a probe's text is padded to.
_QUANTIZE_S = 3.0
_PROBE_TOKENS = 160


@dataclass(frozen=True)
class Row:
    """One format's costs and savings; see KLDivergence for the meaning and units of the measures."""

    format: str
    family: str
    bpw: float
    """bits per weight of the whole model, norms included"""
    size_bytes: int
    ppl: float
    ppl_stderr: float
    delta_ppl: float
    delta_ppl_stderr: float
    kld: float
    kld_stderr: float
    same_top: float
    """percent"""
    accuracy: float | None
    """share of the probes answered rightly; None where no tales are measured"""
    accuracy_low: float | None
    accuracy_high: float | None
    tokens_per_s: float | None
    """tokens a second through the packed model, many at a time, compilation excluded; None where nobody asked"""
    imatrix: bool = False
    """whether an importance matrix weighed the errors"""


@dataclass(frozen=True)
class Comparison:
    """A base model and its quantizations, measured on one text; rows by bits per weight, the base first."""

    settings: dict[str, Any]
    """what the numbers depend on: model, text, windows, probes, precision, versions, device"""
    n_tokens: int
    """tokens scored"""
    floor: float | None
    """perplexity of the program that wrote the tales, on the same tokens; None for other texts"""
    rows: tuple[Row, ...]
    skipped: dict[str, str]
    """formats that do not fit this model, and why"""

    @property
    def best(self) -> tuple[str, ...]:
        """Formats that nothing beats: no other is at once as small and as close to the base."""
        contenders = self.rows[1:]
        return tuple(contenders[i].format for i in front([(row.bpw, row.kld) for row in contenders]))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Comparison":
        """The inverse of write. Raises QjaxError if the file is not a comparison."""
        try:
            record = json.loads(Path(path).read_bytes())
            return cls(**record | {"rows": tuple(Row(**row) for row in record["rows"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise QjaxError(f"{path}: not a comparison that this version of qjax wrote ({error})") from error

    def write(self, path: str | os.PathLike[str]) -> None:
        """As JSON, whole or not at all."""
        with atomic_write(path) as file:
            file.write(json.dumps(asdict(self), indent=2).encode())

    def _table(self) -> Table:
        speed = ("tokens/s",) if self.settings.get("speed") else ()
        measures = ("bpw", "MiB", "PPL", "ΔPPL", "KLD", "same top", "task accuracy", *speed, "best")
        columns = {"format": "<"} | dict.fromkeys(measures, ">")
        rows = [
            [
                row.format + (" †" if row.imatrix else ""),
                f"{row.bpw:.2f}",
                f"{row.size_bytes / 2**20:.2f}",
                f"{row.ppl:.4f} ± {row.ppl_stderr:.4f}",
                f"{row.delta_ppl:+.4f} ± {row.delta_ppl_stderr:.4f}",
                f"{row.kld:.6f} ± {row.kld_stderr:.6f}",
                f"{row.same_top:.2f} %",
                f"{row.accuracy:.1%}" if row.accuracy is not None else "–",
                *(f"{row.tokens_per_s:,.0f}" for _ in speed),
                "*" if row.format in self.best else "",
            ]
            for row in self.rows
        ]
        return Table(columns, rows, self._caption())

    def _caption(self) -> str:
        floor = f"; entropy floor: PPL {self.floor:.4f}" if self.floor else ""
        s = self.settings
        return (
            f"{s['model']} on {s['text']}: {self.n_tokens:,} tokens scored in {s['chunks']} chunks of "
            f"{s['n_ctx']}{floor}"
        )

    def __str__(self) -> str:
        left_out = (f"{name} left out: {why}" for name, why in self.skipped.items())
        return "\n".join([str(self._table()), *self._legend(), *left_out])

    def _legend(self) -> list[str]:
        best = "* best per bit: no other format is as small and as close to the base"
        return [best, "† errors weighed by an importance matrix"] if any(row.imatrix for row in self.rows) else [best]

    def _repr_html_(self) -> str:
        return self._table()._repr_html_() + "".join(f"<p>{line}</p>" for line in self._legend())


def front(costs: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """The Pareto front: which of some points, small being good in both numbers, no other point beats."""

    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in costs)

    return tuple(i for i, point in enumerate(costs) if not beaten(point))


def default_types() -> tuple[Format, ...]:
    """Every registered format for weights, F32 aside, and the affine one at several widths."""
    named = [formats.get(name) for name in formats.names()]
    affine = [Affine(bits=bits) for bits in (2, 3, 4)]
    return (*(f for f in named if f.for_weights and f.name != "F32"), *affine)


def compare(
    base: Model,
    text: str | None = None,
    types: Sequence[str | Format] | None = None,
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    precision: str = "float32",
    imatrix: "str | os.PathLike[str] | Imatrix | None" = None,
    speed: bool = False,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    say: Callable[[str], None] | None = None,
) -> Comparison:
    """Quantize every matrix of `base` to each of `types` and measure what that does.

    text: what to measure on. None: held-out tales, which add the entropy floor and the accuracy on probes.
    types: formats or their names. None: `default_types()`, but those that do not fit the model are left out.
    n_ctx, chunks: as for `qjax.perplexity`; chunks None means 16 of the tales, all of another text.
    imatrix: for all formats that can use one. None: only those that are garbage without get one, collected from tales
    of the training seeds; measured on another text, they count among those that do not fit.
    speed: also measure how fast the packed models read text, for which every format's own program is compiled.
    out: a JSON file that gets each row as soon as it is measured. If `resume` and the file is of the same
    comparison, its rows are not measured again.
    say: takes messages, among them how long it will take; default: a line on stderr.

    Raises QjaxError as `qjax.perplexity` does, and as `Model.quantize` does for types that were asked for.
    """
    say = say or _to_stderr
    chosen = default_types() if types is None else [formats.get(t) for t in types]
    if imatrix is not None and not isinstance(imatrix, Imatrix):
        imatrix = imatrix_files.read(imatrix)
    task = _Task.of(base, text, n_ctx, chunks, precision, imatrix, speed)
    done = _begin(task, Path(out) if out and resume else None, say)

    known = {*done.skipped, *(row.format for row in done.rows)}
    todo = [t for t in (None, *chosen) if (t.name if t else _BASE) not in known]
    if todo:
        say(f"{len(todo)} models to measure, about {_describe_time(task.estimate_s(todo))}")
    if todo and any(isinstance(t, QTensor) for t in base.tensors.values()):
        say(f"{base.name} is quantized already: what the formats lose adds to what it has lost")
    base_logits = cached(task.logits_of(base), _CACHE_BYTES)
    with ThreadPoolExecutor(1) as pool:
        models = _ahead(pool, task.quantized, todo)
        for format, quantized, busy in progress(models, desc="comparing", total=len(todo), unit="model"):
            try:
                row = task.measure(base_logits, format, quantized.result(), busy)
                done = replace(done, rows=_sorted((*done.rows, row)))
            except QjaxError as error:
                if types is not None or format is None:
                    raise
                done = replace(done, skipped=done.skipped | {format.name: str(error)})
            # Else each format adds 30 MB.
            rtn.forget_programs()
            give_back_memory()
            if out:
                done.write(out)
    names = {_BASE, *(t.name for t in chosen)}
    return replace(
        done,
        rows=tuple(row for row in done.rows if row.format in names),
        skipped={name: why for name, why in done.skipped.items() if name in names},
    )


@dataclass(frozen=True)
class _Task:
    """What is measured on each model."""

    base: Model
    settings: dict[str, Any]
    windows: Int[np.ndarray, "chunks n_ctx"]
    size: int
    probes: tuple[Probe, ...]
    floor: float | None
    imatrix: Imatrix | None

    @classmethod
    def of(
        cls,
        base: Model,
        text: str | None,
        n_ctx: int,
        chunks: int | None,
        precision: str,
        imatrix: Imatrix | None,
        speed: bool,
    ) -> "_Task":
        evaluate.check_precision(precision)
        on_tales = text is None
        if text is None:
            text, chunks = evaluate.held_out_tales(), chunks or TALES_CHUNKS
        windows = evaluate.cut(base, text, n_ctx, chunks)
        probes = tuple(tales.probes(PROBES_SEED, N_PROBES)) if on_tales else ()
        settings = {
            "qjax": qjax.__version__,
            "model": base.name,
            "model_sha256": sha256(jax.tree.leaves(base.params)),
            "text": "held-out tales" if on_tales else "text",
            "tokens_sha256": sha256([windows]),
            "n_ctx": n_ctx,
            "chunks": len(windows),
            "probes": len(probes),
            "precision": precision,
            "speed": speed,
            "imatrix_sha256": imatrix and sha256([entry.sums for entry in imatrix.entries.values()]),
            "device": jax.devices()[0].device_kind,
        }
        floor = tales_floor(text, base.tokenizer, windows) if on_tales else None
        return cls(base, settings, windows, ppl.batch_size(n_ctx, base.config.vocab), probes, floor, imatrix)

    @property
    def n_tokens(self) -> int:
        """Tokens scored."""
        return ppl.scored(self.windows, self.settings["n_ctx"]).size

    @property
    def batch(self) -> Int[Array, "size n_ctx"]:
        """The first windows, as many as are evaluated together."""
        return next(ppl.batches(self.windows, self.size))[0]

    def imatrix_for(self, format: Format) -> Imatrix | None:
        """What weighs the errors of `format`, if anything does."""
        if _needs_imatrix(format) and (self.imatrix or self.floor is not None):
            return _completed(self.imatrix or self.calibration, self.base)
        return self.imatrix if format.uses_importance else None

    @functools.cached_property
    def calibration(self) -> Imatrix:
        """Of tales like those that are measured, but others."""
        text = "".join(tale.text for tale in tales.generate(tales.TRAINING, _CALIBRATION_TALES))
        options: dict[str, Any] = {"n_ctx": self.settings["n_ctx"], "chunks": CALIBRATION_CHUNKS, "score": False}
        return evaluate.imatrix(self.base, text, dataset="tales", **options)[0]

    @property
    def small(self) -> bool:
        return 4 * self.base.n_weights <= _DENSE_BYTES

    def quantized(self, format: Format | None) -> tuple[Model, bool]:
        """The model of one format, None for the base, and whether an importance matrix weighed the errors.

        Raises QjaxError if the format does not fit.
        """
        if format is None:
            return self.base, False
        imatrix = self.imatrix_for(format)
        return self.base.quantize(format, imatrix=imatrix, allow_requantize=True), imatrix is not None

    def measure(
        self, base_logits: Logits, format: Format | None, quantized: tuple[Model, bool], busy: Sequence[Future]
    ) -> Row:
        """The row of what `quantized` made; its speed is measured when those who are ``busy`` are done."""
        model, weighed = quantized
        n_ctx, logits = self.settings["n_ctx"], self.logits_of(model)
        parts = list(token_divergence(base_logits, logits, self.windows, self.size))
        precision = self.settings["precision"]
        kld = KLDivergence.of(TokenDivergence.concatenate(parts), n_ctx, precision=precision)
        answers = ask(logits, model.tokenizer.encode, self.probes, self.size) if self.probes else None
        tokens_per_s = None
        if self.settings["speed"]:
            wait(busy)
            packed, tokens = evaluate.logits_of(model, precision), self.batch[:, :-1]
            # The first call compiles.
            tokens_per_s = tokens.size / min(_seconds(packed, tokens, n_ctx // 2) for _ in range(3))
        return Row(
            format=format.name if format else _BASE,
            family=format.family if format else _BASE,
            bpw=model.bpw,
            size_bytes=model.nbytes,
            ppl=kld.ppl,
            ppl_stderr=kld.ppl_stderr,
            delta_ppl=kld.delta_ppl,
            delta_ppl_stderr=kld.delta_ppl_stderr,
            kld=kld.mean,
            kld_stderr=kld.stderr,
            same_top=kld.same_top,
            accuracy=answers and answers.accuracy,
            accuracy_low=answers and answers.low,
            accuracy_high=answers and answers.high,
            tokens_per_s=tokens_per_s,
            imatrix=weighed,
        )

    def logits_of(self, model: Model) -> Logits:
        """Of the model as it is, or decoded if it is small."""
        return evaluate.logits_of(_decoded(model) if self.small else model, self.settings["precision"])

    def estimate_s(self, todo: Sequence[Format | None]) -> float:
        """How long `measure` will take for so many models, from one batch through the base."""
        logits, tokens = self.logits_of(self.base), self.batch
        first_s, again_s = (_seconds(logits, tokens[:, :-1], tokens.shape[1] // 2) for _ in range(2))
        kept = 4 * self.base.config.vocab * self.n_tokens <= _CACHE_BYTES
        n_tokens = len(todo) * (1 if kept else 2) * (self.windows.size + len(self.probes) * _PROBE_TOKENS)
        if self.imatrix is None and any(format and _needs_imatrix(format) for format in todo):
            n_tokens += CALIBRATION_CHUNKS * self.settings["n_ctx"]
        n_programs = 1 if self.small and not self.settings["speed"] else len(todo)
        return again_s * n_tokens / tokens.size + n_programs * (first_s - again_s) + len(todo) * _QUANTIZE_S


def _needs_imatrix(format: Format) -> bool:
    return any(format.name in names.split() for file_type, names in recipes.NEED_IMATRIX if not file_type)


def _completed(imatrix: Imatrix, base: Model) -> Imatrix:
    """With entries for all matrices, in which the columns of those it lacks count alike.

    It lacks the embedding and mostly the head, which a format that needs it could not store then.
    """
    widths = {name: w.shape[-1] for name, w in base.tensors.items() if len(w.shape) > 1}
    alike = {name: Entry(np.ones((1, width), np.float32), np.ones(1, np.float32)) for name, width in widths.items()}
    return replace(imatrix, entries=alike | dict(imatrix.entries))


def _decoded(model: Model) -> Model:
    """The same model with float32 arrays for weights."""
    return replace(model, params=jax.tree.map(dense, model.params, is_leaf=lambda leaf: isinstance(leaf, QTensor)))


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Sequence[T]
) -> Iterator[tuple[T, "Future[R]", "list[Future[R]]"]]:
    """Each item with what `work` made of it, or the QjaxError; and what is made meanwhile: of the next one."""
    begin = lambda item: pool.submit(copy_context().run, work, item)  # noqa: E731
    coming = [begin(item) for item in items[:1]]
    for i, item in enumerate(items):
        made, error = coming[0], coming[0].exception()
        if error and not isinstance(error, QjaxError):
            raise error
        coming = [begin(later) for later in items[i + 1 : i + 2]]
        yield item, made, coming


def _seconds(logits: Logits, tokens: Any, first: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(logits(tokens, first))
    return time.perf_counter() - start


def tales_floor(text: str, tokenizer: Tokenizer, windows: Int[np.ndarray, "chunks n_ctx"]) -> float:
    """Perplexity, on the scored tokens of `windows`, of the program that told the tales of `text`.

    Each choice of the program is counted at the token in which its text begins. A choice that begins in one
    token and shows in the next may so be counted outside a scored half instead of inside, or the reverse: at
    most one at each end of a window, and the two cancel on average.
    """
    pieces = tokenizer.pieces(tokenizer.encode(text), unparse_special=False)
    if b"".join(pieces) != (tokenizer.prefix + text).encode():
        raise QjaxError("the tokenizer does not give this text back, so its tokens have no place in it")
    starts = np.cumsum([-len(tokenizer.prefix), *map(len, pieces)])[:-1]
    # Tales are ASCII: characters are bytes.
    offsets, nats = map(np.array, zip(*tales.trace(text)))
    at = np.searchsorted(starts, offsets, side="right") - 1
    of_token = np.bincount(at, weights=nats, minlength=len(pieces))[: windows.size].reshape(windows.shape)
    return float(np.exp(ppl.scored(of_token, windows.shape[1]).mean()))


def _begin(task: _Task, path: Path | None, say: Callable[[str], None]) -> Comparison:
    """What an interrupted run left of this very comparison, else an empty one."""
    empty = Comparison(task.settings, task.n_tokens, task.floor, (), {})
    if path is None or not path.exists():
        return empty
    found = Comparison.read(path)
    differs = [k for k, v in task.settings.items() if found.settings.get(k) != v]
    if differs:
        say(f"{path}: belongs to another comparison ({', '.join(differs)} differ); starting over")
        return empty
    say(f"{path}: resuming, {len(found.rows)} of the rows are there")
    return found


def _sorted(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda row: (row.format != _BASE, row.bpw, row.kld)))


def _describe_time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)
