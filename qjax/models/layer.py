"""One layer of the transformer: its tensors, and what it computes of the residual stream x, in the order of a layer.

    x ─ norm ─ q, k, v ─ rope ─ attention ─ output (─ norm) ─ + ─ norm ─ feed-forward (─ norm) ─ + ─► x

One function serves all architectures.  A row of `architectures.ARCHITECTURES` says which tensors there are and how they
are used; where the layers of a model differ, arrays with an entry for each layer go along with the weights (`facts`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int

from qjax.errors import QjaxError
from qjax.models.config import Config
from qjax.ops.attention import Scoring
from qjax.ops.experts import mixture, route
from qjax.ops.kernels.columns import Columns
from qjax.ops.linear import matmul
from qjax.ops.mlp import ACTIVATIONS, gated
from qjax.ops.norm import layer_norm, rms_norm
from qjax.ops.rope import Rotation, rope, rotation

# The tensors of a layer, or of a run of layers, by their GGUF name behind "blk.0.": norms and biases are Arrays, the
# matrices Array or QTensor; and the facts.
Layer = dict[str, Any]

TURNED, SLIDING = FACTS = "turned", "sliding"
"""Of each layer of a run: whether rotary embedding turns its queries and keys, and whether its attention has the
window.  There if layers differ in it."""

FIRST_EXPERT = "first_expert"
"""Where the experts of all layers lie one behind another: the number of this layer's first."""

Statistic = Callable[[Array], Any]
"""What to keep of the input (batch, seq, d_in) of a matrix product: arrays, in any pytree"""

ROUTED = "routed"
"""What a statistic keeps of the tokens that each expert gets."""

_QKV = ("attn_q.weight", "attn_k.weight", "attn_v.weight")
_GATE_UP = ("ffn_gate.weight", "ffn_up.weight")
SHARING = (_QKV, _GATE_UP)
"""The matrices of a layer that are multiplied with the same input; where a layout allows it they are one matrix, under
the first one's name."""

ROUTER = "ffn_gate_inp.weight"
EXPERTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight")
"""Matrices of all experts of a layer, (n_experts, out_features, in_features)."""


def layer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer and their shapes, by their name behind "blk.0.".

    Raises QjaxError for biases of matrices that it does not have.
    """
    d, q_rows, kv_rows = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    traits, n, d_ff = config.traits, config.n_experts, config.d_ff
    layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (d,)}
    if traits.fused:
        layer["attn_qkv.weight"] = (q_rows + 2 * kv_rows, d)
    else:
        layer |= dict(zip(_QKV, ((q_rows, d), (kv_rows, d), (kv_rows, d))))
    layer |= {"attn_output.weight": (d, q_rows), "ffn_norm.weight": (d,)}
    if n:
        d_ff = config.d_expert or d_ff
        layer |= {ROUTER: (n, d)} | dict(zip(EXPERTS, ((n, d_ff, d), (n, d_ff, d), (n, d, d_ff))))
    elif traits.fused:
        layer |= {"ffn_up.weight": (d_ff * (2 if traits.gated else 1), d), "ffn_down.weight": (d, d_ff)}
    else:
        layer |= dict.fromkeys(_GATE_UP, (d_ff, d)) | {"ffn_down.weight": (d, d_ff)}
    if alone := [name for name in config.biases if f"{name}.weight" not in layer]:
        raise QjaxError(f"model config: biases of {', '.join(alone)}, which a layer of this model does not have")
    layer |= {f"{name}.bias": layer[f"{name}.weight"][:1] for name in config.biases}
    if traits.head_norms:
        layer |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (config.head_dim,))
    if traits.post_norms:
        layer |= dict.fromkeys(("post_attention_norm.weight", "post_ffw_norm.weight"), (d,))
    if traits.layer_norms:
        layer |= dict.fromkeys(("attn_norm.bias", "ffn_norm.bias"), (d,))
    return layer


def facts(config: Config) -> dict[str, np.ndarray]:
    """What the layers of a model differ in, of all of them."""
    found = {}
    if period := config.traits.unturned:
        found[TURNED] = (np.arange(config.n_layers) + 1) % period != 0
    if config.window is not None and config.full_every:
        found[SLIDING] = np.array(config.sliding)
    return found


# ── shared by all layers ─────────────────────────────────────────────────────────────────────────────


class Rotations(NamedTuple):
    """How queries and keys are turned."""

    full: Rotation
    sliding: Rotation
    """in layers with a window"""


def rotations(config: Config, positions: Int[Array, " seq"], n_positions: int) -> Rotations | None:
    """The rotations of some positions of a text of up to n_positions; None where nothing is turned.

    n_positions decides whether the text is a long one for longrope, as the size of the context does in llama.cpp.
    """
    if config.traits.learned_positions:
        return None
    long = config.rope_n_ctx is not None and n_positions > config.rope_n_ctx
    factors = (long and config.long_factors) or config.rope_factors
    magnitude = config.rope_magnitude
    if config.yarn:
        factors = config.yarn.factors(config.turned, config.rope_theta)
        magnitude *= config.yarn.scale
    turn = partial(rotation, positions, config.turned)
    full = turn(config.rope_theta, config.rope_scale, factors, magnitude)
    return Rotations(full, turn(config.local_theta) if config.local_theta else full)


# ── the layer ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Products:
    """The matrix products of a layer, and what a statistic keeps of their inputs, by the name of the matrix."""

    config: Config
    layer: Layer
    dtype: DTypeLike
    statistic: Statistic | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    def __call__(self, h: Float32[Array, "*batch d_in"], *names: str) -> list[Float32[Array, "*batch d_out"]]:
        """Of each name h @ w.T, and the bias if there is one.  Some may lie behind others in one matrix (`SHARING`)."""
        if self.statistic:
            self.kept |= {name: self.statistic(h) for name in names}
        # Which experts are taken may not depend on how products are rounded.
        dtype = jnp.float32 if names == (ROUTER,) else self.dtype
        layer, shapes = self.layer, layer_shapes(self.config)
        products = jnp.concatenate([matmul(h, layer[name], dtype) for name in names if name in layer], axis=-1)
        ends = np.cumsum([shapes[name][0] for name in names])
        biases = (layer.get(name.removesuffix("weight") + "bias") for name in names)
        return [
            y if bias is None else y + bias.astype(jnp.float32)
            for y, bias in zip(jnp.split(products, ends[:-1], axis=-1), biases)
        ]

    def of_expert(self, rows: Float32[Array, "*batch d_in"], name: str, e: Array) -> Float32[Array, "*batch d_out"]:
        """The product with the matrix of expert e."""
        return matmul(rows, of_stack(self.layer[name], self.layer.get(FIRST_EXPERT, 0) + e), self.dtype)


def norm(config: Config, x: Array, weight: Array, bias: Array | None = None) -> Array:
    """The norm of the architecture."""
    return rms_norm(x, weight, config.norm_eps) if bias is None else layer_norm(x, weight, bias, config.norm_eps)


def qkv(
    config: Config, layer: Layer, x: Float32[Array, "batch seq d_model"], turns: Rotations | None, multiply: Products
) -> tuple[Array, Array, Array]:
    """Queries, keys and values, (batch, seq, heads or kv_heads, head_dim); queries and keys are turned."""
    h = norm(config, x, layer["attn_norm.weight"], layer.get("attn_norm.bias"))
    if config.traits.fused:
        ends = np.cumsum([config.n_heads, config.n_kv_heads]) * config.head_dim
        projected = jnp.split(multiply(h, "attn_qkv.weight")[0], ends, axis=-1)
    else:
        projected = multiply(h, *_QKV)
    q, k, v = (y.reshape(*x.shape[:2], -1, config.head_dim) for y in projected)
    if config.traits.head_norms:
        q = norm(config, q, layer["attn_q_norm.weight"])
        k = norm(config, k, layer["attn_k_norm.weight"])
    if turns is None:
        return q, k, v
    turn, halves = turns.full, config.traits.halves
    if SLIDING in layer:
        turn = jax.tree.map(partial(jnp.where, layer[SLIDING]), turns.sliding, turns.full)
    if TURNED in layer:
        turn = Rotation(jnp.where(layer[TURNED], turn.cos, 1), jnp.where(layer[TURNED], turn.sin, 0))
    return rope(q, turn, halves), rope(k, turn, halves), v


def scoring(config: Config, layer: Layer) -> Scoring:
    """How the layer's attention scores; a window that it does not have is longer than any text."""
    window: Any = config.window
    if SLIDING in layer:
        window = jnp.where(layer[SLIDING], window, np.iinfo(np.int32).max)
    return Scoring(window, config.attn_scalar and config.attn_scalar**-0.5, config.attn_softcap)


def finish(
    config: Config,
    layer: Layer,
    x: Float32[Array, "batch seq d_model"],
    y: Float32[Array, "batch seq heads head_dim"],
    multiply: Products,
) -> Float32[Array, "batch seq d_model"]:
    """Add the attention's result y and then the feed-forward layer's to the residual stream."""
    (y,) = multiply(y.reshape(*x.shape[:2], -1), "attn_output.weight")
    x = x + _post_norm(config, layer, "post_attention_norm.weight", y)
    h = norm(config, x, layer["ffn_norm.weight"], layer.get("ffn_norm.bias"))
    y = _experts(config, h, multiply) if config.n_experts else _feed_forward(config, h, multiply)
    return x + _post_norm(config, layer, "post_ffw_norm.weight", y)


def _post_norm(config: Config, layer: Layer, name: str, y: Array) -> Array:
    return norm(config, y, layer[name]) if name in layer else y


def _feed_forward(config: Config, h: Float32[Array, "batch seq d_model"], multiply: Products) -> Array:
    traits = config.traits
    if not traits.gated:
        made = ACTIVATIONS[traits.activation](multiply(h, "ffn_up.weight")[0])
    else:
        gate, up = jnp.split(multiply(h, "ffn_up.weight")[0], 2, axis=-1) if traits.fused else multiply(h, *_GATE_UP)
        made = gated(gate, up, traits.activation)
    return multiply(made, "ffn_down.weight")[0]


def _experts(config: Config, h: Float32[Array, "batch seq d_model"], multiply: Products) -> Array:
    (logits,) = multiply(h, ROUTER)
    ids, shares = route(logits, config.n_experts_used, config.normed_experts)

    def inner(rows: Array, e: Array) -> Array:
        gate, up = (multiply.of_expert(rows, name, e) for name in EXPERTS[:2])
        return gated(gate, up, config.traits.activation)

    if multiply.statistic:
        multiply.kept |= _seen_by_experts(config, h, ids, inner, multiply.statistic)

    def expert(rows: Array, e: Array) -> Array:
        return multiply.of_expert(inner(rows, e), EXPERTS[2], e)

    rows, ids, shares = (a.reshape(-1, a.shape[-1]) for a in (h, ids, shares))
    return mixture(rows, ids, shares, config.n_experts, expert).reshape(h.shape)


def _seen_by_experts(
    config: Config, h: Array, ids: Array, inner: Callable[[Array, Array], Array], statistic: Statistic
) -> dict[str, Any]:
    """What a statistic keeps of the inputs of each expert's matrices, tokens of others being zeros, experts stacked;
    and under `ROUTED` of ones for its tokens."""

    def of_expert(e: Array) -> tuple[Any, Any, Any]:
        its = (ids == e).any(-1, keepdims=True).astype(jnp.float32)
        return statistic(its * h), statistic(its * inner(its * h, e)), statistic(its)

    h_seen, inner_seen, routed = lax.map(of_expert, jnp.arange(config.n_experts))
    return dict(zip((*EXPERTS, ROUTED), (h_seen, h_seen, inner_seen, routed)))


def of_stack(leaf: Any, i: int | Int[Array, ""]) -> Any:
    """Matrix i of a stack of them."""
    take = lambda w: w.of_layer(i) if isinstance(w, Columns) else w[i]  # noqa: E731
    return jax.tree.map(take, leaf, is_leaf=lambda w: isinstance(w, Columns))


def of_run(run: Layer, i: int | Int[Array, ""]) -> Layer:
    """Layer i of a run of layers.  Experts stay where they are: those of all layers one behind another, so that a
    product reads those that it needs and no others."""
    layer = {name: of_stack(leaf, i) for name, leaf in run.items() if name not in EXPERTS}
    if EXPERTS[0] not in run:
        return layer
    flat = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
    n_experts = run[ROUTER].shape[-2]
    return layer | {name: jax.tree.map(flat, run[name]) for name in EXPERTS} | {FIRST_EXPERT: i * n_experts}
