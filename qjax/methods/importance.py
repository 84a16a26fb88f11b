"""An importance matrix as quantization uses it: which entries count, what they say of each tensor."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32

from qjax.errors import QjaxError
from qjax.io import imatrix
from qjax.io.gguf_metadata import Value, ValueType
from qjax.io.imatrix import Imatrix

MAX_STRING_BYTES = 127
"""llama-quantize cuts file and dataset off there."""


@dataclass(frozen=True, repr=False, eq=False)
class Importance:
    """Mean x² of the input columns of each matrix, by tensor name; without entries, of no tensor.

    metadata: what llama-quantize writes into the file about where they are from.
    """

    by_name: Mapping[str, Float32[np.ndarray, "n_mat columns"]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_name)

    def of(self, name: str, shape: tuple[int, ...]) -> Float32[np.ndarray, "n_mat columns"] | None:
        """One row for each matrix of a tensor of ``shape``, None if there is none.

        Of embeddings a wrong size means none: their rows are looked up, not multiplied (llama-quant.cpp).
        Raises QjaxError for another size, and for NaN and infinities.
        """
        found = self.by_name.get(name)
        if found is None:
            return None
        expected = math.prod(shape[:-2]), shape[-1]
        if found.size == math.prod(expected):
            if not np.isfinite(found).all():
                raise QjaxError(f"{name}: its importance has NaN or infinite values. Collect the matrix again.")
            return found.reshape(expected)
        if name in ("token_embd.weight", "per_layer_token_embd.weight"):
            return None
        raise QjaxError(
            f"{name}: the importance matrix has {found.size} values for it, expected {expected[0]} × {expected[1]}. "
            "It was collected from another model."
        )


NONE = Importance()


def select(
    source: "str | os.PathLike[str] | Imatrix | None",
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> Importance:
    """The entries of an importance matrix that are to be used.

    source: a file, or what `qjax.io.imatrix.read` makes of one.  include, exclude: parts of names; with the one only
    entries that contain any of them count, with the other those that do not.
    Raises QjaxError for a bad file, for both at once, and for a part that no name contains.
    """
    include, exclude = list(include), list(exclude)
    if source is None:
        if include or exclude:
            raise QjaxError("include or exclude weights of which importance matrix? Pass imatrix (--imatrix FILE)")
        return NONE
    if include and exclude:
        raise QjaxError("include and exclude (--include-weights, --exclude-weights) cannot be used together")
    matrix = source if isinstance(source, Imatrix) else imatrix.read(source)
    for part in (*include, *exclude):
        if not any(part in name for name in matrix.entries):
            example = next(iter(matrix.entries), "of no tensor")
            raise QjaxError(f"importance matrix: no entry's name contains {part!r}. Names are like {example}")

    def counts(name: str) -> bool:
        return (not include or any(part in name for part in include)) and not any(part in name for part in exclude)

    means = ((name, matrix.importance(name)) for name in filter(counts, matrix.entries))
    by_name = {name: mean for name, mean in means if mean is not None}
    if not by_name:
        return NONE
    path = None if isinstance(source, Imatrix) else os.fspath(source)
    texts = {"file": path, "dataset": next(iter(matrix.datasets), None)}
    numbers = {"entries_count": len(by_name), "chunks_count": matrix.chunk_count or None}
    described = {key: _cut(text) for key, text in texts.items() if text is not None}
    described |= {key: Value(ValueType.UINT32, number) for key, number in numbers.items() if number is not None}
    return Importance(by_name, {f"quantize.imatrix.{key}": value for key, value in described.items()})


def _cut(text: str) -> str:
    return text.encode("utf-8", "surrogateescape")[:MAX_STRING_BYTES].decode("utf-8", "surrogateescape")
