"""Post-training quantization as a chain: functions that change a model without changing what it computes, then one that
rounds its matrices.

    float model ─ rotate ─ smooth ─ ... ─► float model, easier to round ─ gptq ─► QTensors

Each step is a pure function.  A Transform gets a model and what calibration text shows of it, and returns a model that
computes the same; so that the file stays a standard one, what it changes is folded into the weights.  A Rounder gets
one matrix and what was seen of its input.  `METHODS` is the table of both; a chain is written "rotate+smooth+gptq".
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Int

from qjax.errors import QjaxError, nearest_names
from qjax.formats import Format
from qjax.io.tokenizer import Tokenizer
from qjax.methods import clip, coding, gptq, hqq, rotation, rtn, scaling, statistics
from qjax.methods import plan as planning
from qjax.methods.folding import Job, Transform
from qjax.methods.importance import Importance
from qjax.methods.plan import Plan, Step
from qjax.methods.recipes import Recipe
from qjax.methods.statistics import Seen, Tensors
from qjax.metrics import perplexity as ppl
from qjax.models.config import Config
from qjax.progress import progress
from qjax.tensor import QTensor, dequantize

Rounder = Callable[[str, Array, Format, Seen | None, rtn.Options], Array | QTensor]
"""(name, matrix (*n_mat, d_out, d_in), format, what was seen of its input, options) -> the matrix in that format"""


@dataclass(frozen=True)
class Method:
    """A row of the table; it is a Transform or a Rounder."""

    about: str
    rounds: Rounder | None = None
    transforms: Transform | None = None
    calibrated: bool = True
    """whether it looks at calibration text"""
    beside_floats: bool = False
    """whether it looks at what the text is in the float model, too, once layers before are quantized"""
    fits: Callable[[Format], bool] = lambda format: True
    """whether it can round to a format"""


def _rtn(name: str, w: Array | QTensor, format: Format, seen: Seen | None, options: rtn.Options) -> Array | QTensor:
    return rtn.quantize_tensor(name, w, format, options)


METHODS: dict[str, Method] = {
    "smooth": Method(
        "outliers of activations moved into the weights (SmoothQuant, Xiao et al. 2022)", transforms=scaling.smooth
    ),
    "awq": Method("columns of weights that matter made larger (AWQ, Lin et al. 2023)", transforms=scaling.awq),
    "rotate": Method(
        "the residual stream and the values turned by Hadamard matrices (QuaRot, Ashkboos et al. 2024)",
        transforms=rotation.rotate,
        calibrated=False,
    ),
    "rtn": Method("round to nearest, as llama-quantize does it", rounds=_rtn, calibrated=False),
    "gptq": Method(
        "each column's error into those to come, then coordinate descent (Frantar et al. 2022; Behdin et al. 2023)",
        rounds=gptq.quantize,
        fits=coding.chooses_codes,
    ),
    "gptaq": Method(
        "gptq towards the float model's output, from the quantized layers' input (Li et al. 2025)",
        rounds=gptq.quantize,
        beside_floats=True,
        fits=coding.chooses_codes,
    ),
    "clip": Method(
        "smaller scales where they lower the output's error (Lin et al. 2023)",
        rounds=clip.quantize,
        fits=coding.moves_scales,
    ),
    "hqq": Method(
        "half-quadratic offsets, from the weights alone (Badri and Shaji 2023)",
        rounds=hqq.quantize,
        calibrated=False,
        fits=coding.moves_scales,
    ),
}


class Chain(NamedTuple):
    """Transforms in their order, and a Rounder last."""

    name: str
    transforms: tuple[Method, ...]
    rounder: Method

    @property
    def calibrated(self) -> bool:
        return any(method.calibrated for method in (*self.transforms, self.rounder))


def chain(text: str) -> Chain:
    """The chain that names joined by "+" mean; without a Rounder at its end, "rtn" is.

    Raises QjaxError for an unknown name, with the nearest ones, and for a Rounder that is not the last.
    """
    names = text.lower().split("+")
    for name in names:
        if name not in METHODS:
            raise QjaxError(f"unknown method {name!r}. {nearest_names(name, METHODS)}")
    if METHODS[names[-1]].rounds is None:
        names.append("rtn")
    *before, last = (METHODS[name] for name in names)
    for name, method in zip(names, before):
        if method.transforms is None:
            raise QjaxError(f"method {text!r}: {name} rounds the weights, so it has to be the last, and alone")
    return Chain("+".join(names), tuple(before), last)


def windows(
    config: Config,
    tokenizer: Tokenizer,
    text: str | Sequence[int] | Int[np.ndarray, " n"],
    n_ctx: int = 512,
    chunks: int | None = None,
) -> Int[np.ndarray, "chunks n_ctx"]:
    """Calibration text, or its token ids, as the windows that a model reads, at most ``chunks`` of them.

    A window is no longer than the model's context.  Raises QjaxError for less text than two windows.
    """
    tokens = np.asarray(tokenizer.encode(text) if isinstance(text, str) else text, np.int32)
    try:
        return ppl.windows(tokens, min(n_ctx, config.n_ctx), chunks, tokenizer.bos_id if tokenizer.add_bos else None)
    except QjaxError as error:
        raise QjaxError(f"calibration text: {error}") from None


@dataclass(frozen=True)
class Quantized:
    """What `quantize` made: a model, perhaps of another config (a rotation unties the head), by tensor name."""

    config: Config
    tensors: dict[str, Array | QTensor]
    plan: Plan


def quantize(
    config: Config,
    tensors: Tensors,
    recipe: Recipe,
    method: Chain,
    windows: Int[np.ndarray, "chunks n_ctx"] | None,
    options: rtn.Options | None = None,
) -> Quantized:
    """The model with its matrices in the formats of ``recipe``, by the methods of a chain.

    tensors: floats; where some are quantized already, they are decoded if ``options`` allow that they are quantized
        again.
    windows: token ids of calibration text; None if no method needs one.  Where there are some, what they show serves as
        the importance matrix, too, of tensors that ``options`` have none for.
    Raises QjaxError if calibration text is needed and missing, for an importance matrix of a model that is to be
    transformed, and as `plan.plan` and `Plan.check` do.
    """
    options = options or rtn.Options()
    if windows is None and method.calibrated:
        raise QjaxError(f"method {method.name} needs calibration text; pass calibrate (--calibrate FILE)")
    if method.transforms and options.importance:
        raise QjaxError(
            f"method {method.name} changes the columns that an importance matrix is about; leave imatrix out, and pass "
            "calibrate (--calibrate FILE) in its place"
        )
    # Without calibration text, nothing but the weights is looked at.
    promised = _promised if windows is not None else lambda _: options.importance
    _plan(config, tensors, recipe, promised(tensors)).check(allow_requantize=options.allow_requantize)
    if windows is not None or method.transforms:
        tensors = {name: _decoded(t) for name, t in tensors.items()}
    size = 0 if windows is None else ppl.batch_size(windows.shape[1], config.vocab)
    for transform in method.transforms:
        assert transform.transforms is not None
        seen: Mapping[str, Seen] = {}
        if windows is not None and transform.calibrated:
            seen, _ = statistics.moments(config, tensors, windows, size)
        job = Job(_plan(config, tensors, recipe, promised(tensors)), seen)
        config, tensors = transform.transforms(config, tensors, job)
    plan = _plan(config, tensors, recipe, promised(tensors))
    if windows is None:
        steps = progress(plan.steps, desc=f"quantizing to {recipe.name}", unit="tensor", label=lambda step: step.name)
        made = {step.name: _rounded(method.rounder, step, tensors[step.name], None, options) for step in steps}
        return Quantized(config, made, plan)
    steps = {step.name: step for step in plan.steps}

    def change(matrices: Tensors, seen: Mapping[str, Seen]) -> Tensors:
        ways = {name: weighed(options, name, seen[name]) for name in matrices}
        return {n: _rounded(method.rounder, steps[n], w, seen[n], ways[n]) for n, w in matrices.items()}

    _, made = statistics.moments(
        config,
        tensors,
        windows,
        size,
        change=change,
        beside_floats=method.rounder.beside_floats,
        desc=f"quantizing to {recipe.name}",
    )
    # What reads no activations: norms, and embeddings that are no head.
    for name, step in steps.items():
        if made[name] is tensors[name]:
            made[name] = _rounded(METHODS["rtn"], step, tensors[name], None, options)
    return Quantized(config, {name: made[name] for name in steps}, plan)


def _plan(config: Config, tensors: Tensors, recipe: Recipe, importance: Importance) -> Plan:
    described = {key: value for key, (_, value) in config.to_gguf().items()}
    return planning.plan(tensors, recipe, described, importance)


def _rounded(method: Method, step: Step, w: Any, seen: Seen | None, options: rtn.Options) -> Any:
    assert method.rounds is not None
    return method.rounds(step.name, w, step.format, seen, options) if step.changes else w


def _promised(tensors: Tensors) -> Importance:
    """Stands in a plan for the importance that calibration text will give."""
    matrices = {name: t.shape for name, t in tensors.items() if t.ndim > 1}
    return Importance({n: np.ones((math.prod(shape[:-2]), shape[-1]), np.float32) for n, shape in matrices.items()})


def weighed(options: rtn.Options, name: str, seen: Seen) -> rtn.Options:
    """With what was seen as the importance of a tensor, unless it has one."""
    if name in options.importance.by_name:
        return options
    return replace(options, importance=Importance({name: np.atleast_2d(seen.importance)}))


def _decoded(t: Array | QTensor) -> Array:
    return dequantize(t) if isinstance(t, QTensor) else t
