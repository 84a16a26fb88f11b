"""What a model file holds, without loading it."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qjax.io import gguf, hub
from qjax.model import folder_source
from qjax.tensor import describe_shape, describe_size


@dataclass(frozen=True)
class TensorSummary:
    name: str
    format: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True)
class FileSummary:
    """metadata: key to {"type": GGUF type, "value": plain value}.  types: number of tensors in each format."""

    name: str
    path: str
    architecture: str
    n_weights: int
    size_bytes: int
    bpw: float
    types: dict[str, int]
    metadata: dict[str, dict[str, Any]]
    tensors: tuple[TensorSummary, ...]

    def __str__(self) -> str:
        types = ", ".join(f"{name} ×{count}" for name, count in self.types.items())
        lines = [
            f"{self.name}: {self.architecture}, {self.n_weights / 1e6:.1f} M weights in {len(self.tensors)} tensors, "
            f"{self.bpw:.2f} bpw, {describe_size(self.size_bytes)}",
            f"path     {self.path}",
            f"types    {types}",
            "",
            "metadata",
        ]
        width = max(map(len, self.metadata), default=0)
        for key, entry in self.metadata.items():
            lines.append(f"  {key:{width}}  {entry['type']:<10}  {_shorten(entry['value'])}")
        lines += ["", "tensors"]
        width = max((len(t.name) for t in self.tensors), default=0)
        for t in self.tensors:
            shape = describe_shape(t.shape)
            lines.append(f"  {t.name:{width}}  {t.format:<5}  {shape:>14}  {describe_size(t.size_bytes):>10}")
        return "\n".join(lines)


def info(name: str | Path) -> FileSummary:
    """The summary of a GGUF file (of any architecture) or a safetensors folder, found as `qjax.load` finds it.

    Raises QjaxError if there is none, or it is damaged.
    """
    path = hub.locate(name)
    if path.is_dir():
        source = folder_source(path, path.name)
        architecture, metadata, tensors = source.config.architecture, source.metadata, source.tensors
    else:
        file = gguf.read(path)
        architecture, metadata, tensors = file.architecture, file.metadata, file.tensors
    rows = tuple(
        TensorSummary(n, t.format.name, tuple(t.shape), t.format.nbytes(tuple(t.shape))) for n, t in tensors.items()
    )
    size_bytes = sum(row.size_bytes for row in rows)
    n_weights = sum(math.prod(row.shape) for row in rows)
    return FileSummary(
        name=str(name),
        path=str(path),
        architecture=architecture,
        n_weights=n_weights,
        size_bytes=size_bytes,
        bpw=8 * size_bytes / max(n_weights, 1),
        types=dict(Counter(row.format for row in rows).most_common()),
        metadata={k: {"type": v.type.name, "value": _plain(v.value)} for k, v in metadata.typed.items()},
        tensors=rows,
    )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _shorten(value: Any, width: int = 80) -> str:
    if isinstance(value, list):
        first = ", ".join(repr(v) for v in value[:4])
        return f"[{first}{', …' if len(value) > 4 else ''}] ({len(value)} entries)"
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 1]}… ({len(value)} characters)"
