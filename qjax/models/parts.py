"""Running a model by where its arrays lie: each part, a row of layers on the same devices, is one program.

    tokens ─ embed ─ layers ─► x ┊ x ─ layers ─ head ─► logits       ┊ to another device

Most models are a single part. A compiled program cannot span CPU and GPU, so the forward pass of several parts
goes from one to the next, and x, which is small, moves between them; the keys and values of a layer stay with it.
"""

import functools
from collections.abc import Callable
from itertools import groupby
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import Float32, Int

from qjax.models import cache as caches
from qjax.models import transformer
from qjax.models.cache import FLOAT16, FLOAT32, Cache, CacheTypes
from qjax.models.config import Config
from qjax.models.transformer import Observed, Params, Statistic, n_layers
from qjax.ops.sharded import DATA, MODEL, Sharded, cache_spec, devices, divides, mesh_of


def parts(params: Params) -> tuple[Params, ...]:
    """Params cut where what follows lies on other devices. While they are traced they are one part."""
    nothing = Params(None, (), None, None)
    pieces = [
        nothing._replace(token_embd=params.token_embd, position_embd=params.position_embd),
        *(nothing._replace(runs=(run,)) for run in params.runs),
        params._replace(token_embd=None, position_embd=None, runs=()),
    ]
    if None in map(devices, pieces):
        return (params,)
    groups = [functools.reduce(_join, group) for _, group in groupby(pieces, devices)]
    return (params,) if len(groups) == 1 else tuple(groups)


def _join(a: Params, b: Params) -> Params:
    there = {name: value for name, value in a._asdict().items() if value is not None}
    return b._replace(**(there | {"runs": a.runs + b.runs}))


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator for functions of (config, params, ...): jax.jit with these options where the model is one part.
    Else the function runs as it is, and what it calls of this module is compiled, part by part."""

    def decorate(function: Callable[..., Any]) -> Any:
        whole = jax.jit(function, **options)

        @functools.wraps(whole)
        def run(config: Config, params: Params, *args: Any, **kwargs: Any) -> Any:
            return (whole if len(parts(params)) == 1 else function)(config, params, *args, **kwargs)

        return run

    return decorate


T = TypeVar("T")


def while_loop(unfinished: Callable[[T], Any], body: Callable[[T], T], state: T) -> T:
    """lax.while_loop in a compiled program, else the same on the host."""
    if None in map(devices, jax.tree.leaves(state)):
        return lax.while_loop(unfinished, body, state)
    while unfinished(state):
        state = body(state)
    return state


# ── the forward pass ─────────────────────────────────────────────────────────────────────────────────


def forward(
    config: Config,
    params: Params,
    tokens: Int[Array | np.ndarray, "batch seq"],
    *,
    first: int = 0,
    dtype: DTypeLike = jnp.float32,
    types: CacheTypes = FLOAT32,
) -> Float32[Array, "batch scored vocab"]:
    """`transformer.forward` of all parts. A batch is filled up to divide among the devices along "data"."""
    batch, missing = len(tokens), -len(tokens) % data_width(params)
    x: Any = jnp.pad(tokens, [(0, missing), (0, 0)], mode="edge") if missing else tokens
    for part in parts(params):
        x = transformer.forward(config, part, _bring(x, part), first=first, dtype=dtype, types=types)
    return x if len(x) == batch else x[:batch]


def observe(
    config: Config,
    params: Params,
    tokens: Int[Array | np.ndarray, "batch seq"],
    statistic: Statistic,
    *,
    first: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float32[Array, "batch scored vocab"], Observed]:
    """`transformer.observe` of all parts."""
    x: Any = tokens
    seen = Observed((), None)
    for part in parts(params):
        x, more = transformer.observe(config, part, _bring(x, part), statistic, first=first, dtype=dtype)
        seen = Observed(seen.runs + more.runs, more.head)
    return x, seen


def step(
    config: Config,
    params: Params,
    tokens: Int[Array | np.ndarray, "batch seq"],
    cache: tuple[Cache, ...],
    *,
    n_tokens: Int[Array, ""] | int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float32[Array, "batch vocab"], tuple[Cache, ...]]:
    """`transformer.step` of all parts, each with a cache of its own."""
    x: Any = tokens
    grown = []
    for part, own in zip(parts(params), cache, strict=True):
        x, own = transformer.step(config, part, _bring(x, part), own, n_tokens=n_tokens, dtype=dtype)
        grown.append(own)
    return x, tuple(grown)


def empty_cache(
    config: Config, params: Params, batch: int, max_seq: int, types: CacheTypes = FLOAT16
) -> tuple[Cache, ...]:
    """`cache.empty` of each part, where its layers lie; over a mesh cut by sequences and heads, where they divide."""
    whole = jax.eval_shape(lambda: caches.empty(config, batch, max_seq, types))

    def zeros(part: Params, leaf: Any) -> Array:
        shape = (sum(map(n_layers, part.runs)), *leaf.shape[1:]) if leaf.ndim else ()
        return jnp.zeros(shape, leaf.dtype, device=_where(part, lambda mesh: cache_spec(mesh, shape)))

    return tuple(jax.tree.map(functools.partial(zeros, part), whole) for part in parts(params))


# ── where ────────────────────────────────────────────────────────────────────────────────────────────


def data_width(params: Params) -> int:
    """How many batches are worked on at a time, each on devices of its own."""
    mesh = mesh_of(params.token_embd)
    return 1 if mesh is None else mesh.shape[DATA]


def on_host(x: Array) -> np.ndarray:
    """The values of an array, of which other hosts may have pieces; then all hosts have to ask for it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def describe(params: Params) -> str:
    """What lies where, unless all lies on one device: "embedding, layers 0 to 11 on cpu:0; layers 12 to 29, head on
    cuda:0", or "4 devices: data 2, model 2; whole on each: attn_k, attn_v"."""
    mesh = mesh_of(params.token_embd)
    if mesh is not None:
        uncut = _uncut(params) if mesh.shape[MODEL] > 1 else []
        axes = ", ".join(f"{name} {n}" for name, n in mesh.shape.items() if n > 1)
        return f"{mesh.size} devices: {axes}" + (f"; whole on each: {', '.join(uncut)}" if uncut else "")
    said, layer = [], 0
    for part in parts(params):
        n = sum(map(n_layers, part.runs))
        layers = [f"layers {layer} to {layer + n - 1}" if n > 1 else f"layer {layer}"] * (n > 0)
        ends = ["embedding"] * (part.token_embd is not None), ["head"] * (part.output_norm is not None)
        (device,) = devices(part) or (None,)
        said.append(f"{', '.join(ends[0] + layers + ends[1])} on {device}")
        layer += n
    return "; ".join(said) if len(said) > 1 else ""


def _uncut(params: Params) -> list[str]:
    named = {"token_embd": params.token_embd, "output": params.output}
    named |= {name.removesuffix(".weight"): leaf for run in params.runs for name, leaf in run.items()}
    return sorted(name for name, leaf in named.items() if isinstance(leaf, Sharded) and leaf.split is None)


def _bring(x: Any, part: Params) -> Any:
    """x where the part lies; while that is traced, x itself."""
    where = _where(part, lambda mesh: PartitionSpec(DATA if divides(mesh, len(x)) else None))
    return x if where is None else jax.device_put(x, where)


def _where(part: Params, spec: Callable[[Mesh], PartitionSpec]) -> Sharding | None:
    """None where JAX decides: for arrays that nobody put anywhere, and while they are traced."""
    mesh, leaf = mesh_of(part.token_embd), jax.tree.leaves(part)[0]
    if mesh is not None:
        return NamedSharding(mesh, spec(mesh))
    return leaf.sharding if devices(part) and leaf.committed else None
