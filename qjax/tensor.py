"""QTensor: an array of weights held in a quantized format, and the two functions between it and floats."""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, UInt8

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format


@functools.partial(jax.tree_util.register_dataclass, data_fields=["fields"], meta_fields=["format"])
@dataclass(frozen=True, repr=False)
class QTensor:
    """Weights in a quantized format; a pytree whose leaves are the fields of the blocks.

    fields: a namedtuple of arrays ``(*rows, n_blocks)`` or ``(*rows, n_blocks, count)``, named as ggml names them.
    format: the Format that gives them meaning; static under jit.

    The logical shape ``(*rows, columns)`` is row-major with the contraction axis last and follows from the fields, so
    stacking, slicing (`jax.tree.map`), `jax.vmap` and `jax.lax.scan` over leading axes keep it right by themselves.
    """

    fields: Any
    format: Format = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, ``(*rows, columns)``."""
        codes, layout = self.fields[-1], self.format.layout[-1]
        *rows, n_blocks = codes.shape if layout.count == 1 else codes.shape[:-1]
        return (*rows, n_blocks * self.format.block_size)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all fields: what the tensor takes in a file and in memory."""
        return sum(f.size * f.dtype.itemsize for f in self.fields)

    @property
    def bpw(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.nbytes / self.size

    @classmethod
    def from_bytes(cls, data: UInt8[ArrayLike, "..."], format: str | Format, shape: tuple[int, ...]) -> "QTensor":
        """The tensor of logical ``shape`` whose blocks are ``data`` (uint8, any shape), the inverse of `to_bytes`.

        Raises QjaxError if the number of bytes is not what format and shape need, and for formats without a GGML id.
        """
        format = formats.get(format).resolve(shape)
        _check_file_layout(format)
        data = np.asarray(data)
        if data.nbytes != format.nbytes(shape):
            raise QjaxError(
                f"a {format.name} tensor of shape {shape} takes {format.nbytes(shape)} bytes, found {data.nbytes}"
            )
        *rows, columns = shape
        blocks = data.view(np.uint8).reshape(*rows, columns // format.block_size, format.type_size)
        return cls(_unpack(format, blocks), format)

    def to_bytes(self) -> UInt8[Array, "*rows row_bytes"]:
        """The bytes of the file, one row of blocks after another.  Raises QjaxError for formats without a GGML id."""
        _check_file_layout(self.format)
        return _pack(self.format, self.fields)

    def by_rows(self) -> "QTensor":
        """The same weights, each row with all that it takes to decode it: the leading axes of all fields are ``*rows``.

        Its format is another one where rows share scales that are quantized themselves (NF4).
        """
        return QTensor(*self.format.by_rows(self.fields))

    def __getitem__(self, rows) -> "QTensor":
        """Rows (any index into the leading axes), still quantized, as `by_rows` has them."""
        return jax.tree.map(lambda values: values[rows], self.by_rows())

    def __repr__(self) -> str:
        shape, size = describe_shape(self.shape), describe_size(self.nbytes)
        return f"QTensor({self.format.name}, {shape}, {self.bpw:.2f} bpw, {size})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{name}</code></td><td>{values.dtype}</td><td>{describe_shape(values.shape)}</td>"
            f"<td>{describe_size(values.nbytes)}</td></tr>"
            for name, values in zip(self.fields._fields, self.fields)
        )
        return f"<b>{self!r}</b><table><tr><th>field</th><th>type</th><th>shape</th><th>size</th></tr>{rows}</table>"


def quantize(
    x: Float[Array | np.ndarray, "*rows columns"],
    format: str | Format,
    *,
    importance: Float[Array | np.ndarray, " columns"] | None = None,
    rounding: str | None = None,
    seed: int | Array = 0,
) -> QTensor:
    """Quantizes the rows of ``x``.

    x: weights, the contraction axis last; computed in float32.
    format: a name from `qjax.formats.names()` or a Format.
    importance: weight of each column's squared error (an imatrix row).
    rounding: replaces the rule of the format's final rounding step, a name from `qjax.formats.rounding_names()`.
    seed: of the ``stochastic`` rounding.

    Jitted, and traceable in jit, vmap and scan.  NaN and infinities are not looked for here (that would wait for the
    device); `Model.quantize` refuses them.  Raises QjaxError if a row is no multiple of the block, for an unknown
    format or rounding, if the format has no rounding step or no importance-weighted search, or needs importance.
    """
    format = formats.get(format).resolve(x.shape)
    if rounding is not None:
        formats.check_rounding(rounding)
        if format.rounding is None:
            raise QjaxError(f"{format.name} has no final rounding step to replace; leave rounding out")
    if importance is None and format.needs_importance:
        raise QjaxError(f"{format.name} needs an importance matrix; give importance=, or use Q2_K")
    if importance is not None and not format.uses_importance:
        raise QjaxError(f"{format.name} has no importance-weighted search; leave importance out")
    return QTensor(_encode(format, rounding, x, importance, seed), format)


def dequantize(t: QTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "*rows columns"]:
    """The weights that ``t`` stands for, in ``dtype``.  Jitted."""
    return _decode(t, jnp.dtype(dtype))


def dense(w: Array | QTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape"]:
    """The weights as an Array in ``dtype``, whatever holds them.  Traceable."""
    return dequantize(w, dtype) if isinstance(w, QTensor) else jnp.asarray(w, dtype)


@functools.partial(jax.jit, static_argnames=("format", "rounding"))
def _encode(format: Format, rounding, x, importance, seed) -> tuple:
    def blocked(a):
        return a.astype(jnp.float32).reshape(*a.shape[:-1], -1, format.block_size)

    return format.encode(blocked(x), None if importance is None else blocked(importance), rounding, seed)


@functools.partial(jax.jit, static_argnames=("dtype",))
def _decode(t: QTensor, dtype) -> Float[Array, "*rows columns"]:
    return t.format.decode(t.fields).reshape(t.shape).astype(dtype)


@functools.partial(jax.jit, static_argnames=("format",))
def _unpack(format: Format, blocks) -> tuple:
    return format.unpack(blocks)


@functools.partial(jax.jit, static_argnames=("format",))
def _pack(format: Format, fields) -> UInt8[Array, "*rows row_bytes"]:
    blocks = format.pack(fields)
    return blocks.reshape(*blocks.shape[:-2], -1)


def forget_programs() -> None:
    """Lets go of what is compiled for `quantize`, `dequantize`, `QTensor.from_bytes` and `to_bytes`.

    It is some 30 MB for each format; for what goes through many formats and comes to each once.
    """
    for program in (_encode, _decode, _unpack, _pack):
        program.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]


def _check_file_layout(format: Format) -> None:
    if format.ggml_id is None:
        raise QjaxError(f"{format.name} has no GGML type id, so no file layout; NF4 is saved as safetensors")


def describe_shape(shape: tuple[int, ...]) -> str:
    """As in ``4096×4096``."""
    return "×".join(map(str, shape)) or "scalar"


def describe_size(size_bytes: float) -> str:
    """As in ``9.0 MiB``."""
    power = min(int(math.log2(max(size_bytes, 1))) // 10, 3)
    unit = ("B", "KiB", "MiB", "GiB")[power]
    return f"{size_bytes / 1024**power:.{1 if power else 0}f} {unit}"
