"""Folders whose matrices somebody has quantized: what config.json says of it, and who reads that.

A scheme says which tensors are parts of a matrix (`part`), what they make (`describe`) and makes it (`weight`).  Those
of bitsandbytes need none, as their tensors describe themselves (`bitsandbytes`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qjax.errors import QjaxError
from qjax.io.cursor import shorten
from qjax.io.fp8 import Blocks
from qjax.io.gptq import AWQ_ORDER, Groups
from qjax.io.tokenizer_json import load_json

Scheme = Groups | Blocks

READ = "gptq (2, 3, 4 or 8 bits), awq (gemm, 4 bits), fp8 (blocks of E4M3) and bitsandbytes (NF4)"

# Where AutoGPTQ and AutoAWQ described what they did before config.json had a place for it.
_OWN_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_scheme(folder: Path, config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a folder with this config.json; None if its tensors describe themselves.

    Raises QjaxError for one that is not read, with those that are.
    """
    described, where = config.get("quantization_config"), "config.json"
    for file, method in _OWN_CONFIGS.items():
        if described is None and (folder / file).exists():
            described, where = {"quant_method": method} | load_json(folder / file), file
    if described is None:
        return None
    if not isinstance(described, dict):
        raise QjaxError(f"{folder / where}: quantization_config is {shorten(described)}, expected an object")
    method = described.get("quant_method")
    if method in (None, "bitsandbytes"):
        return None
    reader = _METHODS.get(method) if isinstance(method, str) else None
    found = reader and reader(described)
    if not found:
        details = {key: described[key] for key in _DETAILS if key in described}
        said = ", ".join(f"{key} {shorten(value)}" for key, value in details.items())
        raise QjaxError(
            f"{folder / where}: the model is quantized by {shorten(method)} ({said or 'no more is said'}), and of such "
            f"folders these are read: {READ}. Start from the model's float weights, or from a GGUF file."
        )
    return found


_DETAILS = ("bits", "w_bit", "checkpoint_format", "format", "version", "weight_block_size", "is_marlin_format")


def _gptq(config: Mapping[str, Any]) -> Groups | None:
    layout, bits = config.get("checkpoint_format", config.get("format", "gptq")), config.get("bits")
    if layout not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        return None
    if not isinstance(bits, int) or bits not in (2, 3, 4, 8):
        return None
    return Groups("GPTQ", bits, down=True, less_one=layout == "gptq")


def _awq(config: Mapping[str, Any]) -> Groups | None:
    layout, bits = config.get("version", config.get("format", "gemm")), config.get("bits", config.get("w_bit"))
    if not isinstance(layout, str) or layout.lower() != "gemm" or not isinstance(bits, int) or bits != 4:
        return None
    return Groups("AWQ", bits, down=False, order=AWQ_ORDER)


def _fp8(config: Mapping[str, Any]) -> Blocks | None:
    match config.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return Blocks(rows, columns)
    return None


_METHODS: dict[str, Callable[[Mapping[str, Any]], Scheme | None]] = {"gptq": _gptq, "awq": _awq, "fp8": _fp8}
