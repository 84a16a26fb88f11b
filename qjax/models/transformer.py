"""The transformer of Llama (Touvron et al. 2023) and its kin: pure functions of Config, Params, tokens; read top-down.

    tokens ─ embed ─► x ┬─ norm ─ attention ─ + ─┬─ norm ─ feed-forward ─ + ─► x ─ norm ─ head ─► logits
                        └─────────────────────┘  └────────────────────────┘  n_layers times

A layer is in layer.py. Tensors go by their GGUF names and lie as in a GGUF file: matrices (out_features, in_features),
the rows of attn_q and attn_k ordered for rotary embedding as the architecture has it. The residual stream x is float32
throughout; `dtype` is the type in which activations are multiplied with weights; attention is in float32.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int

from qjax.errors import QjaxError
from qjax.models.cache import FLOAT32, Cache, CacheTypes
from qjax.models.config import Config
from qjax.models.layer import (
    SHARING,
    Layer,
    Products,
    Statistic,
    facts,
    finish,
    layer_shapes,
    norm,
    of_run,
    of_stack,
    qkv,
    rotations,
    scoring,
)
from qjax.models.memory import give_back_memory
from qjax.ops.adapted import Adapted
from qjax.ops.attention import softcapped
from qjax.ops.kernels.columns import Columns, columns, joined
from qjax.ops.linear import embed, matmul
from qjax.ops.sharded import Sharded, devices, keep_cache, mesh_of, whole
from qjax.tensor import QTensor


class Params(NamedTuple):
    """The weights of a model, or of a part of it that lies on devices of its own (see placement.py); leaves Array,
    QTensor or Sharded, and Columns where the model only generates.

    Layers that follow one another and agree in every format, shape and device are stacked on a leading axis, so
    that one compiled body serves them all; a model in one format is a single run.
    """

    token_embd: Array | QTensor | Sharded | Columns | None
    """(vocab, d_model); None in a part that begins later"""
    runs: tuple[Layer, ...]
    output_norm: Array | None
    """(d_model,); None in a part that ends earlier"""
    output: Array | QTensor | Sharded | Columns | None
    """The head, (vocab, d_model); None where the token embedding serves (tied)."""
    position_embd: Array | QTensor | None = None
    """(n_ctx, d_model), where the architecture has it and the token embedding is"""
    output_norm_bias: Array | None = None
    """(d_model,), likewise"""


class Observed(NamedTuple):
    """What a Statistic kept of the input of each matrix product, the layers of a run stacked as in Params."""

    runs: tuple[dict[str, Any], ...]
    head: Any

    def unstack(self, config: Config) -> dict[str, Any]:
        """By the GGUF name of the matrix; the head of a tied model is its token_embd.weight."""
        return _unstack_runs(self.runs) | {"token_embd.weight" if config.tied else "output.weight": self.head}


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model and its shape, in the order of a GGUF file."""
    d, layer, traits = config.d_model, layer_shapes(config), config.traits
    factors = {name: (len(values),) for name, values in config.factors.items()}
    first = {"token_embd.weight": (config.vocab, d)}
    first |= {"position_embd.weight": (config.n_ctx, d)} if traits.learned_positions else {}
    layers = {f"blk.{i}.{name}": shape for i in range(config.n_layers) for name, shape in layer.items()}
    last = {"output_norm.weight": (d,)} | ({"output_norm.bias": (d,)} if traits.layer_norms else {})
    head = {} if config.tied else {"output.weight": (config.vocab, d)}
    return factors | first | layers | last | head


def init(config: Config, key: Array) -> dict[str, Float32[Array, "..."]]:
    """Random float32 weights by GGUF name: ones for norms, zeros for biases, else normal with deviation 0.02, and
    0.02 / √(2 n_layers) for the two matrices of a layer that write to the residual stream (GPT-2's rule)."""

    def draw(key: Array, name: str, shape: tuple[int, ...]) -> Array:
        if name in config.factors:
            return jnp.array(config.factors[name])
        if len(shape) == 1:
            return (jnp.zeros if name.endswith(".bias") else jnp.ones)(shape)
        residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
        return jax.random.normal(key, shape) * 0.02 / (2 * config.n_layers if residual else 1) ** 0.5

    shapes = tensor_shapes(config)
    return {n: draw(k, n, s) for k, (n, s) in zip(jax.random.split(key, len(shapes)), shapes.items())}


def stack(tensors: Mapping[str, Any] | Iterable[tuple[str, Any]], config: Config) -> Params:
    """Gather tensors (Array, QTensor, Sharded or Columns) by GGUF name into Params.

    Each is let go once it is stacked, so that the weights are not held twice if they come as (name, tensor), one by
    one.  Raises QjaxError for a missing, unknown or misshapen tensor, and for a quantized norm.
    """
    tensors, shapes = dict(tensors), tensor_shapes(config)
    for name in [*shapes, *tensors]:
        if name not in tensors:
            raise QjaxError(f"{name}: the {config.architecture} model needs this tensor, and it is not there")
        if name not in shapes:
            raise QjaxError(f"{name}: a {config.architecture} model has no such tensor; ignoring it could be wrong")
        if tuple(tensors[name].shape) != shapes[name]:
            raise QjaxError(f"{name}: shape {tuple(tensors[name].shape)}, expected {shapes[name]} by the config")
        if len(shapes[name]) == 1 and isinstance(tensors[name], QTensor):
            raise QjaxError(f"{name}: stored as {tensors[name].format.name}; a vector has to be F32, F16 or BF16")

    names, differing = list(layer_shapes(config)), facts(config)

    def kind(i: int) -> tuple[Any, ...]:
        layer = [tensors[f"blk.{i}.{name}"] for name in names]
        leaves, structure = jax.tree.flatten(layer)
        return structure, devices(layer), *((leaf.shape, leaf.dtype) for leaf in leaves)

    def run(layers: Sequence[int]) -> Layer:
        together = _together({name: tensors[f"blk.{layers[0]}.{name}"] for name in names})
        stacked = {
            group[0]: _stack((_join([tensors.pop(f"blk.{i}.{name}") for name in group]) for i in layers), len(layers))
            for group in together
        }
        for name, values in differing.items():
            # Where the norms lie: a part of a model is in one place.
            stacked[name] = jax.device_put(values[np.array(layers)], stacked["attn_norm.weight"].sharding)
        return stacked

    runs = [list(layers) for _, layers in groupby(range(config.n_layers), key=kind)]
    return Params(
        token_embd=tensors["token_embd.weight"],
        runs=tuple(map(run, runs)),
        output_norm=tensors["output_norm.weight"],
        output=tensors.get("output.weight"),
        position_embd=tensors.get("position_embd.weight"),
        output_norm_bias=tensors.get("output_norm.bias"),
    )


def layer_part(config: Config, tensors: Mapping[str, Any], i: int) -> Params:
    """Layer i alone, a part of a model that goes from x to x."""
    layer = {name: jax.tree.map(lambda leaf: leaf[None], tensors[f"blk.{i}.{name}"]) for name in layer_shapes(config)}
    layer |= {name: jnp.asarray(values[i : i + 1]) for name, values in facts(config).items()}
    return Params(None, (layer,), None, None)


def _stack(layers: Iterable[Any], n: int) -> Any:
    """So many layers along a new first axis; on a CPU each is let go before the next one comes."""
    layers = iter(layers)
    first = next(layers)
    where = devices(first)
    layers = chain([first], layers)
    if where is None or any(device.platform != "cpu" for device in where) or len(where) > 1:
        stacked = jax.block_until_ready(jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
        give_back_memory()
        return stacked
    whole = jax.tree.map(lambda leaf: _uninitialized((n, *leaf.shape), leaf.dtype), first)
    for i, layer in enumerate(layers):
        for to, leaf in zip(jax.tree.leaves(whole), jax.tree.leaves(layer)):
            to[i] = leaf
        del layer, leaf
        give_back_memory()
    return jax.tree.map(lambda a, leaf: jax.device_put(a, leaf.sharding if leaf.committed else None), whole, first)


def _uninitialized(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that takes memory as it is written, and that JAX takes over as it is: its lines begin at 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def unstack(params: Params, config: Config) -> dict[str, Array | QTensor]:
    """The inverse of stack, in the order of a GGUF file; each tensor as a whole, Array or QTensor, with what an adapter
    adds to it.

    Raises QjaxError for weights laid out to generate only.
    """
    _check_exact(params)
    tensors = _unstack_runs(params.runs)
    tensors |= {"token_embd.weight": params.token_embd, "position_embd.weight": params.position_embd}
    tensors |= {"output_norm.weight": params.output_norm, "output_norm.bias": params.output_norm_bias}
    tensors["output.weight"] = params.output
    tensors |= {name: jnp.array(values) for name, values in config.factors.items()}
    return {name: _merged(whole(tensors[name])) for name in tensor_shapes(config)}


def _merged(w: Any) -> Any:
    return w.merged() if isinstance(w, Adapted) else w


def for_one_row(params: Params) -> Params:
    """The weights laid out for `step` with one token at a time, where that is quicker (see `laid_out`)."""
    runs = tuple(_joined({name: laid_out(w) for name, w in run.items()}) for run in params.runs)
    if params.output is None:
        return params._replace(runs=runs, token_embd=laid_out(params.token_embd))
    return params._replace(runs=runs, output=laid_out(params.output))


def laid_out(w: Any) -> Any:
    """A matrix of a layer, or the head, as the CPU reads it while it generates; itself if it is not quantized, or not
    on a single CPU.  See `Columns`."""
    where = devices(w)
    if not isinstance(w, QTensor) or where is None or len(where) > 1 or next(iter(where)).platform != "cpu":
        return w
    return columns(w)


def _together(layer: Layer) -> list[list[str]]:
    """The names of a layer, or of a run, those together whose Columns can be one matrix: each product has a cost of its
    own, which is most of it in a small model."""

    def kind(name: str) -> Any:
        w = layer[name]
        return w.kind if isinstance(w, Columns) else name

    alone = [[name] for name in layer if not any(name in names for names in SHARING)]
    shared = (groupby((name for name in names if name in layer), kind) for names in SHARING)
    return alone + [list(names) for groups in shared for _, names in groups]


def _join(matrices: Sequence[Any]) -> Any:
    return joined(*matrices) if len(matrices) > 1 else matrices[0]


def _joined(layer: Layer) -> Layer:
    """With one matrix, under the first one's name, for those that can be one."""
    return {names[0]: _join([layer[name] for name in names]) for names in _together(layer)}


def _check_exact(params: Params) -> None:
    is_columns = lambda leaf: isinstance(leaf, Columns)  # noqa: E731
    if any(map(is_columns, jax.tree.leaves(params, is_leaf=is_columns))):
        raise QjaxError(
            "the model was loaded to generate text only: its weights are laid out for that and rounded a little, here "
            "they have to be exact. Load it without only_generate."
        )


def _unstack_runs(runs: tuple[Layer, ...]) -> dict[str, Any]:
    layers = ({name: of_stack(leaf, i) for name, leaf in run.items()} for run in runs for i in range(n_layers(run)))
    return {f"blk.{i}.{name}": leaf for i, layer in enumerate(layers) for name, leaf in layer.items()}


def n_layers(run: Layer) -> int:
    """How many layers a run stacks."""
    return jax.tree.leaves(run)[0].shape[0]


# ── the forward pass ─────────────────────────────────────────────────────────────────────────────────


@partial(jax.jit, static_argnames=("config", "first", "dtype", "types", "remat"))
def forward(
    config: Config,
    params: Params,
    tokens: Int[Array, "batch seq"] | Float32[Array, "batch seq d_model"],
    *,
    first: int = 0,
    dtype: DTypeLike = jnp.float32,
    types: CacheTypes = FLOAT32,
    remat: bool = False,
) -> Float32[Array, "batch scored vocab"]:
    """Logits of the positions from `first` on, each given all tokens up to it.

    There is no cache, but all keys and values are rounded as one of these types would hold them.  Of a part:
    `tokens` may be what the part before returned; without a head it returns x (batch, seq, d_model).
    remat: for a gradient keep of each layer only its input, and compute the rest again (Chen et al. 2016).
    """
    return _forward(config, params, tokens, None, first, dtype, types, remat)[0]


@partial(jax.jit, static_argnames=("config", "statistic", "first", "dtype"))
def observe(
    config: Config,
    params: Params,
    tokens: Int[Array, "batch seq"] | Float32[Array, "batch seq d_model"],
    statistic: Statistic,
    *,
    first: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float32[Array, "batch scored vocab"], Observed]:
    """`forward`, and what `statistic` keeps of the float32 input of each matrix product, the head's included.

    It sees all positions, whatever `first`; where no logits are needed, first = seq saves the head's product.
    """
    return _forward(config, params, tokens, statistic, first, dtype, FLOAT32)


def _forward(
    config: Config,
    params: Params,
    tokens: Int[Array, "batch seq"] | Float32[Array, "batch seq d_model"],
    statistic: Statistic | None,
    first: int,
    dtype: DTypeLike,
    types: CacheTypes,
    remat: bool = False,
) -> tuple[Float32[Array, "batch scored vocab"], Observed]:
    _check_exact(params)
    positions = jnp.arange(tokens.shape[1])
    turns, x = rotations(config, positions, tokens.shape[1]), _embed(config, params, tokens, positions)

    def body(x: Array, layer: Layer) -> tuple[Array, dict[str, Any]]:
        multiply = Products(config, layer, dtype, statistic)
        q, k, v = qkv(config, layer, x, turns, multiply)
        y = types.attend(q, *types.pack(k, v), scoring=scoring(config, layer))
        return finish(config, layer, x, y, multiply), multiply.kept

    runs = []
    for run in params.runs:
        x, kept = lax.scan(jax.checkpoint(body, prevent_cse=False) if remat else body, x, run)
        runs.append(kept)
    if params.output_norm is None:
        return x, Observed(tuple(runs), None)
    head = statistic and statistic(norm(config, x, params.output_norm, params.output_norm_bias))
    return _head(config, params, x[:, first:], dtype), Observed(tuple(runs), head)


@partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames=("cache",))
def step(
    config: Config,
    params: Params,
    tokens: Int[Array, "batch seq"] | Float32[Array, "batch seq d_model"],
    cache: Cache,
    *,
    n_tokens: Int[Array, ""] | int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float32[Array, "batch vocab"] | Float32[Array, "batch seq d_model"], Cache]:
    """Continue the cached text by seq tokens: a prompt, or the one token just chosen.

    n_tokens (default seq) is how many of them are text; what follows is padding, without effect. Returns the
    logits after the last of them, and the cache grown by n_tokens. The cache given is donated: its memory
    becomes the new cache's. cache.length + seq may not exceed cache.max_seq. Of a part: as for `forward`; the
    cache is that of its layers.
    """
    n_tokens = tokens.shape[1] if n_tokens is None else n_tokens
    positions = cache.length + jnp.arange(tokens.shape[1])
    turns, x = rotations(config, positions, cache.max_seq), _embed(config, params, tokens, positions)

    # By index, not by slices of the run: what scan cuts out of Columns is copied (see `Columns.of_layer`).
    def body(run: Layer, first: int, carry: tuple[Array, Cache], i: Array) -> tuple[tuple[Array, Cache], None]:
        (x, cache), layer = carry, of_run(run, i)
        multiply = Products(config, layer, dtype)
        q, k, v = qkv(config, layer, x, turns, multiply)
        cache = keep_cache(cache.write(first + i, k, v), mesh_of(params.token_embd))
        y = cache.types.attend(q, *cache.read(first + i), cache.length, scoring(config, layer))
        return (finish(config, layer, x, y, multiply), cache), None

    first = 0
    for run in params.runs:
        (x, cache), _ = lax.scan(partial(body, run, first), (x, cache), jnp.arange(n_layers(run)))
        first += n_layers(run)
    cache = cache.grown(n_tokens)
    if params.output_norm is None:
        return x, cache
    last = lax.dynamic_slice_in_dim(x, n_tokens - 1, 1, axis=1)
    return _head(config, params, last, dtype)[:, 0], cache


def _embed(config: Config, params: Params, tokens: Array, positions: Array) -> Float32[Array, "batch seq d_model"]:
    """What the first layer reads; in a part that begins later, what the part before returned."""
    if params.token_embd is None:
        return tokens
    x = embed(params.token_embd, tokens)
    if params.position_embd is not None:
        if len(positions) > config.n_ctx:
            raise QjaxError(
                f"tokens: a text of {len(positions)}, but the model has no more than {config.n_ctx} positions"
            )
        x = x + embed(params.position_embd, positions)
    return x * config.d_model**0.5 if config.traits.scaled_embedding else x


def _head(
    config: Config, params: Params, x: Float32[Array, "batch seq d_model"], dtype: DTypeLike
) -> Float32[Array, "batch seq vocab"]:
    weight = params.token_embd if params.output is None else params.output
    assert params.output_norm is not None
    assert weight is not None
    logits = matmul(norm(config, x, params.output_norm, params.output_norm_bias), weight, dtype)
    return softcapped(logits, config.logit_softcap) if config.logit_softcap else logits
