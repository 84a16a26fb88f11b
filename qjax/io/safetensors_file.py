"""safetensors files written tensor by tensor, for models that memory does not hold; the library wants all at once.

    n u64   n bytes of JSON, padded with spaces:
            {"__metadata__": {"format": "pt"}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    the data of the tensors, the widest types first, then by name; offsets count from here

Source: the safetensors library's README and serialize (safetensors/src/tensor.rs), whose bytes these are.
"""

import json
import math
import operator
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qjax.io.atomic import atomic_write
from qjax.progress import progress

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# By the library's names: bytes of an element, narrow types first, in its order.
_SIZES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
_RANK = {dtype: rank for rank, dtype in enumerate(_SIZES)}
_DTYPES = {"uint8": "U8", "float32": "F32"}


class Part(NamedTuple):
    """A tensor of a file, made when its turn comes."""

    dtype: str
    """F32, F16, BF16 or U8"""
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]
    """its bytes, one after another"""

    @classmethod
    def of(cls, values: np.ndarray) -> "Part":
        """An array, float32 or uint8, in memory."""
        return cls(_DTYPES[values.dtype.name], values.shape, lambda: [np.ascontiguousarray(values).reshape(-1)])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.dtype]


def write(path: Path, parts: Mapping[str, Part]) -> None:
    """One file, whole or not at all.  Raises OSError if the disk is full."""
    ordered = dict(sorted(parts.items(), key=lambda item: (-_RANK[item[1].dtype], item[0])))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, part in ordered.items():
        header[name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [at, at + part.nbytes]}
        at += part.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        items = progress(ordered.items(), desc=f"writing {path.name}", unit="tensor", label=operator.itemgetter(0))
        for _, part in items:
            for piece in part.pieces():
                file.write(piece.data)


def shards(parts: Mapping[str, Part], max_bytes: int | None = None) -> dict[str, dict[str, Part]]:
    """The files of weights of a Hugging Face folder by name: one, or, if they have more than ``max_bytes``, several of
    no more (but for tensors that are larger)."""
    groups: list[dict[str, Part]] = [{}]
    for name, part in parts.items():
        size = sum(other.nbytes for other in groups[-1].values())
        if max_bytes is not None and groups[-1] and size + part.nbytes > max_bytes:
            groups.append({})
        groups[-1][name] = part
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def write_shards(folder: Path, files: Mapping[str, Mapping[str, Part]]) -> None:
    """The files into a folder, with an index if they are several."""
    for file, group in files.items():
        write(folder / file, group)
    if len(files) > 1:
        total = sum(part.nbytes for group in files.values() for part in group.values())
        weight_map = {name: file for file, group in files.items() for name in group}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with atomic_write(folder / INDEX) as opened:
            opened.write((json.dumps(index, indent=2) + "\n").encode())
