"""Whether a file is sound: it can be read, and every block in it has weights."""

import dataclasses
import math
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from qjax.io import hub, imatrix
from qjax.io.stored import Stored
from qjax.progress import progress
from qjax.source import open_source
from qjax.table import Table, printable
from qjax.tensor import QTensor, describe_shape, describe_size


@dataclass(frozen=True)
class InvalidTensor:
    """A tensor with blocks that stand for no weights: their scales, or the weights of plain formats, are NaN or
    infinite.  block_size: weights in a block.  n_invalid of n_blocks are such, the first is number ``first``."""

    name: str
    format: str
    shape: tuple[int, ...]
    block_size: int
    n_blocks: int
    n_invalid: int
    first: int

    @property
    def where(self) -> str:
        """The weights of the first one, as numpy indexes them: ``[3, 32:64]``."""
        *rows, columns = self.shape or (1,)
        *row, block = np.unravel_index(self.first, (*rows, columns // self.block_size))
        start = int(block) * self.block_size
        weights = f"{start}:{start + self.block_size}" if self.block_size > 1 else f"{start}"
        return f"[{', '.join([*map(str, row), weights])}]"


@dataclass(frozen=True, eq=False, repr=False)
class Check:
    """What `check` found in a file that can be read.  size_bytes: of its tensors."""

    name: str
    container: str
    n_tensors: int
    size_bytes: int
    invalid: tuple[InvalidTensor, ...]

    @property
    def sound(self) -> bool:
        return not self.invalid

    @property
    def headline(self) -> str:
        """The facts in one line."""
        found = "sound" if self.sound else f"NOT SOUND, {len(self.invalid)} with NaN or infinities"
        size = describe_size(self.size_bytes)
        return f"{printable(self.name)}: {self.container}, {self.n_tensors} tensors, {size}: {found}"

    def table(self) -> Table:
        """The tensors that are not sound."""
        columns = {"tensor": "<", "format": "<", "shape": ">", "invalid blocks": ">", "first": ">", "weights": "<"}
        rows = [
            (t.name, t.format, describe_shape(t.shape), f"{t.n_invalid} of {t.n_blocks}", str(t.first), t.where)
            for t in self.invalid
        ]
        return Table(columns, rows)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {"sound": self.sound} | dataclasses.asdict(self)

    def __str__(self) -> str:
        return self.headline if self.sound else f"{self.headline}\n{self.table()}"

    def __repr__(self) -> str:
        return f"Check({self.headline})"

    def _repr_html_(self) -> str:
        facts = {
            "file": printable(self.name),
            "container": self.container,
            "tensors": str(self.n_tensors),
            "size": describe_size(self.size_bytes),
            "sound": "yes" if self.sound else "no",
        }
        html = Table({"fact": "<", "value": "<"}, list(facts.items()))._repr_html_()
        return html if self.sound else html + self.table()._repr_html_()


def check(name: str | os.PathLike[str]) -> Check:
    """Read a file whole and look at every block, a piece at a time.

    name: a GGUF file, alone or any of its shards, a GGML file from before it, an importance matrix, a safetensors
        folder, a Hub id or ``"tiny"``.

    Blocks are valid as llama.cpp has it where it loads a model with --check-tensors (`Format.valid`).  Raises QjaxError
    if there is no such file, or it cannot be read: as everywhere where files are read, that says what is wrong.
    """
    path = hub.locate(name)
    if path.is_file() and imatrix.recognizes_legacy(path):
        return _check_imatrix(name, path)
    source = open_source(name)
    if str(source.metadata.get("general.type")) == "imatrix":
        return _check_imatrix(name, path)
    items = progress(source.tensors.items(), desc="checking", unit="tensor", label=operator.itemgetter(0))
    found = (_look_at(tensor_name, tensor) for tensor_name, tensor in items)
    return Check(
        name=os.fspath(name),
        container=source.container,
        n_tensors=len(source.tensors),
        size_bytes=sum(tensor.format.nbytes(tensor.shape) for tensor in source.tensors.values()),
        invalid=tuple(tensor for tensor in found if tensor),
    )


def _check_imatrix(name: str | os.PathLike[str], path: Path) -> Check:
    """One that is not sound cannot be read."""
    entries = imatrix.read(path).entries.values()
    size = sum(array.nbytes for entry in entries for array in entry)
    return Check(os.fspath(name), "importance matrix", len(entries), size, ())


def _look_at(name: str, tensor: Stored) -> InvalidTensor | None:
    n_blocks = n_invalid = 0
    first = None
    for valid in _valid_blocks(tensor):
        wrong = np.flatnonzero(~valid)
        if wrong.size and first is None:
            first = n_blocks + int(wrong[0])
        n_invalid += wrong.size
        n_blocks += valid.size
    if first is None:
        return None
    format, shape = tensor.format, tuple(tensor.shape)
    block_size = math.prod(shape) // n_blocks
    return InvalidTensor(name, format.name, shape, block_size, n_blocks, n_invalid, first)


def _valid_blocks(tensor: Stored) -> Iterator[Bool[np.ndarray, " n_blocks"]]:
    """One block after another; whole tensors of formats whose blocks share what is stored."""
    format = tensor.format
    if format.ggml_id is not None:
        yield from (format.valid(format.view(piece)) for piece in tensor.pieces())
        return
    t = tensor.load()
    assert isinstance(t, QTensor)
    rows = t.by_rows()
    yield rows.format.valid(jax.tree.map(np.asarray, rows.fields)).reshape(-1)
