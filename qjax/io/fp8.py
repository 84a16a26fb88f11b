"""8-bit floats with a scale for each block of a matrix, as DeepSeek V3 and Qwen3 are published.

    w.weight            F8_E4M3 (d_out, d_in)
    w.weight_scale_inv  floats (⌈d_out / rows⌉, ⌈d_in / columns⌉), what blocks of rows × columns are multiplied by

Source: transformers integrations/finegrained_fp8.py; llama.cpp conversion/base.py (dequant_simple).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import QjaxError
from qjax.formats import Format, get
from qjax.io.raw_tensor import RawTensor

CODES, SCALES = "weight", "weight_scale_inv"


class Blocks(NamedTuple):
    """How all matrices of a model are stored."""

    rows: int
    columns: int

    @property
    def label(self) -> str:
        return f"FP8 in blocks of {self.rows}×{self.columns}, read as F32"

    def part(self, name: str, dtype: str) -> str | None:
        """Which part of a matrix the tensor called ``name`` is; None if it is none."""
        part = name.rpartition(".")[2]
        return part if part == SCALES or (part == CODES and dtype == "F8_E4M3") else None

    def describe(self, parts: Mapping[str, RawTensor]) -> tuple[tuple[int, ...], Format]:
        """Shape and format of the matrix.

        Its weights are float32: the products, rounded to it.  Raises QjaxError if a part is missing or of another type
        or shape than the other wants.
        """
        if missing := {CODES, SCALES} - parts.keys():
            raise QjaxError(f"the part {min(missing)} of an FP8 matrix is missing")
        codes, scales = parts[CODES], parts[SCALES]
        if len(codes.shape) != 2 or 0 in codes.shape:
            raise QjaxError(f"an FP8 tensor of shape {codes.shape}, expected a matrix")
        expected = tuple(-(-n // size) for n, size in zip(codes.shape, self))
        if scales.shape != expected or scales.dtype not in ("F32", "F16", "BF16"):
            raise QjaxError(
                f"{SCALES} is {scales.dtype}{list(scales.shape)}, expected floats {list(expected)} for a matrix "
                f"{list(codes.shape)} in blocks of {self.rows}×{self.columns}"
            )
        return codes.shape, get("F32")

    def weight(self, parts: Mapping[str, RawTensor], format: Format) -> Array:
        """The matrix that `describe` described."""
        codes, scales = (parts[part].read().astype(np.float32) for part in (CODES, SCALES))
        # By index, for blocks may be said to be far larger than the matrix.
        for axis, (n, size) in enumerate(zip(codes.shape, self)):
            scales = np.take(scales, np.arange(n) // min(size, n), axis=axis)
        return jnp.asarray(codes * scales)
