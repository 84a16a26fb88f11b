"""Whether a file follows from its source: `verify` makes it again, as its receipt says, and compares the bytes."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array

import qjax
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.io import gguf
from qjax.io.gguf import GGUFFile, Metadata
from qjax.io.imatrix import Imatrix
from qjax.io.metadata_edit import MetadataChange, changes_table, compare
from qjax.io.stored import Stored, recut
from qjax.methods import plan as planning
from qjax.methods import recipes, rtn, solver
from qjax.methods.receipt import REPEATABLE, How, Receipt, Text, weights_sha256
from qjax.methods.recipes import Recipe
from qjax.progress import progress
from qjax.quantize_file import make
from qjax.source import Source, open_source
from qjax.table import Table, printable
from qjax.tensor import QTensor, describe_shape

BLOCKS = 2**14
"""Compared at a time."""

# What a model is called says nothing of what it computes, but these do.
_STRUCTURE = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")


@dataclass(frozen=True)
class TensorMismatch:
    """A tensor that is not as it follows from the source.

    problem: what differs.  n_blocks: of the tensor, n_differing: of these, first: number of the first of them, from 0;
    0, 0 and None where they cannot be compared.
    """

    name: str
    problem: str
    n_blocks: int = 0
    n_differing: int = 0
    first: int | None = None

    def cells(self) -> tuple[str, str, str, str]:
        """Name, problem, share of differing blocks, the first of them."""
        share = f"{self.n_differing:,} of {self.n_blocks:,}" if self.n_blocks else ""
        return printable(self.name), printable(self.problem), share, "" if self.first is None else str(self.first)


@dataclass(frozen=True, eq=False, repr=False)
class Verification:
    """Whether a file is what follows from its source; true if it is.

    receipt: of the file, None if it has none.  contract: "byte-exact", or "repeatable": then bytes may differ with
    another version of JAX or another kind of device.  source_sha256: of the source, None where no receipt names it.
    n_tensors, n_blocks: of the file, as far as they were compared.  tensors: those that differ.
    metadata: entries that differ, from what they should be to what they are, but for names and receipts.
    notes: what is to be known, though it is no difference.
    """

    file: str
    source: str
    receipt: Receipt | None
    contract: str
    source_sha256: str | None
    n_tensors: int
    n_blocks: int
    tensors: tuple[TensorMismatch, ...]
    metadata: tuple[MetadataChange, ...]
    notes: tuple[str, ...]

    @property
    def is_source(self) -> bool:
        """Whether the source is the one that the receipt names."""
        return self.receipt is None or self.receipt.source_sha256 == self.source_sha256

    @property
    def n_differing(self) -> int:
        """Blocks that differ."""
        return sum(tensor.n_differing for tensor in self.tensors)

    def __bool__(self) -> bool:
        return self.is_source and not self.tensors and not self.metadata

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        names = ("file", "source", "contract", "source_sha256", "is_source", "n_tensors", "n_blocks", "n_differing")
        return {
            "follows": bool(self),
            **{name: getattr(self, name) for name in names},
            "tensors": [dataclasses.asdict(tensor) for tensor in self.tensors],
            "metadata": [change.to_json() for change in self.metadata],
            "notes": self.notes,
            "receipt": self.receipt and self.receipt.to_metadata(),
        }

    def __str__(self) -> str:
        verdict = "follows" if self else "does not follow"
        lines = [f"{printable(self.file)} {verdict} from {printable(self.source)}"]
        if not self.is_source:
            assert self.receipt is not None
            lines += [f"source: its sha256 is {self.source_sha256}, the receipt names {self.receipt.source_sha256}"]
        else:
            equal = self.n_tensors - len(self.tensors)
            lines += [f"tensors: {equal} of {self.n_tensors} as they follow, {self.n_blocks:,} blocks; {self.contract}"]
        if self.tensors:
            columns = {"tensor": "<", "problem": "<", "blocks that differ": ">", "first": ">"}
            lines += [*str(Table(columns, [tensor.cells() for tensor in self.tensors])).splitlines()]
        if self.metadata:
            lines += ["metadata", *(f"  {line}" for line in str(changes_table(self.metadata)).splitlines())]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def verify(
    file: str | os.PathLike[str],
    source: str | os.PathLike[str],
    recipe: "str | Format | Mapping[str, str | Format] | Recipe | None" = None,
    *,
    method: str = "rtn",
    calibrate: Text | None = None,
    n_ctx: int = 512,
    chunks: int | None = None,
    imatrix: "str | os.PathLike[str] | Imatrix | None" = None,
    rounding: str | None = None,
    lora: str | os.PathLike[str] | None = None,
) -> Verification:
    """Quantizes ``source`` again, as ``file`` says that it was, and compares all bytes, a piece at a time.

    file: a GGUF file, or a shard.  source: what `load` takes, or a GGUF file of any architecture.
    imatrix, calibrate: the importance matrix and the text that the receipt names by their hashes.
    recipe, method, n_ctx, chunks, rounding: where the file has no receipt: as in `Model.quantize`.  Without a recipe
        tensors are rounded to the formats that they have.
    lora: an adapter that was added to the weights.

    Raises QjaxError if a file is missing or damaged, for an importance matrix or text that is not the receipt's,
    for options beside a receipt, and as `quantize_file` does.
    """
    found, opened = gguf.read(file), open_source(source, lora=lora)
    receipt = _receipt(found)
    asked = recipe is not None or (method, n_ctx, chunks, rounding) != ("rtn", 512, None, None)
    if receipt and asked:
        raise QjaxError(f"{file}: its receipt says how it was made; give no recipe, method or rounding beside it")
    notes: tuple[str, ...] = ()
    if receipt:
        how, notes = receipt.how(found.metadata, imatrix, calibrate), _notes(receipt)
        sha256 = weights_sha256(opened.tensors)
        if sha256 != receipt.source_sha256:
            return Verification(str(file), str(source), receipt, receipt.contract, sha256, 0, 0, (), (), notes)
    else:
        how = How(
            recipe=_as_it_is(found, opened) if recipe is None else recipes.recipe(recipe),
            method=method,
            rounding=rounding,
            imatrix=imatrix,
            calibrate=calibrate,
            n_ctx=n_ctx,
            chunks=chunks,
        )
        sha256 = None
    made = make(opened, how, allow_requantize=True, allow_nonfinite=True, receipt=False)
    names = dict.fromkeys((*made.tensors, *found.tensors))
    compared = [
        _compare(name, made.tensors.get(name), found.tensors.get(name))
        for name in progress(names, desc=f"verifying {found.paths[0].name}", unit="tensor")
    ]
    return Verification(
        file=str(file),
        source=str(source),
        receipt=receipt,
        contract=receipt.contract if receipt else how.contract,
        source_sha256=sha256,
        n_tensors=len(names),
        n_blocks=sum(n for n, _ in compared),
        tensors=tuple(mismatch for _, mismatch in compared if mismatch),
        metadata=_changes(made.metadata, found.metadata, any_type=receipt is None and recipe is None),
        notes=notes,
    )


def _receipt(file: GGUFFile) -> Receipt | None:
    try:
        return Receipt.read(file.metadata)
    except QjaxError as error:
        raise QjaxError(f"{file.paths[0]}: {error}") from None


def _notes(receipt: Receipt) -> tuple[str, ...]:
    """What is not as it was when the file was made."""
    here = {"qjax": qjax.__version__, "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    then = {"qjax": receipt.version, "jax": receipt.jax, "device": receipt.device}
    changed = [what for what in here if then[what] not in (None, here[what])]
    notes = [f"made with {what} {printable(str(then[what]))}; here it is {here[what]}" for what in changed]
    if changed and receipt.contract == REPEATABLE:
        notes.append("bytes may differ because of that")
    if receipt.contract != REPEATABLE and jax.default_backend() != "cpu":
        notes.append("bytes are promised of a CPU alone (JAX_PLATFORMS=cpu)")
    return tuple(notes)


def _as_it_is(file: GGUFFile, source: Source) -> Recipe:
    """Every matrix in the format that it has in ``file``."""
    shared = [name for name in planning.matrices(file.tensors, file.metadata) if name in source.tensors]
    exact = solver.exactly({name: file.tensors[name].format for name in shared})
    return dataclasses.replace(recipes.COPY, name="the file's formats", tensor_types=tuple(exact.items()))


def _changes(expected: Metadata, found: Metadata, any_type: bool) -> tuple[MetadataChange, ...]:
    """any_type: whether the file type follows from nothing."""

    def counts(key: str) -> bool:
        if key.startswith("general."):
            return key in _STRUCTURE and not (any_type and key == "general.file_type")
        return key != "quantize.imatrix.file" and not key.startswith(rtn.RECEIPT_PREFIX) and key not in gguf.SPLIT_KEYS

    return tuple(change for change in compare(expected, found) if counts(change.key))


def _compare(
    name: str, expected: Array | QTensor | Stored | None, found: Stored | None
) -> tuple[int, TensorMismatch | None]:
    """The number of blocks compared, and what differs, if anything does."""
    if expected is None or found is None:
        return 0, TensorMismatch(name, "is missing" if found is None else "is not in the source")
    format, shape = planning.stored_format(expected), tuple(expected.shape)
    if shape != tuple(found.shape):
        return 0, TensorMismatch(name, f"shape {describe_shape(found.shape)}, expected {describe_shape(shape)}")
    if format != found.format:
        return 0, TensorMismatch(name, f"format {found.format.name}, expected {format.name}")
    n_blocks, n_differing, first = 0, 0, None
    step = BLOCKS * format.type_size
    for x, y in zip(recut(gguf.pieces(expected), np.uint8, step), recut(found.pieces(), np.uint8, step), strict=True):
        differing = (x.reshape(-1, format.type_size) != y.reshape(-1, format.type_size)).any(axis=1)
        if first is None and differing.any():
            first = n_blocks + int(differing.argmax())
        n_blocks, n_differing = n_blocks + differing.size, n_differing + int(np.count_nonzero(differing))
    return n_blocks, TensorMismatch(name, "bytes", n_blocks, n_differing, first) if n_differing else None
