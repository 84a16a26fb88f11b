"""Hugging Face folders: config.json, model.safetensors (or shards and their index), tokenizer.json.

In memory tensors go by GGUF's names and lie as in GGUF (see `names`); the translation happens here.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import QjaxError
from qjax.io import names
from qjax.io.tokenizer import Tokenizer
from qjax.io.tokenizer_json import dump_json, load_json
from qjax.models.config import Config
from qjax.models.transformer import tensor_shapes
from qjax.tensor import QTensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# How safetensors and jax name the types a weight may have.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Some folders hold the rotary frequencies too, which follow from the config.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class _Entry:
    """A tensor in a safetensors file."""

    file: Path
    hf_name: str
    dtype: str
    shape: tuple[int, ...]


class LazyTensors(Mapping[str, Array]):
    """The tensors of a folder by GGUF name, in the order of a GGUF file; each is read when asked for."""

    def __init__(self, config: Config, entries: Mapping[str, _Entry]):
        self._config = config
        self._entries = entries

    def __getitem__(self, name: str) -> Array:
        from safetensors import safe_open

        entry = self._entries[name]
        # Reading is safetensors' own: the file is mapped, and its header was checked when it was opened.
        with safe_open(entry.file, framework="numpy") as file:
            return jnp.asarray(names.interleave(name, file.get_tensor(entry.hf_name), self._config))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"LazyTensors({len(self)} tensors)"


class Checkpoint(NamedTuple):
    """A model as a folder holds it; its tokenizer is `Tokenizer.from_folder`'s to read."""

    config: Config
    tensors: LazyTensors


def read_folder(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face folder; the tensors are float32, float16 or bfloat16, and read when asked for.

    The head is tied where the config says so or lm_head.weight is absent, and config.tied tells.

    Raises QjaxError for files that are missing or damaged, an architecture or tensor that is not known, a tensor
    that is missing or whose type or shape is not the config's, an index that names a file outside the folder,
    and a head that the config calls tied but that differs from the embedding.
    """
    folder = Path(path)
    hf_config = load_json(folder / "config.json")
    found = {entry.hf_name: entry for file, listed in _files(folder) for entry in _entries(file, listed)}
    entries = {
        names.to_gguf(hf_name): entry for hf_name, entry in found.items() if not hf_name.endswith(_DERIVED)
    }
    tied = bool(hf_config.get("tie_word_embeddings")) or "output.weight" not in entries
    config = Config.from_hf(hf_config | {"tie_word_embeddings": tied})
    head = entries.pop("output.weight", None) if tied else None

    shapes = tensor_shapes(config)
    for name, shape in shapes.items():
        if name not in entries:
            raise QjaxError(f"{folder}: the tensor {names.to_hf(name)} ({name}) is missing")
        entry = entries[name]
        if entry.shape != shape:
            raise QjaxError(f"{entry.file}: {entry.hf_name} has shape {entry.shape}, expected {shape} by config.json")
        if entry.dtype not in _DTYPES:
            raise QjaxError(f"{entry.file}: {entry.hf_name} is {entry.dtype}, expected {', '.join(_DTYPES)}")
    if extra := [entries[name].hf_name for name in entries if name not in shapes]:
        raise QjaxError(f"{folder}: config.json has {config.n_layers} layers and no place for {extra[0]}")
    tensors = LazyTensors(config, {name: entries[name] for name in shapes})
    if head is not None:
        _check_tied(head, tensors)
    return Checkpoint(config, tensors)


def write_folder(
    path: str | os.PathLike[str],
    config: Config,
    tensors: Mapping[str, Array | QTensor],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Save a model as a Hugging Face folder, each file whole or not at all; the folder is made if need be.

    tensors: by GGUF name, in GGUF's layout, float32, float16 or bfloat16; what `read_folder` gives is written back
    with the same bytes.

    Raises QjaxError for a tensor that is missing, unknown or misshapen, or that safetensors has no type for.
    """
    from safetensors.numpy import save_file

    shapes = tensor_shapes(config)
    if unmatched := sorted(shapes.keys() ^ tensors.keys()):
        problem = "is missing" if unmatched[0] in shapes else "has no place in this model"
        raise QjaxError(f"{path}: not written: the tensor {unmatched[0]} {problem}")
    weights = {}
    for name, shape in shapes.items():
        x = tensors[name]
        if isinstance(x, QTensor) or x.dtype.name not in _DTYPES.values():
            kind = x.format.name if isinstance(x, QTensor) else x.dtype.name
            raise QjaxError(f"{path}: not written: {name} is {kind}, and a safetensors folder holds float32, "
                            "float16 or bfloat16. Dequantize it first, or save a GGUF file.")  # fmt: skip
        if x.shape != shape:
            raise QjaxError(f"{path}: not written: {name} has shape {x.shape}, expected {shape} by the config")
        weights[names.to_hf(name)] = np.ascontiguousarray(names.deinterleave(name, np.asarray(x), config))

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    ids = {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    dtype = weights[names.to_hf("token_embd.weight")].dtype.name
    # safetensors writes a file by name, so it gets a place of its own first.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".qjax-") as temporary:
        save_file(weights, Path(temporary) / WEIGHTS, metadata={"format": "pt"})
        os.replace(Path(temporary) / WEIGHTS, folder / WEIGHTS)
    (folder / INDEX).unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.to_folder(folder)
    dump_json(folder / "config.json", config.to_hf() | {"torch_dtype": dtype} | ids)


def _files(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """The safetensors files of a folder, each with the tensors that the index says it holds."""
    if (folder / WEIGHTS).exists():
        return [(folder / WEIGHTS, None)]
    if not (folder / INDEX).exists():
        raise QjaxError(f"{folder}: there is neither {WEIGHTS} nor {INDEX}. Other formats of weights (pickled .bin, "
                        ".pt) are not read; convert them to safetensors.")  # fmt: skip
    weight_map = load_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise QjaxError(f"{folder / INDEX}: expected an object 'weight_map' from tensor names to file names")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(file, set()).add(name)
    for file in listed:
        # Windows' rules see both kinds of separators, drives and "..", on every system.
        if PureWindowsPath(file).name != file or not file.endswith(".safetensors"):
            raise QjaxError(f"{folder / INDEX}: {file!r} is not the name of a safetensors file in this folder")
    return [(folder / file, names_in_file) for file, names_in_file in listed.items()]


def _entries(file: Path, listed: set[str] | None) -> Iterator[_Entry]:
    """The tensors in a safetensors file, from its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            keys = set(opened.keys())
            if absent := sorted((listed or set()) - keys):
                raise QjaxError(f"{file}: the tensor {absent[0]}, which {INDEX} places here, is missing")
            for name in sorted(keys if listed is None else listed):
                part = opened.get_slice(name)
                yield _Entry(file, name, part.get_dtype(), tuple(part.get_shape()))
    except FileNotFoundError:
        raise QjaxError(f"{file}: there is no such file, though {INDEX} names it") from None
    except (SafetensorError, OSError) as error:
        raise QjaxError(f"{file}: not a safetensors file, or cut short ({error}). Fetch it again.") from error


def _check_tied(head: _Entry, tensors: LazyTensors) -> None:
    """A tied model may carry its head all the same, but then it must be the embedding."""
    from safetensors import safe_open

    with safe_open(head.file, framework="numpy") as file:
        if not np.array_equal(file.get_tensor(head.hf_name), np.asarray(tensors["token_embd.weight"])):
            raise QjaxError(f"{head.file}: {head.hf_name} differs from model.embed_tokens.weight, but config.json "
                            "says tie_word_embeddings. Remove the one or set the other to false.")  # fmt: skip
