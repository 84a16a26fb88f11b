"""A recipe applied to a model: the format of each tensor, the sizes that follow, and what is in the way.

Rules of order and precedence: llama.cpp src/llama-quant.cpp (llama_tensor_get_type, tensor_type_fallback).
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import Array

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.io.cursor import shorten
from qjax.io.stored import Stored
from qjax.methods import recipes
from qjax.methods.importance import NONE, Importance
from qjax.methods.recipes import Recipe
from qjax.tensor import QTensor, describe_shape, describe_size


@dataclass(frozen=True)
class Step:
    """What becomes of one tensor: ``source`` is its format now, ``format`` the one it gets.

    wanted: where its rows do not divide into blocks of what the recipe says: that format; None otherwise.
    lacks_imatrix: in this format it would be garbage without an importance, and there is none.
    """

    name: str
    shape: tuple[int, ...]
    source: Format
    format: Format
    wanted: Format | None = None
    lacks_imatrix: bool = False

    @property
    def changes(self) -> bool:
        return self.format != self.source

    @property
    def source_bytes(self) -> int:
        return self.source.nbytes(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.format.nbytes(self.shape)

    def __str__(self) -> str:
        note = f"  (rows of {self.shape[-1]} do not divide into blocks of {self.wanted.name})" if self.wanted else ""
        return (
            f"{self.name:36}  {describe_shape(self.shape):>16}  {self.source.name:>5} -> {self.format.name:8}"
            f"{describe_size(self.source_bytes):>10} -> {describe_size(self.size_bytes):>10}{note}"
        )


@dataclass(frozen=True)
class Plan:
    """The steps in llama-quantize's order: tensors of no layer first, then layer by layer, by name."""

    recipe: Recipe
    steps: tuple[Step, ...]

    @property
    def n_weights(self) -> int:
        return sum(math.prod(step.shape) for step in self.steps)

    @property
    def source_bytes(self) -> int:
        """Of all tensors together, as is `size_bytes`."""
        return sum(step.source_bytes for step in self.steps)

    @property
    def size_bytes(self) -> int:
        return sum(step.size_bytes for step in self.steps)

    @property
    def source_bpw(self) -> float:
        return 8 * self.source_bytes / max(self.n_weights, 1)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.size_bytes / max(self.n_weights, 1)

    @property
    def fallbacks(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.wanted)

    def check(self, *, allow_requantize: bool = False) -> None:
        """Raises QjaxError, naming a tensor, if an importance is missing, or if quantized weights would be quantized
        again unless ``allow_requantize``."""
        for step in self.steps:
            if step.changes and step.source.block_size > 1 and not allow_requantize:
                raise QjaxError(
                    f"{step.name}: is {step.source.name} already, and making it {step.format.name} would add a second "
                    "error. Start from an F32, F16 or BF16 model, or pass allow_requantize (--allow-requantize)."
                )
            if step.lacks_imatrix:
                raise QjaxError(
                    f"{step.name}: {step.format.name} needs the tensor's importance, without it the result would be "
                    "garbage. Make an importance matrix with `qjax imatrix` and pass it as imatrix (--imatrix FILE)."
                )

    def to_json(self) -> dict[str, Any]:
        """For the command line."""
        tensors = [
            {
                "name": step.name,
                "shape": list(step.shape),
                "source": step.source.name,
                "format": step.format.name,
                "wanted": step.wanted.name if step.wanted else None,
                "size_bytes": step.size_bytes,
            }
            for step in self.steps
        ]
        sizes = {key: getattr(self, key) for key in ("source_bytes", "size_bytes", "source_bpw", "bpw")}
        return {"recipe": self.recipe.name} | sizes | {"n_fallbacks": len(self.fallbacks), "tensors": tensors}

    def __str__(self) -> str:
        return "\n".join([*map(str, self.steps), self.summary()])

    def summary(self) -> str:
        """Sizes, and what there is to know before, without the tensors."""
        before, after = describe_size(self.source_bytes), describe_size(self.size_bytes)
        parts = [f"{self.recipe.name}, {before} ({self.source_bpw:.2f} bpw) to {after} ({self.bpw:.2f} bpw)"]
        if self.fallbacks:
            parts.append(f"{len(self.fallbacks)} of {len(self.steps)} tensors fall back to other formats")
        if lacking := [step.name for step in self.steps if step.lacks_imatrix]:
            parts.append(f"{len(lacking)} tensors need an importance matrix, the first is {lacking[0]}")
        return "; ".join(parts)


def plan(
    tensors: Mapping[str, Array | np.ndarray | QTensor | Stored],
    recipe: Recipe,
    metadata: Mapping[str, Any],
    importance: Importance = NONE,
    *,
    in_order: bool = False,
) -> Plan:
    """What ``recipe`` makes of ``tensors``; nothing is computed.

    metadata: GGUF's, of which mixtures need the architecture, its layers, heads and experts.
    importance: its presence alone changes some mixtures.
    in_order: whether layers are counted in the order of ``tensors`` instead of by name.
    Raises QjaxError for a pattern that matches nothing, for metadata that a mixture needs and that are missing,
    and, naming the tensor, for an importance of another size and for rows that do not divide (see Recipe).
    """
    names = list(tensors) if in_order else sorted(tensors, key=_layer_and_name)
    chooser = _Chooser(recipe, metadata, names, importance)
    steps = tuple(chooser.step(name, tuple(tensors[name].shape), stored_format(tensors[name])) for name in names)
    for pattern, _ in recipe.tensor_types:
        if pattern not in chooser.matched:
            example = next((step.name for step in steps if len(step.shape) > 1), "blk.0.ffn_down.weight")
            raise QjaxError(f"tensor type {pattern!r}: matches no matrix of this model. Names are like {example}")
    return Plan(recipe, steps)


def matrices(
    tensors: Mapping[str, Array | np.ndarray | QTensor | Stored], metadata: Mapping[str, Any]
) -> tuple[str, ...]:
    """The names of the tensors that a recipe gives formats, in a plan's order; the others stay, or become F32."""
    names = sorted(tensors, key=_layer_and_name)
    chooser = _Chooser(recipes.COPY, metadata, names, NONE)
    return tuple(name for name in names if chooser.takes(name, tuple(tensors[name].shape)))


def within(
    budget_bpw: float,
    tensors: Mapping[str, Array | np.ndarray | QTensor | Stored],
    metadata: Mapping[str, Any],
    importance: Importance = NONE,
) -> Plan:
    """The plan of the largest file type that takes at most ``budget_bpw`` bits per weight of all tensors.

    It is one that makes the model smaller, needs no importance that is missing, and is not `recipes.FOR_FEW_MODELS`;
    of two that are equally large the later in `recipes.FILE_TYPES`.
    Raises QjaxError, naming the smallest, if none fits, and as `plan` does.
    """
    made = [
        plan(tensors, recipes.recipe(name), metadata, importance)
        for name in recipes.names()
        if name not in recipes.FOR_FEW_MODELS
    ]
    possible = [p for p in made if p.size_bytes < p.source_bytes and not any(step.lacks_imatrix for step in p.steps)]
    fitting = [p for p in possible if p.bpw <= budget_bpw]
    if fitting:
        return max(reversed(fitting), key=lambda p: p.size_bytes)
    needs = "" if importance else "; the file types below need an importance matrix (imatrix)"
    if not possible:
        raise QjaxError(
            f"no file type makes this model smaller: it has {made[0].source_bpw:.3f} bits per weight{needs}"
        )
    smallest = min(possible, key=lambda p: p.size_bytes)
    raise QjaxError(
        f"no file type fits into {budget_bpw:g} bits per weight: the smallest possible for this model is "
        f"{smallest.recipe.name} with {smallest.bpw:.3f}{needs}"
    )


def stored_format(tensor: Array | np.ndarray | QTensor | Stored) -> Format:
    """The Format of a QTensor or Stored tensor; of an array the plain format of its dtype."""
    # jax.Array has a `format` too: its memory layout.
    return formats.plain_format(tensor.dtype) if isinstance(tensor, Array | np.ndarray) else tensor.format


class _Chooser:
    """Walks the tensors of a model in order, counting those of each role as it goes."""

    def __init__(self, recipe: Recipe, metadata: Mapping[str, Any], names: list[str], importance: Importance):
        self.recipe, self.importance = recipe, importance
        self.architecture = str(metadata.get("general.architecture", ""))
        self.model = _Model.of(self.architecture, metadata) if recipe.is_mixture else None
        self.tied = "output.weight" not in names
        self.roles = {name: self._role(name) for name in names}
        self.n_attn_v = list(self.roles.values()).count("attn_v")
        self.passed: Counter[str] = Counter()
        self.matched: set[str] = set()
        """expressions of ``recipe.tensor_types``"""

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor is a matrix that is quantized."""
        return not _is_vector(name, shape) and self._is_quantized(name)

    def step(self, name: str, shape: tuple[int, ...], source: Format) -> Step:
        if _is_vector(name, shape) or (self.recipe.converts and not self._is_quantized(name)):
            # ggml adds and multiplies these as F32 only, and they are few.
            return Step(name, shape, source, formats.get("F32") if source.name in ("F16", "BF16") else source)
        chosen = self._choose(name, shape) if self._is_quantized(name) else None
        if chosen is None:
            return Step(name, shape, source, source)
        try:
            format = _fitting(chosen, shape, self.recipe.converts) if self.recipe.fallback else chosen.resolve(shape)
        except QjaxError as error:
            raise QjaxError(f"{name}: {error}") from None
        wanted = chosen if self.recipe.fallback and format.name != chosen.name else None
        lacks_imatrix = (
            format != source and self.importance.of(name, shape) is None and self._needs_imatrix(name, format)
        )
        return Step(name, shape, source, format, wanted, lacks_imatrix)

    def _fits(self, architecture: str, pattern: str, name: str) -> bool:
        return architecture in ("", self.architecture) and re.search(pattern, name) is not None

    def _is_quantized(self, name: str) -> bool:
        if self.recipe.leave_output_tensor and name == "output.weight":
            return False
        return name.endswith("weight") and not any(self._fits(*row, name) for row in recipes.UNTOUCHED)

    def _role(self, name: str) -> str:
        return next(role for architecture, pattern, role in recipes.ROLES if self._fits(architecture, pattern, name))

    def _choose(self, name: str, shape: tuple[int, ...]) -> Format | None:
        recipe, role = self.recipe, self.roles[name]
        matching = [(p, f) for p, f in recipe.tensor_types if re.search(p, name, re.IGNORECASE)]
        self.matched.update(pattern for pattern, _ in matching)
        # The second embedding of some models is a table of its own, which an expression may mean.
        if role == "token_embd" and recipe.token_embedding_type and (name == "token_embd.weight" or not matching):
            return recipe.token_embedding_type
        if role == "output" and recipe.output_tensor_type:
            return recipe.output_tensor_type
        if matching:
            return matching[0][1]
        return self._mixed(name, shape, role) if self.model else recipe.default

    def _mixed(self, name: str, shape: tuple[int, ...], role: str) -> Format:
        recipe, model = self.recipe, self.model
        assert model is not None
        assert recipe.default is not None
        if role == "token_embd" and self.tied:
            role = "output"
            if recipe.output_tensor_type:
                return recipe.output_tensor_type
        i, n = self.passed[role], self.n_attn_v if role == "attn_v" else model.n_layers
        self.passed[role] += 1
        if role.startswith("ffn_") and model.n_experts > 1 and recipe.file_type not in recipes.LOW_BITS.split():
            # A layer of experts may have several of these.
            i = _layer(name)
            if not 0 <= i < n:
                raise QjaxError(f"{name}: the name says no layer from 0 to {n - 1}")
        place = recipes.Place(
            architecture=self.architecture,
            is_70b=model.is_70b,
            gqa=model.gqa,
            n_experts=model.n_experts,
            has_imatrix=bool(self.importance),
            stacked=any(size > 1 for size in shape[-3:-2]),
            divides=shape[-1] % recipe.default.block_size == 0,
            i=i,
            n=n,
        )
        rule = next((rule for rule in recipes.rules(recipe.file_type, role) if rule.holds(place)), None)
        return formats.get(rule.format) if rule else recipe.default

    def _needs_imatrix(self, name: str, format: Format) -> bool:
        return self.roles[name] not in ("output", "token_embd") and any(
            format.name in names.split() and file_type in ("", self.recipe.file_type)
            for file_type, names in recipes.NEED_IMATRIX
        )


def _fitting(wanted: Format, shape: tuple[int, ...], converts: bool) -> Format:
    """``wanted`` or what takes its place where rows do not divide.  Raises QjaxError if nothing is set to do so."""
    try:
        return wanted.resolve(shape)
    except QjaxError:
        if converts:
            return formats.get("F16")
        smaller = recipes.FALLBACKS.get(wanted.name)
        if smaller is None and wanted.block_size > 32:
            raise
    other = formats.get(smaller or wanted.name)
    return formats.get("F16") if shape[-1] % other.block_size else other


def _is_vector(name: str, shape: tuple[int, ...]) -> bool:
    """As ggml counts axes: leading ones of size 1 are none.  Norms are vectors, however they are cut into heads."""
    return all(size == 1 for size in shape[:-1]) or name.endswith("_norm.weight")


def _layer(name: str) -> int:
    """The number of the layer in a tensor's name, -1 where there is none."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _layer_and_name(name: str) -> tuple[int, str]:
    return _layer(name), name


@dataclass(frozen=True)
class _Model:
    """What `recipes.RULES` ask about a model."""

    n_layers: int
    gqa: int
    n_experts: int
    is_70b: bool

    @classmethod
    def of(cls, architecture: str, metadata: Mapping[str, Any]) -> "_Model":
        """Raises QjaxError if ``metadata`` lack the number of layers or heads."""

        def number(key: str, default: int | None = None) -> int:
            value = metadata.get(f"{architecture}.{key}", default)
            if isinstance(value, np.ndarray) and value.size and value.dtype.kind in "iu":
                value = int(value[0])  # One for each layer; llama-quantize looks at the first.
            if not isinstance(value, int):
                raise QjaxError(
                    f"metadata key {architecture}.{key}: expected a whole number, found {shorten(value)}. Mixtures "
                    "need it: take every matrix alike with pure (--pure), or set it in overrides (--override-kv)."
                )
            return value

        n_layers, n_heads = number("block_count"), number("attention.head_count")
        n_kv_heads = number("attention.head_count_kv", n_heads)
        is_70b = n_layers == recipes.LAYERS_OF_70B.get(architecture) and (
            architecture != "llama" or n_heads != n_kv_heads
        )
        gqa = n_heads // n_kv_heads if n_kv_heads else 0
        return cls(n_layers, gqa, number("expert_count", 0), is_70b)
