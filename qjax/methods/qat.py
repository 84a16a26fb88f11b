"""Quantization-aware training: the loss is that of the quantized model, the weights behind it stay floats.

    w ─ quantize ─ dequantize ─► ŵ ─ model ─► loss        ∂loss/∂w := ∂loss/∂ŵ

What stands in the forward pass is the format's own search, so that the trained model is the one that is written: its
bytes are those of quantize(w) (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference").  Rounding has no gradient to speak of; the straight-through estimator passes that
of ŵ on to w as if nothing had been rounded (Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic
Neurons for Conditional Computation").
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float32

from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.methods.importance import NONE, Importance
from qjax.methods.plan import Plan
from qjax.methods.training import Weights
from qjax.tensor import QTensor, dense, dequantize, quantize

# ── the weights are trained ──────────────────────────────────────────────────────────────────────────


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def fake_quantize(
    w: Float32[Array, "*rows columns"], format: Format, importance: Float[Array, " columns"] | None = None
) -> Float32[Array, "*rows columns"]:
    """dequantize(quantize(w)), bit for bit, with the gradient of w itself.

    Every weight gets the gradient of what it has become, also one that the format clips at the end of its range: the
    scale is chosen anew at each step, so that the next one may have the range.  Scales get none, they are functions of
    w.  Raises QjaxError as `quantize` does.
    """
    quantized = quantize(w, format, importance=importance)
    # XLA may keep more digits than a cast to float16 and back leaves, unless it cannot see both.
    return dequantize(QTensor(lax.optimization_barrier(quantized.fields), quantized.format))


fake_quantize.defvjp(
    lambda w, format, importance: (fake_quantize(w, format, importance), None), lambda *a: (a[-1], None)
)


def start(tensors: Mapping[str, Array | QTensor]) -> Weights:
    """Every tensor of a model in float32, which is what is trained."""
    return {name: dense(t) for name, t in tensors.items()}


def quantized(weights: Weights, plan: Plan, importance: Importance = NONE) -> Weights:
    """The weights that the model in the formats of ``plan`` has, by `fake_quantize`.

    Blocks of a format are searched together, whatever tensor they are of, where they stand alone: the program that XLA
    compiles has one search for each format, which is most of it.
    """
    made, together = dict(weights), defaultdict(list)
    for step in plan.steps:
        if not step.changes:
            continue
        of_matrices = importance.of(step.name, step.shape) if step.format.uses_importance else None
        if of_matrices is not None:
            matrices = weights[step.name].reshape(-1, *step.shape[-2:])
            weighed: list[Any] = [
                fake_quantize(x, step.format, jnp.asarray(i)) for x, i in zip(matrices, of_matrices, strict=True)
            ]
            made[step.name] = jnp.stack(weighed).reshape(step.shape)
        elif step.format.ggml_id is None:
            # Perhaps one scale for the whole tensor.
            made[step.name] = fake_quantize(weights[step.name], step.format)
        else:
            together[step.format].append(step)
    for format, steps in together.items():
        flat: Any = fake_quantize(jnp.concatenate([weights[step.name].reshape(-1) for step in steps]), format)
        ends = np.cumsum([math.prod(step.shape) for step in steps])
        for step, part in zip(steps, jnp.split(flat, ends[:-1])):
            made[step.name] = part.reshape(step.shape)
    return made


# ── the scales are trained ───────────────────────────────────────────────────────────────────────────


def scales(tensors: Mapping[str, Array | QTensor]) -> Weights:
    """What is trained instead, if the codes stay: by how much of itself each float field of a quantized tensor changes
    (Esser et al. 2020, "Learned Step Size Quantization"), under the name ``TENSOR:FIELD``, zeros; and vectors as they
    are.

    Raises QjaxError if no tensor has such a field (the scales of MXFP4, for one, are powers of two).
    """
    made: Weights = {}
    for name, t in tensors.items():
        if isinstance(t, QTensor):
            made |= {f"{name}:{field}": jnp.zeros(getattr(t.fields, field).shape) for field in _float_fields(t.format)}
    if not made:
        used = sorted({t.format.name for t in tensors.values() if isinstance(t, QTensor)})
        raise QjaxError(f"no scale can be trained: {', '.join(used) or 'no format'} has none that is a float")
    return made | {name: dense(t) for name, t in tensors.items() if t.ndim == 1}


def rescaled(
    weights: Weights, tensors: Mapping[str, Array | QTensor], *, traced: bool = True
) -> dict[str, Array | QTensor]:
    """``tensors`` with the scales that ``weights`` say, rounded to what the format stores.

    traced: as float32 with a gradient straight through that rounding; otherwise as the format stores them.
    """

    def scale(name: str, field: str, old: Array) -> Array:
        new = old.astype(jnp.float32) * (1 + weights[f"{name}:{field}"])
        if not traced:
            return new.astype(old.dtype)
        rounded = lax.optimization_barrier(lax.stop_gradient(new).astype(old.dtype)).astype(jnp.float32)
        return rounded + (new - lax.stop_gradient(new))

    def tensor(name: str, t: Array | QTensor) -> Any:
        if not isinstance(t, QTensor):
            return weights.get(name, t)
        changed = {field: scale(name, field, getattr(t.fields, field)) for field in _float_fields(t.format)}
        return QTensor(t.fields._replace(**changed), t.format)

    return {name: tensor(name, t) for name, t in tensors.items()}


def _float_fields(format: Format) -> list[str]:
    return [field.name for field in format.layout if jnp.issubdtype(jnp.dtype(field.dtype), jnp.floating)]
