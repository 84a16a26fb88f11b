"""What a model file holds, as one record: for a terminal, a notebook, Markdown and JSON."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.io.gguf_metadata import Metadata, Value, ValueType
from qjax.io.stored import Stored
from qjax.table import Table, folded, printable
from qjax.tensor import describe_shape, describe_size

MAX_HTML_ROWS = 2000
"""A notebook shows no more entries, and no more tensors."""

_LAYER = re.compile(r"(.*?\bblk\.)(\d+)\.(.+)", re.DOTALL)


@dataclass(frozen=True)
class TensorSummary:
    """A tensor of a file.  offset: of its first byte in the file, None where the file has it in another layout."""

    name: str
    format: str
    shape: tuple[int, ...]
    n_weights: int
    size_bytes: int
    bpw: float
    offset: int | None

    @classmethod
    def of(cls, name: str, tensor: Stored) -> "TensorSummary":
        format, shape = tensor.format, tuple(tensor.shape)
        offset = getattr(tensor, "offset", None)
        return cls(name, format.name, shape, math.prod(shape), format.nbytes(shape), format.bpw, offset)


@dataclass(frozen=True)
class Total:
    """Over several tensors.  bpw: bits per weight; metadata and padding do not count."""

    n_tensors: int
    n_weights: int
    size_bytes: int
    bpw: float

    @classmethod
    def of(cls, tensors: Sequence[TensorSummary]) -> "Total":
        n_weights = sum(t.n_weights for t in tensors)
        size_bytes = sum(t.size_bytes for t in tensors)
        return cls(len(tensors), n_weights, size_bytes, 8 * size_bytes / max(n_weights, 1))


@dataclass(frozen=True, repr=False, eq=False)
class FileSummary:
    """A GGUF file or a safetensors folder, its tensors unread.

    name: as the reader knows it.  container: "GGUF 3", "GGJT 3" or "safetensors", with how it is quantized.
    paths: of the file, or of all its shards.
    """

    name: str
    container: str
    paths: tuple[str, ...]
    file_bytes: int
    metadata: Metadata
    tensors: tuple[TensorSummary, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def total(self) -> Total:
        return Total.of(self.tensors)

    @property
    def types(self) -> dict[str, Total]:
        """By the name of the format, the most frequent first."""
        by_format: dict[str, list[TensorSummary]] = {}
        for tensor in self.tensors:
            by_format.setdefault(tensor.format, []).append(tensor)
        return {name: Total.of(by_format[name]) for name in sorted(by_format, key=lambda n: -len(by_format[n]))}

    @property
    def headline(self) -> str:
        """The facts in one line."""
        name, container, architecture, n_tensors, n_weights, size, bpw, types = self.facts().values()
        return (
            f"{name}: {container}, {architecture}, {n_tensors} tensors, {n_weights} weights, {size}, {bpw} bpw, {types}"
        )

    def facts(self) -> dict[str, str]:
        """What can be said in a word each."""
        total, more = self.total, len(self.paths) - 1
        return {
            "file": printable(self.name) + (f" and {more} more" if more > 0 else ""),
            "container": self.container,
            "architecture": printable(self.architecture),
            "tensors": str(total.n_tensors),
            "weights": f"{total.n_weights:,}",
            "size": describe_size(self.file_bytes),
            "bpw": f"{total.bpw:.2f}",
            "types": ", ".join(f"{name} ×{of.n_tensors}" for name, of in self.types.items()) or "none",
        }

    def tables(self, tensors: bool = True) -> dict[str, Table]:
        """Title to table: formats, metadata, and unless told otherwise tensors."""
        listed = {f"tensors ({len(self.tensors)})": _tensor_table(self.tensors)} if tensors else {}
        return {
            f"formats ({len(self.types)})": self._type_table(),
            f"metadata ({len(self.metadata)})": _metadata_table(self.metadata.typed.items()),
        } | listed

    def text(self, tensors: bool = True) -> str:
        """For a terminal."""
        lines = [f"{key:<13} {value}" for key, value in self.facts().items()]
        if self.paths != (self.name,):
            lines += [f"{'path':<13} {printable(path)}" for path in self.paths]
        for title, table in self.tables(tensors).items():
            lines += ["", title, *(f"  {line}" for line in str(table).splitlines())]
        return "\n".join(lines)

    def markdown(self, tensors: bool = True) -> str:
        """For a page of documentation."""
        facts = Table({"fact": "<", "value": "<"}, list(self.facts().items()))
        parts = [f"# {self.container} file", facts.markdown()]
        for title, table in self.tables(tensors).items():
            parts += [f"## {title}", table.markdown()]
        return "\n\n".join(parts)

    def to_json(self, tensors: bool = True, arrays: bool = False) -> dict[str, Any]:
        """Plain values for `json.dumps`.  arrays: with their elements, not only their type and count."""
        listed = {"tensors": [dataclasses.asdict(t) for t in self.tensors]} if tensors else {}
        return {
            "name": self.name,
            "container": self.container,
            "paths": self.paths,
            "architecture": self.architecture,
            "file_bytes": self.file_bytes,
            **dataclasses.asdict(self.total),
            "types": {name: dataclasses.asdict(total) for name, total in self.types.items()},
            "metadata": {key: value_to_json(value, arrays) for key, value in self.metadata.typed.items()},
        } | listed

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"FileSummary({self.headline})"

    def _repr_html_(self) -> str:
        facts = Table({"fact": "<", "value": "<"}, list(self.facts().items()))
        entries = list(itertools.islice(self.metadata.typed.items(), MAX_HTML_ROWS))
        listed = self.tensors[:MAX_HTML_ROWS]
        return "".join(
            [
                facts._repr_html_(),
                self._type_table()._repr_html_(),
                folded(
                    f"metadata ({_shown(entries, len(self.metadata))})",
                    _metadata_table(entries)._repr_html_(),
                ),
                folded(f"tensors ({_shown(listed, len(self.tensors))})", *map(_group_html, layer_groups(listed))),
            ]
        )

    def _type_table(self) -> Table:
        columns = {"format": "<", "tensors": ">", "weights": ">", "size": ">", "share": ">", "bpw": ">"}
        total = self.total
        rows = [
            (
                name,
                str(of.n_tensors),
                f"{of.n_weights:,}",
                describe_size(of.size_bytes),
                f"{of.size_bytes / max(total.size_bytes, 1):.1%}",
                f"{of.bpw:.4g}",
            )
            for name, of in (*self.types.items(), ("all", total))
        ]
        return Table(columns, rows)


@dataclass(frozen=True)
class LayerGroup:
    """Tensors outside the layers, or those of one layer and of all after it that are alike.

    prefix: before the number of the layer, "" outside.  tensors: of the first layer.
    """

    prefix: str
    layers: tuple[int, ...]
    tensors: tuple[TensorSummary, ...]

    def __str__(self) -> str:
        if not self.layers:
            return f"outside the layers: {_count(self.tensors)}"
        first, *_, last = (*self.layers, self.layers[-1])
        alike = f" … {last} ({len(self.layers)} layers alike, each " if len(self.layers) > 1 else " ("
        return f"{self.prefix}{first}{alike}{_count(self.tensors)})"


def layer_groups(tensors: Iterable[TensorSummary]) -> list[LayerGroup]:
    """``tensors`` by layer; layers that follow one another with the same names, shapes and formats stand together."""
    by_layer: dict[tuple[str, int | None], list[TensorSummary]] = {}
    for tensor in tensors:
        match = _LAYER.fullmatch(tensor.name)
        by_layer.setdefault((match[1], int(match[2])) if match else ("", None), []).append(tensor)

    # Files may have their layers in the order of the alphabet: 1, 10, 11, 2.
    prefixes = list(dict.fromkeys(prefix for prefix, _ in by_layer))
    ordered = sorted(by_layer.items(), key=lambda item: (prefixes.index(item[0][0]), item[0][1] or 0))
    groups = []
    for (prefix, *_), items in itertools.groupby(ordered, lambda item: _alike(*item)):
        keys, members = zip(*items)
        layers = tuple(layer for _, layer in keys if layer is not None)
        groups.append(LayerGroup(prefix, layers, tuple(members[0])))
    return groups


def _alike(layer: tuple[str, int | None], tensors: Iterable[TensorSummary]) -> tuple:
    """What layers that stand together have in common."""
    prefix, number = layer
    start = 0 if number is None else len(f"{prefix}{number}")
    return prefix, number is None, *((t.name[start:], t.shape, t.format) for t in tensors)


def value_to_json(value: Value, arrays: bool = False) -> dict[str, Any]:
    """Type and value; of an array element type and count, and the elements if ``arrays``."""
    if value.type != ValueType.ARRAY:
        return {"type": value.type.name, "value": plain(value.value)}
    described = {"type": "ARRAY", "element_type": value.element_type.name, "count": len(value.value)}
    return described | ({"value": plain(value.value)} if arrays else {})


def plain(value: Any) -> Any:
    """``value`` in types that JSON has; numbers that it has not are the strings that float() reads."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _metadata_table(entries: Iterable[tuple[str, Value]]) -> Table:
    rows = [(key, value.type_name, value.text) for key, value in entries]
    return Table({"key": "<", "type": "<", "value": "<"}, rows)


def _tensor_table(tensors: Iterable[TensorSummary]) -> Table:
    columns = {"name": "<", "format": "<", "shape": ">", "bpw": ">", "size": ">", "offset": ">"}
    rows = [
        (
            t.name,
            t.format,
            describe_shape(t.shape),
            f"{t.bpw:.4g}",
            describe_size(t.size_bytes),
            "–" if t.offset is None else str(t.offset),
        )
        for t in tensors
    ]
    return Table(columns, rows)


def _group_html(group: LayerGroup) -> str:
    return folded(str(group), _tensor_table(group.tensors)._repr_html_())


def _count(tensors: Sequence[TensorSummary]) -> str:
    plural = "" if len(tensors) == 1 else "s"
    return f"{len(tensors)} tensor{plural}, {describe_size(sum(t.size_bytes for t in tensors))}"


def _shown(listed: Sequence, total: int) -> str:
    return str(total) if len(listed) == total else f"the first {len(listed)} of {total}"
