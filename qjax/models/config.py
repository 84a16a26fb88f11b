"""The shape of a model, read from and written to GGUF metadata and Hugging Face's config.json."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.errors import QjaxError
from qjax.models import config_json, rope_scaling
from qjax.models.architectures import (
    ARCHITECTURES,
    MLP,
    NOTHING,
    QKV,
    Architecture,
    entry,
    every,
    sliding_layers,
    unknown,
)
from qjax.models.rope_scaling import Yarn

ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS = FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
"""Tensors of GGUF files that are part of Config here."""


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
    full_every: int = 0
    """n: every n-th layer sees all tokens in spite of the window; 0: none does."""
    local_theta: float | None = None
    """Base of rotary embedding in the layers with a window, unscaled; None: as in the others."""
    attn_scalar: int | None = None
    """Scores are divided by its square root; None: head_dim."""
    attn_softcap: float = 0.0
    """c: scores become c tanh(score / c); 0: they stay."""
    logit_softcap: float = 0.0
    """Likewise of logits."""
    n_rot: int | None = None
    """So many channels of a head are turned, the first; None: all."""
    long_factors: tuple[float, ...] = ()
    """Instead of rope_factors, in texts longer than rope_n_ctx (longrope)."""
    rope_n_ctx: int | None = None
    """Positions the model was trained for before rotary embedding was stretched."""
    rope_magnitude: float = 1.0
    """What is turned is multiplied by it, too."""
    yarn: Yarn | None = None
    """Instead of rope_scale and rope_factors."""
    n_experts: int = 0
    """Of each feed-forward layer; 0: it is none of experts."""
    n_experts_used: int = 0
    """For each token."""
    d_expert: int | None = None
    """d_ff of an expert; None: d_ff."""
    normed_experts: bool = True
    """The weights of the experts used sum to 1; else they are their probabilities among all."""

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise QjaxError(unknown(self.architecture, ARCHITECTURES))
        sizes = ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim", "vocab", "n_ctx")
        optional = ("window", "local_theta", "attn_scalar", "n_rot", "rope_n_ctx", "d_expert")
        given = (name for name in optional if getattr(self, name) is not None)
        for name in (*sizes, "rope_theta", "rope_scale", "rope_magnitude", "norm_eps", *given):
            if not getattr(self, name) > 0:
                raise QjaxError(f"model config: {name} is {getattr(self, name)}, expected a positive number")
        for name in ("full_every", "attn_softcap", "logit_softcap"):
            if not 0 <= getattr(self, name) < math.inf:
                raise QjaxError(f"model config: {name} is {getattr(self, name)}, expected 0 or more")
        if self.n_heads % self.n_kv_heads:
            raise QjaxError(f"model config: {self.n_heads} heads do not divide among {self.n_kv_heads} KV heads")
        if self.turned % 2 or self.turned > self.head_dim:
            raise QjaxError(
                f"model config: head_dim is {self.head_dim}, of which {self.turned} are turned; rotary embedding needs "
                "an even number"
            )
        theta = self.rope_theta
        for name, factors in self.factors.items():
            if len(factors) != self.turned // 2:
                raise QjaxError(
                    f"model config: {len(factors)} factors for the {self.turned // 2} frequencies of rotary "
                    f"embedding ({name})"
                )
            if not all(0 < factor < math.inf for factor in factors):
                raise QjaxError(f"model config: the factors of rotary embedding ({name}) have to be positive")
        if self.yarn and not (all(0 < number < math.inf for number in self.yarn if number is not None) and theta > 1):
            raise QjaxError(f"model config: {self.yarn} makes no sense with rope_theta {theta}")
        if bool(self.long_factors) != (bool(self.rope_factors) and self.traits.partly_turned):
            raise QjaxError(f"model config: factors of rotary embedding that {self.architecture} does not have")
        if not (0 < self.n_experts_used <= self.n_experts or self.n_experts == self.n_experts_used == 0):
            raise QjaxError(f"model config: {self.n_experts_used} of {self.n_experts} experts cannot be used")
        if bool(self.n_experts) not in {row.experts for row in self.traits.classes.values()}:
            raise QjaxError(f"model config: {self.architecture} with {self.n_experts} experts is not known")

    @property
    def traits(self) -> Architecture:
        """Of its architecture."""
        return ARCHITECTURES[self.architecture]

    @property
    def turned(self) -> int:
        """How many channels of a head rotary embedding turns."""
        return self.head_dim if self.n_rot is None else self.n_rot

    @property
    def factors(self) -> dict[str, tuple[float, ...]]:
        """What of it GGUF files hold as tensors, by name."""
        if self.long_factors:
            return {LONG_FACTORS: self.long_factors, SHORT_FACTORS: self.rope_factors}
        return {ROPE_FACTORS: self.rope_factors} if self.rope_factors else {}

    @property
    def sliding(self) -> tuple[bool, ...]:
        """Of each layer, whether attention has the window."""
        return sliding_layers(self.n_layers, self.full_every if self.window is not None else 1)

    # ── GGUF ─────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        factors: Mapping[str, tuple[float, ...]] = NOTHING,
    ) -> "Config":
        """Read llama.cpp's keys.

        shapes: tensor names and their (rows, columns), which settle vocab, tied and biases.
        factors: what the tensors in `FACTORS` hold.
        Raises QjaxError for an unknown architecture, a missing key, or rotary embedding of a kind not known here.
        """
        architecture = entry(metadata, "general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise QjaxError(unknown(architecture, ARCHITECTURES))
        traits = ARCHITECTURES[architecture]

        def get(key: str, *default: Any, of: type = object, most: int = 2**63) -> Any:
            return entry(metadata, f"{architecture}.{key}", *default, of=of, most=most)

        # A file without a type means linear, and a factor of 0 none, as in llama.cpp (llama-model.cpp, load_hparams).
        scaling = get("rope.scaling.type", "linear", of=str)
        if scaling not in ("none", "linear", "yarn", *["longrope"] * traits.partly_turned):
            raise rope_scaling.unknown(f"rope.scaling.type {scaling}")
        factor = get("rope.scaling.factor", get("rope.scale_linear", 0.0, of=float), of=float)
        factor = factor if scaling == "linear" else 0.0
        yarn = _yarn(get) if scaling == "yarn" else None
        if len(shapes.get("token_embd.weight", ())) != 2:
            raise QjaxError("model file: there is no tensor token_embd.weight of two axes")
        for name in FACTORS:
            if name in shapes and name not in factors:
                raise QjaxError(f"model file: the factors in {name} are not given, and without them results are wrong")
        n_layers, d_model, n_heads = (
            get(key, of=int) for key in ("block_count", "embedding_length", "attention.head_count")
        )
        if n_layers > len(shapes):
            raise QjaxError(f"model file: {architecture}.block_count is {n_layers}, more than there are tensors")
        head_dim = get("attention.key_length", d_model // max(n_heads, 1), of=int)
        n_rot = get("rope.dimension_count", head_dim, of=int)
        lengths = {"attention.value_length": get("attention.value_length", head_dim, of=int)}
        lengths |= {} if traits.partly_turned else {"rope.dimension_count": n_rot}
        for key, length in lengths.items():
            if length != head_dim:
                raise QjaxError(f"model file: {architecture}.{key} is {length}, expected the head size {head_dim}")
        window = get("attention.sliding_window", traits.window or 0, of=int) or None if traits.windowed else None
        pattern = get("attention.sliding_window_pattern", None)
        counted = isinstance(pattern, list | np.ndarray) and len(pattern) == n_layers
        if counted and np.asarray(pattern).dtype.kind in "biu":
            full_every = every(np.asarray(pattern, np.bool_).tolist(), traits.full_every)
        else:
            full_every = get("attention.sliding_window_pattern", traits.full_every, of=int)
        local = traits.local_theta and get("rope.freq_base_swa", traits.local_theta, of=float)
        scale = get("attention.scale", None, of=float) if traits.attn_scalar else None
        if scale is not None and not 1e-6 < scale <= 1:
            raise QjaxError(
                f"model file: {architecture}.attention.scale is {scale}, expected 1 / √head_dim or the like"
            )
        scalar = round(scale**-2) if scale else _wide_scalar(traits, n_layers, d_model, n_heads, head_dim)
        d_ff = get("feed_forward_length", of=int)
        d_expert = get("expert_feed_forward_length", d_ff, of=int)
        norm_eps = "attention.layer_norm_epsilon" if traits.layer_norms else "attention.layer_norm_rms_epsilon"
        matrices = (*QKV, "attn_qkv", "attn_output", *MLP)
        return cls(
            architecture=architecture,
            n_layers=n_layers,
            d_model=d_model,
            d_ff=d_ff,
            n_heads=n_heads,
            n_kv_heads=get("attention.head_count_kv", n_heads, of=int),
            head_dim=head_dim,
            vocab=shapes["token_embd.weight"][0],
            n_ctx=get("context_length", of=int),
            norm_eps=get(norm_eps, of=float),
            rope_theta=get("rope.freq_base", 10000.0, of=float),
            tied="output.weight" not in shapes,
            rope_scale=1 / factor if factor else 1.0,
            rope_factors=factors.get(ROPE_FACTORS, factors.get(SHORT_FACTORS, ())),
            biases=tuple(name for name in matrices if f"blk.0.{name}.bias" in shapes),
            window=window,
            full_every=full_every if window else 0,
            local_theta=local if window else None,
            attn_scalar=None if scalar == head_dim else scalar,
            attn_softcap=get("attn_logit_softcapping", traits.attn_softcap, of=float) if traits.attn_softcap else 0.0,
            logit_softcap=get("final_logit_softcapping", traits.logit_softcap, of=float),
            n_rot=None if n_rot == head_dim else n_rot,
            long_factors=factors.get(LONG_FACTORS, ()),
            rope_n_ctx=get(_ORIGINAL, 0, of=int) or None if traits.partly_turned else None,
            rope_magnitude=get("rope.scaling.attn_factor", 1.0, of=float),
            yarn=yarn,
            n_experts=get("expert_count", 0, of=int),
            n_experts_used=get("expert_used_count", 0, of=int),
            d_expert=None if d_expert == d_ff else d_expert,
            normed_experts=get("expert_weights_norm", True, of=bool),
        )

    def to_gguf(self) -> dict[str, tuple[str, Any]]:
        """The metadata that llama.cpp's converter writes for the model: key -> (GGUF type name, value).

        What the model has and the converter has no key for is said by keys that llama.cpp has for other architectures.
        """
        traits = self.traits
        norm_eps = "attention.layer_norm_epsilon" if traits.layer_norms else "attention.layer_norm_rms_epsilon"
        fields: dict[str, tuple[str, Any]] = {
            "context_length": ("uint32", self.n_ctx),
            "embedding_length": ("uint32", self.d_model),
            "block_count": ("uint32", self.n_layers),
            "feed_forward_length": ("uint32", self.d_ff),
            "attention.head_count": ("uint32", self.n_heads),
            "attention.head_count_kv": ("uint32", self.n_kv_heads),
            "attention.key_length": ("uint32", self.head_dim),
            "attention.value_length": ("uint32", self.head_dim),
            norm_eps: ("float32", self.norm_eps),
            "rope.dimension_count": ("uint32", self.turned),
            "rope.freq_base": ("float32", self.rope_theta),
            "vocab_size": ("uint32", self.vocab),
        }
        # What a reader takes for granted.
        usual = dict.fromkeys(("attention.key_length", "attention.value_length"), self.d_model // self.n_heads)
        usual |= {"rope.dimension_count": self.head_dim, "rope.freq_base": 10000.0, "vocab_size": self.vocab}
        usual["attention.head_count_kv"] = self.n_heads
        for key in traits.implied:
            if fields[key][1] == usual[key]:
                del fields[key]
        if self.rope_scale != 1:
            fields["rope.scaling.type"] = ("string", "linear")
            fields["rope.scaling.factor"] = ("float32", 1 / self.rope_scale)
        if self.yarn:
            fields["rope.scaling.type"] = ("string", "yarn")
            fields["rope.scaling.factor"] = ("float32", self.yarn.factor)
            fields["rope.scaling.original_context_length"] = ("uint32", self.yarn.n_ctx)
            for key, field in _YARN.items():
                if (value := getattr(self.yarn, field)) != Yarn._field_defaults[field]:
                    fields[f"rope.scaling.{key}"] = ("float32", value)
        if self.rope_n_ctx:
            fields["rope.scaling.original_context_length"] = ("uint32", self.rope_n_ctx)
        if self.long_factors or self.rope_magnitude != 1:
            fields["rope.scaling.attn_factor"] = ("float32", self.rope_magnitude)
        if traits.attn_softcap:
            fields["attn_logit_softcapping"] = ("float32", self.attn_softcap)
        if self.logit_softcap or traits.logit_softcap:
            fields["final_logit_softcapping"] = ("float32", self.logit_softcap)
        if traits.windowed:
            fields["attention.sliding_window"] = ("uint32", self.window or 0)
            if self.window and self.full_every != traits.full_every:
                fields["attention.sliding_window_pattern"] = ("uint32", self.full_every)
        if self.local_theta:
            fields["rope.freq_base_swa"] = ("float32", self.local_theta)
        wide = _wide_scalar(traits, self.n_layers, self.d_model, self.n_heads, self.head_dim)
        if (scalar := self.attn_scalar or self.head_dim) != wide:
            fields["attention.scale"] = ("float32", scalar**-0.5)
        if self.n_experts:
            fields["expert_count"] = ("uint32", self.n_experts)
            fields["expert_used_count"] = ("uint32", self.n_experts_used)
            if traits.sized_experts:
                fields["expert_feed_forward_length"] = ("uint32", self.d_expert or self.d_ff)
            if not self.normed_experts:
                fields["expert_weights_norm"] = ("bool", False)
        prefixed = {f"{self.architecture}.{key}": value for key, value in fields.items()}
        return {"general.architecture": ("string", self.architecture)} | prefixed

    # ── config.json ──────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a parsed config.json. Raises QjaxError for what the forward pass would compute wrongly."""
        try:
            return cls(**config_json.read(config))
        except QjaxError:
            raise
        except (TypeError, ValueError, ArithmeticError) as error:
            raise QjaxError(f"config.json: it describes no model ({error})") from error

    def to_hf(self) -> dict[str, Any]:
        """The entries of config.json that describe the model.  Raises QjaxError for what they have no word for."""
        return config_json.write(self)


_ORIGINAL = "rope.scaling.original_context_length"
# GGUF's keys behind "rope.scaling.", and the fields of Yarn.
_YARN = {"yarn_attn_factor": "magnitude", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


def _yarn(get: Callable[..., Any]) -> Yarn:
    for key, usual in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if (found := get(f"rope.scaling.{key}", usual, of=float)) != usual:
            raise rope_scaling.unknown(f"rope.scaling.{key} {found:g}")
    given = {field: get(f"rope.scaling.{key}", None, of=float) for key, field in _YARN.items()}
    given = {field: value for field, value in given.items() if value is not None}
    n_ctx = get(_ORIGINAL, get("context_length", of=int), of=int)
    return Yarn(get("rope.scaling.factor", of=float), n_ctx, **given)


def _wide_scalar(traits: Architecture, n_layers: int, d_model: int, n_heads: int, head_dim: int) -> int:
    """attn_scalar as llama.cpp takes it for granted."""
    return d_model // max(n_heads, 1) if n_layers == traits.n_layers_wide else head_dim
