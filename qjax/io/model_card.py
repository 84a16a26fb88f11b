"""general.* of a GGUF file: what a model is called, whose it is, how large, and how its makers would sample from it.

Told by, the first that knows it: what the caller sets; the model card (README.md, YAML between two lines ---);
_name_or_path in config.json; the name of the folder.  generation_config.json has the sampling.  Names say what their
parts look like:

    SmolLM2-135M-Instruct-v0.2    SmolLM2: basename   135M: size_label   Instruct: finetune   v0.2: version

Source: llama.cpp gguf-py/gguf/metadata.py (Metadata) and utility.py (size_label).
"""

import math
import re
import warnings
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from qjax.errors import QjaxError
from qjax.io.cursor import shorten
from qjax.io.gguf_metadata import Metadata, Value, ValueType
from qjax.io.tokenizer_json import load_json

# general.sampling.*, its type, and what generation_config.json calls it, the first that is there.
_SAMPLING = (
    ("sequence", ValueType.STRING, ("sequence",)),
    ("top_k", ValueType.INT32, ("top_k",)),
    ("top_p", ValueType.FLOAT32, ("top_p",)),
    ("min_p", ValueType.FLOAT32, ("min_p",)),
    ("xtc_probability", ValueType.FLOAT32, ("xtc_probability",)),
    ("xtc_threshold", ValueType.FLOAT32, ("xtc_threshold",)),
    ("temp", ValueType.FLOAT32, ("temperature",)),
    ("penalty_last_n", ValueType.INT32, ("penalty_last_n",)),
    ("penalty_repeat", ValueType.FLOAT32, ("penalty_repeat", "repetition_penalty")),
    ("mirostat", ValueType.INT32, ("mirostat",)),
    ("mirostat_tau", ValueType.FLOAT32, ("mirostat_tau",)),
    ("mirostat_eta", ValueType.FLOAT32, ("mirostat_eta",)),
)

# general.* in the order of the file, and what a model card calls it.
_TEXTS = {
    "name": ("name", "model_name"),
    "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"),
    "organization": ("organization", "model_organization"),
    "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"),
    "description": ("description", "model_description"),
    "quantized_by": (),
    "size_label": ("size_label", "model_size_label"),
    "license": ("license",),
    "license.name": ("license_name",),
    "license.link": ("license_link",),
    "url": (),
    "doi": (),
    "uuid": (),
    "repo_url": (),
    "source.url": ("url", "model_url"),
    "source.doi": ("doi", "model_doi"),
    "source.uuid": ("uuid", "model_uuid"),
    "source.repo_url": ("repo_url", "model_repo_url"),
}
_RELATIVES = {
    "base_model": ("base_model", "base_models", "base_model_sources"),
    "dataset": ("datasets", "dataset", "dataset_sources"),
}
_OF_RELATIVES = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")
_LISTS = {"tags": ("tags", "pipeline_tag"), "languages": ("languages", "language")}

_HUB = "https://huggingface.co/"
_MAX_CARD_BYTES = 2**20
_MAX_DIGITS = 100
# What ends a line, for Python's `str.splitlines`.
_LINE_END = re.compile(r"\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")


class NameParts(NamedTuple):
    """What the name of a model says; None where it says nothing."""

    name: str | None = None
    """without the organization"""
    organization: str | None = None
    basename: str | None = None
    finetune: str | None = None
    version: str | None = None
    size_label: str | None = None


def general(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    model_id: str,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    *,
    adapter: bool = False,
) -> Metadata:
    """The entries general.sampling.* to general.languages for the model in a Hugging Face folder.

    shapes: of its tensors by GGUF name, which tell its size.  model_id: the folder's name, or the id on the Hub.
    overrides: by key, as in general.author; general.base_models and general.datasets are lists of objects.
    adapter: the shapes are those of the matrices that an adapter changes, so the size is another's.
    What a card says in another form than expected is left out, with a warning.
    Raises QjaxError for an override that has no place in general.* .
    """
    if unknown := [key for key in overrides if key.removeprefix("general.") not in _known()]:
        raise QjaxError(f"metadata {shorten(unknown[0])}: no such key; known: {', '.join(sorted(_known()))}")
    given = {key.removeprefix("general."): value for key, value in overrides.items()}
    card, n_weights = read_card(folder), -count(shapes) if adapter else count(shapes)
    found: dict[str, Any] = _sampling(folder, given)
    parts = [name_parts(model_id, n_weights)]
    named = load_json(folder / "config.json", optional=True).get("_name_or_path")
    if isinstance(named, str) and named.count("/") <= 1:  # else it is somebody's path
        parts.insert(0, name_parts(named, n_weights))
    for key, names in _TEXTS.items():
        told = [given.get(key), *map(card.get, names), *(_from_parts(part, key) for part in parts)]
        found[key] = next((text for text in map(_text, told) if text is not None), None)
    found["name"] = found["name"] or model_id
    found["size_label"] = found["size_label"] or (None if adapter else size_label(shapes))
    for key, names in _RELATIVES.items():
        found |= _relatives(key, given, card, names, n_weights)
    for key, names in _LISTS.items():
        listed = given.get(key)
        values = [card.get(name) for name in names] if listed is None else [listed]
        found[key] = [text for value in values for item in _listed(value) if (text := _text(item)) is not None]
    return Metadata({f"general.{key}": value for key, value in found.items() if value not in (None, "", [])})


def name_parts(model_id: str, n_weights: int = 0) -> NameParts:
    """The parts of "organization/name" or "name"; their meaning is a guess from what each looks like.

    n_weights: of the model; a size far from it is the length of a context or the like, and counts as a finetune.
    Of an adapter its own weights, negative.
    """
    if " " in model_id:
        return NameParts(model_id)
    organization, slash, name = model_id.partition("/")
    if not slash:
        organization, name = None, model_id
    if organization and organization.startswith("."):
        organization = None
    words = [word for word in name.split("-") if word]
    if not words:
        return NameParts(name, organization)
    texts, kinds = map(list, zip(*(_kind(word, i == 0, n_weights) for i, word in enumerate(words))))
    if any(c.isdecimal() for text, kind in zip(texts, kinds) if kind == "size" for c in text):
        # A number says more than "small".
        kinds = [None if kind == "size" and text.isalpha() else kind for text, kind in zip(texts, kinds)]
    leads = [kind == "version" or (kind is None and text[0].isalpha()) for text, kind in zip(texts, kinds)]
    n_base = leads.index(False) if False in leads else len(leads)
    if n_base == len(kinds):
        while n_base and kinds[n_base - 1] == "version":
            n_base -= 1
    later: dict[str, list[str]] = {}
    for text, kind in zip(texts[n_base:], kinds[n_base:]):
        later.setdefault(kind or "finetune", []).append(text)
    finetune, version = ("-".join(later.get(kind, ())) or None for kind in ("finetune", "version"))
    size = "-".join(dict.fromkeys(later.get("size", ()))) or None
    # A name of which nothing else is known is too vague for a basename.
    basename = None if size is finetune is version is None else "-".join(texts[:n_base]) or None
    return NameParts(name, organization, basename, finetune, version, size)


def title(name: str) -> str:
    """A name to be read: "tiny-llama-v2" as Tiny Llama v2."""
    words = name.strip().replace("-", " ").split()
    as_is = re.compile(r"v\d+(?:\.\d+)*|\d.*")
    return " ".join(word.title() if word.islower() and not as_is.fullmatch(word) else word for word in words)


def size_label(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """How large a model is, in short: 135M, or 8x7B of eight experts, counting one of them; None without tensors."""
    n_experts = [shape[-3] for name, shape in shapes.items() if "_exps." in name and len(shape) > 2]
    if not shapes:
        return None
    if not n_experts:
        return _rounded(count(shapes))
    each = sum(
        math.prod(shape) // (shape[-3] if "_exps." in name and len(shape) > 2 else 1) for name, shape in shapes.items()
    )
    return f"{sum(n_experts) // len(n_experts)}x{_rounded(each)}"


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The weights of all tensors together."""
    return sum(map(math.prod, shapes.values()))


def read_card(folder: Path) -> dict[str, Any]:
    """The front matter of README.md; empty where there is none, and, after a warning, where it is no YAML."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        text = _LINE_END.sub("\n", file.read(_MAX_CARD_BYTES).decode(errors="replace")) + "\n"
    if not text.startswith("---\n"):
        return {}
    # Not as a list of lines, which takes fifty times the size of short ones.
    front = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)[1]
    # YAML takes `no`, which is Norwegian, for false; tabs are not allowed, and occur.
    front = front.replace("- no\n", '- "no"\n').replace("\t", "  ")

    import yaml

    try:
        # In C, where it was built with it: it is fast, and refuses what nests too deep.
        from yaml import CSafeLoader as SafeLoader
    except ImportError:
        from yaml import SafeLoader

    class Loader(SafeLoader):  # pyright: ignore[reportGeneralTypeIssues]
        """Without merge keys (<<), with which a few lines fill any memory; long numbers, which take long, are texts."""

        def flatten_mapping(self, node):
            pass

        def construct_yaml_int(self, node):
            value = self.construct_scalar(node)
            return value if len(value) > _MAX_DIGITS else super().construct_yaml_int(node)

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    try:
        card = yaml.load(front, Loader)
    except Exception as error:  # Its constructors raise whatever Python does, as in !!int "".
        _warn(f"{path}: the front matter is no YAML ({' '.join(str(error).split())})")
        return {}
    return card if isinstance(card, dict) else {}


def _known() -> set[str]:
    sampling = {f"sampling.{key}" for key, *_ in _SAMPLING}
    return sampling | _TEXTS.keys() | _LISTS.keys() | {f"{key}s" for key in _RELATIVES}


def _sampling(folder: Path, given: Mapping[str, Any]) -> dict[str, Value]:
    path = folder / "generation_config.json"
    try:
        config = load_json(path, optional=True)
    except QjaxError as error:
        _warn(str(error))
        config = {}
    found = {}
    for key, kind, names in _SAMPLING:
        value = given.get(f"sampling.{key}", next((config[name] for name in names if name in config), None))
        try:
            found |= {} if value is None else {f"sampling.{key}": Value(kind, value)}
        except QjaxError as error:
            _warn(f"{path}: {key}: {error}")
    return found


def _warn(problem: str) -> None:
    warnings.warn(f"{problem}; the GGUF metadata do without", stacklevel=5)


def _text(value: Any) -> str | None:
    """What is written of a value; nothing of what is no text, number or date, or a list of these."""
    if isinstance(value, list):
        texts = [None if isinstance(item, list) else _text(item) for item in value]
        return None if None in texts else ",".join(filter(None, texts))
    return str(value) if isinstance(value, str | int | float | date) else None


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else value if isinstance(value, list) else []


def _from_parts(parts: NameParts, key: str) -> str | None:
    value = getattr(parts, key, None)
    return title(value) if value and key in ("name", "organization") else value


def _relatives(
    key: str, given: Mapping[str, Any], card: Mapping[str, Any], names: tuple[str, ...], n_weights: int
) -> dict[str, Any]:
    """The models that this one was made of, or the data: how many, and what is known of each."""
    present = [name for name in names if name in card]
    if f"{key}s" not in given and not present:
        return {}
    described = [
        item if isinstance(item, dict) else _relative(item, n_weights) if isinstance(item, str) else {}
        for item in given.get(f"{key}s") or _listed(card[present[0]] if present else None)
    ]
    entries: dict[str, Any] = {f"{key}.count": Value(ValueType.UINT32, len(described))}
    for i, of in enumerate(described):
        entries |= {f"{key}.{i}.{name}": _text(of.get(name)) for name in _OF_RELATIVES}
    return entries


def _relative(model_id: str, n_weights: int) -> dict[str, Any]:
    """What an id or an address tells."""
    if model_id.startswith(("http://", "https://", "ssh://")):
        known: dict[str, Any] = {"repo_url": model_id}
        match = re.fullmatch(r"https?://huggingface\.co/([^/]+/[^/]+)", model_id)
        if match is None:
            return known
        parts = name_parts(match[1], n_weights)
    else:
        parts = name_parts(model_id, n_weights)
        known = {"repo_url": f"{_HUB}{parts.organization}/{parts.name}"} if parts.organization else {}
    told = {name: _from_parts(parts, name) for name in ("name", "organization", "version")}
    return known | {name: value for name, value in told.items() if value is not None}


_VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
_TYPE = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)  # of a quantized copy
_FINETUNE = re.compile("chat|instruct|vision|lora", re.IGNORECASE)
_SIZE = re.compile(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT]\d?|small|mini|medium|large|x?xl)", re.IGNORECASE)


def _kind(word: str, first: bool, n_weights: int) -> tuple[str, str | None]:
    """A word of a name as it is written, and what it seems to be; None: cannot be told."""
    if _VERSION.fullmatch(word):
        return word, "version"
    if _TYPE.fullmatch(word):
        return word, "type"
    if first:
        return word, None
    if _SIZE.fullmatch(word):
        word = word.replace("_", ".")
        if word[-1].isdecimal():  # 7b1 is 7.1B
            word = f"{word[:-2]}.{word[-1]}{word[-2]}"
        if word[-2].isdecimal():
            word = word[:-1] + word[-1].upper()
        return (f"{word[:-1]}{word[-1].lower()}", "finetune") if _far_from(word, n_weights) else (word, "size")
    if _FINETUNE.fullmatch(word):
        return word, "type" if n_weights < 0 and word.lower() == "lora" else "finetune"
    return word, None


def _far_from(label: str, n_weights: int) -> bool:
    """Whether a size is none of a model of ``n_weights``: adapters may lack layers, so of them it may be larger."""
    if not n_weights or not re.fullmatch(r"\d+(\.\d+)?", label[:-1]):
        return False
    size = float(label[:-1]) * 1000 ** " KMBT".find(label[-1])
    if n_weights < 0:
        return size < -n_weights // 8
    return abs(size - n_weights) > 7 * n_weights // 8


def _rounded(n: int) -> str:
    """To two digits, or whole units."""
    scale, unit = next(((s, u) for s, u in ((1e-12, "T"), (1e-9, "B"), (1e-6, "M")) if n * s > 1), (1e-3, "K"))
    digits = max(2 - len(str(round(n * scale)).lstrip("0")), 0)
    return f"{n * scale:.{digits}f}{unit}"
