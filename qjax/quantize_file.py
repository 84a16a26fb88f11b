"""From a model on disk to a quantized GGUF file: slab by slab, by what calibration text shows, or into a given size."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.io import gguf, splits
from qjax.io.atomic import check_target
from qjax.io.gguf import Metadata
from qjax.io.imatrix import Imatrix
from qjax.io.stored import Stored
from qjax.io.tokenizer import Tokenizer
from qjax.methods import converter, importance, pipeline, recipes, rtn, solver
from qjax.methods import plan as planning
from qjax.methods.importance import Importance
from qjax.methods.plan import Plan
from qjax.methods.receipt import How
from qjax.methods.recipes import Recipe
from qjax.methods.sensitivity import Trial
from qjax.methods.solver import Solution
from qjax.source import Source, open_source


def quantize_file(
    source: str | os.PathLike[str] | Source,
    target: str | os.PathLike[str] | None,
    recipe: "str | Format | Mapping[str, str | Format] | Recipe",
    *,
    imatrix: "str | os.PathLike[str] | Imatrix | None" = None,
    include_weights: Sequence[str] = (),
    exclude_weights: Sequence[str] = (),
    overrides: Mapping[str, Any] = MappingProxyType({}),
    rounding: str | None = None,
    allow_requantize: bool = False,
    allow_nonfinite: bool = False,
    keep_split: bool = False,
    max_tensors: int | None = None,
    max_bytes: int | None = None,
    no_tensor_first_split: bool = False,
    receipt: bool | None = None,
    dry_run: bool = False,
) -> "QuantizedFile":
    """Writes a copy of a model, rounded to nearest, as a GGUF file, slab by slab, so that memory holds no tensor as a
    whole.

    source: what `load` takes, or a GGUF file of any architecture, or what is open already.
    target: a path ending in .gguf; an earlier file stays until the new one is complete.  None with ``dry_run``.
    include_weights, exclude_weights: parts of names that say which entries of the imatrix count.
    overrides: metadata to set; they also count where a mixture depends on metadata.
    keep_split: as many shards as the source has, NAME-00001-of-... where ``target`` is NAME.gguf, none of them there
    yet; mixtures then count layers in the order of the shards.
    max_tensors, max_bytes, no_tensor_first_split: shards as llama.cpp's converter makes them, see `splits.divide`.
    receipt: whether the metadata say what the file was made of, by hashes, and how (see `Receipt`).  None: if llama.cpp
    writes no such file.  Those that it writes are its own to the last byte, and `qjax.verify` needs no receipt for
    them: the formats are in the file, and rounding to nearest takes nothing but the weights and the imatrix.
    dry_run: only the plan, nothing is written; what would be refused is in it.  The rest as in `Model.quantize`.
    Raises as `Model.quantize` does, and if ``target`` is the source itself or is no GGUF file's name.
    """
    opened = source if isinstance(source, Source) else open_source(source)
    how = How(
        recipe=recipes.recipe(recipe),
        imatrix=imatrix,
        include_weights=include_weights,
        exclude_weights=exclude_weights,
        overrides=overrides,
        rounding=rounding,
        keep_split=keep_split,
    )
    if keep_split and len(opened.paths) == 1:
        raise QjaxError(f"{opened.path}: is not in shards, so there is no split to keep (--keep-split)")
    if dry_run or target is None:
        return QuantizedFile(None, _planned(opened, how, how.importance)[1])
    target = checked_target(target, opened)
    made = make(opened, how, allow_requantize=allow_requantize, allow_nonfinite=allow_nonfinite, receipt=receipt)
    if keep_split:
        groups, keys = [[*gguf.read_shard(path).tensors] for path in opened.paths], splits.KEYS
    else:
        divided = splits.divide(made.tensors, max_tensors, max_bytes, no_tensor_first_split)
        groups, keys = [[*group] for group in divided], gguf.SPLIT_KEYS
    if len(groups) > 1:
        shards = [{name: made.tensors[name] for name in group} for group in groups]
        written = splits.write_shards(target.with_suffix(""), made.metadata, shards, keys=keys)
        return QuantizedFile(written.files[0].path, made.plan)
    gguf.write(target, made.metadata, made.tensors)
    return QuantizedFile(str(target), made.plan)


def quantize_file_by(
    source: str | os.PathLike[str] | Source,
    target: str | os.PathLike[str],
    recipe: "str | Format | Mapping[str, str | Format] | Recipe",
    method: str,
    *,
    calibrate: str | Sequence[int] | Int[np.ndarray, " n"] | None = None,
    n_ctx: int = 512,
    chunks: int | None = None,
    imatrix: "str | os.PathLike[str] | Imatrix | None" = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    rounding: str | None = None,
    allow_requantize: bool = False,
    allow_nonfinite: bool = False,
    receipt: bool | None = None,
) -> "QuantizedFile":
    """Writes a copy of a model, quantized by a method or a chain of them, as a GGUF file; the model is in memory.

    method, calibrate, n_ctx, chunks: as in `Model.quantize`.  The rest as in `quantize_file`.
    Raises as these do.
    """
    opened = source if isinstance(source, Source) else open_source(source)
    target = checked_target(target, opened)
    how = How(
        recipe=recipes.recipe(recipe),
        method=method,
        calibrate=calibrate,
        n_ctx=n_ctx,
        chunks=chunks,
        imatrix=imatrix,
        overrides=overrides,
        rounding=rounding,
    )
    made = make(opened, how, allow_requantize=allow_requantize, allow_nonfinite=allow_nonfinite, receipt=receipt)
    gguf.write(target, made.metadata, made.tensors)
    return QuantizedFile(str(target), made.plan)


class Made(NamedTuple):
    """What is to be written: in the order of the file, as `gguf.write` takes it.  Where tensors are rounded to nearest
    they are pending, and a piece at a time is in memory."""

    metadata: Metadata
    tensors: Mapping[str, Any]
    plan: Plan


def make(
    source: Source,
    how: How,
    *,
    allow_requantize: bool = False,
    allow_nonfinite: bool = False,
    receipt: bool | None = None,
) -> Made:
    """``source`` quantized as it is asked for: the one way from a model on disk to what a file of it holds.

    The rest as in `quantize_file`, which raises what this does.
    """
    weighed = how.importance
    options = rtn.Options(weighed, how.rounding, allow_requantize, allow_nonfinite)
    made: Mapping[str, Any]
    if how.streams:
        tensors, plan = _planned(source, how, weighed)
        plan.check(allow_requantize=allow_requantize)
        made = rtn.pending(tensors, plan, options)
    else:
        config, windows = source.config, None
        if how.calibrate is not None:
            tokenizer = Tokenizer.from_gguf(source.metadata)
            windows = pipeline.windows(config, tokenizer, how.calibrate, how.n_ctx, how.chunks)
        loaded = {name: tensor.load() for name, tensor in source.tensors.items()}
        quantized = pipeline.quantize(config, loaded, how.recipe, pipeline.chain(how.method), windows, options)
        made, plan = quantized.tensors, quantized.plan
    entries = how.receipt(source.tensors, plan, receipt)
    return Made(rtn.metadata(source.metadata, how.recipe, weighed, how.overrides, entries), made, plan)


def _planned(source: Source, how: How, weighed: Importance) -> tuple[Mapping[str, Stored], Plan]:
    """The tensors, as they lie in a file of the converter, and what becomes of them."""
    tensors = source.tensors
    if source.path.is_dir():
        tensors = converter.staged(tensors, source.metadata)
    in_order = how.keep_split or how.recipe.converts
    return tensors, planning.plan(tensors, how.recipe, source.metadata | how.overrides, weighed, in_order=in_order)


def solve(
    source: str | os.PathLike[str] | Source,
    calibrate: str | Sequence[int] | Int[np.ndarray, " n"],
    *,
    target_bpw: float | None = None,
    target_size: int | None = None,
    method: str = "rtn",
    candidates: Sequence[str | Format] | None = None,
    sensitivity: str = "estimated",
    n_ctx: int = 512,
    chunks: int | None = None,
    imatrix: "str | os.PathLike[str] | Imatrix | None" = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    allow_requantize: bool = False,
) -> Solution:
    """The mixture that loses least within a size; `Solution.recipe` is for `quantize_file_by`, with the same text.

    target_bpw: bits per weight over all tensors, or target_size: bytes of the whole GGUF file.
    method: a Rounder's name.  candidates, sensitivity: as in `solver.solve`.  The rest as in `quantize_file_by`.
    Raises QjaxError as these do, and for a method that changes the model before it is rounded.
    """
    opened = source if isinstance(source, Source) else open_source(source)
    chain, config, weighed = pipeline.chain(method), opened.config, importance.select(imatrix)
    if chain.transforms:
        raise QjaxError(
            f"method {method!r}: formats are chosen for the model as it is; give the method that rounds alone"
        )
    # What the tensors become that are no matrices, and a header at least as long as that of the file, receipt and all.
    recipe, metadata = recipes.recipe("F32"), opened.metadata | overrides
    plan, matrices = planning.plan(opened.tensors, recipe, metadata), planning.matrices(opened.tensors, metadata)
    plan.check(allow_requantize=allow_requantize)
    written = rtn.pending(opened.tensors, plan)
    how = How(
        recipe=solver.longest_recipe({name: opened.tensors[name].shape for name in matrices}),
        method=method,
        calibrate=calibrate,
        n_ctx=n_ctx,
        chunks=chunks,
        imatrix=imatrix,
        overrides=overrides,
    )
    receipt = how.receipt(opened.tensors, planning.plan(opened.tensors, how.recipe, metadata))
    header = gguf.size_bytes(rtn.metadata(opened.metadata, recipe, weighed, overrides, receipt), written)
    header -= sum(solver.padded(step.format, step.shape) for step in plan.steps)
    budget = solver.budget_of(plan, matrices, bpw=target_bpw, file_bytes=target_size, header=header)
    windows = pipeline.windows(config, Tokenizer.from_gguf(opened.metadata), calibrate, n_ctx, chunks)
    tensors = {name: tensor.load() for name, tensor in opened.tensors.items()}
    trial = Trial.of(config, tensors, windows, chain.rounder, rtn.Options(weighed))
    return solver.solve(trial, matrices, budget, candidates=candidates, sensitivity=sensitivity)


def checked_target(target: str | os.PathLike[str], source: Source) -> Path:
    """The path of a GGUF file that is not the source.  Raises QjaxError for others, as `atomic.check_target` does."""
    target = Path(target)
    if target.suffix != ".gguf":
        raise QjaxError(f"{target}: quantized models are written as GGUF; give a name that ends in .gguf")
    if target.exists() and any(target.samefile(path) for path in source.paths):
        raise QjaxError(f"{target}: is the model to be read; write to another file")
    check_target(target)
    return target


@dataclass(frozen=True)
class QuantizedFile:
    """What `quantize_file` wrote, or would write: then there is no path; of shards that of the first."""

    path: str | None
    plan: Plan

    @property
    def size_bytes(self) -> int:
        """Of the tensors."""
        return self.plan.size_bytes

    @property
    def bpw(self) -> float:
        return self.plan.bpw

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path} | self.plan.to_json()

    def __str__(self) -> str:
        return f"{self.path}: {self.plan.summary()}" if self.path else f"{self.plan}; dry run, nothing written"
