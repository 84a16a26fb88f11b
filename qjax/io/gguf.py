"""GGUF, the file format of llama.cpp: metadata, then tensors, in one file or in shards.

    "GGUF"  version u32  n_tensors i64  n_entries i64
    n_entries × (key string, type u32, value)                               general.alignment: default 32
    n_tensors × (name string, n_dims u32, dims i64 × n_dims, type u32, offset u64)
    padding to the alignment, then the data of each tensor, padded to the alignment; offset counts from here

Little-endian; strings are a u64 length and bytes; dims begin with the contraction axis, so a shape here is
dims reversed.  Source: ggml/docs/gguf.md, and gguf.cpp for what is refused.
"""

import functools
import itertools
import math
import operator
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import UInt8

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.formats.plain import Plain
from qjax.io.atomic import atomic_write
from qjax.io.cursor import Cursor, shorten
from qjax.io.gguf_metadata import Metadata, Value, ValueType, pack_string, unpack_metadata
from qjax.io.mapped import MappedFile
from qjax.io.stored import Stored, piece_bounds
from qjax.io.summary import FileSummary, TensorSummary
from qjax.progress import progress
from qjax.tensor import QTensor, describe_shape, describe_size

__all__ = [
    "GGUFFile", "Metadata", "TensorInfo", "Value", "ValueType", "read", "read_shard", "size_bytes", "write",
]  # fmt: skip

VERSION = 3
READABLE_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME_BYTES = 63
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
"""Which shard this is, from 0; of how many; with how many tensors together."""

# What else people pass to a GGUF reader: first bytes, what it is, what to do about it.
_GGML = ("a GGML file from before GGUF", "Write it as GGUF first: qjax quantize FILE OUT.gguf COPY")
_LOOKALIKES = {
    **dict.fromkeys((b"lmgg", b"fmgg", b"tjgg"), _GGML),
    b"vers": ("probably a Git LFS pointer", "Fetch the file it points to with `git lfs pull`."),
    b"<!do": ("a web page", "Download the file itself."),
    b"<htm": ("a web page", "Download the file itself."),
    b"pk\3\4": (
        "a zip archive, perhaps a PyTorch checkpoint",
        "Unpack it, or convert the model to safetensors.",
    ),
}

# A mapped file cannot be replaced on Windows.
_CAN_REPLACE_MAPPED = os.name == "posix"


@dataclass(frozen=True, repr=False, eq=False)
class TensorInfo(Stored):
    """A tensor in a file: what it is and where; its bytes are read when asked for."""

    name: str
    shape: tuple[int, ...]
    """Row-major, the contraction axis last."""
    format: Format
    offset: int
    """Of the first byte from the start of the file."""
    file: MappedFile

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def data(self) -> UInt8[np.ndarray, "rows row_bytes"]:
        """The bytes as they lie in the file, mapped and not copied, one row of the tensor a row.

        Where something else may cut the file short meanwhile, take `pieces` or `load`, which say so: see `MappedFile`.
        """
        columns = self.shape[-1] if self.shape else 1
        row_bytes = self.format.nbytes((columns,))
        return self.file.mapped[self.offset :][: self.nbytes].reshape(math.prod(self.shape[:-1]), row_bytes)

    def pieces(self) -> Iterator[np.ndarray]:
        for start, stop in piece_bounds(self.nbytes, self.format.type_size):
            yield self.file.read(self.offset + start, self.offset + stop)

    def load(self) -> Array | QTensor:
        """The tensor in memory: an Array in the file's dtype for plain formats, a QTensor for the others.

        Raises QjaxError for 64-bit numbers while JAX has them switched off.
        """
        read = functools.partial(self.file.read, self.offset, self.offset + self.nbytes)
        if not isinstance(self.format, Plain):
            return QTensor.from_bytes(read(), self.format, self.shape)
        dtype = jnp.dtype(self.format.dtype)
        if dtype.itemsize == 8 and not jax.config.read("jax_enable_x64"):
            raise QjaxError(
                f"{self.path}: tensor {self.name!r} is {self.format.name}, but 64-bit numbers are off "
                "in JAX. Set the environment variable JAX_ENABLE_X64=1."
            )
        return jnp.asarray(read().view(dtype).reshape(self.shape))

    def __repr__(self) -> str:
        shape, size = describe_shape(self.shape), describe_size(self.nbytes)
        return f"TensorInfo({self.name}, {self.format.name}, {shape}, {size})"


@dataclass(frozen=True, repr=False, eq=False)
class GGUFFile:
    """A GGUF file, or all shards of one, as if they were one file.

    metadata: key to plain Python value; ``metadata.typed[key]`` has the GGUF type as well.
    tensors: name to `TensorInfo`, in the order of the file.
    """

    paths: tuple[Path, ...]
    version: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    size_bytes: int
    """Of all shards together."""
    kind: str = "GGUF"
    """Or what a file from before it is called (see `ggml_legacy`)."""

    @property
    def container(self) -> str:
        """As in "GGUF 3"."""
        return f"{self.kind} {self.version}"

    @property
    def architecture(self) -> str:
        """``general.architecture``, or "unknown"."""
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def n_weights(self) -> int:
        return self.summary().total.n_weights

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors; metadata and padding do not count."""
        return self.summary().total.bpw

    def summary(self, name: str | None = None) -> FileSummary:
        """What the file holds, as a record to print.  name: what to call it, by default the file's name."""
        return FileSummary(
            name=name or self.paths[0].name,
            container=self.container,
            paths=tuple(map(str, self.paths)),
            file_bytes=self.size_bytes,
            metadata=self.metadata,
            tensors=tuple(TensorSummary.of(*item) for item in self.tensors.items()),
        )

    def __repr__(self) -> str:
        return f"GGUFFile({self.summary().headline})"

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


def read(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file of version 2 or 3; of a model in shards (``name-00001-of-00003.gguf``) any of them.

    The file is mapped: only the header is read here, a tensor's bytes when they are asked for.  Shards are
    seen as one file with the metadata of the first, without the keys ``split.*``.

    Raises QjaxError, saying where and what to do, for anything llama.cpp would not read either.
    """
    file = read_shard(path)
    n_shards = _integer(file, "split.count", default=1)
    return _read_shards(file, n_shards) if n_shards > 1 else file


def read_shard(path: str | os.PathLike[str]) -> GGUFFile:
    """One file as it is, be it a shard or not; otherwise as `read`."""
    path = Path(path)
    file = MappedFile(path)
    cursor = Cursor(file.mapped, path)
    version = _read_version(cursor)
    n_tensors = cursor.count("tensors", each=24)
    n_entries = cursor.count("metadata entries", each=14)
    metadata = unpack_metadata(cursor, n_entries)
    alignment = _alignment(metadata, f"{path}: ")
    headers = _read_tensor_headers(cursor, n_tensors)
    start = cursor.at + _padding(cursor.at, alignment)

    tensors, expected, previous = {}, 0, "the start of the data"
    for header in headers:
        tensor = TensorInfo(header.name, header.shape, header.format, start + header.offset, file)
        what = f"tensor {header.name!r}"
        if header.offset != expected:
            cursor.fail(
                f"{what} has offset {header.offset}, expected {expected} (after {previous}, aligned to "
                f"{alignment}). The file is damaged: tensors overlap, leave gaps or are out of order, or "
                "general.alignment is wrong.",
                at=header.offset_at,
            )
        if tensor.offset + tensor.nbytes > file.size:
            raise QjaxError(
                f"{path}: {what} needs {tensor.nbytes} bytes from byte {tensor.offset}, the file has "
                f"{file.size} bytes in all. It is cut short: probably an incomplete download, fetch it again."
            )
        tensors[header.name] = tensor
        expected += tensor.nbytes + _padding(tensor.nbytes, alignment)
        previous = what
    whole = GGUFFile((path,), version, metadata, tensors, file.size)
    for key in metadata.keys() & SPLIT_KEYS:
        _integer(whole, key)
    return whole


def _read_version(cursor: Cursor) -> int:
    magic = bytes(cursor.take(4, "the magic number of a GGUF file"))
    if magic != b"GGUF":
        found, advice = _LOOKALIKES.get(
            magic.lower(), ("no kind of file this reader knows", "Give the path of a .gguf file.")
        )
        cursor.fail(f"not a GGUF file: it begins with {magic!r}, expected b'GGUF'. It is {found}. {advice}", at=0)
    version = cursor.number("I", "the version")
    if version in READABLE_VERSIONS:
        return version
    if version & 0xFFFF == 0 and version:
        advice = "It was written for a big-endian machine: convert it with `gguf-convert-endian FILE little`."
    elif version > VERSION:
        advice = "It is newer than this reader: update qjax."
    else:
        advice = "It is older than this reader: convert the model again with a current llama.cpp."
    expected = " or ".join(map(str, READABLE_VERSIONS))
    cursor.fail(f"GGUF version {version}, expected {expected}. {advice}", at=4)


@dataclass(frozen=True)
class _TensorHeader:
    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int
    offset_at: int
    """Where in the file the offset stands, for messages."""


def _read_tensor_headers(cursor: Cursor, count: int) -> list[_TensorHeader]:
    headers: dict[str, _TensorHeader] = {}
    for i in range(count):
        start = cursor.at
        name = cursor.string(f"the name of tensor {i}")
        name_bytes = cursor.at - start - 8
        if name_bytes > MAX_NAME_BYTES:
            cursor.fail(
                f"the name of tensor {i}, {shorten(name)}, has {name_bytes} bytes, expected at most "
                f"{MAX_NAME_BYTES} (llama.cpp's limit). The file is damaged, or tensors need shorter names.",
                at=start,
            )
        what = f"tensor {name!r}"
        if name in headers:
            cursor.fail(f"{what} occurs twice, expected once. The file is damaged.", at=start)
        shape = _read_shape(cursor, what)
        format = _read_format(cursor, what, shape)
        offset_at = cursor.at
        headers[name] = _TensorHeader(name, shape, format, cursor.number("Q", f"the offset of {what}"), offset_at)
    return list(headers.values())


def _read_shape(cursor: Cursor, what: str) -> tuple[int, ...]:
    start = cursor.at
    n_dims = cursor.number("I", f"the number of dimensions of {what}")
    if n_dims > MAX_DIMS:
        cursor.fail(f"{what} has {n_dims} dimensions, expected at most {MAX_DIMS}. The file is damaged.", at=start)
    dims = [cursor.number("q", f"the shape of {what}") for _ in range(n_dims)]
    if any(dim < 0 for dim in dims):
        cursor.fail(f"{what} has dimensions {dims}, expected none negative. The file is damaged.", at=start)
    # Also of a tensor without weights, whose rows and their bytes are counted.
    most = 2**60 if 0 in dims else 2**63
    if any(size >= most for size in itertools.accumulate((dim or 1 for dim in dims), operator.mul)):
        cursor.fail(f"{what} has dimensions {dims}: more weights than 64 bits count. The file is damaged.", at=start)
    return tuple(reversed(dims))


def _read_format(cursor: Cursor, what: str, shape: tuple[int, ...]) -> Format:
    start = cursor.at
    ggml_id = cursor.number("I", f"the type of {what}")
    try:
        format = formats.by_id(ggml_id)
        format.nbytes(shape)  # Raises if rows are no whole number of blocks.
    except QjaxError as error:
        cursor.fail(f"{what}: {error}", at=start)
    return format


_SHARD_NAME = re.compile(r"(.+)-[0-9]{5}-of-([0-9]{5})\.gguf", re.DOTALL)


def _read_shards(file: GGUFFile, n_shards: int) -> GGUFFile:
    """The merged view of all the shards that ``file`` is one of."""
    path = file.paths[0]
    match = _SHARD_NAME.fullmatch(path.name)
    if not match or int(match[2]) != n_shards:
        raise QjaxError(
            f"{path}: it is one of {n_shards} shards, expected a name like NAME-00001-of-{n_shards:05}.gguf, "
            "by which to find the others. Give all shards back the names they were published under."
        )
    siblings = [f"{match[1]}-{i:05}-of-{n_shards:05}.gguf" for i in range(1, n_shards + 1)]
    # In whatever case, as some systems have it; one look at the folder, for a false count may be large.
    present = {name.casefold() for name in os.listdir(path.parent)}
    missing = [name for name in siblings if name.casefold() not in present]
    if missing:
        raise QjaxError(
            f"{path}: {len(missing)} of {n_shards} shards are missing beside it: {shorten(missing)}. "
            "Download them into the same folder."
        )

    paths = [path.with_name(name) for name in siblings]
    shards = [file if sibling == path else read_shard(sibling) for sibling in paths]
    n_tensors = _integer(file, "split.tensors.count")
    tensors: dict[str, TensorInfo] = {}
    for i, shard in enumerate(shards):
        for key, expected in zip(SPLIT_KEYS, (i, n_shards, n_tensors)):
            if (found := _integer(shard, key)) != expected:
                _disagree(shard, f"{key} is {found}, expected {expected} as {path.name} says")
        if repeated := tensors.keys() & shard.tensors.keys():
            _disagree(shard, f"it has tensors that an earlier shard has too: {shorten(sorted(repeated))}")
        tensors |= shard.tensors
    if len(tensors) != n_tensors:
        _disagree(file, f"split.tensors.count is {n_tensors}, found {len(tensors)} tensors in all shards")

    metadata = Metadata({key: value for key, value in shards[0].metadata.typed.items() if key not in SPLIT_KEYS})
    size_bytes = sum(shard.size_bytes for shard in shards)
    return GGUFFile(tuple(paths), shards[0].version, metadata, tensors, size_bytes)


def _disagree(shard: GGUFFile, message: str) -> NoReturn:
    raise QjaxError(f"{shard.paths[0]}: {message}. The shards are not of one model; download all of them again.")


def _integer(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.metadata.get(key, default)
    if not isinstance(value, int):
        found = "missing" if value is None else file.metadata.typed[key].type_name
        raise QjaxError(f"{file.paths[0]}: metadata key {key} is {found}, expected an integer. Fetch the file again.")
    return value


def _alignment(metadata: Metadata, where: str = "") -> int:
    """The ``general.alignment`` in force.  Raises QjaxError unless it is a UINT32 power of two."""
    value = metadata.typed.get("general.alignment", Value(ValueType.UINT32, DEFAULT_ALIGNMENT))
    if value.type != ValueType.UINT32 or value.value.bit_count() != 1:
        raise QjaxError(
            f"{where}metadata key general.alignment is {value.type_name} {shorten(value.value)}, "
            f"expected a UINT32 power of two. Leave it out for the usual {DEFAULT_ALIGNMENT}."
        )
    return value.value


def _padding(size: int, alignment: int) -> int:
    """Bytes from ``size`` to the next multiple of ``alignment``."""
    return -size % alignment


def write(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Array | np.ndarray | QTensor | Stored],
) -> None:
    """Write a GGUF file of version 3.

    metadata: a Metadata keeps its types; plain values get natural ones (`Value.of`), a Value names its own.
    tensors: by name, in the order of the file.  A QTensor is stored as it is, an Array in its own dtype; a
        Stored tensor, such as a TensorInfo of another file, is asked for its bytes when its turn comes.

    Beside those passed in, a piece of one tensor at a time is in memory.  The file appears under ``path`` when it is
    complete; if anything fails, what was there before is unchanged.  A canonical file (version 3, padded with
    zeros, nothing after the last tensor's) that was read and is written again has the same bytes.

    Raises QjaxError for what GGUF cannot hold, OSError if the disk is full.
    """
    path = Path(path)
    header, alignment = _pack_header(metadata, tensors)
    if not _CAN_REPLACE_MAPPED:
        _refuse_mapped(path, tensors)
    with atomic_write(path) as file:
        file.write(header)
        _pad(file, alignment)
        items = progress(tensors.items(), desc=f"writing {path.name}", unit="tensor", label=operator.itemgetter(0))
        for _, tensor in items:
            for piece in pieces(tensor):
                file.write(piece.data)
            _pad(file, alignment)


def size_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, Array | np.ndarray | QTensor | Stored]) -> int:
    """Bytes of the file that `write` makes of these; no tensor is read or computed.  Raises as `write`."""
    header, alignment = _pack_header(metadata, tensors)
    sizes = (_format_of(name, tensor).nbytes(tensor.shape) for name, tensor in tensors.items())
    return sum(size + _padding(size, alignment) for size in (len(header), *sizes))


def _pack_header(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[bytes, int]:
    """Everything before the data and its padding; to what the data are padded."""
    metadata = metadata if isinstance(metadata, Metadata) else Metadata(metadata)
    alignment = _alignment(metadata)
    header = [struct.pack("<4sIqq", b"GGUF", VERSION, len(tensors), len(metadata)), metadata.pack()]
    offset = 0
    for name, tensor in tensors.items():
        format = _format_of(name, tensor)
        header.append(_pack_tensor_header(name, tensor.shape, format, offset))
        nbytes = format.nbytes(tensor.shape)
        offset += nbytes + _padding(nbytes, alignment)
    return b"".join(header), alignment


def _pack_tensor_header(name: str, shape: tuple[int, ...], format: Format, offset: int) -> bytes:
    packed_name = pack_string(name)
    if len(packed_name) - 8 > MAX_NAME_BYTES:
        raise QjaxError(f"tensor {name!r}: a name may have at most {MAX_NAME_BYTES} bytes in a GGUF file")
    if len(shape) > MAX_DIMS:
        raise QjaxError(f"tensor {name!r}: shape {shape} has more than the {MAX_DIMS} axes a GGUF file can hold")
    dims = struct.pack(f"<I{len(shape)}q", len(shape), *reversed(shape))
    return packed_name + dims + struct.pack("<IQ", format.ggml_id, offset)


def _format_of(name: str, tensor: Array | np.ndarray | QTensor | Stored) -> Format:
    if not isinstance(tensor, Array | np.ndarray):
        format = tensor.format
    else:
        try:
            format = formats.plain_format(tensor.dtype)
        except QjaxError as error:
            raise QjaxError(f"tensor {name!r}: {error}") from None
    if format.ggml_id is None:
        raise QjaxError(f"tensor {name!r}: {format.name} has no GGUF type. Use one of the GGML formats, e.g. Q4_0.")
    return format


def pieces(tensor: Array | np.ndarray | QTensor | Stored) -> Iterator[np.ndarray]:
    """The bytes of a tensor as a file has them, flat, one after another."""
    if isinstance(tensor, Stored):
        yield from tensor.pieces()
    elif isinstance(tensor, QTensor):
        yield np.asarray(tensor.to_bytes()).reshape(-1)
    else:
        values = np.asarray(tensor)
        yield np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)


def _pad(file: BinaryIO, alignment: int) -> None:
    size = _padding(file.tell(), alignment)
    for start in range(0, size, 2**20):
        file.write(bytes(min(2**20, size - start)))


def _refuse_mapped(path: Path, tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, TensorInfo) and path.exists() and path.samefile(tensor.path):
            raise QjaxError(
                f"{path}: cannot be replaced while tensor {name!r} is mapped from it (Windows forbids that). "
                "Write to another name and rename."
            )
