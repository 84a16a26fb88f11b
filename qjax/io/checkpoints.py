"""Hugging Face folders: config.json, model.safetensors (or shards and their index), tokenizer.json.

In memory tensors go by GGUF's names and lie as in GGUF (see `names`); the translation happens here.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.io import names
from qjax.io.atomic import atomic_write
from qjax.io.cursor import shorten
from qjax.io.stored import Stored
from qjax.io.tokenizer import Tokenizer
from qjax.io.tokenizer_json import dump_json, load_json
from qjax.models.config import Config
from qjax.models.transformer import tensor_shapes
from qjax.tensor import QTensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The types a weight may have, which safetensors and ggml call by the same names.
_FORMATS = ("F32", "F16", "BF16")
_DTYPES = ("float32", "float16", "bfloat16")
# Some folders hold the rotary frequencies too, which follow from the config.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class CheckpointTensor(Stored):
    """A tensor in a safetensors file; its bytes are read when asked for."""

    name: str
    """Hugging Face's."""
    shape: tuple[int, ...]
    format: Format
    path: Path
    heads: int | None = None
    """If given, the rows are interleaved within each of so many heads on loading."""

    def load(self) -> Array:
        """The tensor in memory, in the file's dtype and GGUF's layout."""
        from safetensors import safe_open

        with safe_open(self.path, framework="numpy") as file:
            x = file.get_tensor(self.name)
        return jnp.asarray(x if self.heads is None else names.interleave(x, self.heads))

    @property
    def data(self) -> np.ndarray:
        """The bytes as a GGUF file has them."""
        return np.asarray(self.load()).reshape(-1).view(np.uint8)


class Checkpoint(NamedTuple):
    """A model as a folder holds it; its tokenizer is `Tokenizer.from_folder`'s to read."""

    config: Config
    tensors: dict[str, CheckpointTensor]
    """By GGUF name, in the order of a GGUF file."""


def read_folder(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face folder; the tensors are float32, float16 or bfloat16, and read when asked for.

    The head is tied where the config says so or lm_head.weight is absent, and config.tied tells.

    Raises QjaxError for files that are missing or damaged, an architecture or tensor that is not known, a
    tensor that is missing or whose type or shape is not the config's, an index that names a file outside the
    folder, and a head that the config calls tied but that differs from the embedding.
    """
    folder = Path(path)
    config = Config.from_hf(load_json(folder / "config.json"))
    found = {names.to_gguf(tensor.name): tensor for file, listed in _files(folder) for tensor in _tensors(file, listed)}
    head = found.get("output.weight")
    config = replace(config, tied=config.tied or head is None)
    if config.tied:
        found.pop("output.weight", None)

    if config.n_layers > len(found):
        raise QjaxError(f"{folder}: config.json has {config.n_layers} layers, more than there are tensors")
    shapes = tensor_shapes(config)
    for name in (*shapes, *found):
        if name not in found:
            raise QjaxError(f"{folder}: the tensor {names.to_hf(name)} ({name}) is missing")
        tensor = found[name]
        where = f"{tensor.path}: {tensor.name}"
        if name not in shapes:
            raise QjaxError(f"{where} has no place in a model of {config.n_layers} layers (config.json)")
        if tensor.shape != shapes[name]:
            raise QjaxError(f"{where} has shape {tensor.shape}, expected {shapes[name]} by config.json")
    tensors = {name: replace(found[name], heads=names.interleaved_heads(name, config)) for name in shapes}
    embedding = tensors["token_embd.weight"]
    if config.tied and head is not None and not np.array_equal(head.load(), embedding.load()):
        raise QjaxError(
            f"{head.path}: {head.name} differs from {embedding.name}, yet config.json has "
            "tie_word_embeddings. Remove the one or set the other to false."
        )
    return Checkpoint(config, tensors)


def write_folder(
    path: str | os.PathLike[str],
    config: Config,
    tensors: Mapping[str, Array | QTensor],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Save a model as a Hugging Face folder, each file whole or not at all; the folder is made if need be.

    tensors: by GGUF name, in GGUF's layout, float32, float16 or bfloat16; what `read_folder` gives is written
    back with the same bytes.

    Raises QjaxError for a tensor that is missing, unknown or misshapen, or that safetensors has no type for.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    shapes = tensor_shapes(config)
    if unmatched := sorted(shapes.keys() ^ tensors.keys()):
        problem = "is missing" if unmatched[0] in shapes else "has no place in this model"
        raise QjaxError(f"{path}: not written: the tensor {unmatched[0]} {problem}")
    weights = {}
    for name, shape in shapes.items():
        x = tensors[name]
        if isinstance(x, QTensor) or x.dtype.name not in _DTYPES:
            kind = x.format.name if isinstance(x, QTensor) else x.dtype.name
            raise QjaxError(
                f"{path}: not written: {name} is {kind}, and a safetensors folder holds "
                f"{', '.join(_DTYPES)}. Dequantize it first, or save a GGUF file."
            )
        if x.shape != shape:
            raise QjaxError(f"{path}: not written: {name} has shape {x.shape}, expected {shape}")
        heads = names.interleaved_heads(name, config)
        rows = np.asarray(x)
        weights[names.to_hf(name)] = rows if heads is None else names.deinterleave(rows, heads)

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    ids = {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    dtype = weights[names.to_hf("token_embd.weight")].dtype.name
    try:
        with atomic_write(folder / WEIGHTS) as file:
            save_file(weights, file.name, metadata={"format": "pt"})
    except SafetensorError as error:
        raise QjaxError(f"{folder / WEIGHTS}: not written ({error})") from error
    (folder / INDEX).unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.to_folder(folder)
    dump_json(folder / "config.json", config.to_hf() | {"torch_dtype": dtype} | ids)


def _files(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """The safetensors files of a folder, each with the tensors that the index says it holds."""
    if (folder / WEIGHTS).exists():
        return [(folder / WEIGHTS, None)]
    if not (folder / INDEX).exists():
        raise QjaxError(
            f"{folder}: there is neither {WEIGHTS} nor {INDEX}. Pickled weights (.bin, .pt) are not read; "
            "convert them to safetensors."
        )
    weight_map = load_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise QjaxError(f"{folder / INDEX}: expected an object 'weight_map' from tensor names to file names")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(file, set()).add(name)
    for file in listed:
        # Windows' rules see both kinds of separators, drives and "..", on every system.
        if PureWindowsPath(file).name != file or not file.endswith(".safetensors"):
            raise QjaxError(f"{folder / INDEX}: {shorten(file)} is not a safetensors file in the same folder")
    return [(folder / file, names_in_file) for file, names_in_file in listed.items()]


def _tensors(file: Path, listed: set[str] | None) -> Iterator[CheckpointTensor]:
    """The tensors in a safetensors file, from its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            keys = set(opened.keys())
            if absent := sorted((listed or set()) - keys):
                raise QjaxError(f"{file}: the tensor {absent[0]}, which {INDEX} places here, is missing")
            for name in sorted(keys if listed is None else listed):
                if name.endswith(_DERIVED):
                    continue
                stored = opened.get_slice(name)
                if (dtype := stored.get_dtype()) not in _FORMATS:
                    raise QjaxError(f"{file}: {name} is {dtype}, expected one of {', '.join(_FORMATS)}")
                yield CheckpointTensor(name, tuple(stored.get_shape()), formats.get(dtype), file)
    except FileNotFoundError:
        raise QjaxError(f"{file}: there is no such file, though {INDEX} names it") from None
    except (SafetensorError, OSError) as error:
        raise QjaxError(f"{file}: not a safetensors file, or cut short ({error}). Fetch it again.") from error
