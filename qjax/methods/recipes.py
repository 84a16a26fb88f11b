"""Recipes: which tensor gets which format.  Rules are data; the first that matches a name decides.

A file type of llama-quantize ("Q4_0") is more than its format: the head, or the embedding where it serves as the
head, is kept finer, because every logit passes through it (llama-quant.cpp llama_tensor_get_type).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qjax import formats
from qjax.errors import QjaxError, nearest_names
from qjax.formats import Format

_HEAD = r"^output\.weight$"
_TIED_HEAD = r"^token_embd\.weight$"


@dataclass(frozen=True)
class Recipe:
    """Formats by tensor name.

    name: what to call it. rules: (regular expression, Format) pairs, searched in order. default: the format of every
    other matrix, None to leave it as it is. head: the format of the head, output.weight or, where there is none,
    token_embd.weight; None leaves it to the default. file_type: llama.cpp's number for general.file_type, None for
    mixtures it has no number for.
    """

    name: str
    default: Format | None
    rules: tuple[tuple[str, Format], ...] = ()
    head: Format | None = None
    file_type: int | None = None

    def format_for(self, name: str, shape: tuple[int, ...], *, tied: bool) -> Format | None:
        """The format of a tensor, None where it stays as it is.  Vectors and norms are F32 always: ggml adds and
        multiplies them as such, and they are few.

        Raises QjaxError naming the tensor if its rows do not divide into the format's blocks.
        """
        if len(shape) < 2 or not name.endswith("weight") or name.endswith("_norm.weight"):
            return formats.get("F32")
        chosen = next((format for pattern, format in self.rules if re.search(pattern, name)), None)
        if chosen is None and self.head and re.search(_TIED_HEAD if tied else _HEAD, name):
            chosen = self.head
        chosen = chosen or self.default
        try:
            return chosen and chosen.resolve(shape)
        except QjaxError as error:
            raise QjaxError(f"{name}: {error}") from None


@dataclass(frozen=True)
class _FileType:
    """A row of llama-quantize's table."""

    id: int
    default: str
    head: str | None = None


# llama-quantize takes Q6_K for the head where rows divide by 256; Q8_0 is what it falls back to.
_FILE_TYPES = {
    "F32": _FileType(0, "F32"),
    "F16": _FileType(1, "F16"),
    "BF16": _FileType(32, "BF16"),
    "Q4_0": _FileType(2, "Q4_0", "Q8_0"),
    "Q4_1": _FileType(3, "Q4_1", "Q8_0"),
    "Q5_0": _FileType(8, "Q5_0", "Q8_0"),
    "Q5_1": _FileType(9, "Q5_1", "Q8_0"),
    "Q8_0": _FileType(7, "Q8_0", "Q8_0"),
}


COPY = Recipe("COPY", None)
"""Every matrix as it is."""


def names() -> tuple[str, ...]:
    """The names of the file types."""
    return tuple(_FILE_TYPES)


def recipe(of: "str | Format | Mapping[str, str | Format] | Recipe") -> Recipe:
    """The Recipe meant by a file type's name, a Format for all matrices alike, or {regular expression: format}.

    Of a mapping, matrices that match no expression are kept in F16.
    Raises QjaxError for an unknown name, with the nearest ones, or a malformed expression.
    """
    match of:
        case Recipe():
            return of
        case Format():
            return Recipe(of.name, of)
        case str():
            row = _FILE_TYPES.get(of.upper())
            if row is None:
                raise QjaxError(f"unknown file type {of!r}. {nearest_names(of, _FILE_TYPES)}")
            head = formats.get(row.head) if row.head else None
            return Recipe(of.upper(), formats.get(row.default), head=head, file_type=row.id)
    rules = tuple((pattern, formats.get(format)) for pattern, format in of.items())
    for pattern, _ in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise QjaxError(f"recipe: {pattern!r} is no regular expression: {error}") from None
    return Recipe("custom", formats.get("F16"), rules)
