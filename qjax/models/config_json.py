"""Hugging Face's config.json, read and written: the fields of Config by its entries, and the other way round."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qjax.errors import QjaxError
from qjax.models import rope_scaling
from qjax.models.architectures import (
    ARCHITECTURES,
    BY_CLASS,
    MLP,
    QKV,
    Architecture,
    HFClass,
    entry,
    every,
    unknown,
)

if TYPE_CHECKING:
    from qjax.models.config import Config

# What config.json may call the activations of `ops.mlp`; the first is written.
_ACTIVATIONS = {"silu": ("silu",), "gelu": ("gelu_pytorch_tanh", "gelu_new")}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ORIGINAL = "original_max_position_embeddings"
# Of layers, columns, and columns of a head: something is made for each of them before their tensors are looked for.
_MOST = 2**20


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Config.  Raises QjaxError for what the forward pass would compute wrongly."""
    classes = entry(config, "architectures", [], of=list) or ["(none given)"]
    if not isinstance(classes[0], str) or classes[0] not in BY_CLASS:
        raise QjaxError(unknown(classes[0], BY_CLASS))
    architecture = BY_CLASS[classes[0]]
    traits = ARCHITECTURES[architecture]
    hf_class = traits.classes[classes[0]]
    config = {**hf_class.defaults, **(entry(config, "text_config", of=dict) if hf_class.others else config)}
    renamed = {ours: config[theirs] for ours, theirs in traits.hf_keys.items() if theirs in config}
    config = {key: value for key, value in config.items() if traits.hf_keys.get(key, key)} | renamed
    for key, value in traits.hf_fixed.items():
        if config.get(key) not in (None, value):
            raise QjaxError(f"config.json: {key} is {config[key]!r}; only {value!r} is supported")
    known = _ACTIVATIONS[traits.activation]
    if (value := config.get("hidden_act", known[0])) not in known:
        raise QjaxError(f"config.json: hidden_act is {value!r}; only {' or '.join(map(repr, known))} is supported")
    n_layers = entry(config, "num_hidden_layers", of=int, most=_MOST)
    turned = [i % traits.unturned != traits.unturned - 1 for i in range(n_layers)] if traits.unturned else None
    if (layers := entry(config, "no_rope_layers", [], of=list)) and list(map(bool, layers)) != turned:
        expected = f"0 for every {traits.unturned}th" if traits.unturned else "none"
        raise QjaxError(f"config.json: no_rope_layers is {layers}; expected {expected}")
    d_model = entry(config, "hidden_size", of=int, most=_MOST)
    n_heads = entry(config, "num_attention_heads", of=int)
    head_dim = entry(config, "head_dim", 0, of=int, most=_MOST) or traits.head_dim or d_model // max(n_heads, 1)
    n_ctx = entry(config, "max_position_embeddings", of=int)
    window, full_every = _window(config, hf_class, traits, n_layers)
    scalar = entry(config, "query_pre_attn_scalar", traits.attn_scalar, of=int) if traits.attn_scalar else head_dim
    # transformers 5 moved rope_theta and rope_scaling into one entry, or one for each kind of layer.
    rope = entry(config, "rope_parameters", {}, of=dict)
    full = {**entry(rope, _FULL, rope, of=dict)}
    theta = entry(full, "rope_theta", entry(config, "rope_theta", hf_class.theta, of=float), of=float)
    full |= entry(config, "rope_scaling", {}, of=dict)
    local = entry(config, "rope_local_base_freq", traits.local_theta, of=float)
    local = entry(entry(rope, _SLIDING, {}, of=dict), "rope_theta", local, of=float)
    n_rot, rope_n_ctx = head_dim, None
    if traits.partly_turned:
        share = entry(config, "partial_rotary_factor", 1.0, of=float)
        n_rot = int(head_dim * entry(full, "partial_rotary_factor", share, of=float, most=1))
        rope_n_ctx = entry(config, _ORIGINAL, n_ctx, of=int) or n_ctx
        full[_ORIGINAL] = rope_n_ctx
    d_ff = entry(config, "intermediate_size", *([] if traits.gated else [4 * d_model]), of=int)
    n_experts = entry(config, "num_local_experts", of=int) if hf_class.experts else 0
    d_expert = entry(config, "moe_intermediate_size", of=int) if traits.sized_experts else d_ff
    return dict(
        architecture=architecture,
        n_layers=n_layers,
        d_model=d_model,
        d_ff=d_ff,
        n_heads=n_heads,
        n_kv_heads=entry(config, "num_key_value_heads", 0, of=int) or n_heads,
        head_dim=head_dim,
        vocab=entry(config, "vocab_size", of=int),
        n_ctx=n_ctx,
        norm_eps=entry(config, "rms_norm_eps", of=float),
        rope_theta=theta,
        tied=bool(config.get("tie_word_embeddings", traits.tied)),
        biases=_biases(config, traits),
        window=window,
        full_every=full_every,
        local_theta=local if traits.local_theta and window else None,
        attn_scalar=None if scalar == head_dim else scalar,
        attn_softcap=_softcap(config, "attn_logit_softcapping", traits.attn_softcap),
        logit_softcap=_softcap(config, "final_logit_softcapping", traits.logit_softcap),
        n_rot=None if n_rot == head_dim else n_rot,
        rope_n_ctx=rope_n_ctx,
        n_experts=n_experts,
        n_experts_used=entry(config, "num_experts_per_tok", of=int) if n_experts else 0,
        d_expert=None if d_expert == d_ff else d_expert,
        normed_experts=bool(config.get("norm_topk_prob", not traits.sized_experts)),
        **rope_scaling.read(full, n_rot, theta, n_ctx, long=traits.partly_turned),
    )


def write(config: "Config") -> dict[str, Any]:
    """The entries that describe the model.  Raises QjaxError for what they have no word for."""
    traits = config.traits
    name, hf_class = next(
        (name, row)
        for name, row in traits.classes.items()
        if row.experts == bool(config.n_experts) and (row.windowed or config.window is None)
    )
    described = {
        "architectures": [name],
        "model_type": hf_class.model_type,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.n_ctx,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "hidden_act": _ACTIVATIONS[traits.activation][0],
        "attention_bias": "attn_output" in config.biases,
        "mlp_bias": set(MLP) <= set(config.biases),
    }
    if hf_class.windowed:
        described["sliding_window"] = config.window
    if traits.full_every:
        described["layer_types"] = [_SLIDING if sliding else _FULL for sliding in config.sliding]
    if traits.attn_scalar:
        described["query_pre_attn_scalar"] = config.attn_scalar or config.head_dim
        described["attn_logit_softcapping"] = config.attn_softcap or None
        described["final_logit_softcapping"] = config.logit_softcap or None
    if config.local_theta:
        described["rope_local_base_freq"] = config.local_theta
    if config.n_experts:
        described["num_local_experts"] = config.n_experts
        described["num_experts_per_tok"] = config.n_experts_used
    if traits.sized_experts:
        described["moe_intermediate_size"] = config.d_expert or config.d_ff
        described["norm_topk_prob"] = config.normed_experts
    described = {key: value for key, value in described.items() if traits.hf_keys.get(key, key)}
    if {*config.biases} != {*_biases(described, traits)}:
        found = ", ".join(config.biases) or "none"
        raise QjaxError(f"config.json of {config.architecture} has no word for such biases ({found})")
    if traits.partly_turned:
        described["partial_rotary_factor"] = config.turned / config.head_dim
        described[_ORIGINAL] = config.rope_n_ctx or config.n_ctx
    if scaling := _rope_scaling(config):
        described["rope_scaling"] = scaling
    return {traits.hf_keys.get(key, key): value for key, value in described.items()}


def _rope_scaling(config: "Config") -> dict[str, Any]:
    if config.rope_scale != 1:
        return {"rope_type": "linear", "factor": 1 / config.rope_scale}
    if config.long_factors:
        lists = {"short_factor": list(config.rope_factors), "long_factor": list(config.long_factors)}
        return {"rope_type": "longrope", "attention_factor": config.rope_magnitude} | lists
    if config.yarn:
        factor, n_ctx, fast, slow, magnitude = config.yarn
        yarn = {"rope_type": "yarn", "factor": factor, _ORIGINAL: n_ctx, "beta_fast": fast, "beta_slow": slow}
        return yarn if magnitude is None else yarn | {"attention_factor": magnitude}
    if not config.rope_factors:
        return {}
    llama3 = {"rope_type": "llama3", "factor": max(config.rope_factors)} | rope_scaling.LLAMA3
    factors = rope_scaling.read(llama3, config.turned, config.rope_theta, config.n_ctx)["rope_factors"]
    # Others may have rounded otherwise.
    if not np.allclose(factors, config.rope_factors, rtol=1e-5, atol=0):
        raise QjaxError("config.json has no word for these factors of rotary embedding (rope_freqs.weight)")
    return llama3


def _softcap(config: Mapping[str, Any], key: str, usual: float) -> float:
    """0 where config.json says null."""
    return entry(config, key, 0.0 if key in config else usual, of=float)


def _biases(config: Mapping[str, Any], traits: Architecture) -> tuple[str, ...]:
    """The matrices with a bias, by config.json."""
    attention = (*QKV, "attn_output") if config.get("attention_bias") else traits.biases
    return attention + (MLP if config.get("mlp_bias") else ())


def _window(
    config: Mapping[str, Any], hf_class: HFClass, traits: Architecture, n_layers: int
) -> tuple[int | None, int]:
    """window and full_every, by config.json."""
    types = entry(config, "layer_types", [], of=list)
    window = entry(config, "sliding_window", None if "sliding_window" in config else traits.window, of=int)
    if not traits.full_every:
        all_alike = hf_class.windowed and {*types} == {_SLIDING}
        if config.get("use_sliding_window") or (_SLIDING in types and not all_alike):
            raise QjaxError("config.json: use_sliding_window; only attention to all tokens is supported for it")
        return (window if hf_class.windowed else None), 0
    full_every = entry(config, "sliding_window_pattern", 0, of=int) or traits.full_every
    if types:
        if len(types) != n_layers or not {*types} <= {_FULL, _SLIDING}:
            raise QjaxError(f"config.json: layer_types is {types}; expected {_FULL} or {_SLIDING} for each layer")
        full_every = every([kind == _SLIDING for kind in types], full_every)
    return (None, 0) if window is None or full_every == 1 else (window, full_every)
