"""LoRA adapters (Hu et al. 2021): some matrices W of a model become W + scale · B A, with A (rank, in), B (out, rank).

    GGUF    general.type "adapter", adapter.type "lora", adapter.lora.alpha; W's name.lora_a and .lora_b
    PEFT    adapter_config.json; adapter_model.safetensors: base_model.model.<W's name>.lora_A.weight and .lora_B.weight

scale is alpha / rank.  Source: llama.cpp convert_lora_to_gguf.py and src/llama-adapter.cpp, peft's LoraConfig.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

from qjax.errors import QjaxError, located
from qjax.formats import get
from qjax.io import gguf, names
from qjax.io.checkpoints import FORMATS
from qjax.io.cursor import shorten
from qjax.io.stored import Stored
from qjax.io.tokenizer_json import load_json
from qjax.models.config import Config
from qjax.tensor import QTensor, dequantize

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What adapter_config.json may ask for beside, and what it has to say if it does.
_PLAIN = {"peft_type": "LORA", "use_dora": False, "fan_in_fan_out": False, "alpha_pattern": {}, "modules_to_save": None}
_MAX_ALPHA = 1e30  # It is tens; float32 has to hold its products.
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


class Pair(NamedTuple):
    """What is added to a matrix, but for the scale, in GGUF's layout."""

    a: Float32[np.ndarray, "rank columns"]
    b: Float32[np.ndarray, "rows rank"]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory.  pairs: by the GGUF names of the matrices."""

    path: Path
    architecture: str
    alpha: float
    pairs: Mapping[str, Pair]

    def apply(self, tensors: Mapping[str, Stored], architecture: str) -> dict[str, Stored]:
        """The tensors of a model with the adapter added.  Raises QjaxError if it is one of another model."""
        if architecture != self.architecture:
            raise QjaxError(f"{self.path}: an adapter of {self.architecture} models, and this one is {architecture}")
        for name, pair in self.pairs.items():
            shape = (pair.b.shape[0], pair.a.shape[1])
            if name not in tensors or tensors[name].shape != shape:
                found = f"has shape {tensors[name].shape}" if name in tensors else "does not exist"
                raise QjaxError(f"{self.path}: changes {name} of shape {shape}, which {found} in this model")
        return {
            name: Merged(tensor, self.pairs[name], self.alpha) if name in self.pairs else tensor
            for name, tensor in tensors.items()
        }


class Merged(Stored):
    """A matrix with what an adapter adds, in float32."""

    def __init__(self, base: Stored, pair: Pair, alpha: float):
        self.base, self.shape, self.format = base, base.shape, get("F32")
        self._pair, self._scale = pair, np.float32(alpha / pair.a.shape[0])

    @property
    def data(self) -> np.ndarray:
        base = self.base.load()
        dense = np.asarray(dequantize(base) if isinstance(base, QTensor) else base).astype(np.float32)
        # Whoever uses weights says if they are not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            return (dense + self._scale * (self._pair.b @ self._pair.a)).reshape(-1).view(np.uint8)

    def load(self) -> Array:
        return jnp.asarray(self.data.view(np.float32).reshape(self.shape))


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter, as PEFT saves it."""
    return (Path(path) / CONFIG).is_file()


def read(path: str | os.PathLike[str], config: Config) -> Adapter:
    """A GGUF file or a PEFT folder.  config: of the model that it is for.

    Raises QjaxError for what is no adapter, or changes more than matrices of layers and the head.
    """
    path = Path(path)
    return _read_folder(path, config) if path.is_dir() else _read_gguf(path)


def _read_gguf(path: Path) -> Adapter:
    file = gguf.read(path)
    kind = tuple(str(file.metadata.get(key)) for key in ("general.type", "adapter.type"))
    alpha = file.metadata.get("adapter.lora.alpha")
    if kind != ("adapter", "lora") or not isinstance(alpha, float) or not abs(alpha) < _MAX_ALPHA:
        raise QjaxError(
            f"{path}: no LoRA adapter: general.type and adapter.type are {kind}, adapter.lora.alpha {shorten(alpha)}"
        )
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in file.tensors.items():
        matrix, _, part = name.rpartition(".lora_")
        x = tensor.load()
        x = np.asarray(dequantize(x) if isinstance(x, QTensor) else x).astype(np.float32)
        halves.setdefault(matrix, {})[part] = x
    return _adapter(path, file.architecture, alpha, halves)


def _read_folder(folder: Path, config: Config) -> Adapter:
    from safetensors import SafetensorError, safe_open

    described = load_json(folder / CONFIG)
    for key, value in _PLAIN.items():
        if described.get(key) and described[key] != value:
            raise QjaxError(f"{folder / CONFIG}: {key} is {described[key]!r}, which GGUF cannot express")
    halves: dict[str, dict[str, np.ndarray]] = {}
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            for key in sorted(file.keys()):
                if (match := _NAME.fullmatch(key)) is None:
                    raise QjaxError(f"{folder / WEIGHTS}: {key} is no part of a LoRA pair, and nothing else is read")
                dtype, shape = (stored := file.get_slice(key)).get_dtype(), stored.get_shape()
                if dtype not in FORMATS or len(shape) != 2:
                    expected = f"a matrix of {', '.join(FORMATS)}"
                    raise QjaxError(f"{folder / WEIGHTS}: {key} is {dtype} {shape}, expected {expected}")
                with located(folder / WEIGHTS):
                    name, part = names.to_gguf(f"{match[1]}.weight", config), match[2].lower()
                if names.expert(key) is not None:
                    raise QjaxError(f"{folder / WEIGHTS}: {key} is of a single expert, which is not supported")
                x, heads = file.get_tensor(key).astype(np.float32), names.layout(name, config).heads
                # The rows of W are those of B.
                if heads and part == "b" and (not x.size or x.shape[0] % (2 * heads)):
                    raise QjaxError(f"{folder / WEIGHTS}: {key} has shape {x.shape}, expected rows for {heads} heads")
                halves.setdefault(name, {})[part] = names.interleave(x, heads) if heads and part == "b" else x
    except (SafetensorError, OSError) as error:
        raise QjaxError(f"{folder / WEIGHTS}: not a safetensors file, or cut short ({error})") from None
    alpha = described.get("lora_alpha")
    if not isinstance(alpha, int | float) or not abs(alpha) < _MAX_ALPHA:  # nor NaN
        raise QjaxError(f"{folder / CONFIG}: lora_alpha is {shorten(alpha)}, expected a number")
    if described.get("use_rslora"):
        # There the scale is alpha / √rank.
        ranks = {pair["a"].shape[0] for pair in halves.values() if "a" in pair}
        if len(ranks) != 1:
            raise QjaxError(f"{folder / CONFIG}: use_rslora with ranks {sorted(ranks)}, which GGUF cannot express")
        alpha *= math.sqrt(ranks.pop())
    return _adapter(folder, config.architecture, float(alpha), halves)


def _adapter(path: Path, architecture: str, alpha: float, halves: Mapping[str, Mapping[str, Any]]) -> Adapter:
    for name, pair in halves.items():
        fit = pair.keys() == {"a", "b"} and pair["a"].ndim == pair["b"].ndim == 2
        if not name or not fit or not 0 < pair["a"].shape[0] == pair["b"].shape[1]:
            found = ", ".join(f"{part} {x.shape}" for part, x in pair.items())
            raise QjaxError(f"{path}: {name}: found {found}; expected a (rank, columns) and b (rows, rank)")
        if name == "token_embd.weight":
            raise QjaxError(f"{path}: changes the embedding, which is not supported")
    if not halves:
        raise QjaxError(f"{path}: there are no tensors")
    return Adapter(path, architecture, alpha, {name: Pair(**pair) for name, pair in halves.items()})
