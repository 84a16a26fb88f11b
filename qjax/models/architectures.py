"""The architectures that run, one row each: what sets their models apart, in the forward pass and in files.

Sources: llama.cpp src/models/ and conversion/, transformers' configurations and models of these names.
"""

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, NamedTuple

from qjax.errors import QjaxError

QKV = ("attn_q", "attn_k", "attn_v")
MLP = ("ffn_gate", "ffn_up", "ffn_down")
NOTHING: Mapping[str, Any] = MappingProxyType({})


class HFClass(NamedTuple):
    """A class that Hugging Face's config.json names."""

    model_type: str
    windowed: bool = False
    """config.json may say how many tokens back attention sees"""
    experts: bool = False
    """the feed-forward layer is a mixture of experts"""
    theta: float = 10000.0
    """the base of rotary embedding where config.json does not say"""
    defaults: Mapping[str, Any] = NOTHING
    """what else it may leave out"""
    others: tuple[str, ...] = ()
    """of a model that also sees, say: parts of the names of what is not the language model, whose entries of
    config.json are then in text_config"""


class Architecture(NamedTuple):
    """What the models of an architecture have in common."""

    classes: Mapping[str, HFClass]
    """by their name in config.json; the first that fits is written"""

    # the forward pass
    halves: bool = False
    """Rotary embedding turns pairs half a head apart in its GGUF files, as in Hugging Face's; else neighbours."""
    partly_turned: bool = False
    """files may say that only so many channels of a head are turned"""
    unturned: int = 0
    """n: every n-th layer does without rotary embedding (NoPE); 0: none does."""
    learned_positions: bool = False
    """a vector for each position is added to the embedding, and nothing is turned"""
    biases: tuple[str, ...] = ()
    """the matrices of a layer that have a bias whatever config.json says"""
    fused: bool = False
    """queries, keys and values are made by one matrix, attn_qkv, and gate and up, if there is a gate, by ffn_up"""
    sized_experts: bool = False
    """experts have a d_ff of their own, and files say so"""
    gated: bool = True
    """whether the feed-forward layer has a gate"""
    activation: str = "silu"
    """of the feed-forward layer, see `ops.mlp.ACTIVATIONS`"""
    head_norms: bool = False
    """each head's queries and keys are normalized before they are turned"""
    layer_norms: bool = False
    """norms subtract the mean and add a bias; else they are RMS norms"""
    post_norms: bool = False
    """what attention and feed-forward layer make is normalized before it is added"""
    scaled_embedding: bool = False
    """the embedding is multiplied by √d_model"""

    # numbers that files may leave out
    windowed: bool = False
    """GGUF files say how many tokens back attention sees"""
    window: int | None = None
    """how many; None: all"""
    full_every: int = 0
    """n: every n-th layer sees all tokens in spite of the window; 0: none does"""
    local_theta: float | None = None
    """the base of rotary embedding in layers with a window, unscaled; None: as in the others"""
    attn_softcap: float = 0.0
    """c: scores become c tanh(score / c); 0: they stay"""
    logit_softcap: float = 0.0
    """likewise of logits"""
    attn_scalar: int | None = None
    """Scores are divided by its square root; None: by that of head_dim, always."""
    n_layers_wide: int = 0
    """With so many layers, and only then, that is d_model / n_heads in llama.cpp, else head_dim."""
    tied: bool = False
    head_dim: int | None = None

    # files
    norms_less_one: bool = False
    """Hugging Face's weights of norms are those of GGUF files less 1"""
    transposed: bool = False
    """Hugging Face's matrices of layers are (in_features, out_features)"""
    hf_keys: Mapping[str, str] = NOTHING
    """how config.json calls what most call otherwise; "": it does not say"""
    hf_fixed: Mapping[str, Any] = NOTHING
    """what config.json has to say, if it says it"""
    implied: tuple[str, ...] = ()
    """what its GGUF files do not say where it is the rule"""


_LENGTHS = ("attention.key_length", "attention.value_length")
_SIZES = ("vocab_size", "rope.dimension_count")
_GEMMA = Architecture(
    {},
    halves=True,
    activation="gelu",
    post_norms=True,
    scaled_embedding=True,
    windowed=True,
    window=4096,
    attn_scalar=256,
    tied=True,
    head_dim=256,
    norms_less_one=True,
    hf_keys={"hidden_act": "hidden_activation"},
    hf_fixed={"use_bidirectional_attention": False},
    implied=_SIZES,
)
_GEMMA3 = HFClass(
    "gemma3_text",
    windowed=True,
    theta=1e6,
    defaults={
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "vocab_size": 262208,
    },
)
_QWEN3 = Architecture({}, halves=True, head_norms=True, head_dim=128, implied=_SIZES)

# By GGUF's name.
ARCHITECTURES = {
    "llama": Architecture(
        {
            "LlamaForCausalLM": HFClass("llama"),
            "MistralForCausalLM": HFClass("mistral", windowed=True),
            "MixtralForCausalLM": HFClass("mixtral", windowed=True, experts=True, theta=1e6),
        }
    ),
    "qwen2": Architecture(
        {"Qwen2ForCausalLM": HFClass("qwen2")}, halves=True, biases=QKV, implied=(*_LENGTHS, *_SIZES)
    ),
    "qwen3": _QWEN3._replace(classes={"Qwen3ForCausalLM": HFClass("qwen3")}),
    "qwen3moe": _QWEN3._replace(
        classes={"Qwen3MoeForCausalLM": HFClass("qwen3_moe", experts=True)},
        head_dim=None,
        implied=(*_LENGTHS, *_SIZES),
        sized_experts=True,
        hf_keys={"num_local_experts": "num_experts"},
        hf_fixed={"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "smollm3": Architecture({"SmolLM3ForCausalLM": HFClass("smollm3")}, unturned=4, tied=True, implied=_LENGTHS),
    "gemma2": _GEMMA._replace(
        classes={"Gemma2ForCausalLM": HFClass("gemma2", windowed=True)},
        full_every=2,
        attn_softcap=50.0,
        logit_softcap=30.0,
        n_layers_wide=46,
        implied=(*_SIZES, "rope.freq_base"),
    ),
    "gemma3": _GEMMA._replace(
        classes={
            "Gemma3ForCausalLM": _GEMMA3,
            "Gemma3ForConditionalGeneration": _GEMMA3._replace(others=("vision_tower.", "multi_modal_projector.")),
        },
        head_norms=True,
        full_every=6,
        local_theta=10000.0,
        n_layers_wide=62,
    ),
    "phi3": Architecture(
        {"Phi3ForCausalLM": HFClass("phi3", windowed=True, defaults={"original_max_position_embeddings": 4096})},
        halves=True,
        partly_turned=True,
        fused=True,
        windowed=True,
        implied=("vocab_size", *_LENGTHS),
    ),
    "gpt2": Architecture(
        {"GPT2LMHeadModel": HFClass("gpt2")},
        learned_positions=True,
        biases=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
        fused=True,
        gated=False,
        activation="gelu",
        layer_norms=True,
        tied=True,
        transposed=True,
        hf_keys={
            "hidden_act": "activation_function",
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
            "rms_norm_eps": "layer_norm_epsilon",
            **dict.fromkeys(("attention_bias", "head_dim", "mlp_bias", "num_key_value_heads", "rope_theta"), ""),
        },
        hf_fixed={
            "add_cross_attention": False,
            "scale_attn_by_inverse_layer_idx": False,
            "scale_attn_weights": True,
        },
        implied=(*_SIZES, *_LENGTHS, "attention.head_count_kv", "rope.freq_base"),
    ),
}

BY_CLASS = {name: architecture for architecture, row in ARCHITECTURES.items() for name in row.classes}


# ── for who reads the files ──────────────────────────────────────────────────────────────────────────


def sliding_layers(n_layers: int, full_every: int) -> tuple[bool, ...]:
    """Of each layer, whether it has the window, where every n-th has not; 0: all have."""
    return tuple(full_every == 0 or (i + 1) % full_every != 0 for i in range(n_layers))


def every(sliding: list[bool], usual: int) -> int:
    """The n with which every n-th layer, and no other, is without the window.  Raises QjaxError if there is none."""
    candidates = (usual, sliding.index(False) + 1 if False in sliding else 0)
    found = next((n for n in candidates if list(sliding_layers(len(sliding), n)) == sliding), None)
    if found is None:
        order = "".join("fs"[one] for one in sliding)
        raise QjaxError(f"model config: layers with a window (s) and without (f) in no regular order: {order}")
    return found


_KINDS: Mapping[type, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "true or false"),
    str: (str, "a text"),
    list: (list, "a list"),
    dict: (dict, "an object"),
}


def entry(mapping: Mapping[str, Any], key: str, *default: Any, of: type = object, most: int = 2**63) -> Any:
    """Of metadata or config.json, where null is none.

    of: int, float, bool, str, list or dict.  Raises QjaxError if there is none and no default, for one of another kind,
    and for whole numbers above ``most``.
    """
    value = mapping.get(key)
    if value is None:
        if not default:
            raise QjaxError(f"model config: there is no key {key!r}")
        return default[0]
    if of is object:
        return value
    kind, expected = _KINDS[of]
    if of is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (of is bool):
        raise QjaxError(f"model config: {key} is {value!r:.80}, expected {expected}")
    if of in (int, float) and not -most <= value <= most and value == value:
        raise QjaxError(f"model config: {key} is {value!r:.80}, expected {expected} up to {most}")
    return of(value)


def unknown(name: Any, known: Iterable[str]) -> str:
    """What to say of an architecture or class that is not known."""
    return f"model config: unknown architecture {name!r:.80}; known: {', '.join(sorted(known))}"
