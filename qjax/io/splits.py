"""One GGUF file into shards and back, as llama-gguf-split does it (tools/gguf-split/gguf-split.cpp), and as llama.cpp's
converter does (gguf-py/gguf/gguf_writer.py).

Shards are called PREFIX-00001-of-00003.gguf; the first has the metadata, each has its number (from 0), the number of
tensors of the whole model, and the number of shards.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from qjax.errors import QjaxError
from qjax.io import gguf
from qjax.io.atomic import atomic_folder, check_target
from qjax.io.gguf import SPLIT_KEYS, Metadata, Value, ValueType
from qjax.io.stored import Stored
from qjax.table import Table, printable
from qjax.tensor import describe_size

DEFAULT_MAX_TENSORS = 128
MAX_SHARDS = 2**16 - 1

# llama-gguf-split's order; the converter has that of SPLIT_KEYS.
KEYS = ("split.no", "split.tensors.count", "split.count")


@dataclass(frozen=True)
class WrittenFile:
    """A file that is written, or would be."""

    path: str
    n_tensors: int
    size_bytes: int


@dataclass(frozen=True)
class WrittenFiles:
    """What `split` and `merge` made."""

    files: tuple[WrittenFile, ...]
    written: bool
    """False for a dry run."""

    def __str__(self) -> str:
        rows = [(printable(f.path), str(f.n_tensors), describe_size(f.size_bytes)) for f in self.files]
        table = Table({"file": "<", "tensors": ">", "size": ">"}, rows)
        return f"{table}" if self.written else f"dry run, nothing written\n{table}"


def split(
    path: str | os.PathLike[str],
    prefix: str | os.PathLike[str],
    *,
    max_tensors: int | None = None,
    max_bytes: int | None = None,
    no_tensor_first_split: bool = False,
    dry_run: bool = False,
) -> WrittenFiles:
    """Write a GGUF file (or shards, which are then divided anew) as shards ``prefix``-00001-of-... .

    max_tensors: so many in a shard, 128 unless ``max_bytes`` is given.  max_bytes: of the tensors of a shard; one
    that is larger has a shard of its own.  no_tensor_first_split: the first shard has the metadata alone.

    Raises QjaxError for limits that make no sense and where a file is in the way.  If anything fails, no shard is left.
    """
    if max_tensors is not None and max_bytes is not None:
        raise QjaxError("give either the tensors or the size of a shard, not both")
    if max_tensors is None and max_bytes is None:
        max_tensors = DEFAULT_MAX_TENSORS
    file = gguf.read(path)
    groups = divide(file.tensors, max_tensors, max_bytes, no_tensor_first_split, alignment=gguf.DEFAULT_ALIGNMENT)
    return write_shards(prefix, file.metadata, groups, dry_run=dry_run)


def merge(path: str | os.PathLike[str], out: str | os.PathLike[str], *, dry_run: bool = False) -> WrittenFiles:
    """Write the shards that ``path`` is one of as the one file ``out``.

    As llama-gguf-split leaves them, the keys of a shard stay, with a count of 0 shards.

    Raises QjaxError if ``path`` is no shard, if others are missing, and if there is an ``out``.
    """
    if not gguf.read_shard(path).metadata.get("split.count"):
        raise QjaxError(f"{path}: is not a shard (its metadata have no split.count), so there is nothing to merge")
    file = gguf.read(path)
    merged = _numbered(file.metadata, 0, 0, len(file.tensors))
    return _write_all({Path(out): (merged, file.tensors)}, dry_run)


def divide(
    tensors: Mapping[str, Stored],
    max_tensors: int | None,
    max_bytes: int | None,
    no_tensor_first_split: bool = False,
    *,
    alignment: int = 1,
) -> list[dict[str, Stored]]:
    """The tensors of each shard, so that none passes a limit; a tensor that does has a shard of its own.

    no_tensor_first_split: the first has none.  alignment: to what the sizes that count are padded.
    Raises QjaxError for limits below 1, and for more than 65535 shards.
    """
    for what, limit in (("tensors", max_tensors), ("bytes", max_bytes)):
        if limit is not None and limit < 1:
            raise QjaxError(f"{limit} {what} in a shard: expected at least 1")
    groups: list[dict[str, Stored]] = [{}, {}] if no_tensor_first_split else [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.format.nbytes(tensor.shape)
        padded = nbytes + -nbytes % alignment
        full = len(groups[-1]) == max_tensors or (max_bytes is not None and size + padded > max_bytes)
        if groups[-1] and full:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += padded
    if len(groups) > MAX_SHARDS:
        raise QjaxError(f"{len(groups)} shards, more than {MAX_SHARDS}. Raise the limit for each.")
    return groups


def write_shards(
    prefix: str | os.PathLike[str],
    metadata: Metadata,
    groups: Sequence[Mapping[str, Stored]],
    *,
    keys: Sequence[str] = KEYS,
    dry_run: bool = False,
) -> WrittenFiles:
    """Write each group of tensors as a shard, all of them or none.  Raises QjaxError where a file is in the way.

    keys: the order of `gguf.SPLIT_KEYS` in the files.
    """
    n, n_tensors = len(groups), sum(map(len, groups))
    shards = {}
    for i, tensors in enumerate(groups):
        own = metadata if i == 0 else Metadata()
        path = Path(f"{os.fspath(prefix)}-{i + 1:05}-of-{n:05}.gguf")
        shards[path] = _numbered(own, i, n, n_tensors, keys), tensors
    return _write_all(shards, dry_run)


def parse_size(text: str, *, fine: bool = False) -> int:
    """Bytes of a size as llama-gguf-split takes it, ``500M`` or ``2G``, in powers of 1000.  Raises QjaxError.

    fine: as the converter does, also ``500K`` and bytes; a B may follow, as in transformers' ``5GB``, and a fraction
    may be given, ``2.5M``.
    """
    match = re.fullmatch(
        r"([1-9]\d{0,17}(?:\.\d{1,18}(?=[KMG]))?)([KMG]?)(B?)" if fine else r"([1-9]\d{0,17})([MG])()", text, re.ASCII
    )
    if not match:
        expected = "a number of bytes, or K, M or G of them" if fine else "a whole number of megabytes or gigabytes"
        raise QjaxError(f"size {text!r}: expected {expected}, as in 500M or 2G")
    return int(Fraction(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]])


def _numbered(metadata: Metadata, no: int, count: int, n_tensors: int, keys: Sequence[str] = KEYS) -> Metadata:
    """``metadata`` with the keys of a shard at the end, in llama.cpp's types."""
    others = {key: value for key, value in metadata.typed.items() if key not in SPLIT_KEYS}
    numbers = {
        "split.no": Value(ValueType.UINT16, no),
        "split.tensors.count": Value(ValueType.INT32, n_tensors),
        "split.count": Value(ValueType.UINT16, count),
    }
    return Metadata(others | {key: numbers[key] for key in keys})


def _write_all(files: Mapping[Path, tuple[Metadata, Mapping[str, Stored]]], dry_run: bool) -> WrittenFiles:
    """All of them or none, in one folder; the first is there when the others are."""
    _refuse_existing(files)
    plan = tuple(
        WrittenFile(str(path), len(tensors), gguf.size_bytes(metadata, tensors))
        for path, (metadata, tensors) in files.items()
    )
    if dry_run:
        return WrittenFiles(plan, written=False)
    first = check_target(next(iter(files)))
    with atomic_folder(first.parent, last=first.name) as folder:
        for path, (metadata, tensors) in files.items():
            gguf.write(folder / path.name, metadata, tensors)
        # Somebody else may have written them meanwhile.
        _refuse_existing(files)
    return WrittenFiles(plan, written=True)


def _refuse_existing(paths: Iterable[Path]) -> None:
    for path in paths:
        if os.path.lexists(path):  # also a link that leads nowhere yet
            raise QjaxError(f"{path}: exists already. Remove it, or write to another name.")
