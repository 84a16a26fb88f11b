"""Format: what a block of bits means.  One table row a format; sizes, fields, packing and bpw follow from it."""

import functools
import math
from abc import ABC, abstractmethod
from collections import namedtuple
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float32, Int8, Num, UInt8

from qjax.errors import QjaxError, nearest_names


@dataclass(frozen=True)
class Field:
    """One member of the block struct: ``count`` elements of ``dtype``, in the file's byte order."""

    name: str
    dtype: str
    count: int = 1

    @functools.cached_property
    def nbytes(self) -> int:
        return self.count * jnp.dtype(self.dtype).itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one block's array."""
        return () if self.count == 1 else (self.count,)


class Integers(NamedTuple):
    """Weights as ``scale * code + offset``, to within float32's rounding."""

    codes: Int8[Array, "*rows n_groups group"]
    scale: Float32[Array, "*rows n_groups"]
    offset: Float32[Array, "*rows n_groups"] | None
    bounds: tuple[int, int]
    """The least and the greatest code there can be."""


class Scales(NamedTuple):
    """What the codes of a group are counted in: a weight is ``scale * level + offset``."""

    scale: Float32[Array, "*rows n_groups"]
    offset: Float32[Array, "*rows n_groups"] | None


@dataclass(frozen=True)
class Format(ABC):
    """A way to store rows of weights in blocks.

    Subclasses give ``name``, ``ggml_id`` (None where GGUF has no id), ``block_size`` (weights), ``layout`` (the
    block struct, in byte order), ``family``, and the pure functions `encode` and `decode`.  ``exactness`` states
    the contract with the reference implementation, ``rounding`` the rule of the final rounding step or None,
    ``encodable`` whether `encode` exists, ``for_weights`` whether models store weights in it (else activations, sums
    or indices), ``uses_importance`` and ``needs_importance`` what it does with that,
    ``weighs_rows`` whether with importance a block's errors are weighed by the whole row, ``blocks_stand_alone``
    whether otherwise each block is encoded, and decoded, by itself.

    The fields of a tensor are a namedtuple with one array for each entry of ``layout``, shaped
    ``(*rows, n_blocks)`` where ``count`` is 1 and ``(*rows, n_blocks, count)`` otherwise.
    """

    name: ClassVar[Any]
    ggml_id: ClassVar[Any] = None
    block_size: ClassVar[Any]
    layout: ClassVar[Any]
    family: ClassVar[Any]
    rounding: ClassVar[Any] = None
    encodable: ClassVar[bool] = True
    for_weights: ClassVar[bool] = True
    uses_importance: ClassVar[bool] = False
    needs_importance: ClassVar[bool] = False
    weighs_rows: ClassVar[bool] = False
    blocks_stand_alone: ClassVar[bool] = True
    exactness: ClassVar[str] = "byte-exact"

    @abstractmethod
    def encode(
        self,
        weights: Float32[Array, "*rows n_blocks block_size"],
        importance: Float32[Array, " n_blocks block_size"] | None = None,
        rounding: str | None = None,
        seed: int | Array = 0,
    ) -> tuple:
        """Weights to fields.  Whole rows are seen because some importance rules need them."""

    integers: ClassVar[Any] = None
    """Fields to `Integers`, where the weights are codes with a scale, and an offset perhaps, for each group."""

    from_integers: ClassVar[Any] = None
    """The inverse, from codes in these blocks; what does not fit, codes or scales, becomes something else."""

    # Choosing codes otherwise than `encode` does, with scales that are stored: for methods that weigh the errors of
    # weights together.  A format has all of these where each weight has a code of its own.

    levels: ClassVar[Any] = None
    """What codes stand for, in rising order, float32; None if weights have no codes of their own."""

    scales: ClassVar[Any] = None
    """Fields to `Scales`, as they are stored: weights are ``scale * levels[i] + offset``, to float32's rounding."""

    with_scales: ClassVar[Any] = None
    """(fields, `Scales`) to fields with the nearest scales that can be stored beside what all groups of a block share,
    which stays.  None where blocks share more than that, and can not be encoded by themselves."""

    with_codes: ClassVar[Any] = None
    """(fields, i uint8 ``(*rows, n_blocks, block_size)``) to fields of the same scales whose weights are of levels
    i."""

    runs: ClassVar[Any] = None
    """The weights of blocks run by run, for kernels that decode where they multiply; None where they can not.

    ``runs(read)`` yields (index in the block of the first weight, float32 weights ``(..., run_size)``).  ``read(name,
    first=0, n=1, bits=8)`` gives n elements of a field of all blocks at hand, ``(..., n)``, as int32 or float32: the
    bytes in which codes of so many bits begin, from byte ``first`` on.  A kernel knows arithmetic, no lookup.
    """
    run_size: ClassVar[int] = 32
    """A power of two."""

    @property
    def activations(self) -> str | None:
        """The format to which ggml rounds what it multiplies with this one on a CPU (ggml-cpu.c type_traits_cpu,
        vec_dot_type); None where it has no such product."""
        if self.ggml_id is None or not self.for_weights:
            return None
        return "Q8_K" if self.block_size == 256 else "Q8_0"

    @property
    def piece_size(self) -> int:
        """Weights that `runs` takes for a block: a part of one, where fields of several elements divide with it."""
        return self.block_size

    def encode_activations(self, values: Float32[Array, "*rows n_blocks block_size"]) -> tuple:
        """`encode` for what a model computes as it runs, such as the keys and values of its cache.

        That has no time for a search: where `encode` has one, ggml rounds activations by another rule (``from_float``
        in ggml-cpu.c type_traits_cpu).
        """
        return self.encode(values)

    @abstractmethod
    def decode(self, fields: Any) -> Float32[Array, "*rows n_blocks block_size"]:
        """Fields to weights."""

    def by_rows(self, fields: Any) -> "tuple[tuple, Format]":
        """The same weights with ``*rows`` in front of every field, so that rows can be taken out; and their format."""
        *rows, _ = fields[-1].shape if self.layout[-1].count == 1 else fields[-1].shape[:-1]
        return self.Fields(*(jnp.broadcast_to(values, (*rows, *values.shape[len(rows) :])) for values in fields)), self

    @functools.cached_property
    def type_size(self) -> int:
        """Bytes of one block."""
        return sum(field.nbytes for field in self.layout)

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.type_size / self.block_size

    @property
    def Fields(self) -> type:
        return _fields_type(tuple(field.name for field in self.layout))

    def resolve(self, shape: tuple[int, ...]) -> "Format":
        """The format with its block size fixed for a tensor of ``shape``.  Raises QjaxError if rows do not divide."""
        row = shape[-1] if shape else 1
        if row % self.block_size:
            raise QjaxError(
                f"row length {row} is not a multiple of {self.block_size} ({self.name} block). "
                f"{_formats_for_row(row, self.bpw)}"
            )
        return self

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of logical ``shape``, rows last.  Raises QjaxError if rows do not divide."""
        self.resolve(shape)
        return math.prod(shape) // self.block_size * self.type_size

    def pack(self, fields: Any) -> UInt8[Array, "*rows n_blocks type_size"]:
        """Fields to the bytes of the file: each field's little-endian bytes, one after another."""
        parts = []
        for field, values in zip(self.layout, fields):
            values = values if field.count > 1 else values[..., None]
            as_bytes = lax.bitcast_convert_type(values, jnp.uint8)
            parts.append(as_bytes.reshape(*values.shape[:-1], field.nbytes))
        return jnp.concatenate(parts, axis=-1)

    def unpack(self, data: UInt8[Array, "*rows n_blocks type_size"]) -> tuple:
        """The bytes of the file to fields; the inverse of `pack`, bit for bit."""
        values, start = [], 0
        for field in self.layout:
            part = data[..., start : start + field.nbytes]
            start += field.nbytes
            dtype = jnp.dtype(field.dtype)
            if dtype.itemsize > 1:
                part = part.reshape(*part.shape[:-1], field.count, dtype.itemsize)
            part = lax.bitcast_convert_type(part, dtype)
            values.append(part if field.count > 1 else part[..., 0])
        return self.Fields(*values)

    def view(self, data: UInt8[np.ndarray, " n_bytes"]) -> tuple:
        """The same as numpy sees it, where it lies: for whole blocks in a row, of which nothing is copied."""
        struct = [(field.name, jnp.dtype(field.dtype), field.shape) for field in self.layout]
        blocks = data.view(np.dtype(struct))
        return self.Fields(*(blocks[field.name] for field in self.layout))

    def valid(self, fields: Any) -> Bool[np.ndarray, "*rows n_blocks"]:
        """Whether each block has weights: of most formats, whether its floats are neither NaN nor infinite
        (ggml-quants.c ggml_validate_row_data).  fields: numpy's, as from `view`."""
        codes = fields[-1]
        valid = np.ones(codes.shape if self.layout[-1].count == 1 else codes.shape[:-1], np.bool_)
        for field, values in zip(self.layout, fields):
            if jnp.issubdtype(field.dtype, jnp.floating):
                finite = is_finite(values)
                valid &= finite if field.count == 1 else finite.all(axis=-1)
        return valid

    def __repr__(self) -> str:
        return f"{self.name} ({self.block_size} weights in {self.type_size} bytes, {self.bpw:.4g} bpw)"

    def _repr_html_(self) -> str:
        struct = " · ".join(f"<code>{f.name}</code> {f.count}×{f.dtype}" for f in self.layout)
        return (
            f"<b>{self.name}</b>: {self.block_size} weights in {self.type_size} bytes = "
            f"{self.bpw:.4g} bits per weight ({struct})"
        )


def is_finite(values: Num[np.ndarray, "*s"]) -> Bool[np.ndarray, "*s"]:
    """np.isfinite, by the bits: ten times as fast for 16 bits, and without a warning for signaling NaN."""
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    infinity = np.array(np.inf, values.dtype).view(unsigned)
    return (values.view(unsigned) & infinity) != infinity


@functools.cache
def _fields_type(field_names: tuple[str, ...]) -> type:
    """One namedtuple class for each list of names: pytrees compare classes by identity."""
    return namedtuple("Fields", field_names)


_BY_NAME: dict[str, Format] = {}
_BY_ID: dict[int, Format] = {}


_F = TypeVar("_F", bound=Format)


def register(cls: type[_F]) -> type[_F]:
    """Class decorator: makes the format known under its name and its GGML id."""
    instance = cls()
    _BY_NAME[instance.name] = instance
    if instance.ggml_id is not None:
        _BY_ID[instance.ggml_id] = instance
    return cls


def names() -> tuple[str, ...]:
    """The names of all registered formats."""
    return tuple(_BY_NAME)


def get(format: str | Format) -> Format:
    """The format called ``format`` (case does not matter); a Format passes through.

    Raises QjaxError with the nearest names if there is none.
    """
    if isinstance(format, Format):
        return format
    found = _BY_NAME.get(format) or {name.upper(): known for name, known in _BY_NAME.items()}.get(format.upper())
    if found is None:
        raise QjaxError(f"unknown format {format!r}. {nearest_names(format, _BY_NAME)}")
    return found


def by_id(ggml_id: int) -> Format:
    """The format with a GGML type id.  Raises QjaxError with the known ids if there is none."""
    if ggml_id not in _BY_ID:
        known = ", ".join(f"{f.name} {i}" for i, f in sorted(_BY_ID.items()))
        raise QjaxError(f"unknown tensor type id {ggml_id}; this version of qjax knows {known}")
    return _BY_ID[ggml_id]


def _formats_for_row(row: int, bpw: float) -> str:
    """What to use instead of a format of ``bpw`` whose blocks do not divide the row."""
    blocks = (f for f in _BY_NAME.values() if f.block_size > 1 and f.for_weights and not f.needs_importance)
    fitting = sorted((f for f in blocks if row % f.block_size == 0), key=lambda f: abs(f.bpw - bpw))
    names = ", ".join(f.name for f in fitting[:4])
    return f"Use one of {names}." if names else "Use F16, BF16 or Affine(block_size='row')."
