"""Importance matrices as llama-imatrix writes them: how strongly text drives each input column of each matrix.

    GGUF   general.type "imatrix", imatrix.datasets [string], imatrix.chunk_count u32, imatrix.chunk_size u32
           of each matrix W, by name:   W.in_sum2 F32 (n_mat, n_cols)   Σ x² over the tokens seen
                                        W.counts  F32 (n_mat, 1)        how many those were
    .dat   n_entries i32, then of each matrix: length i32, name, n_calls i32, n_values i32, n_values × f32
           last_chunk i32, length i32, dataset                          not in the oldest files

The older .dat holds n_calls · Σx² / count, n_calls being the chunks seen; of experts it knows no counts.
Sources: llama.cpp tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp, tools/quantize/quantize.cpp (load_imatrix).
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from qjax.errors import QjaxError
from qjax.io import gguf
from qjax.io.atomic import atomic_write
from qjax.io.cursor import Cursor, shorten

_SUMS, _COUNTS = ".in_sum2", ".counts"
_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
# Of a .dat at least: three numbers, a name of one byte, one value.
_ENTRY_BYTES = 17


class Entry(NamedTuple):
    """What was seen at the input of one tensor; n_mat is 1 but for a stack of experts."""

    sums: Float32[np.ndarray, "n_mat n_cols"]
    """Σ x² over tokens"""
    counts: Float32[np.ndarray, " n_mat"]
    """tokens summed"""


@dataclass(frozen=True, repr=False, eq=False)
class Imatrix:
    """Sums of squared activations by the name of the weight they meet.

    datasets: the texts they were collected on.  chunk_count: windows of the longest of them, chunk_size: tokens in
    a window.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    def importance(self, name: str) -> Float32[np.ndarray, "n_mat n_cols"] | None:
        """Mean x² of each column, as llama-quantize weighs its errors; 1 for experts never seen, None if no entry."""
        if name not in self.entries:
            return None
        sums, counts = self.entries[name]
        means = np.ones_like(sums)
        return np.divide(sums, counts[:, None], out=means, where=counts[:, None] > 0)

    def __repr__(self) -> str:
        texts = ", ".join(self.datasets) or "an unnamed text"
        return f"Imatrix({len(self.entries)} tensors, {self.chunk_count} chunks of {self.chunk_size} of {texts})"


# ── read ─────────────────────────────────────────────────────────────────────────────────────────────


def recognizes_legacy(path: Path) -> bool:
    """Whether a file is a .dat, as far as its beginning tells, which has no magic number."""
    with path.open("rb") as file:
        n_entries, length = struct.unpack("<ii", file.read(8).ljust(8, b"\0"))
    return 1 <= n_entries <= path.stat().st_size // _ENTRY_BYTES and 1 <= length <= gguf.MAX_NAME_BYTES


def read(path: str | os.PathLike[str], *, chunk_size: int = 512) -> Imatrix:
    """An importance matrix in either format.

    chunk_size: tokens in a chunk of a .dat file, which does not say.

    Raises QjaxError for a file that is neither, is cut short, lacks its metadata, or holds a NaN, infinite or
    negative number.
    """
    path = Path(path)
    if not path.is_file():
        raise QjaxError(f"{path}: there is {'a folder, not a file' if path.is_dir() else 'no such file'}")
    with path.open("rb") as file:
        magic = file.read(4)
    return _read_gguf(path) if magic == b"GGUF" else _read_legacy(path, chunk_size)


def _read_gguf(path: Path) -> Imatrix:
    file = gguf.read(path)
    if missing := [key for key in _KEYS if key not in file.metadata]:
        raise QjaxError(
            f"{path}: not an importance matrix: the metadata has no key {missing[0]} (it is of type "
            f"{shorten(file.metadata.get('general.type', 'unknown'))}). Make one with `qjax imatrix`."
        )
    datasets, chunk_count, chunk_size = (file.metadata[key] for key in _KEYS)
    for key, value, kind in zip(_KEYS, (datasets, chunk_count, chunk_size), (list, int, int)):
        if not isinstance(value, kind):
            expected = "an array of strings" if kind is list else "a whole number"
            raise QjaxError(f"{path}: metadata key {key} is {file.metadata.typed[key].type_name}, expected {expected}")
    if chunk_size < 1:
        raise QjaxError(f"{path}: metadata key imatrix.chunk_size is {chunk_size}, expected at least 1")

    # Other suffixes are llama.cpp's to add; it passes over them too.
    names = sorted({name.removesuffix(s) for s in (_SUMS, _COUNTS) for name in file.tensors if name.endswith(s)})
    if not names:
        raise QjaxError(f"{path}: an importance matrix without entries")
    entries = {}
    for name in names:
        halves = [file.tensors.get(name + suffix) for suffix in (_SUMS, _COUNTS)]
        for suffix, half in zip((_SUMS, _COUNTS), halves):
            if half is None:
                raise QjaxError(f"{path}: {name} has no tensor {name}{suffix} beside its other half")
            if half.format.name != "F32":
                raise QjaxError(f"{path}: {half.name} is stored as {half.format.name}, expected F32")
        sums, counts = (half.data.view(np.float32).ravel() for half in halves if half)
        entries[name] = _entry(path, name, sums, counts)
    return Imatrix(entries, tuple(datasets), chunk_count, chunk_size)


def _read_legacy(path: Path, chunk_size: int) -> Imatrix:
    if path.stat().st_size < 4:
        raise QjaxError(f"{path}: {path.stat().st_size} bytes are no importance matrix")
    cursor = Cursor(np.memmap(path, np.uint8, mode="r"), path)
    n_entries = cursor.number("i", "the number of entries")
    most = cursor.left // _ENTRY_BYTES
    if not 1 <= n_entries <= most:
        cursor.fail(
            f"it claims {n_entries} entries, expected 1 to {most}. This is neither a GGUF nor a .dat importance "
            "matrix, or it is cut short. Make one with `qjax imatrix`.",
            at=0,
        )
    entries: dict[str, Entry] = {}
    for i in range(n_entries):
        start = cursor.at
        length = cursor.number("i", f"the length of name {i}")
        if not 1 <= length <= gguf.MAX_NAME_BYTES:
            cursor.fail(
                f"the name of entry {i} has {length} bytes, expected 1 to {gguf.MAX_NAME_BYTES}. The file is damaged "
                "or no importance matrix.",
                at=start,
            )
        name = str(cursor.take(length, f"name {i}"), "utf-8", "surrogateescape")
        if name in entries:
            cursor.fail(f"{shorten(name)} occurs twice, expected once. The file is damaged.", at=start)
        n_calls = cursor.number("i", f"the number of calls of {name}")
        n_values = cursor.number("i", f"the number of values of {name}")
        if n_values < 1:
            cursor.fail(f"{shorten(name)} has {n_values} values, expected at least 1. The file is damaged.")
        values = np.frombuffer(cursor.take(4 * n_values, f"the values of {name}"), "<f4")
        # llama-quantize takes the values of no calls as they are.
        counts = np.array([(n_calls or 1) * chunk_size], np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            entries[name] = _entry(path, name, values * np.float32(chunk_size), counts)

    chunk_count, datasets = 0, ()
    if cursor.left:
        chunk_count = max(cursor.number("i", "the number of chunks"), 0)
        if length := cursor.number("I", "the length of the dataset's name") if cursor.left else 0:
            datasets = (str(cursor.take(length, "the dataset's name"), "utf-8", "surrogateescape"),)
    return Imatrix(dict(sorted(entries.items())), datasets, chunk_count, chunk_size)


def _entry(path: Path, name: str, sums: np.ndarray, counts: np.ndarray) -> Entry:
    """Checked: what comes from a file may be anything."""
    for what, values in (("sum of squares", sums), ("count", counts)):
        wrong = ~(np.isfinite(values) & (values >= 0))
        if wrong.any():
            at = int(wrong.argmax())
            raise QjaxError(
                f"{path}: {name}: {np.count_nonzero(wrong)} of {values.size} numbers are NaN, infinite or negative, "
                f"the first {what} being {values[at]} at {at}. The matrix is damaged; collect it again."
            )
    if not counts.size or not sums.size or sums.size % counts.size:
        raise QjaxError(f"{path}: {name}: {sums.size} sums do not divide among {counts.size} counts")
    # llama.cpp keeps counts as integers.
    return Entry(sums.reshape(counts.size, -1), np.floor(counts + np.float32(0.5)))


# ── write ────────────────────────────────────────────────────────────────────────────────────────────


def write(path: str | os.PathLike[str], imatrix: Imatrix) -> None:
    """Write GGUF, byte for byte as llama-imatrix does.  Raises QjaxError for a name too long, or no entries."""
    tensors: dict[str, np.ndarray] = {}
    for name, (sums, counts) in _sorted_entries(path, imatrix).items():
        # ggml leaves out the outer axes of size 1.
        alone = len(counts) == 1
        tensors[name + _SUMS] = sums[0] if alone else sums
        tensors[name + _COUNTS] = counts if alone else counts[:, None]
    values = list(imatrix.datasets), imatrix.chunk_count, imatrix.chunk_size
    gguf.write(path, {"general.type": "imatrix", **dict(zip(_KEYS, values))}, tensors)


def write_legacy(path: str | os.PathLike[str], imatrix: Imatrix) -> None:
    """Write .dat, byte for byte as llama-imatrix does: means only, 1 for experts never seen; the last dataset."""
    seen = {name: entry for name, entry in _sorted_entries(path, imatrix).items() if entry.counts.any()}
    with atomic_write(path) as file:
        file.write(struct.pack("<i", len(seen)))
        for name, entry in seen.items():
            # Rounded up, so that a part of a chunk is not nothing.
            n_calls = -(-int(entry.counts.max()) // imatrix.chunk_size)
            means = imatrix.importance(name)
            assert means is not None
            _write_name(file, name)
            file.write(struct.pack("<ii", n_calls, means.size))
            file.write((means * np.float32(n_calls)).astype("<f4").tobytes())
        file.write(struct.pack("<i", imatrix.chunk_count))
        _write_name(file, imatrix.datasets[-1] if imatrix.datasets else "")


WRITERS = {"gguf": write, "dat": write_legacy}
"""By the names that llama-imatrix --output-format has for them."""


def _sorted_entries(path: str | os.PathLike[str], imatrix: Imatrix) -> dict[str, Entry]:
    if not any(entry.counts.any() for entry in imatrix.entries.values()):
        raise QjaxError(f"{path}: an importance matrix in which nothing was seen is not worth writing")
    return dict(sorted(imatrix.entries.items()))


def _write_name(file, name: str) -> None:
    data = name.encode("utf-8", "surrogateescape")
    file.write(struct.pack("<i", len(data)) + data)
