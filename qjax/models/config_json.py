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
    every,
    number,
    part,
    texts,
    unknown,
    whole,
)

if TYPE_CHECKING:
    from qjax.models.config import Config

# What config.json may call the activations of `ops.mlp`; the first is written.
_ACTIVATIONS = {"silu": ("silu",), "gelu": ("gelu_pytorch_tanh", "gelu_new")}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ORIGINAL, _SHARE, _SCALAR = "original_max_position_embeddings", "partial_rotary_factor", "query_pre_attn_scalar"


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Config.  Raises QjaxError for what the forward pass would compute wrongly."""
    classes = texts(config, "architectures") or ["(none given)"]
    if classes[0] not in BY_CLASS:
        raise QjaxError(unknown(classes[0], BY_CLASS))
    architecture = BY_CLASS[classes[0]]
    traits = ARCHITECTURES[architecture]
    hf_class = traits.classes[classes[0]]
    config = {**hf_class.defaults, **(part(config, "text_config") if hf_class.others else config)}
    renamed = {ours: config[theirs] for ours, theirs in traits.hf_keys.items() if theirs in config}
    config = {key: value for key, value in config.items() if traits.hf_keys.get(key, key)} | renamed
    for key, value in traits.hf_fixed.items():
        if config.get(key) not in (None, value):
            raise QjaxError(f"config.json: {key} is {config[key]!r}; only {value!r} is supported")
    known = _ACTIVATIONS[traits.activation]
    if (value := config.get("hidden_act", known[0])) not in known:
        raise QjaxError(f"config.json: hidden_act is {value!r}; only {' or '.join(map(repr, known))} is supported")
    n_layers = whole(config, "num_hidden_layers")
    if layers := config.get("no_rope_layers"):
        each = traits.unturned
        as_usual = each and isinstance(layers, list) and len(layers) == n_layers
        if not as_usual or any(bool(turned) != (i % each != each - 1) for i, turned in enumerate(layers)):
            expected = f"0 for every {each}th" if each else "none"
            raise QjaxError(f"config.json: no_rope_layers is {layers!r:.80}; expected {expected}")
    d_model, n_heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    head_dim = whole(config, "head_dim", None) or traits.head_dim or d_model // max(n_heads, 1)
    n_ctx = whole(config, "max_position_embeddings")
    window, full_every = _window(config, hf_class, traits, n_layers)
    scalar = whole({_SCALAR: traits.attn_scalar, **config}, _SCALAR) if traits.attn_scalar else head_dim
    # transformers 5 moved rope_theta and rope_scaling into one entry, or one for each kind of layer.
    rope = part(config, "rope_parameters")
    full = {**(part(rope, _FULL) if _FULL in rope else rope)}
    theta = number({"rope_theta": hf_class.theta, **config, **full}, "rope_theta")
    full |= part(config, "rope_scaling")
    local = {"rope_theta": config.get("rope_local_base_freq", traits.local_theta), **part(rope, _SLIDING)}
    n_rot, rope_n_ctx = head_dim, None
    if traits.partly_turned:
        share = number({_SHARE: 1.0, **config, **full}, _SHARE)
        if not 0 < share <= 1:
            raise QjaxError(f"config.json: {_SHARE} is {share}, expected more than 0 and at most 1")
        n_rot = int(head_dim * share)
        rope_n_ctx = whole(config, _ORIGINAL, None) or n_ctx
        full[_ORIGINAL] = rope_n_ctx
    implied = config.get("intermediate_size") is None and not traits.gated
    d_ff = 4 * d_model if implied else whole(config, "intermediate_size")
    n_experts = whole(config, "num_local_experts") if hf_class.experts else 0
    d_expert = whole(config, "moe_intermediate_size") if traits.sized_experts else d_ff
    return dict(
        architecture=architecture,
        n_layers=n_layers,
        d_model=d_model,
        d_ff=d_ff,
        n_heads=n_heads,
        n_kv_heads=whole(config, "num_key_value_heads", None) or n_heads,
        head_dim=head_dim,
        vocab=whole(config, "vocab_size"),
        n_ctx=n_ctx,
        norm_eps=number(config, "rms_norm_eps"),
        rope_theta=theta,
        tied=bool(config.get("tie_word_embeddings", traits.tied)),
        biases=_biases(config, traits),
        window=window,
        full_every=full_every,
        local_theta=number(local, "rope_theta") if traits.local_theta and window else None,
        attn_scalar=None if scalar == head_dim else scalar,
        attn_softcap=number(config, "attn_logit_softcapping", traits.attn_softcap) or 0.0,
        logit_softcap=number(config, "final_logit_softcapping", traits.logit_softcap) or 0.0,
        n_rot=None if n_rot == head_dim else n_rot,
        rope_n_ctx=rope_n_ctx,
        n_experts=n_experts,
        n_experts_used=whole(config, "num_experts_per_tok") if n_experts else 0,
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


def _biases(config: Mapping[str, Any], traits: Architecture) -> tuple[str, ...]:
    """The matrices with a bias, by config.json."""
    attention = (*QKV, "attn_output") if config.get("attention_bias") else traits.biases
    return attention + (MLP if config.get("mlp_bias") else ())


def _window(
    config: Mapping[str, Any], hf_class: HFClass, traits: Architecture, n_layers: int
) -> tuple[int | None, int]:
    """window and full_every, by config.json."""
    types, window = texts(config, "layer_types"), whole(config, "sliding_window", traits.window)
    if not traits.full_every:
        all_alike = hf_class.windowed and {*types} == {_SLIDING}
        if config.get("use_sliding_window") or (_SLIDING in types and not all_alike):
            raise QjaxError("config.json: use_sliding_window; only attention to all tokens is supported for it")
        return (window if hf_class.windowed else None), 0
    full_every = whole(config, "sliding_window_pattern", None) or traits.full_every
    if types:
        if len(types) != n_layers or not {*types} <= {_FULL, _SLIDING}:
            raise QjaxError(f"config.json: layer_types is {types!r:.80}; expected {_FULL} or {_SLIDING} for each layer")
        full_every = every([kind == _SLIDING for kind in types], full_every)
    return (None, 0) if window is None or full_every == 1 else (window, full_every)
