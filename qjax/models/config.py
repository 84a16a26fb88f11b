"""The shape of a model, read from and written to GGUF metadata and Hugging Face's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qjax.errors import QjaxError

# GGUF's architecture name -> the class in Hugging Face's config.json.
ARCHITECTURES = {"llama": "LlamaForCausalLM"}


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

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise QjaxError(_unknown(self.architecture, ARCHITECTURES))
        sizes = ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim", "vocab", "n_ctx")
        for name in (*sizes, "rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise QjaxError(f"model config: {name} is {getattr(self, name)}, expected a positive number")
        if self.n_heads % self.n_kv_heads:
            raise QjaxError(f"model config: {self.n_heads} heads do not divide among {self.n_kv_heads} KV heads")
        if self.head_dim % 2:
            raise QjaxError(f"model config: head_dim is {self.head_dim}; rotary embedding needs an even number")

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> "Config":
        """Read llama.cpp's keys; `shapes` maps tensor names to (rows, columns) and settles vocab and tied.

        Raises QjaxError for an unknown architecture, a missing key, or scaled rotary embedding.
        """
        architecture = _get(metadata, "general.architecture")
        if architecture not in ARCHITECTURES:
            raise QjaxError(_unknown(architecture, ARCHITECTURES))

        def get(key: str, *default: Any) -> Any:
            return _get(metadata, f"{architecture}.{key}", *default)

        scaling = get("rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in shapes:
            raise _scaled_rope("tensor rope_freqs.weight" if scaling == "none" else f"rope.scaling.type {scaling}")
        if "token_embd.weight" not in shapes:
            raise QjaxError("model file: there is no tensor token_embd.weight")
        d_model, n_heads = int(get("embedding_length")), int(get("attention.head_count"))
        head_dim = int(get("attention.key_length", d_model // max(n_heads, 1)))
        for key in ("attention.value_length", "rope.dimension_count"):
            if (length := int(get(key, head_dim))) != head_dim:
                raise QjaxError(f"model file: {architecture}.{key} is {length}, expected the head size {head_dim}")
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
        )

    def to_gguf(self) -> dict[str, tuple[str, Any]]:
        """The metadata llama.cpp needs to run the model: key -> (GGUF type name, value)."""
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
        prefixed = {f"{self.architecture}.{key}": value for key, value in fields.items()}
        return {"general.architecture": ("string", self.architecture)} | prefixed

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a parsed config.json. Raises QjaxError for what the forward pass would compute wrongly."""
        names = {hf: gguf for gguf, hf in ARCHITECTURES.items()}
        classes = config.get("architectures") or ["(none given)"]
        if classes[0] not in names:
            raise QjaxError(_unknown(classes[0], names))
        # transformers 5 moved rope_theta and rope_scaling into one entry.
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or rope
        if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
            raise _scaled_rope(f"rope_type {kind}")
        for key, only in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
            if (value := config.get(key, only)) != only:
                raise QjaxError(f"config.json: {key} is {value!r}; only {only!r} is supported")
        d_model, n_heads = int(_get(config, "hidden_size")), int(_get(config, "num_attention_heads"))
        return cls(
            architecture=names[classes[0]],
            n_layers=int(_get(config, "num_hidden_layers")),
            d_model=d_model,
            d_ff=int(_get(config, "intermediate_size")),
            n_heads=n_heads,
            n_kv_heads=int(config.get("num_key_value_heads") or n_heads),
            head_dim=int(config.get("head_dim") or d_model // max(n_heads, 1)),
            vocab=int(_get(config, "vocab_size")),
            n_ctx=int(_get(config, "max_position_embeddings")),
            norm_eps=float(_get(config, "rms_norm_eps")),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The entries of config.json that describe the model."""
        return {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
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
            "attention_bias": False,
            "mlp_bias": False,
        }


def _get(mapping: Mapping[str, Any], key: str, *default: Any) -> Any:
    if key not in mapping and not default:
        raise QjaxError(f"model config: there is no key {key!r}")
    return mapping.get(key, *default)


def _unknown(name: str, known: Mapping[str, str]) -> str:
    return f"model config: unknown architecture {name!r}; known: {', '.join(sorted(known))}"


def _scaled_rope(found: str) -> QjaxError:
    return QjaxError(
        f"model config: scaled rotary embedding ({found}) is not supported, and leaving it out would give "
        "wrong results. Use a model without it."
    )
