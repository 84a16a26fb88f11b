"""Recipes: which tensor gets which format.  Rules are data; `plan` reads them.

A file type of llama-quantize ("Q4_K_M") is a mixture: its default for most matrices, and rows of `RULES` for those
that suffer more or less from few bits.  Source: llama.cpp src/llama-quant.cpp.
"""

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from qjax import formats
from qjax.errors import QjaxError, nearest_names
from qjax.formats import Format
from qjax.io.cursor import shorten


class FileType(NamedTuple):
    id: int
    """general.file_type in the file"""
    default: str
    """the format of the matrices that no rule names"""


FILE_TYPES = {
    "F32": FileType(0, "F32"),
    "F16": FileType(1, "F16"),
    "BF16": FileType(32, "BF16"),
    "Q1_0": FileType(40, "Q1_0"),
    "Q2_0": FileType(41, "Q2_0"),
    "Q4_0": FileType(2, "Q4_0"),
    "Q4_1": FileType(3, "Q4_1"),
    "Q5_0": FileType(8, "Q5_0"),
    "Q5_1": FileType(9, "Q5_1"),
    "Q8_0": FileType(7, "Q8_0"),
    "Q2_K": FileType(10, "Q2_K"),
    "Q2_K_S": FileType(21, "Q2_K"),
    "Q3_K_S": FileType(11, "Q3_K"),
    "Q3_K_M": FileType(12, "Q3_K"),
    "Q3_K_L": FileType(13, "Q3_K"),
    "Q4_K_S": FileType(14, "Q4_K"),
    "Q4_K_M": FileType(15, "Q4_K"),
    "Q5_K_S": FileType(16, "Q5_K"),
    "Q5_K_M": FileType(17, "Q5_K"),
    "Q6_K": FileType(18, "Q6_K"),
    "IQ1_S": FileType(24, "IQ1_S"),
    "IQ1_M": FileType(31, "IQ1_M"),
    "IQ2_XXS": FileType(19, "IQ2_XXS"),
    "IQ2_XS": FileType(20, "IQ2_XS"),
    "IQ2_S": FileType(28, "IQ2_XS"),
    "IQ2_M": FileType(29, "IQ2_S"),
    "IQ3_XXS": FileType(23, "IQ3_XXS"),
    "IQ3_XS": FileType(22, "IQ3_S"),
    "IQ3_S": FileType(26, "IQ3_S"),
    "IQ3_M": FileType(27, "IQ3_S"),
    "IQ4_NL": FileType(25, "IQ4_NL"),
    "IQ4_XS": FileType(30, "IQ4_XS"),
    "TQ1_0": FileType(36, "TQ1_0"),
    "TQ2_0": FileType(37, "TQ2_0"),
    "MXFP4_MOE": FileType(38, "MXFP4"),
}

FOR_FEW_MODELS = ("Q1_0", "Q2_0", "TQ1_0", "TQ2_0", "MXFP4_MOE")
"""For models that were trained with weights of so few values, and for models with experts."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# ── which tensors, and what they are ─────────────────────────────────────────────────────────────────

# Matrices whose name does not end in "weight" are no matrices of products; of the others these are small, or
# looked up, or routes: (architecture or any, expression on the name).
UNTOUCHED = (
    ("", r"_norm\.weight"),
    ("", r"ffn_gate_(inp|tid2eid)\.weight"),
    ("", r"altup|laurel|per_layer_model_proj"),
    ("", r"^(position_embd|token_types)\.weight$"),
    ("", r"ssm_conv1d|shortconv\.conv\.weight"),
    ("", r"indexer\.[kq]_proj\.weight"),
    ("", r"time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight"),
    ("", r"attn_rel_b\.weight"),
    ("", r"\.(position_embd|rel_pos|patch_embd|patch_merger)|sam\.(pos_embd|neck\.|net_)"),
    ("", r"a\.rvq\.codebook|mm\.a\.code_embd"),
    ("glm5-next", r"hc_|indexer\.(attn_q_b|attn_k|proj)|indexer_compressor_(gate|ape)"),
    ("glm5-next", r"ssm_([fg]_[ab]|beta)\.weight|attn_(kv_a_mqa|[kv]_b)\.weight"),
)

# The first row that fits gives the role.  Without output.weight, token_embd serves as the head: its role is output.
ROLES = (
    ("glm5-next", r"attn_q_[ab]|nextn\.eh_proj", "low_rank"),
    ("", r"^output\.weight$", "output"),
    ("", r"^(per_layer_)?token_embd\.weight$", "token_embd"),
    ("", r"attn_(qkv|kv_b|v)\.weight", "attn_v"),
    ("", r"attn_k\.weight", "attn_k"),
    ("", r"attn_q\.weight", "attn_q"),
    ("", r"attn_output\.weight", "attn_output"),
    ("", r"ffn_up", "ffn_up"),
    ("", r"ffn_gate", "ffn_gate"),
    ("", r"ffn_down", "ffn_down"),
    ("", r"", "other"),
)

# ── what they get ────────────────────────────────────────────────────────────────────────────────────


class Place(NamedTuple):
    """What the conditions of `RULES` look at: a model, one of its tensors, and its position i among n of its role."""

    architecture: str
    is_70b: bool
    gqa: int
    """query heads that share a key head"""
    n_experts: int
    has_imatrix: bool
    stacked: bool
    """whether the tensor holds several matrices"""
    divides: bool
    """whether its rows divide into blocks of the default"""
    i: int
    n: int


def _more_bits(t: Place) -> bool:
    """The first and the last eighth of the layers, and every third of those between."""
    return t.i < t.n // 8 or t.i >= 7 * t.n // 8 or (t.i - t.n // 8) % 3 == 2


CONDITIONS: dict[str, Callable[[Place], bool]] = {
    "first 2": lambda t: t.i < 2,
    "first 4": lambda t: t.i < 4,
    "first 1/16": lambda t: t.i < t.n // 16,
    "first 1/8": lambda t: t.i < t.n // 8,
    "middle 6/8": lambda t: t.n // 8 <= t.i < 7 * t.n // 8,
    "more bits": _more_bits,
    "gqa >= 4": lambda t: t.gqa >= 4,
    "experts >= 4": lambda t: t.n_experts >= 4,
    "8 experts": lambda t: t.n_experts == 8,
    "stacked": lambda t: t.stacked,
    "divides": lambda t: t.divides,
    "imatrix": lambda t: t.has_imatrix,
    "70B": lambda t: t.is_70b,
    "falcon": lambda t: t.architecture == "falcon",
    "bailingmoe3": lambda t: t.architecture == "bailingmoe3",
}


class Rule(NamedTuple):
    """A row of the table; each empty column fits all."""

    file_types: str
    roles: str
    when: str
    """conditions that must all hold, "not" before one that must not"""
    format: str

    def holds(self, place: Place) -> bool:
        return all(
            CONDITIONS[condition.removeprefix("not ")](place) != condition.startswith("not ")
            for condition in self.when.split(", ")
            if condition
        )


# The file types of 1 and 2 bits; they count their layers as they come, experts or not.
LOW_BITS = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M"

# The first row that fits decides.  A matrix that none fits gets the default of its file type.
RULES = (
    Rule("", "low_rank", "", "Q8_0"),
    # Every logit passes through the head.
    Rule("MXFP4_MOE", "output", "", "Q8_0"),
    Rule("", "output", "falcon", "Q8_0"),
    Rule("", "output", "not divides", "Q8_0"),
    Rule(f"{LOW_BITS} IQ3_XXS", "output", "", "Q5_K"),
    Rule("Q8_0", "output", "", "Q8_0"),
    Rule("", "output", "", "Q6_K"),
    # Stacks are experts, but for bailingmoe3's attention.
    Rule("MXFP4_MOE", "ffn_down ffn_gate ffn_up", "stacked", "MXFP4"),
    Rule("MXFP4_MOE", "", "stacked, not bailingmoe3", "MXFP4"),
    Rule("MXFP4_MOE", "", "", "Q8_0"),
    #
    Rule("IQ1_S IQ1_M IQ2_XXS IQ2_XS", "token_embd", "", "Q2_K"),
    Rule("IQ2_S IQ2_M IQ3_XXS", "token_embd", "", "IQ3_S"),
    Rule("TQ1_0 TQ2_0 Q2_0", "token_embd", "", "Q4_K"),
    # Small where heads share it, and what it loses no other matrix makes good.
    Rule(LOW_BITS, "attn_v", "gqa >= 4", "Q4_K"),
    Rule(LOW_BITS, "attn_v", "experts >= 4", "Q4_K"),
    Rule("IQ2_S IQ2_M", "attn_v", "", "IQ3_S"),
    Rule(LOW_BITS, "attn_v", "", "Q2_K"),
    Rule("", "attn_v", "8 experts", "Q8_0"),
    Rule("Q2_K Q3_K_S Q3_K_M Q4_K_S IQ3_M", "attn_v", "70B", "Q5_K"),
    Rule("Q2_K_S IQ3_XXS IQ3_XS IQ3_S", "attn_v", "70B, gqa >= 4", "Q5_K"),
    Rule("Q2_K Q2_K_S IQ3_XXS IQ3_XS IQ3_S", "attn_v", "gqa >= 4", "Q4_K"),
    Rule("Q2_K", "attn_v", "", "Q3_K"),
    Rule("IQ3_XXS", "attn_v", "not imatrix", "IQ3_S"),
    Rule("IQ3_M", "attn_v", "", "Q4_K"),
    Rule("Q3_K_M", "attn_v", "first 2", "Q5_K"),
    Rule("Q3_K_M", "attn_v", "", "Q4_K"),
    Rule("Q3_K_L", "attn_v", "", "Q5_K"),
    Rule("IQ4_NL IQ4_XS", "attn_v", "gqa >= 4", "Q5_K"),
    Rule("Q4_K_M Q5_K_M", "attn_v", "more bits", "Q6_K"),
    Rule("Q4_K_M", "attn_v", "70B", "Q5_K"),
    Rule("Q4_K_S", "attn_v", "first 4", "Q5_K"),
    #
    Rule(LOW_BITS, "attn_k", "8 experts", "Q4_K"),
    Rule("", "attn_k", "8 experts", "Q8_0"),
    Rule("IQ3_XS", "attn_k attn_q", "", "IQ3_XXS"),
    Rule("IQ3_XXS", "attn_k attn_q", "", "IQ2_S"),
    #
    Rule(LOW_BITS, "attn_output", "8 experts", "Q5_K"),
    Rule("IQ1_S IQ1_M", "attn_output", "", "IQ2_XXS"),
    Rule("IQ2_S IQ2_M", "attn_output", "", "IQ3_S"),
    Rule("Q3_K_L", "attn_output", "falcon", "Q4_K"),
    Rule("Q2_K Q3_K_S Q3_K_M Q4_K_S Q4_K_M", "attn_output", "8 experts, not falcon", "Q5_K"),
    Rule("IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_NL IQ4_XS", "attn_output", "8 experts, not falcon", "Q5_K"),
    Rule("Q2_K", "attn_output", "not falcon", "Q3_K"),
    Rule("IQ3_XXS", "attn_output", "not falcon", "IQ3_S"),
    Rule("Q3_K_M IQ3_M", "attn_output", "not falcon", "Q4_K"),
    Rule("Q3_K_L", "attn_output", "not falcon, not 8 experts", "Q5_K"),
    # The first layers meet the largest activations.
    Rule("IQ2_S IQ2_M", "ffn_down", "first 1/8", "IQ3_S"),
    Rule(LOW_BITS, "ffn_down", "first 1/8", "Q2_K"),
    Rule("Q2_K", "ffn_down", "", "Q3_K"),
    Rule("Q2_K_S", "ffn_down", "first 1/8", "Q4_K"),
    Rule("IQ3_XXS", "ffn_down", "not imatrix, first 1/8", "Q4_K"),
    Rule("IQ3_XXS", "ffn_down", "not imatrix", "Q3_K"),
    Rule("IQ3_M", "ffn_down", "first 1/8", "Q4_K"),
    Rule("IQ3_M", "ffn_down", "8 experts, more bits", "Q4_K"),
    Rule("Q3_K_M", "ffn_down", "first 1/16", "Q5_K"),
    Rule("Q3_K_M", "ffn_down", "not falcon", "Q4_K"),
    Rule("Q3_K_M", "ffn_down", "more bits", "Q4_K"),
    Rule("Q3_K_L", "ffn_down", "falcon", "Q4_K"),
    Rule("Q3_K_L", "ffn_down", "", "Q5_K"),
    Rule("IQ4_NL IQ4_XS", "ffn_down", "not imatrix, first 1/8", "Q5_K"),
    Rule("Q4_K_S", "ffn_down", "not falcon, first 1/8", "Q5_K"),
    Rule("Q4_K_M", "ffn_down", "falcon, first 1/16", "Q6_K"),
    Rule("Q4_K_M", "ffn_down", "falcon, more bits", "Q5_K"),
    Rule("Q4_K_M", "ffn_down", "not falcon, more bits", "Q6_K"),
    Rule("Q5_K_M", "ffn_down", "more bits", "Q6_K"),
    # With an imatrix these two can go astray there, without one their _1 variants do.
    Rule("Q4_0", "ffn_down", "imatrix, first 1/8", "Q4_1"),
    Rule("Q5_0", "ffn_down", "imatrix, first 1/8", "Q5_1"),
    #
    Rule("IQ3_XS", "ffn_gate ffn_up", "middle 6/8", "IQ3_XXS"),
)


@functools.cache
def rules(file_type: str, role: str) -> tuple[Rule, ...]:
    """The rows of `RULES` for tensors of ``role`` in files of ``file_type``."""
    fitting = [row for row in RULES if not row.file_types or file_type in row.file_types.split()]
    return tuple(row for row in fitting if not row.roles or role in row.roles.split())


# Where rows do not divide into blocks of the one, the other is tried, then F16; also from blocks of up to 32.
FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

# Without an importance matrix these are garbage, but for the head and the embedding, of which there is none:
# (file types or any, format).
NEED_IMATRIX = (("", "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS"), ("Q2_K_S", "Q2_K"))

# Which model is of 70 billion weights: by its number of layers; llama's also shares key heads, its 65B does not.
LAYERS_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}

# ── the recipe ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Recipe:
    """Formats for the tensors of a model; `recipe` makes one, `plan.plan` applies it.

    name: what to call it.  default: the format of a matrix that nothing below names; None copies it.
    file_type: of llama-quantize, whose mixture in `RULES` comes before the default unless ``pure``; "" for none.
    output_tensor_type, token_embedding_type: of these two tensors.  leave_output_tensor: output.weight stays as it is.
    tensor_types: (regular expression, format), the first that matches a name decides; case does not matter.
    fallback: a matrix whose rows do not divide into blocks gets another format (`FALLBACKS`) and the plan says so;
    otherwise it is an error.
    converts: as llama.cpp's converter does it: what is not quantized becomes F32, rows that do not divide F16.
    """

    name: str
    default: Format | None
    file_type: str = ""
    pure: bool = False
    output_tensor_type: Format | None = None
    token_embedding_type: Format | None = None
    leave_output_tensor: bool = False
    tensor_types: tuple[tuple[str, Format], ...] = ()
    fallback: bool = False
    converts: bool = False

    @property
    def is_mixture(self) -> bool:
        return bool(self.file_type and not self.pure and self.default and self.default.block_size > 1)


COPY = Recipe("COPY", None)
"""Every matrix as it is."""

CONVERTED = Recipe("CONVERTED", None, converts=True)
"""As the converter would, but every matrix as it is."""

OUTTYPES = ("F32", "F16", "BF16", "Q8_0", "TQ1_0", "TQ2_0")
"""The file types that the converter writes without llama-quantize."""


def names() -> tuple[str, ...]:
    """The names of the file types."""
    return tuple(FILE_TYPES)


def recipe(
    of: "str | Format | Mapping[str, str | Format] | Recipe",
    *,
    pure: bool = False,
    output_tensor_type: str | Format | None = None,
    token_embedding_type: str | Format | None = None,
    leave_output_tensor: bool = False,
    tensor_types: "Mapping[str, str | Format] | None" = None,
) -> Recipe:
    """The Recipe meant by a file type's name or number, a Format for all matrices alike, or a mapping from regular
    expressions on tensor names to formats; of a mapping, matrices that match none are kept in F16.

    pure: the default for every matrix, without the mixture.  The rest as in Recipe, formats also by name.
    Raises QjaxError for an unknown name, with the nearest ones, or a malformed expression.
    """
    match of:
        case Recipe():
            made = of
        case Format():
            known = ALIASES.get(of.name, of.name)
            made = Recipe(of.name, of, known if known in FILE_TYPES else "", pure=True)
        case str():
            made = _named(of)
        case _:
            made = Recipe("custom", formats.get("F16"), tensor_types=_checked(of))
    return replace(
        made,
        pure=made.pure or pure,
        output_tensor_type=made.output_tensor_type if output_tensor_type is None else formats.get(output_tensor_type),
        token_embedding_type=(
            made.token_embedding_type if token_embedding_type is None else formats.get(token_embedding_type)
        ),
        leave_output_tensor=made.leave_output_tensor or leave_output_tensor,
        tensor_types=made.tensor_types + _checked(tensor_types or {}),
    )


def outtype(name: str) -> Recipe:
    """A file type as the converter makes it: one of `OUTTYPES`; else llama-quantize's.  Raises as `recipe` does."""
    key = name.upper()
    if key not in OUTTYPES:
        return recipe(name)
    ends = formats.get("F16") if key.startswith("TQ") else None
    return Recipe(
        key,
        formats.get(key),
        key,
        pure=True,
        output_tensor_type=ends,
        token_embedding_type=ends,
        fallback=True,
        converts=True,
    )


def assignments(texts: Iterable[str]) -> dict[str, Format]:
    """Expressions and formats in texts ``REGEX=TYPE``, as llama-quantize --tensor-type takes them; the first counts.

    Raises QjaxError for other texts and for unknown formats.
    """
    found: dict[str, Format] = {}
    for text in texts:
        pattern, _, format = text.partition("=")
        if not pattern or not format:
            raise QjaxError(f"tensor type {text!r}: expected REGEX=TYPE, as in ffn_down=Q6_K")
        found.setdefault(pattern, formats.get(format))
    return found


def _named(name: str) -> Recipe:
    key = ALIASES.get(name.upper(), name.upper())
    key = next((known for known, row in FILE_TYPES.items() if str(row.id) == key), key)
    if key == COPY.name:
        return COPY
    if key not in FILE_TYPES:
        raise QjaxError(f"unknown file type {name!r}. {nearest_names(name, (*FILE_TYPES, COPY.name))}")
    return Recipe(key, formats.get(FILE_TYPES[key].default), key, fallback=True)


def _checked(expressions: "Mapping[str, str | Format]") -> tuple[tuple[str, Format], ...]:
    for pattern in expressions:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)
                re.compile(pattern)
        except (re.error, RecursionError) as error:
            raise QjaxError(f"recipe: {shorten(pattern)} is no regular expression: {error}") from None
        except FutureWarning as warning:  # what other languages, C++'s among them, read as a class such as [[:digit:]]
            raise QjaxError(f"recipe: {shorten(pattern)} is ambiguous ({warning}); write \\[ for a bracket") from None
    return tuple((pattern, formats.get(format)) for pattern, format in expressions.items())
