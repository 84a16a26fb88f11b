"""Round to nearest: each tensor on its own, as llama-quantize does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.formats.plain import Plain
from qjax.io.stored import Stored
from qjax.methods.recipes import Recipe
from qjax.tensor import QTensor, dequantize, quantize

QUANTIZATION_VERSION = 2
"""ggml.h GGML_QNT_VERSION: the layout of the block formats."""


@dataclass(frozen=True)
class Options:
    """rounding: replaces the rule of the final rounding step.  The others lift a refusal.

    Raises QjaxError for an unknown rounding.
    """

    rounding: str | None = None
    allow_requantize: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self):
        if self.rounding is not None:
            formats.check_rounding(self.rounding)


def plan(tensors: Mapping[str, Any], recipe: Recipe, options: Options = Options()) -> dict[str, Format | None]:
    """The format each tensor gets, None where it stays as it is; nothing is computed.

    tensors: anything with a ``shape`` and, if quantized, a ``format``.
    Raises QjaxError for a row that does not divide, and for quantized tensors unless ``allow_requantize``.
    """
    tied = "output.weight" not in tensors
    chosen = {name: recipe.format_for(name, tuple(t.shape), tied=tied) for name, t in tensors.items()}
    for name, format in chosen.items():
        source = stored_format(tensors[name])
        if format is not None and format != source and source.block_size > 1 and not options.allow_requantize:
            raise QjaxError(
                f"{name}: is {source.name} already, and quantizing it to {format.name} would add a second error. "
                "Start from an F32, F16 or BF16 model, or pass allow_requantize (--allow-requantize)."
            )
    return {name: None if f == stored_format(tensors[name]) else f for name, f in chosen.items()}


def stored_format(tensor: Array | QTensor | Stored) -> Format:
    """The Format of a QTensor or Stored tensor; of an Array the plain format of its dtype."""
    # jax.Array has a `format` too: its memory layout.
    return formats.plain_format(tensor.dtype) if isinstance(tensor, Array) else tensor.format


def quantize_tensor(
    name: str, tensor: Array | QTensor, format: Format, options: Options = Options()
) -> Array | QTensor:
    """``tensor`` in ``format``: a QTensor, or an Array of its dtype if the format is plain.

    Raises QjaxError naming it if it has NaN or infinite weights, or gets such scales, unless ``allow_nonfinite``.
    """
    x = dequantize(tensor) if isinstance(tensor, QTensor) else tensor.astype(jnp.float32)
    rounding = options.rounding if format.rounding else None
    result = quantize(x, format, rounding=rounding)
    if not options.allow_nonfinite:
        _refuse_nonfinite(name, x, result)
    return result.fields.values if isinstance(format, Plain) else result


def _refuse_nonfinite(name: str, x: Array, result: QTensor) -> None:
    # In numpy, because each of these steps would be compiled for each shape.
    finite = np.isfinite(np.asarray(x))
    if wrong := x.size - int(np.count_nonzero(finite)):
        at = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise QjaxError(
            f"{name}: {wrong} of {x.size} weights are NaN or infinite, the first at {at}. The model is damaged; "
            "fetch it again, or pass allow_nonfinite (--allow-nonfinite)."
        )
    scales = [np.asarray(f, np.float32) for f in result.fields if jnp.issubdtype(f.dtype, jnp.floating)]
    if not all(np.isfinite(scale).all() for scale in scales):
        raise QjaxError(
            f"{name}: weights of up to {float(jnp.abs(x).max()):.3g} overflow what {result.format.name} can hold. "
            "Use BF16 or F32 for it."
        )


@dataclass(frozen=True)
class Pending(Stored):
    """A Stored tensor that is read and quantized when its bytes are asked for, so that a model of any size streams
    through a memory of a few tensors."""

    name: str
    source: Stored
    format: Format
    options: Options

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def load(self) -> Array | QTensor:
        return quantize_tensor(self.name, self.source.load(), self.format, self.options)

    @property
    def data(self) -> np.ndarray:
        result = self.load()
        return np.asarray(result.to_bytes() if isinstance(result, QTensor) else result).view(np.uint8)


def pending(tensors: Mapping[str, Stored], recipe: Recipe, options: Options = Options()) -> dict[str, Stored]:
    """``tensors`` (still on disk) as `plan` has them, each quantized when it is written.  Raises as `plan` does."""
    chosen = plan(tensors, recipe, options)
    return {
        name: tensors[name] if format is None else Pending(name, tensors[name], format, options)
        for name, format in chosen.items()
    }


def metadata(recipe: Recipe) -> dict[str, Any]:
    """What llama-quantize writes into general.*: the file type, where it has a number, and the layout's version."""
    file_type = {} if recipe.file_type is None else {"general.file_type": recipe.file_type}
    return {"general.quantization_version": QUANTIZATION_VERSION} | file_type
