"""NF4 in safetensors, as bitsandbytes lays out a linear layer: several tensors, named after its weight "w".

    w                                    uint8 (n, 1): the codes, two a byte, the first one above
    w.absmax                             uint8 codes of absmax; without double quantization the absmax, float32
    w.quant_map                          float32 (16,): the values of the codes
    w.nested_absmax, w.nested_quant_map  float32 (n_groups,) and (256,), with double quantization only
    w.quant_state.bitsandbytes__nf4      JSON in bytes: the shape, nested_offset, the sizes of the blocks

Source: bitsandbytes/functional.py, QuantState.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.formats.nf4 import NESTED_BLOCK_SIZE, NF4, NF4_F32, SCALES, VALUES
from qjax.tensor import QTensor

CODES, STATE = "", "quant_state.bitsandbytes__nf4"
_PLAIN, _NESTED = (CODES, "absmax", "quant_map", STATE), ("nested_absmax", "nested_quant_map")
PARTS = (*_PLAIN, *_NESTED)
"""What follows the name of the weight."""

DTYPES = ("U8", "F32")
"""Of the parts, in safetensors' words."""

FORMATS = (NF4(), NF4_F32())
"""With and without double quantization."""


def key(name: str, part: str) -> str:
    """The name of a part of the weight ``name``."""
    return f"{name}.{part}" if part else name


def config(dtype: str) -> dict[str, Any]:
    """config.json's quantization_config.  dtype: what the weights are decoded to, in torch's words."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }


def to_parts(t: QTensor, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The parts of a matrix in one of `FORMATS`.  dtype: what it is to be decoded to, in torch's words."""
    fields = t.fields
    state = {"quant_type": "nf4", "blocksize": NF4.block_size, "dtype": dtype, "shape": list(t.shape)}
    nested = {}
    if t.format == NF4():
        nested = {"nested_absmax": np.asarray(fields.nested_absmax), "nested_quant_map": SCALES}
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
        state |= {"nested_offset": float(fields.nested_offset)}
    return {
        CODES: np.asarray(fields.qs).reshape(-1, 1),
        "absmax": np.asarray(fields.absmax).reshape(-1),
        "quant_map": VALUES,
        STATE: np.frombuffer(json.dumps(state).encode(), np.uint8),
        **nested,
    }


def read_state(data: UInt8[np.ndarray, " n_bytes"]) -> tuple[dict[str, Any], Format, tuple[int, ...]]:
    """A quant_state, the format that it tells of, and the shape.  Raises QjaxError if it is of another kind."""
    try:
        state = json.loads(data.tobytes())
        shape = tuple(state["shape"])
        sizes = all(isinstance(n, int) and n > 0 for n in shape) and 1 <= len(shape) <= 2
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise QjaxError(f"the quant_state of bitsandbytes is damaged ({error!r})") from None
    blocks = state.get("blocksize"), state.get("nested_blocksize", NESTED_BLOCK_SIZE)
    if not sizes or shape[-1] % NF4.block_size or blocks != (NF4.block_size, NESTED_BLOCK_SIZE):
        raise QjaxError(
            f"only matrices in blocks of {NF4.block_size} and {NESTED_BLOCK_SIZE} are read, found shape {shape} in "
            f"blocks of {blocks[0]} and {blocks[1]}"
        )
    return state, NF4() if "nested_blocksize" in state else NF4_F32(), shape


def from_parts(parts: Mapping[str, np.ndarray]) -> QTensor:
    """The matrix that `to_parts` stored; the inverse.

    Raises QjaxError if parts are missing, contradict each other, or have maps other than NF4's.
    """
    if STATE not in parts:
        raise QjaxError(f"the part {STATE} of the bitsandbytes tensor is missing")
    state, format, shape = read_state(parts[STATE])
    nested = format == NF4()
    if missing := [part for part in _PLAIN + _NESTED * nested if part not in parts]:
        raise QjaxError(f"the part {missing[0] or 'with the codes'} of the bitsandbytes tensor is missing")
    n_blocks = (*shape[:-1], shape[-1] // NF4.block_size)
    try:
        fields = {"absmax": parts["absmax"].reshape(n_blocks), "qs": parts[CODES].reshape(*n_blocks, -1)}
        if nested:
            with np.errstate(over="raise"):
                offset = np.float32(state["nested_offset"])
            fields |= {"nested_absmax": parts["nested_absmax"], "nested_offset": offset}
        t = QTensor(format.Fields(**fields), format)
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise QjaxError(f"the bitsandbytes tensor contradicts its quant_state ({error})") from None
    dtypes_differ = any(fields[field.name].dtype != field.dtype for field in format.layout)
    if dtypes_differ or t.nbytes != format.nbytes(shape):
        found = ", ".join(f"{name} {field.dtype}{field.shape}" for name, field in fields.items())
        raise QjaxError(f"the bitsandbytes tensor contradicts its quant_state of shape {shape}: found {found}")
    # As bitsandbytes compares them: what made the file may round the map otherwise.
    maps = {"quant_map": VALUES} | ({"nested_quant_map": SCALES} if nested else {})
    for name, known in maps.items():
        if parts[name].shape != known.shape or not np.allclose(parts[name], known, rtol=0, atol=1e-6):
            raise QjaxError(f"the bitsandbytes tensor has a {name} that is not NF4's")
    return jax.tree.map(jnp.asarray, t)
