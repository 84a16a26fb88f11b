"""Metadata compared and changed: what `qjax diff` and `qjax set` say and do."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qjax.errors import QjaxError, nearest_names
from qjax.io import gguf
from qjax.io.cursor import shorten
from qjax.io.gguf_metadata import Metadata, Value, ValueType
from qjax.io.summary import value_to_json
from qjax.table import Table, printable

# Keys that a file is read by, and what depends on them.
_PROTECTED = {
    r"general\.architecture": "it says which model this is, and most other keys begin with it",
    r"general\.alignment": "it says where the tensors lie",
    r"general\.quantization_version": "it says how the bytes of the tensors are to be read",
    r"split\.(no|count|tensors\.count)": "it says how the shards fit together",
    r"tokenizer\.ggml\.(model|tokens|token_type|scores|merges)": "the model was trained with this vocabulary",
}


@dataclass(frozen=True, eq=False)
class MetadataChange:
    """An entry before and after; None where there is none."""

    key: str
    before: Value | None
    after: Value | None

    @property
    def sign(self) -> str:
        """``+`` added, ``-`` removed, ``~`` changed."""
        return "+" if self.before is None else "-" if self.after is None else "~"

    def cells(self) -> tuple[str, str, str, str]:
        """Sign, key, before and after."""
        before, after = self.before, self.after
        if before and after and before.type == after.type == ValueType.ARRAY:
            # Long arrays begin alike.
            at = _first_difference(before.value, after.value)
            return self.sign, self.key, _element(before, at), _element(after, at)
        return self.sign, self.key, _shown(before), _shown(after)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; arrays without their elements."""
        sides = {"before": self.before, "after": self.after}
        return {"key": self.key} | {side: None if v is None else value_to_json(v) for side, v in sides.items()}


def compare(before: Metadata, after: Metadata) -> tuple[MetadataChange, ...]:
    """What differs in value or type; the order of the entries does not count."""
    keys = dict.fromkeys((*before, *after))
    pairs = ((key, before.typed.get(key), after.typed.get(key)) for key in keys)
    return tuple(MetadataChange(*pair) for pair in pairs if pair[1] != pair[2])


def changes_table(changes: Iterable[MetadataChange]) -> Table:
    return Table({"": "<", "key": "<", "before": "<", "after": "<"}, [change.cells() for change in changes])


@dataclass(frozen=True)
class MetadataEdit:
    """What `edit` did, or would do if it had been allowed to write."""

    path: Path
    changes: tuple[MetadataChange, ...]
    written: bool

    def __str__(self) -> str:
        if not self.changes:
            return f"{printable(str(self.path))}: has these entries already, nothing to write"
        verb = "written" if self.written else "dry run, nothing written"
        return f"{printable(str(self.path))}: {verb}\n{changes_table(self.changes)}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {"path": str(self.path), "written": self.written, "changes": [c.to_json() for c in self.changes]}


def edit(
    path: str | os.PathLike[str],
    values: Mapping[str, str | Value] = MappingProxyType({}),
    *,
    remove: Iterable[str] = (),
    rename: Mapping[str, str] = MappingProxyType({}),
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> MetadataEdit:
    """Change the metadata of a GGUF file: first ``rename`` (old key to new), then ``remove``, then set ``values``.

    values: a str is read as the type that the key has already; a Value may change the type, or add a key.
    out: where to write, by default over ``path``, which is replaced when its successor is complete.
    force: allow changes to entries that a file is read by, such as general.architecture.

    Raises QjaxError for a key that does not exist, one that is protected, a text that is no value of the type, and
    for a shard other than the first, which has no metadata but its number.
    """
    file = gguf.read_shard(path)
    if file.metadata.get("split.no"):
        raise QjaxError(f"{path}: is a shard, and the metadata of a model are in its first. Give that file.")
    try:
        metadata = _edited(file.metadata, values, remove, rename)
        changes = compare(file.metadata, metadata)
        if not force:
            _refuse_protected(changes)
        gguf.size_bytes(metadata, file.tensors)  # Raises for what cannot be written.
    except QjaxError as error:
        raise QjaxError(f"{path}: {error}") from None
    target = Path(path if out is None else out)
    write = bool(changes or out is not None) and not dry_run
    if write:
        gguf.write(target, metadata, file.tensors)
    return MetadataEdit(target, changes, write)


def assignment(text: str) -> tuple[str, Value]:
    """Key and value of ``KEY=TYPE:VALUE``, as in ``general.name=STRING:Owl``.  Raises QjaxError if it is none."""
    match = re.fullmatch(r"([^=]+)=([^:]+):(.*)", text, re.DOTALL)
    if not match:
        raise QjaxError(f"{shorten(text)}: expected KEY=TYPE:VALUE, as in general.name=STRING:Owl")
    try:
        return match[1], Value.parse(match[2], match[3])
    except QjaxError as error:
        raise QjaxError(f"metadata key {shorten(match[1])}: {error}") from None


def renaming(text: str) -> tuple[str, str]:
    """Both keys of ``OLD=NEW``.  Raises QjaxError if it is none."""
    old, _, new = text.partition("=")
    if not old or not new:
        raise QjaxError(f"{shorten(text)}: expected OLD=NEW, as in general.nmae=general.name")
    return old, new


def _edited(
    metadata: Metadata, values: Mapping[str, str | Value], remove: Iterable[str], rename: Mapping[str, str]
) -> Metadata:
    for old, new in rename.items():
        _existing(metadata, old)
        if new in metadata:
            raise QjaxError(f"metadata key {shorten(new)} exists already; remove it before {shorten(old)} is renamed")
        # A renamed entry keeps its place.
        metadata = Metadata({new if key == old else key: value for key, value in metadata.typed.items()})
    metadata = Metadata(metadata)
    for key in remove:
        _existing(metadata, key)
        del metadata[key]
    for key, value in values.items():
        if isinstance(value, str):
            old = _existing(metadata, key)
            try:
                value = Value.parse(old.type_name, value)
            except QjaxError as error:
                raise QjaxError(f"metadata key {key}: {error}; to change its type give KEY=TYPE:VALUE") from None
        metadata[key] = value
    return metadata


def _existing(metadata: Metadata, key: str) -> Value:
    if key not in metadata:
        raise QjaxError(
            f"there is no metadata key {shorten(key)}. {nearest_names(key, map(printable, metadata))} "
            "To add one, give its type: --set KEY=TYPE:VALUE"
        )
    return metadata.typed[key]


def _refuse_protected(changes: Iterable[MetadataChange]) -> None:
    for change in changes:
        for pattern, reason in _PROTECTED.items():
            if re.fullmatch(pattern, change.key):
                raise QjaxError(f"metadata key {change.key} is protected: {reason}. Pass force (--force) to change it.")


def _first_difference(before: Any, after: Any) -> int:
    differing = (i for i, (a, b) in enumerate(zip(before, after)) if repr(a) != repr(b))
    return next(differing, min(len(before), len(after)))


def _shown(value: Value | None) -> str:
    return "" if value is None else f"{value.type_name} {value.text}"


def _element(array: Value, at: int) -> str:
    shown = shorten(array.value[at : at + 1]) if at < len(array.value) else "end"
    return f"{array.type_name} at {at}: {shown}"
