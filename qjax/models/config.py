"""The shape of a model, read from and written to GGUF metadata and Hugging Face's config.json."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qjax.errors import QjaxError


class Architecture(NamedTuple):
    """What the models of an architecture have in common."""

    classes: tuple[str, ...]
    """in Hugging Face's config.json; the first is written"""
    halves: bool = False
    """Rotary embedding turns pairs half a head apart in its GGUF files, as in Hugging Face's; else neighbours."""
    biases: tuple[str, ...] = ()
    """the matrices of a layer that have a bias whatever config.json says"""
    head_norms: bool = False
    """each head's queries and keys are normalized before they are turned"""
    unturned: int = 0
    """n: every n-th layer does without rotary embedding (NoPE); 0: none does."""
    tied: bool = False
    """what Hugging Face takes for granted where config.json does not mention the head"""
    head_dim: int | None = None
    """likewise"""
    implied: tuple[str, ...] = ()
    """what its GGUF files do not say where it is the rule"""


_LENGTHS = ("attention.key_length", "attention.value_length")
_SIZES = ("vocab_size", "rope.dimension_count")
_QKV = ("attn_q", "attn_k", "attn_v")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")

# By GGUF's name, which is Hugging Face's model_type too.
ARCHITECTURES = {
    "llama": Architecture(("LlamaForCausalLM", "MistralForCausalLM")),
    "qwen2": Architecture(("Qwen2ForCausalLM",), halves=True, biases=_QKV, implied=(*_LENGTHS, *_SIZES)),
    "qwen3": Architecture(("Qwen3ForCausalLM",), halves=True, head_norms=True, head_dim=128, implied=_SIZES),
    "smollm3": Architecture(("SmolLM3ForCausalLM",), unturned=4, tied=True, implied=_LENGTHS),
}
_BY_CLASS = {name: architecture for architecture, row in ARCHITECTURES.items() for name in row.classes}

# How Llama 3.1 to 3.3 stretch rotary embedding, but for the factor: their config.json all say so.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Config:
    """What the forward pass has to know of a model beside its weights; hashable, so static under jit.

    Raises QjaxError where the numbers do not describe a model.
    """

    architecture: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    n_ctx: int
    """Positions the model was trained for."""
    norm_eps: float
    rope_theta: float
    tied: bool
    """Whether the output head is the token embedding."""
    rope_scale: float = 1.0
    """Positions are multiplied by it (linear scaling)."""
    rope_factors: tuple[float, ...] = ()
    """What the frequency of each rotary pair is divided by, in float32 (rope_freqs.weight); nothing: 1."""
    biases: tuple[str, ...] = ()
    """The matrices of a layer that have a bias, as in attn_q."""
    window: int | None = None
    """How many tokens back attention sees, itself included; None: all.  GGUF's llama files do not say."""

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise QjaxError(_unknown(self.architecture, ARCHITECTURES))
        sizes = ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim", "vocab", "n_ctx")
        windows = () if self.window is None else ("window",)
        for name in (*sizes, "rope_theta", "rope_scale", "norm_eps", *windows):
            if not getattr(self, name) > 0:
                raise QjaxError(f"model config: {name} is {getattr(self, name)}, expected a positive number")
        if self.n_heads % self.n_kv_heads:
            raise QjaxError(f"model config: {self.n_heads} heads do not divide among {self.n_kv_heads} KV heads")
        if self.head_dim % 2:
            raise QjaxError(f"model config: head_dim is {self.head_dim}; rotary embedding needs an even number")
        if self.rope_factors and len(self.rope_factors) != self.head_dim // 2:
            raise QjaxError(
                f"model config: {len(self.rope_factors)} factors for the {self.head_dim // 2} frequencies of rotary "
                "embedding (rope_freqs.weight)"
            )
        if not all(0 < factor < math.inf for factor in self.rope_factors):
            raise QjaxError("model config: the factors of rotary embedding (rope_freqs.weight) have to be positive")

    @property
    def traits(self) -> Architecture:
        """Of its architecture."""
        return ARCHITECTURES[self.architecture]

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        rope_factors: tuple[float, ...] = (),
    ) -> "Config":
        """Read llama.cpp's keys.

        shapes: tensor names and their (rows, columns), which settle vocab, tied and biases.
        rope_factors: what rope_freqs.weight holds.
        Raises QjaxError for an unknown architecture, a missing key, or rotary embedding of a kind not known here.
        """
        architecture = _get(metadata, "general.architecture")
        if architecture not in ARCHITECTURES:
            raise QjaxError(_unknown(architecture, ARCHITECTURES))

        def get(key: str, *default: Any) -> Any:
            return _get(metadata, f"{architecture}.{key}", *default)

        # A file without a type means linear, and a factor of 0 none, as in llama.cpp (llama-model.cpp, load_hparams).
        if (scaling := get("rope.scaling.type", "linear")) not in ("none", "linear"):
            raise _scaled_rope(f"rope.scaling.type {scaling}")
        factor = float(get("rope.scaling.factor", get("rope.scale_linear", 0.0))) if scaling == "linear" else 0.0
        if "token_embd.weight" not in shapes:
            raise QjaxError("model file: there is no tensor token_embd.weight")
        if "rope_freqs.weight" in shapes and not rope_factors:
            raise QjaxError(
                "model file: the factors in rope_freqs.weight are not given, and without them results are wrong"
            )
        d_model, n_heads = int(get("embedding_length")), int(get("attention.head_count"))
        head_dim = int(get("attention.key_length", d_model // max(n_heads, 1)))
        for key in ("attention.value_length", "rope.dimension_count"):
            if (length := int(get(key, head_dim))) != head_dim:
                raise QjaxError(f"model file: {architecture}.{key} is {length}, expected the head size {head_dim}")
        matrices = (*_QKV, "attn_output", *_MLP)
        return cls(
            architecture=architecture,
            n_layers=int(get("block_count")),
            d_model=d_model,
            d_ff=int(get("feed_forward_length")),
            n_heads=n_heads,
            n_kv_heads=int(get("attention.head_count_kv", n_heads)),
            head_dim=head_dim,
            vocab=shapes["token_embd.weight"][0],
            n_ctx=int(get("context_length")),
            norm_eps=float(get("attention.layer_norm_rms_epsilon")),
            rope_theta=float(get("rope.freq_base", 10000.0)),
            tied="output.weight" not in shapes,
            rope_scale=1 / factor if factor else 1.0,
            rope_factors=rope_factors,
            biases=tuple(name for name in matrices if f"blk.0.{name}.bias" in shapes),
        )

    def to_gguf(self) -> dict[str, tuple[str, Any]]:
        """The metadata that llama.cpp's converter writes for the model: key -> (GGUF type name, value)."""
        fields = {
            "context_length": ("uint32", self.n_ctx),
            "embedding_length": ("uint32", self.d_model),
            "block_count": ("uint32", self.n_layers),
            "feed_forward_length": ("uint32", self.d_ff),
            "attention.head_count": ("uint32", self.n_heads),
            "attention.head_count_kv": ("uint32", self.n_kv_heads),
            "attention.key_length": ("uint32", self.head_dim),
            "attention.value_length": ("uint32", self.head_dim),
            "attention.layer_norm_rms_epsilon": ("float32", self.norm_eps),
            "rope.dimension_count": ("uint32", self.head_dim),
            "rope.freq_base": ("float32", self.rope_theta),
            "vocab_size": ("uint32", self.vocab),
        }
        usual = dict.fromkeys(_LENGTHS, self.d_model // self.n_heads)
        usual |= {"rope.dimension_count": self.head_dim, "vocab_size": self.vocab}
        for key in self.traits.implied:
            if fields[key][1] == usual[key]:
                del fields[key]
        if self.rope_scale != 1:
            fields |= {
                "rope.scaling.type": ("string", "linear"),
                "rope.scaling.factor": ("float32", 1 / self.rope_scale),
            }
        prefixed = {f"{self.architecture}.{key}": value for key, value in fields.items()}
        return {"general.architecture": ("string", self.architecture)} | prefixed

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a parsed config.json. Raises QjaxError for what the forward pass would compute wrongly."""
        classes = config.get("architectures") or ["(none given)"]
        if classes[0] not in _BY_CLASS:
            raise QjaxError(_unknown(classes[0], _BY_CLASS))
        architecture = _BY_CLASS[classes[0]]
        traits = ARCHITECTURES[architecture]
        if (value := config.get("hidden_act", "silu")) != "silu":
            raise QjaxError(f"config.json: hidden_act is {value!r}; only 'silu' is supported")
        if "sliding_attention" in (config.get("layer_types") or ()) or config.get("use_sliding_window"):
            raise QjaxError("config.json: use_sliding_window; only attention to all tokens is supported for it")
        n_layers = int(_get(config, "num_hidden_layers"))
        turned = [i % traits.unturned != traits.unturned - 1 for i in range(n_layers)] if traits.unturned else None
        if (layers := config.get("no_rope_layers")) and list(map(bool, layers)) != turned:
            expected = f"0 for every {traits.unturned}th" if traits.unturned else "none"
            raise QjaxError(f"config.json: no_rope_layers is {layers}; expected {expected}")
        d_model, n_heads = int(_get(config, "hidden_size")), int(_get(config, "num_attention_heads"))
        head_dim = int(config.get("head_dim") or traits.head_dim or d_model // max(n_heads, 1))
        # transformers 5 moved rope_theta and rope_scaling into one entry.
        rope = config.get("rope_parameters") or {}
        theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
        scale, factors = _rope_scaling(config.get("rope_scaling") or rope, head_dim, theta)
        return cls(
            architecture=architecture,
            n_layers=n_layers,
            d_model=d_model,
            d_ff=int(_get(config, "intermediate_size")),
            n_heads=n_heads,
            n_kv_heads=int(config.get("num_key_value_heads") or n_heads),
            head_dim=head_dim,
            vocab=int(_get(config, "vocab_size")),
            n_ctx=int(_get(config, "max_position_embeddings")),
            norm_eps=float(_get(config, "rms_norm_eps")),
            rope_theta=theta,
            tied=bool(config.get("tie_word_embeddings", traits.tied)),
            rope_scale=scale,
            rope_factors=factors,
            biases=_biases(config, traits),
            window=config.get("sliding_window") if classes[0] == "MistralForCausalLM" else None,
        )

    def to_hf(self) -> dict[str, Any]:
        """The entries of config.json that describe the model.  Raises QjaxError for what they have no word for."""
        described = {
            "architectures": [self.traits.classes[self.window is not None]],
            "model_type": self.architecture if self.window is None else "mistral",
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.n_ctx,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "attention_bias": "attn_output" in self.biases,
            "mlp_bias": set(_MLP) <= set(self.biases),
        }
        described |= {} if self.window is None else {"sliding_window": self.window}
        if {*self.biases} != {*_biases(described, self.traits)}:
            found = ", ".join(self.biases) or "none"
            raise QjaxError(f"config.json of {self.architecture} has no word for such biases ({found})")
        if self.rope_scale != 1:
            described["rope_scaling"] = {"rope_type": "linear", "factor": 1 / self.rope_scale}
        if self.rope_factors:
            llama3 = {"rope_type": "llama3", "factor": max(self.rope_factors)} | _LLAMA3
            _, factors = _rope_scaling(llama3, self.head_dim, self.rope_theta)
            # Others may have rounded otherwise.
            if not np.allclose(factors, self.rope_factors, rtol=1e-5, atol=0):
                raise QjaxError("config.json has no word for these factors of rotary embedding (rope_freqs.weight)")
            described["rope_scaling"] = llama3
        return described


def _biases(config: Mapping[str, Any], traits: Architecture) -> tuple[str, ...]:
    """The matrices with a bias, by config.json."""
    attention = (*_QKV, "attn_output") if config.get("attention_bias") else traits.biases
    return attention + (_MLP if config.get("mlp_bias") else ())


def _rope_scaling(scaling: Mapping[str, Any], head_dim: int, theta: float) -> tuple[float, tuple[float, ...]]:
    """rope_scale and rope_factors, by config.json.

    llama3 (Grattafiori et al. 2024): waves longer than the original context / low_freq_factor are stretched by the
    factor, those shorter than it / high_freq_factor are left alone, those between by something between.  Each step in
    float32, as llama.cpp's converter does it (conversion/llama.py).
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return 1.0, ()
    if kind not in ("linear", "llama3"):
        raise _scaled_rope(f"rope_type {kind}")
    factor = float(_get(scaling, "factor"))
    if not factor > 0:
        raise QjaxError(f"config.json: rope_scaling, {kind}, has factor {factor}; expected a positive number")
    if kind == "linear":
        return 1 / factor, ()
    low, high = (float(_get(scaling, key)) for key in ("low_freq_factor", "high_freq_factor"))
    n_ctx = float(_get(scaling, "original_max_position_embeddings"))
    if not 0 < low < high:
        raise QjaxError(f"config.json: rope_scaling makes no sense: {dict(scaling)}")
    f32 = np.float32
    waves = f32(2 * np.pi) / (1 / f32(theta) ** (np.arange(0, head_dim, 2, dtype=f32) / f32(head_dim)))
    # How often each goes round in the original context, between the two factors from 0 to 1.
    smooth = (f32(n_ctx) / waves - f32(low)) / f32(high - low)
    between = 1 / ((1 - smooth) / f32(factor) + smooth)
    factors = np.where(waves < n_ctx / high, f32(1), np.where(waves > n_ctx / low, f32(factor), between))
    return 1.0, tuple(map(float, factors))


def _get(mapping: Mapping[str, Any], key: str, *default: Any) -> Any:
    if key not in mapping and not default:
        raise QjaxError(f"model config: there is no key {key!r}")
    return mapping.get(key, *default)


def _unknown(name: str, known: Iterable[str]) -> str:
    return f"model config: unknown architecture {name!r}; known: {', '.join(sorted(known))}"


def _scaled_rope(found: str) -> QjaxError:
    return QjaxError(
        f"model config: rotary embedding scaled in this way ({found}) is not supported, and leaving it out would give "
        "wrong results. Known: linear, llama3."
    )
