"""QLoRA: adapters trained beside weights that stay packed (Dettmers et al. 2023, "QLoRA: Efficient Finetuning of
Quantized LLMs").

    y = x @ W.T + scale · (x @ A.T) @ B.T       W: NF4, or whatever a GGUF file has; scale = alpha / rank

Of the model's weights A and B alone have gradients and moments (Hu et al. 2021, "LoRA").  W is decoded where it is
multiplied, again on the way back, and of each layer only the input is kept for that (see `transformer.forward`), so
that memory holds the packed weights, the adapter three times over (with its moments), and one layer at work.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError, nearest_names
from qjax.io.lora import Adapter, Pair
from qjax.methods.training import Weights
from qjax.models.config import Config
from qjax.models.layer import EXPERTS, layer_shapes
from qjax.models.transformer import Params, n_layers
from qjax.ops.adapted import Adapted

TARGETS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""By default all matrices of a layer, as the paper advises, that are not those of experts or the router."""

# One array for all layers: a program that trains hundreds of small ones takes minutes to compile.
_LAYERS = "blk.*."


def matrices(config: Config, targets: Sequence[str] = TARGETS) -> dict[str, tuple[int, ...]]:
    """The shapes of the matrices that get an adapter, by GGUF name; those of all layers as a stack of them, under the
    name ``blk.*.KIND.weight``.

    targets: names as in "attn_q"; "output" is the head, where it is not the embedding.
    Raises QjaxError for a target that the model, or an adapter, does not have.
    """
    shapes = {name.removesuffix(".weight"): shape for name, shape in layer_shapes(config).items()}
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        kind: (f"{_LAYERS}{kind}.weight", (config.n_layers, *shape))
        for kind, shape in shapes.items()
        if len(shape) == 2 and f"{kind}.weight" not in EXPERTS
    }
    if not config.tied:
        found["output"] = ("output.weight", (config.vocab, config.d_model))
    chosen = [kind for kind in TARGETS if kind in found] if targets == TARGETS else targets
    if unknown := [kind for kind in chosen if kind not in found]:
        raise QjaxError(f"lora: no matrix {unknown[0]!r} to adapt. {nearest_names(unknown[0], found)}")
    if not chosen:
        raise QjaxError("lora: no matrix to adapt; name some")
    return dict(found[kind] for kind in chosen)


def start(shapes: dict[str, tuple[int, ...]], rank: int, seed: int) -> Weights:
    """A drawn, with deviation 1 / √columns, and B zero, so that training begins with the model as it is.

    Raises QjaxError for a rank that is no use.
    """
    smallest = min(min(shape[-2:]) for shape in shapes.values())
    if not 0 < rank <= smallest:
        raise QjaxError(f"lora: rank is {rank}, expected 1 to {smallest}, the smaller side of the smallest matrix")
    draw, made = np.random.default_rng(seed), {}
    for name, (*stack, rows, columns) in shapes.items():
        drawn = draw.standard_normal((*stack, rank, columns), np.float32)
        made[f"{name}.lora_a"] = jnp.asarray(drawn / np.float32(columns**0.5))
        made[f"{name}.lora_b"] = jnp.zeros((*stack, rows, rank))
    return made


def adapted(params: Params, weights: Weights, scale: float) -> Params:
    """``params`` with the adapter's matrices beside theirs; no array of them is copied."""

    def pair(name: str, base: Any, layers: slice = slice(None)) -> Any:
        if f"{name}.lora_a" not in weights:
            return base
        a, b = (weights[f"{name}.lora_{part}"][layers] for part in "ab")
        return Adapted(base, a, b, scale)

    runs, first = [], 0
    for run in params.runs:
        layers = slice(first, first + n_layers(run))
        runs.append({name: pair(f"{_LAYERS}{name}", leaf, layers) for name, leaf in run.items()})
        first = layers.stop
    return params._replace(runs=tuple(runs), output=pair("output.weight", params.output))


def adapter(config: Config, weights: Weights, alpha: float, path: Path = Path("adapter")) -> Adapter:
    """What was trained, as files have it."""
    pairs: dict[str, Pair] = {}
    for name in (key.removesuffix(".lora_a") for key in weights if key.endswith(".lora_a")):
        a, b = (np.asarray(weights[f"{name}.lora_{part}"]) for part in "ab")
        if name.startswith(_LAYERS):
            kind = name.removeprefix(_LAYERS)
            pairs |= {f"blk.{i}.{kind}": Pair(*halves) for i, halves in enumerate(zip(a, b))}
        else:
            pairs[name] = Pair(a, b)
    return Adapter(path, config.architecture, alpha, pairs)
