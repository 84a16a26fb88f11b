"""Train a model through its quantized weights: `qat` and `qlora`, a model and a text in, a model and a report out."""

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Int32

from qjax import formats
from qjax.data import tales
from qjax.errors import QjaxError
from qjax.evaluate import PRECISIONS, Text, bos_of, check_n_ctx, tokens_of
from qjax.formats import Format
from qjax.io import gguf
from qjax.io.imatrix import Imatrix
from qjax.io.lora import Adapter
from qjax.machine import memory_status
from qjax.methods import converter, importance, recipes, rtn, training
from qjax.methods import plan as planning
from qjax.methods import qat as quantized_training
from qjax.methods import qlora as low_rank
from qjax.methods.recipes import Recipe
from qjax.methods.training import Batches, Checkpoint, Fitted, Loss, Options, Weights
from qjax.metrics.perplexity import with_bos
from qjax.model import Model
from qjax.models import placement, transformer
from qjax.models.transformer import Params
from qjax.tensor import QTensor, describe_size

QAT, QLORA = Options(rate=1e-3, distill=1.0), Options(rate=1e-3)
"""What is right for the small model; larger ones want smaller rates."""


@dataclass(frozen=True)
class TrainingReport:
    """How a model was trained."""

    name: str
    method: str
    steps: int
    first_step: int
    """where this run began; 0 unless it was resumed"""
    n_tokens: int
    """predicted in all steps together"""
    n_trained: int
    """numbers that were trained"""
    losses: tuple[float, ...]
    """of each step, in nats per token"""
    time_s: float
    """wall time of this run, compilation included"""
    peak_memory_bytes: int | None
    """the most that the process ever had in memory; None where the system does not say"""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        few = max(1, len(self.losses) // 10)
        first, last = (np.mean(part) for part in (self.losses[:few], self.losses[-few:]))
        memory = f", {describe_size(self.peak_memory_bytes)} of memory" if self.peak_memory_bytes else ""
        return (
            f"{self.name}: {self.method}, {self.n_trained / 1e6:.2f} M numbers, {self.steps} steps of "
            f"{self.n_tokens // max(self.steps, 1)} tokens, loss {first:.4f} to {last:.4f} (means of {few} steps), "
            f"{self.time_s:.0f} s{memory}"
        )


@dataclass(frozen=True)
class Trained:
    """model: runs as any other; of `qlora` its matrices stay packed, with the adapter beside them."""

    model: Model
    report: TrainingReport
    adapter: Adapter | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the adapter if there is one, as GGUF, else the model (see `Model.save`)."""
        if self.adapter is None:
            self.model.save(path)
            return
        metadata = converter.adapter_metadata(self.adapter, Path(path).stem, {})
        gguf.write(path, metadata, converter.adapter_tensors(self.adapter, "f32"))


def qat(
    model: Model,
    recipe: "str | Format | Mapping[str, str | Format] | Recipe",
    text: Text | None = None,
    *,
    options: Options = QAT,
    only_scales: bool = False,
    imatrix: "str | os.PathLike[str] | Imatrix | None" = None,
    teacher: Model | None = None,
    precision: str = "float32",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Trained:
    """``model`` quantized by ``recipe``, after training with these formats in its forward pass.

    recipe, imatrix: as for `Model.quantize`; weights that are quantized already are where it begins.
    text: to train on, or its tokens.  None: tales, a new one each time, none of those that `held_out_tales` has.
    options: `Options`; options.distill is the share of the loss that the teacher's predictions have.
    only_scales: the codes stay those of `Model.quantize`, and the formats' float scales are trained.
    teacher: default: ``model`` as it is.  precision: of the products' factors, float32 or bfloat16.
    checkpoint: a folder in which the run is saved as it goes; resume: whether to go on with what is there.

    Raises QjaxError as `Model.quantize` does, for too little text, a context longer than the model's, a teacher with
    another vocabulary, a loss or gradient that is not finite, and checkpoints of another run.
    """
    start = time.perf_counter()
    recipe, weighed = recipes.recipe(recipe), importance.select(imatrix)
    _check_one_device(model)
    tensors, config = model.tensors, model.config
    described = {key: value for key, (_, value) in config.to_gguf().items()}
    floats = quantized_training.start(tensors)
    plan = planning.plan(floats, recipe, described, weighed)
    plan.check()
    if not any(step.changes for step in plan.steps):
        raise QjaxError(f"train: {recipe.name} quantizes no matrix, so there is nothing to train for")
    guide = teacher or model
    if guide.config.vocab != config.vocab:
        raise QjaxError(f"train: the teacher has {guide.config.vocab} tokens, {model.name} has {config.vocab}")
    first = model.quantize(recipe, imatrix=imatrix, allow_requantize=True) if only_scales else None
    codes = {} if first is None else dict(first.tensors)
    weights = floats if first is None else quantized_training.scales(codes)
    dtype = _dtype(precision)

    def loss(weights: Weights, fixed: Any, tokens: Array) -> Array:
        teacher, codes = fixed
        if codes:
            made = quantized_training.start(quantized_training.rescaled(weights, codes))
        else:
            made = quantized_training.quantized(weights, plan, weighed)
        student = transformer.stack(made, config)
        told = None if teacher is None else transformer.forward(guide.config, teacher, tokens[:, :-1], dtype=dtype)
        logits = transformer.forward(config, student, tokens[:, :-1], dtype=dtype)
        return training.text_loss(logits, tokens[:, 1:], told, options.distill)

    about = training.about(
        options,
        method="qat, scales" if only_scales else "qat",
        formats=[step.format.name for step in plan.steps],
        precision=precision,
        importance=training.sha256([weighed.by_name[name] for name in sorted(weighed.by_name)]),
        teacher=training.sha256(jax.tree.leaves(guide.params)) if options.distill else None,
    )
    fixed = (guide.params if options.distill else None, codes)
    fitted = _fit(model, loss, weights, fixed, text, options, f"training for {recipe.name}", about, checkpoint, resume)
    if first is None:
        trained = _with_tensors(model, fitted.weights).quantize(recipe, imatrix=imatrix)
    else:
        trained = _with_tensors(first, quantized_training.rescaled(fitted.weights, codes, traced=False))
    trained = dataclasses.replace(trained, name=f"{model.name}:{recipe.name}, trained")
    return Trained(trained, _report(trained.name, about["method"], options, weights, fitted, start))


def qlora(
    model: Model,
    text: Text | None = None,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: Sequence[str] = low_rank.TARGETS,
    base: str | Format | None = "NF4",
    options: Options = QLORA,
    precision: str = "float32",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Trained:
    """``model`` with a LoRA adapter that was trained beside its packed weights.

    rank, targets: of the adapter, and which matrices it is for (`qlora.matrices`).  alpha: default: the rank, so that
    the scale is 1.
    base: the format of the matrices while the adapter is trained, if they are floats; None: as they are.  A quantized
    model stays what it is.
    The rest as for `qat`, but that there is no teacher.  Raises QjaxError for the same, a rank or targets that do not
    fit.
    """
    start = time.perf_counter()
    _check_one_device(model)
    config = model.config
    if options.distill:
        raise QjaxError("train: an adapter has no teacher; distill has to be 0")
    held = model if base is None or _is_packed(model) else _packed(model, base)
    weights = low_rank.start(low_rank.matrices(config, targets), rank, options.seed)
    alpha = float(rank if alpha is None else alpha)
    if not 0 < alpha < math.inf:
        raise QjaxError(f"lora: alpha is {alpha}, expected a positive number")
    scale, dtype = alpha / rank, _dtype(precision)

    def loss(weights: Weights, params: Params, tokens: Array) -> Array:
        adapted = low_rank.adapted(params, weights, scale)
        logits = transformer.forward(config, adapted, tokens[:, :-1], dtype=dtype, remat=True)
        return training.text_loss(logits, tokens[:, 1:])

    about = training.about(options, method="qlora", rank=rank, alpha=alpha, targets=list(targets), precision=precision)
    about["base"] = training.sha256(jax.tree.leaves(held.params))
    fitted = _fit(model, loss, weights, held.params, text, options, "training an adapter", about, checkpoint, resume)
    trained = dataclasses.replace(
        held, params=low_rank.adapted(held.params, fitted.weights, scale), name=f"{model.name}+lora"
    )
    report = _report(trained.name, "qlora", options, weights, fitted, start)
    return Trained(trained, report, low_rank.adapter(config, fitted.weights, alpha))


# ── shared ───────────────────────────────────────────────────────────────────────────────────────────


def _fit(
    model: Model,
    loss: Loss,
    weights: Weights,
    fixed: Any,
    text: Text | None,
    options: Options,
    desc: str,
    about: dict[str, Any],
    checkpoint: str | os.PathLike[str] | None,
    resume: bool,
) -> Fitted:
    check_n_ctx(model, options.n_ctx)
    if text is None:
        batches, seen = _tales(model, options), "tales"
    else:
        tokens = tokens_of(model, text)
        batches, seen = training.windows_of(tokens, options, bos_of(model)), training.sha256([tokens])
    saved = None if checkpoint is None else Checkpoint(Path(checkpoint), about | {"text": seen}, resume)
    return training.fit(loss, weights, fixed, batches, options, desc=desc, checkpoint=saved)


def _tales(model: Model, options: Options) -> Batches:
    """Windows of tales, for each step new ones; none of a seed that is for evaluation."""
    length = options.n_ctx + 1
    needed = options.batch * length

    def windows(step: int) -> Int32[np.ndarray, "batch length"]:
        told, n = [], 1 + needed // 80
        while len(told) < needed:
            n *= 2
            seed = tales.TRAINING + (options.seed << 32) + step
            told = model.tokenizer.encode("".join(tale.text for tale in tales.generate(seed, n)))
        return with_bos(np.array(told[:needed]).reshape(options.batch, length), bos_of(model))

    return windows


def _check_one_device(model: Model) -> None:
    if model.placement:
        raise QjaxError(f"train: {model.name} lies on several devices ({model.placement}); load it on one")


def _dtype(precision: str) -> Any:
    """Raises QjaxError for a precision in which products have no gradient."""
    if precision not in ("float32", "bfloat16"):
        raise QjaxError(f"precision is {precision!r}, expected float32 or bfloat16")
    return PRECISIONS[precision]


def _is_packed(model: Model) -> bool:
    is_packed = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731
    return any(map(is_packed, jax.tree.leaves(model.params, is_leaf=is_packed)))


def _packed(model: Model, base: str | Format) -> Model:
    """A file type of llama-quantize is a mixture; other formats are for all matrices alike."""
    known = not isinstance(base, str) or base.upper() in recipes.names()
    return model.quantize(base if known else formats.get(base))


def _with_tensors(model: Model, tensors: Mapping[str, Array | QTensor]) -> Model:
    params = placement.stack(((name, tensors[name]) for name in model.tensors), model.config, model.place)
    return dataclasses.replace(model, params=params, metadata=rtn.without_receipt(model.metadata))


def _report(name: str, method: str, options: Options, weights: Weights, fitted: Fitted, start: float) -> TrainingReport:
    return TrainingReport(
        name=name,
        method=method,
        steps=options.steps,
        first_step=fitted.first_step,
        n_tokens=options.steps * options.batch * options.n_ctx,
        n_trained=sum(x.size for x in weights.values()),
        losses=fitted.losses,
        time_s=time.perf_counter() - start,
        peak_memory_bytes=memory_status().get("VmHWM"),
    )
