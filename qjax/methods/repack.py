"""Weights that are quantized already, in another format that has the same ones: nothing is rounded a second time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import formats
from qjax.formats import Affine, Format, Integers
from qjax.tensor import QTensor, dequantize

TARGETS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")
"""By size."""


def repack(t: QTensor) -> QTensor | None:
    """The weights of ``t``, Affine with zero points (as GPTQ and AWQ leave them), in the smallest of the GGML formats
    in `TARGETS` that has every one of them exactly; None if none does.

    Q4_0 has codes that end up within -8 .. 7 steps of zero: 2 and 3 bits always, 4 bits if the zero points are 8.  Q5_0
    has -16 .. 15: all others of 4 bits.  Q8_0 has those of 8 bits whose zero points are 128.  Q4_1 stores its minimum
    as a float16, which zero point times scale seldom is.  Scales have to be float16, or equal to one, and groups a
    multiple of 32.
    """
    source = t.format
    if not (isinstance(source, Affine) and source.zero_point and int(source.block_size) % 32 == 0):
        return None
    fields, weights = t.by_rows().fields, dequantize(t)
    for format in map(formats.get, TARGETS):
        repacked = QTensor(_repacked(fields, source, format), format)
        # Whatever did not fit shows here.
        if np.array_equal(dequantize(repacked), weights):
            return repacked
    return None


@functools.partial(jax.jit, static_argnames=("source", "format"))
def _repacked(fields: Any, source: Affine, format: Format) -> tuple:
    """The fields of ``format`` with the codes of those of ``source``."""
    per_group = int(source.block_size) // format.block_size
    codes = source.codes(fields).astype(jnp.int32)
    d, z = (x.astype(jnp.float32) for x in (fields.d, fields.z))
    with_minimum = "m" in (field.name for field in format.layout)
    if not with_minimum:
        codes -= fields.z.astype(jnp.int32)[..., None]
    blocks = codes.astype(jnp.int8).reshape(*codes.shape[:-2], -1, format.block_size)
    d, m = (jnp.repeat(x, per_group, axis=-1) for x in (d, -z * d))
    return format.from_integers(Integers(blocks, d, m if with_minimum else None, (-128, 127)))
