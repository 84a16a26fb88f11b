"""How two model files differ: metadata, tensors, and the error of each tensor."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32, UInt8

from qjax.formats import Format
from qjax.formats.plain import Plain
from qjax.info import summarize
from qjax.io.metadata_edit import MetadataChange, changes_table, compare
from qjax.io.stored import Stored, recut
from qjax.io.summary import FileSummary, TensorSummary, plain
from qjax.methods import rtn
from qjax.metrics.tensors import TensorError, slabs_error
from qjax.progress import progress
from qjax.source import open_source
from qjax.table import Table
from qjax.tensor import describe_shape

SLAB = 2**18
"""Weights compared at a time; a multiple of every block, so that each format is compiled once."""


@dataclass(frozen=True)
class TensorChange:
    """A tensor before and after, None where there is none.  error: of the weights, None if they cannot be compared."""

    name: str
    before: TensorSummary | None
    after: TensorSummary | None
    error: TensorError | None = None

    @property
    def sign(self) -> str:
        """``+`` added, ``-`` removed, ``~`` changed."""
        return "+" if self.before is None else "-" if self.after is None else "~"

    def cells(self) -> tuple[str, ...]:
        """Sign, name, shape and format (from → to), and the error."""
        sides = [side for side in (self.before, self.after) if side]
        shapes = dict.fromkeys(describe_shape(side.shape) for side in sides)
        formats = dict.fromkeys(side.format for side in sides)
        e = self.error
        errors = (
            ("",) * 5
            if e is None
            else (
                f"{e.rmse:.3e}",
                f"{e.relative_rmse:.2%}",
                f"{e.sqnr_db:.2f}",
                f"{e.max_error:.3e}",
                f"{e.cosine:.6f}",
            )
        )
        return self.sign, self.name, " → ".join(shapes), " → ".join(formats), *errors

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        sides = {"before": self.before, "after": self.after}
        described = {side: t and dataclasses.asdict(t) for side, t in sides.items()}
        e = self.error
        values = e and dataclasses.asdict(e) | {"rmse": e.rmse, "relative_rmse": e.relative_rmse}
        error = values and {key: plain(value) for key, value in values.items()}
        return {"name": self.name} | described | {"error": error}


@dataclass(frozen=True, eq=False, repr=False)
class FileDiff:
    """Only what differs; false if nothing does.  The order of entries and tensors does not count."""

    before: FileSummary
    after: FileSummary
    metadata: tuple[MetadataChange, ...]
    tensors: tuple[TensorChange, ...]

    def __bool__(self) -> bool:
        return bool(self.metadata or self.tensors)

    def tables(self) -> dict[str, Table]:
        """Title to table, without empty ones."""
        columns = {"": "<", "name": "<", "shape": ">", "format": "<"}
        errors = {"RMSE": ">", "relative": ">", "SQNR dB": ">", "max": ">", "cosine": ">"}
        tensors = Table(columns | errors, [change.cells() for change in self.tensors])
        titled = {
            _title("metadata", self.metadata): changes_table(self.metadata),
            _title("tensors", self.tensors): tensors,
        }
        return {title: table for title, table in titled.items() if table.rows}

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {
            "equal": not self,
            "before": self.before.name,
            "after": self.after.name,
            "metadata": [change.to_json() for change in self.metadata],
            "tensors": [change.to_json() for change in self.tensors],
        }

    def __str__(self) -> str:
        lines = [f"{sign} {summary.headline}" for sign, summary in (("---", self.before), ("+++", self.after))]
        for title, table in self.tables().items():
            lines += ["", title, *(f"  {line}" for line in str(table).splitlines())]
        return "\n".join(lines if self else [*lines, "", "no difference"])

    def _repr_html_(self) -> str:
        heads = Table({"": "<", "file": "<"}, [("---", self.before.headline), ("+++", self.after.headline)])
        tables = (f"<p>{title}</p>{table._repr_html_()}" for title, table in self.tables().items())
        return heads._repr_html_() + ("".join(tables) if self else "<p>no difference</p>")


def diff(before: str | os.PathLike[str], after: str | os.PathLike[str]) -> FileDiff:
    """Compare two model files, each found as `qjax.info.info` finds it.

    Tensors are equal if shape, format and bytes are; of those of one shape that differ the error of the weights is
    computed, a slab at a time.  Raises QjaxError if one is missing or damaged.
    """
    a, b = open_source(before), open_source(after)
    names = progress(dict.fromkeys((*a.tensors, *b.tensors)), desc="comparing", unit="tensor")
    changes = (_compare_tensors(name, a.tensors.get(name), b.tensors.get(name)) for name in names)
    return FileDiff(
        before=summarize(before, a),
        after=summarize(after, b),
        metadata=compare(a.metadata, b.metadata),
        tensors=tuple(change for change in changes if change),
    )


def _compare_tensors(name: str, before: Stored | None, after: Stored | None) -> TensorChange | None:
    """None if they are equal."""
    error = None
    if before and after and tuple(before.shape) == tuple(after.shape):
        if before.format == after.format and _same_bytes(before, after):
            return None
        error = slabs_error(zip(_weights(before), _weights(after))) if math.prod(before.shape) else None
    return TensorChange(name, before and TensorSummary.of(name, before), after and TensorSummary.of(name, after), error)


def _slabs(tensor: Stored) -> Iterator[UInt8[np.ndarray, " n"]]:
    """The bytes of SLAB weights after those of another."""
    return recut(tensor.pieces(), np.uint8, tensor.format.nbytes((SLAB,)))


def _weights(tensor: Stored) -> Iterator[Float32[np.ndarray, " n"]]:
    """All weights in the order of the file, SLAB at a time."""
    if tensor.format.ggml_id is None:
        return recut(rtn.weights(tensor), np.float32, SLAB)
    return (_decode(tensor.format, data) for data in _slabs(tensor))


def _decode(format: Format, data: UInt8[np.ndarray, " n"]) -> Float32[np.ndarray, " weights"]:
    if isinstance(format, Plain):
        with np.errstate(over="ignore"):
            return data.view(jnp.dtype(format.dtype)).astype(np.float32)
    n_weights = data.size // format.type_size * format.block_size
    padded = np.zeros(format.nbytes((SLAB,)), np.uint8)
    padded[: data.size] = data
    return np.asarray(_decode_blocks(format, padded.reshape(-1, format.type_size)))[:n_weights]


@functools.partial(jax.jit, static_argnames=("format",))
def _decode_blocks(format: Format, blocks: UInt8[Array, "n_blocks type_size"]) -> Float32[Array, " weights"]:
    return format.decode(format.unpack(blocks)).reshape(-1)


def _same_bytes(a: Stored, b: Stored) -> bool:
    if a.format.ggml_id is None:
        return all(map(np.array_equal, jax.tree.leaves(a.load()), jax.tree.leaves(b.load())))
    return all(np.array_equal(x, y) for x, y in zip(_slabs(a), _slabs(b)))


def _title(what: str, changes: tuple[MetadataChange, ...] | tuple[TensorChange, ...]) -> str:
    signs = [change.sign for change in changes]
    counted = {"changed": signs.count("~"), "added": signs.count("+"), "removed": signs.count("-")}
    return f"{what}: {', '.join(f'{count} {verb}' for verb, count in counted.items() if count)}"
