"""Round to nearest: each tensor on its own, as llama-quantize does, in slabs of one shape.

A slab is so many weights of a tensor, padded with zeros where it ends.  All tensors share two shapes of slab, so that
a format's quantizer is compiled twice at most (for a small model once), whatever the shapes of the model, and the
memory taken does not depend on them.  Only where importance makes a format look at whole rows does a slab have these.
A tensor in memory is made at once where its blocks share a scale, or where it has plain numbers.
"""

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float32

from qjax import formats, tensor
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.formats.plain import Plain
from qjax.io import gguf
from qjax.io.gguf import Metadata, Value, ValueType
from qjax.io.stored import Stored, aligned
from qjax.methods import recipes
from qjax.methods.importance import NONE, Importance
from qjax.methods.plan import Plan
from qjax.methods.recipes import Recipe
from qjax.tensor import QTensor, dequantize, quantize

QUANTIZATION_VERSION = 2
"""ggml.h GGML_QNT_VERSION: the layout of the block formats."""

RECEIPT_PREFIX = "qjax."
"""Of the metadata that say how the file was made, see `receipt`; they hold for that file alone."""

SLAB_WEIGHTS = (2**19, 2**16)
"""Of large slabs, where at least `_LARGE_SLABS` of them fit, and of small ones, for what is left."""

# With fewer the large ones save less time than their program takes to compile.
_LARGE_SLABS = 4

# A search takes one core, so slabs are worked side by side; more than 16 would take more memory than they save time.
THREADS = min(os.cpu_count() or 1, 16)


@dataclass(frozen=True)
class Options:
    """importance: of the columns of each tensor, `importance.select` makes it.  rounding: replaces the rule of the
    final rounding step.  The others lift a refusal.

    Raises QjaxError for an unknown rounding.
    """

    importance: Importance = NONE
    rounding: str | None = None
    allow_requantize: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self):
        if self.rounding is not None:
            formats.check_rounding(self.rounding)


def quantize_tensor(
    name: str, tensor: Array | QTensor, format: Format, options: Options = Options()
) -> Array | QTensor:
    """``tensor`` in ``format``: a QTensor, or an Array of its dtype if the format is plain.

    Raises QjaxError naming it if it has NaN or infinite weights, or gets such scales, unless ``allow_nonfinite``, and
    if its importance has another size.
    """
    job = _Job(name, tensor.shape, format.resolve(tensor.shape), options)
    if job.format.blocks_stand_alone and not isinstance(format, Plain):
        return job.in_memory(floats(tensor))
    # One scale for the whole tensor, or none.
    packed = isinstance(tensor, QTensor)
    x = _joined(floats(tensor), math.prod(tensor.shape), np.float32) if packed else np.asarray(tensor)
    return job.quantize(x.reshape(tensor.shape).astype(np.float32, copy=False))


@dataclass(frozen=True)
class Pending(Stored):
    """A Stored tensor that is read and quantized when its bytes are asked for, so that a model of any size streams
    through a memory of a few slabs."""

    name: str
    source: Stored
    format: Format
    options: Options

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def load(self) -> Array | QTensor:
        return quantize_tensor(self.name, self.source.load(), self.format, self.options)

    @property
    def data(self) -> np.ndarray:
        return _joined(self.pieces(), self.format.nbytes(self.shape), np.uint8)

    def pieces(self) -> Iterator[np.ndarray]:
        return _Job(self.name, self.shape, self.format, self.options).run(weights(self.source))


def pending(tensors: Mapping[str, Stored], plan: Plan, options: Options = Options()) -> dict[str, Stored]:
    """``tensors`` (still on disk) as ``plan`` has them, in its order, each quantized when it is written."""
    return {
        step.name: Pending(step.name, tensors[step.name], step.format, options) if step.changes else tensors[step.name]
        for step in plan.steps
    }


def metadata(
    source: Metadata,
    recipe: Recipe,
    importance: Importance = NONE,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    receipt: Mapping[str, Any] = MappingProxyType({}),
) -> Metadata:
    """``source`` with what llama-quantize writes at its end, or the converter in its place; of shards, the keys of one
    file.

    That is the file type (llama.cpp guesses it where a recipe has none), the layout's version, ``overrides`` and where
    the importance is from.  ``receipt`` follows; the source's own is left out.
    """
    source = without_receipt(source)
    written: dict[str, Any] = {"general.quantization_version": QUANTIZATION_VERSION}
    if recipe.file_type:
        written["general.file_type"] = recipes.FILE_TYPES[recipe.file_type].id
    elif recipe.default is None and "general.file_type" in source:
        written["general.file_type"] = source.typed["general.file_type"]
    written |= {**overrides, **importance.metadata, **receipt}
    if recipe.converts:
        return source | written
    dropped = {*written, *gguf.SPLIT_KEYS, "general.file_type"}
    return Metadata({key: value for key, value in source.typed.items() if key not in dropped} | written)


def without_receipt(metadata: Metadata) -> Metadata:
    """``metadata`` as of a model that is changed, and no longer what a receipt says."""
    return Metadata({key: value for key, value in metadata.typed.items() if not key.startswith(RECEIPT_PREFIX)})


_OVERRIDES: dict[str, tuple[ValueType, Callable[[str], Any]]] = {
    # llama-quantize stores the magnitude, as the keys it reads back are unsigned.
    "int": (ValueType.UINT32, lambda text: abs(int(text))),
    "float": (ValueType.FLOAT32, float),
    "bool": (ValueType.BOOL, {"true": True, "false": False}.__getitem__),
    "str": (ValueType.STRING, str),
}


def override(text: str) -> tuple[str, Value]:
    """Key and value in ``KEY=TYPE:VALUE``, as llama-quantize --override-kv takes it.  Raises QjaxError."""
    key, _, typed = text.partition("=")
    kind, colon, value = typed.partition(":")
    if not key or not colon or kind not in _OVERRIDES:
        raise QjaxError(f"override {text!r}: expected KEY=TYPE:VALUE, TYPE one of {', '.join(_OVERRIDES)}")
    vtype, parse = _OVERRIDES[kind]
    try:
        return key, Value(vtype, parse(value))
    except (ValueError, KeyError) as error:
        raise QjaxError(f"override {text!r}: {value!r} is no {kind} that GGUF can hold ({error})") from error


# ── slabs ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Job:
    """Making one tensor of ``shape`` into ``format``."""

    name: str
    shape: tuple[int, ...]
    format: Format
    options: Options

    def run(self, weights: Iterable[np.ndarray]) -> Iterator[Any]:
        """The blocks of the tensor, slab by slab: their bytes, or their fields where the format has no bytes.  Its
        weights come flat, in pieces of any size and float dtype."""
        of_matrices = self.options.importance.of(self.name, self.shape) if self.format.uses_importance else None
        matrices = [None] if of_matrices is None else list(of_matrices)
        whole_rows = of_matrices is not None and self.format.weighs_rows
        unit = self.shape[-1] if whole_rows else self.format.block_size
        flow, done = _Flow(weights), 0
        begun: deque[Future] = deque()
        with ThreadPoolExecutor(THREADS) as pool:
            for columns in matrices:
                for i, (n, size) in enumerate(_slabs(math.prod(self.shape) // len(matrices), unit)):
                    x = flow.take(n, size)
                    width = unit if whole_rows else size
                    importance = None if columns is None else np.resize(np.roll(columns, -done), width)
                    begun.append(pool.submit(self._blocks, x.reshape(-1, width), n, done, importance, i))
                    done += n
                    if len(begun) > THREADS:
                        yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()

    def in_memory(self, weights: Iterable[np.ndarray]) -> QTensor:
        """The whole tensor, from weights as `run` takes them."""
        *rows, columns = self.shape
        format, at = self.format, 0
        blocks = (*rows, columns // format.block_size)
        fields = [_empty((math.prod(blocks), *field.shape), field.dtype) for field in format.layout]
        for slab in self.run(weights):
            parts = format.view(slab) if isinstance(slab, np.ndarray) else slab
            for whole, part in zip(fields, parts):
                whole[at : at + len(part)] = part
            at += len(parts[-1])
        return QTensor(format.Fields(*(jnp.asarray(f.reshape(*blocks, *f.shape[1:])) for f in fields)), format)

    def quantize(self, x: np.ndarray, at: int = 0, importance: np.ndarray | None = None, seed: int = 0) -> Any:
        """``x``, which begins with weight number ``at`` of the tensor, quantized: bytes, or a QTensor where its
        format has none."""
        checked = not self.options.allow_nonfinite
        rounding = self.options.rounding if self.format.rounding else None
        result, sum_of_squares, fits = _quantize(x, importance, seed, self.format, rounding)
        if checked and not np.isfinite(sum_of_squares) and not (finite := np.isfinite(x)).all():
            first = np.unravel_index(at + int(np.argmin(finite)), self.shape)
            raise QjaxError(
                f"{self.name}: the weight at {tuple(map(int, first))} is NaN or infinite. The model is damaged; "
                "fetch it again, or pass allow_nonfinite (--allow-nonfinite)."
            )
        if isinstance(self.format, Plain):
            fits = float(sum_of_squares) < float(jnp.finfo(result.dtype).max) ** 2 or np.isfinite(result).all()
        if checked and not fits:
            raise QjaxError(
                f"{self.name}: weights of up to {np.abs(x).max():.3g} overflow what {self.format.name} can hold. "
                "Use BF16 or F32 for it."
            )
        return result

    def _blocks(self, x: np.ndarray, n: int, *start: Any) -> Any:
        """Those of the first ``n`` weights of a slab."""
        result = self.quantize(x, *start)
        if isinstance(result, QTensor):
            return jax.tree.map(lambda values: values[: n // self.format.block_size], _flat(result))
        return np.asarray(result).reshape(-1).view(np.uint8)[: self.format.nbytes((n,))]


def forget_programs() -> None:
    """As `tensor.forget_programs`, with those of this module."""
    tensor.forget_programs()
    _quantize.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]


@functools.partial(jax.jit, static_argnames=("format", "rounding"))
def _quantize(
    x, importance, seed, format: Format, rounding: str | None
) -> tuple[Any, Float32[Array, ""], Bool[Array, ""]]:
    """All that is done with a slab, as one program: the result, the sum of the squares of the weights (no weight is
    larger than its root, though it may overflow), and whether it fits: its scales are finite.

    Plain numbers are bytes already, copied faster as what they are, and have no scales.
    """
    sum_of_squares = jnp.sum(jnp.square(x))
    t = quantize(x, format, importance=importance, rounding=rounding, seed=seed)
    if isinstance(format, Plain):
        return t.fields[0], sum_of_squares, jnp.bool_(True)
    scales = [jnp.isfinite(f).all() for f in t.fields if jnp.issubdtype(f.dtype, jnp.floating)]
    return t if format.ggml_id is None else t.to_bytes(), sum_of_squares, jnp.array(scales).all()


class _Flow:
    """Weights that come in pieces of one size and are taken in another."""

    def __init__(self, pieces: Iterable[np.ndarray]):
        self._pieces = iter(pieces)
        self._rest = np.empty(0, np.float32)

    def take(self, n: int, size: int) -> Float32[np.ndarray, " size"]:
        """The next ``n`` and zeros; not copied where that can be."""
        if n == size <= self._rest.size and self._rest.dtype == np.float32:
            x, self._rest = self._rest[:n], self._rest[n:]
            return x
        x = np.zeros(size, np.float32)
        missing = x[:n]
        while missing.size:
            if not self._rest.size:
                self._rest = next(self._pieces)
            m = min(missing.size, self._rest.size)
            missing[:m] = self._rest[:m]
            missing, self._rest = missing[m:], self._rest[m:]
        return x


def _slabs(n: int, unit: int) -> Iterator[tuple[int, int]]:
    """(weights used, weights) of one slab after another, ``n`` used together; multiples of ``unit``."""
    large, small = (max(1, size // unit) * unit for size in SLAB_WEIGHTS)
    n_large = n // large if n >= _LARGE_SLABS * large else 0
    while n:
        size, n_large = (large, n_large - 1) if n_large else (small, 0)
        yield min(n, size), size
        n -= min(n, size)


def weights(source: Stored) -> Iterator[np.ndarray]:
    """The numbers that a tensor stands for, flat, in pieces of any size and float dtype."""
    if isinstance(source.format, Plain):
        dtype = jnp.dtype(source.format.dtype)
        yield from (piece.view(dtype) for piece in source.pieces())
    elif source.format.ggml_id is not None:
        for piece in source.pieces():
            yield from _decoded(source.format.view(piece), source.format)
    else:  # no bytes to take in pieces, but rows
        t = source.load()
        assert isinstance(t, QTensor)
        n_rows, columns = math.prod(t.shape[:-1]), t.shape[-1]
        step = max(1, SLAB_WEIGHTS[0] // columns)
        for start in range(0, n_rows, step):
            rows = np.unravel_index(np.minimum(np.arange(start, start + step), n_rows - 1), t.shape[:-1])
            yield np.asarray(dequantize(t[rows]))[: n_rows - start].reshape(-1)


def floats(tensor: Array | np.ndarray | QTensor) -> Iterator[np.ndarray]:
    """The same of a tensor in memory."""
    if not isinstance(tensor, QTensor):
        yield np.asarray(tensor).reshape(-1)
    elif tensor.format.blocks_stand_alone:
        yield from _decoded(_flat(tensor), tensor.format)
    else:
        yield np.asarray(dequantize(tensor)).reshape(-1)


def _flat(t: QTensor) -> Any:
    """The fields of its blocks, one after another."""
    pairs = zip(t.fields, t.format.layout)
    return t.format.Fields(*(np.asarray(values).reshape(-1, *field.shape) for values, field in pairs))


def _decoded(fields: Sequence[np.ndarray], format: Format) -> Iterator[np.ndarray]:
    """The numbers that blocks stand for, flat."""
    at = 0
    for n, size in _slabs(len(fields[-1]) * format.block_size, format.block_size):
        n_blocks = n // format.block_size
        slab = [np.zeros((size // format.block_size, *values.shape[1:]), values.dtype) for values in fields]
        for padded, values in zip(slab, fields):
            padded[:n_blocks] = values[at : at + n_blocks]
        at += n_blocks
        yield np.asarray(dequantize(QTensor(format.Fields(*slab), format))).reshape(-1)[:n]


def _joined(pieces: Iterable[np.ndarray], n: int, dtype: DTypeLike) -> np.ndarray:
    """All numbers in one array."""
    joined, at = _empty((n,), dtype), 0
    for piece in pieces:
        joined[at : at + piece.size] = piece
        at += piece.size
    return joined


def _empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Numbers of no particular value, where JAX on CPU takes them as they are."""
    dtype = jnp.dtype(dtype)
    return aligned(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
