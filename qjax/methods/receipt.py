"""The receipt of a quantization: how a file came to be, in its metadata, so that `qjax.verify` can make it again.

A receipt names what the bytes follow from: the weights, the recipe, the method, importance and text by their hashes.
The entries are those of `Receipt` behind ``qjax.``, without what was not asked for; llama.cpp passes over them.
"""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_origin

import jax
import numpy as np
from jax import Array
from jaxtyping import Int

import qjax
from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.io import imatrix as imatrix_files
from qjax.io.cursor import shorten
from qjax.io.gguf_metadata import Metadata
from qjax.io.imatrix import Imatrix
from qjax.io.stored import Stored
from qjax.methods import importance, pipeline, recipes, rtn, solver
from qjax.methods.importance import Importance
from qjax.methods.plan import Plan
from qjax.methods.recipes import Recipe
from qjax.methods.rtn import RECEIPT_PREFIX as PREFIX
from qjax.progress import progress
from qjax.tensor import QTensor

LAYOUT = 1
"""Of the entries, in qjax.receipt; a reader knows those up to its own."""

BYTE_EXACT = Format.exactness
"""The contract of rounding to nearest: the bytes that ggml gives, wherever it is done on a CPU."""
REPEATABLE = "repeatable"
"""Of everything else: the same bytes from the same JAX on the same kind of device."""

_CHUNK_BYTES = 2**20

Text = str | Sequence[int] | Int[np.ndarray, " n"]
Tensors = Mapping[str, Any]
"""Arrays, QTensors or Stored tensors, by name."""


@dataclass(frozen=True, kw_only=True)
class How:
    """What is asked of a quantization, beside the model; see `quantize_file` and `Model.quantize` for each."""

    recipe: Recipe
    method: str = "rtn"
    rounding: str | None = None
    keep_split: bool = False
    imatrix: "str | os.PathLike[str] | Imatrix | None" = None
    include_weights: Sequence[str] = ()
    exclude_weights: Sequence[str] = ()
    calibrate: Text | None = None
    n_ctx: int = 512
    chunks: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def importance(self) -> Importance:
        """The entries of the importance matrix that count."""
        return importance.select(self.imatrix, include=self.include_weights, exclude=self.exclude_weights)

    @property
    def streams(self) -> bool:
        """Whether each tensor is rounded on its own, so that a model need not be in memory."""
        return pipeline.chain(self.method).name == "rtn" and self.calibrate is None

    @property
    def is_llama_cpps(self) -> bool:
        """Whether llama.cpp's programs write such a file, too."""
        return self.streams and self.rounding is None

    @property
    def contract(self) -> str:
        """What is promised of the bytes."""
        return BYTE_EXACT if self.is_llama_cpps and jax.default_backend() == "cpu" else REPEATABLE

    def receipt(self, tensors: Tensors, plan: Plan, wanted: bool | None = None) -> dict[str, Any]:
        """The entries of a `Receipt`, or none.  wanted: whether there are any; None: unless llama.cpp writes such a
        file, which is then the same."""
        wanted = not self.is_llama_cpps if wanted is None else wanted
        return Receipt.of(self, tensors, plan).to_metadata() if wanted else {}


@dataclass(frozen=True)
class Receipt:
    """What the metadata of a file say of how it came to be.

    recipe: with names in ``tensor_types`` in place of expressions: the tensors that these decided.
    imatrix_sha256: of the file, or of the one that `imatrix.write` makes; calibrate_sha256: of the text, without its
    last newline, in UTF-8, or of its ids as int32.  source_sha256: see `weights_sha256`.
    overrides: the keys that were set by hand.  jax, device: where the contract is not byte-exact.
    """

    version: str
    contract: str
    source_sha256: str
    recipe: Recipe
    method: str = "rtn"
    rounding: str | None = None
    keep_split: bool = False
    imatrix_sha256: str | None = None
    include_weights: tuple[str, ...] = ()
    exclude_weights: tuple[str, ...] = ()
    calibrate_sha256: str | None = None
    n_ctx: int = 512
    chunks: int | None = None
    overrides: tuple[str, ...] = ()
    jax: str | None = None
    device: str | None = None

    @classmethod
    def of(cls, how: How, tensors: Tensors, plan: Plan) -> "Receipt":
        """Of ``how``, applied to ``tensors`` with this plan; reads all of them."""
        assigned = tuple((name, format) for name, format in plan.assigned.items() if name in tensors)
        where: dict[str, Any] = {}
        if how.contract != BYTE_EXACT:
            where = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        return cls(
            version=qjax.__version__,
            contract=how.contract,
            source_sha256=weights_sha256(tensors),
            recipe=replace(how.recipe, tensor_types=assigned),
            method=pipeline.chain(how.method).name,
            rounding=how.rounding,
            keep_split=how.keep_split,
            imatrix_sha256=None if how.imatrix is None else imatrix_sha256(how.imatrix),
            include_weights=tuple(how.include_weights),
            exclude_weights=tuple(how.exclude_weights),
            calibrate_sha256=None if how.calibrate is None else text_sha256(how.calibrate),
            n_ctx=how.n_ctx,
            chunks=how.chunks,
            overrides=tuple(how.overrides),
            **where,
        )

    def to_metadata(self) -> dict[str, Any]:
        """The entries of a file, those left out that are as they are when nothing is asked for."""
        flat: dict[str, Any] = {"receipt": LAYOUT}
        for key, value in _values(self):
            flat |= {f"recipe.{part}": of for part, of in _values(self.recipe)} if key == "recipe" else {key: value}
        return {f"{PREFIX}{key}": value for key, value in flat.items()}

    @classmethod
    def read(cls, metadata: Metadata) -> "Receipt | None":
        """The one in the metadata of a file, None where there is none.

        Raises QjaxError, naming the key, for a newer layout, for what is missing and what is no such value.
        """
        layout = metadata.get(f"{PREFIX}receipt")
        if layout is None:
            return None
        if not isinstance(layout, int) or layout > LAYOUT:
            raise QjaxError(
                f"metadata key {PREFIX}receipt is {shorten(layout)}, expected {LAYOUT}: the receipt is of a newer qjax "
                f"({shorten(metadata.get(f'{PREFIX}version'))}). Update qjax."
            )
        recipe = _read(Recipe, metadata, f"{PREFIX}recipe.")
        if recipe["file_type"] and recipe["file_type"] not in recipes.FILE_TYPES:
            raise QjaxError(f"metadata key {PREFIX}recipe.file_type: unknown file type {shorten(recipe['file_type'])}")
        return cls(**_read(cls, metadata, PREFIX, recipe=Recipe(**recipe)))

    def how(self, metadata: Metadata, imatrix: Any = None, calibrate: Text | None = None) -> How:
        """What was asked for, with the importance matrix and the text, and what ``metadata`` has for what was set.

        Raises QjaxError if one is missing or is another than it was.
        """
        _check("importance matrix", "imatrix (--imatrix FILE)", imatrix, self.imatrix_sha256, imatrix_sha256)
        _check("calibration text", "calibrate (--calibrate TEXT)", calibrate, self.calibrate_sha256, text_sha256)
        exact = solver.exactly(dict(self.recipe.tensor_types))
        return How(
            recipe=replace(self.recipe, tensor_types=tuple(exact.items())),
            method=self.method,
            rounding=self.rounding,
            keep_split=self.keep_split,
            imatrix=imatrix,
            include_weights=self.include_weights,
            exclude_weights=self.exclude_weights,
            calibrate=calibrate,
            n_ctx=self.n_ctx,
            chunks=self.chunks,
            overrides={key: metadata.typed[key] for key in self.overrides if key in metadata},
        )


def _check(what: str, option: str, given: Any, expected: str | None, sha256: Callable[[Any], str]) -> None:
    """Raises QjaxError unless ``given`` is what a receipt has the hash of."""
    if given is None and expected is not None:
        raise QjaxError(f"{what}: the receipt names one of sha256 {expected}; pass it as {option}")
    if given is not None and expected is None:
        raise QjaxError(f"{what}: the receipt names none; leave out {option}")
    if given is not None and (found := sha256(given)) != expected:
        raise QjaxError(f"{what}: its sha256 is {found}, the receipt names {expected}; pass that one as {option}")


# ── hashes ───────────────────────────────────────────────────────────────────────────────────────────


def weights_sha256(tensors: Tensors) -> str:
    """Of weights, as quantization sees them: float32.  So it is the same for all containers and shards, in whatever
    order, and for F16 and F32 of the same values.

    It is the sha256 of lines ``NAME SHAPE SHA256``, sorted, the last being that of the tensor's values, little-endian.
    """
    lines = []
    for name, tensor in progress(sorted(tensors.items()), desc="hashing", unit="tensor", label=lambda item: item[0]):
        digest = hashlib.sha256()
        for piece in _floats(tensor):
            digest.update(np.ascontiguousarray(piece, "<f4").data)
        lines.append(f"{name} {'x'.join(map(str, tensor.shape))} {digest.hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _floats(tensor: Array | np.ndarray | QTensor | Stored) -> Iterator[np.ndarray]:
    if isinstance(tensor, Stored):
        yield from rtn.weights(tensor)
    else:
        yield from rtn.floats(tensor)


def imatrix_sha256(matrix: str | os.PathLike[str] | Imatrix) -> str:
    """Of the file, or of the one that `imatrix.write` makes.  Raises QjaxError if there is no such file."""
    if not isinstance(matrix, Imatrix):
        if not Path(matrix).is_file():
            raise QjaxError(f"{matrix}: there is no such file, expected an importance matrix")
        return _of_pieces(_chunks(Path(matrix)))
    with tempfile.TemporaryDirectory() as folder:
        imatrix_files.write(path := Path(folder, "imatrix.gguf"), matrix)
        return _of_pieces(_chunks(path))


def text_sha256(text: Text) -> str:
    """Of a text in UTF-8, or of ids as little-endian int32."""
    return _of_pieces([text.encode() if isinstance(text, str) else np.asarray(text, "<i4").tobytes()])


def _of_pieces(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


# ── records to entries and back ──────────────────────────────────────────────────────────────────────


def _values(record: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of the fields of a record that are not what they are by default."""
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if value is not None and value != item.default:
            yield item.name, _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Format):
        return value.name
    if isinstance(value, tuple):
        return [item if isinstance(item, str) else f"{item[0]}={item[1].name}" for item in value]
    return value


def _read(kind: type, metadata: Metadata, prefix: str, **given: Any) -> dict[str, Any]:
    """The fields of a record of ``kind`` from what `_values` made of it."""
    fields = dict(given)
    for item in dataclasses.fields(kind):
        key, optional = f"{prefix}{item.name}", item.default is not dataclasses.MISSING or item.type == Format | None
        if item.name in given:
            continue
        if key not in metadata:
            if not optional:
                raise QjaxError(f"metadata key {key} is missing, though there is a receipt (qjax.receipt)")
            fields[item.name] = None if item.default is dataclasses.MISSING else item.default
            continue
        fields[item.name] = _typed(key, metadata[key], item.type, metadata.typed[key].type_name)
    return fields


def _typed(key: str, value: Any, expected: Any, found: str) -> Any:
    try:
        if expected == Format | None and isinstance(value, str):
            return formats.get(value)
        if get_origin(expected) is tuple and isinstance(value, list):
            if expected == tuple[str, ...]:
                return tuple(value)
            pairs = (item.rpartition("=") for item in value)
            return tuple((name, formats.get(format)) for name, _, format in pairs)
        if get_origin(expected) is not tuple and isinstance(value, expected):
            return value
    except QjaxError as error:
        raise QjaxError(f"metadata key {key}: {error}") from None
    raise QjaxError(f"metadata key {key} is {found}, which no receipt has there")
