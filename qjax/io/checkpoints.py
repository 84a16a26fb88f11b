"""Hugging Face folders: config.json, model.safetensors (or shards and their index), tokenizer.json.

Weights are floats, or NF4 as bitsandbytes stores it.
In memory tensors go by GGUF's names and lie as in GGUF (see `names`); the translation happens here.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.formats.nf4 import NF4_F32
from qjax.io import bitsandbytes, names
from qjax.io.atomic import atomic_write
from qjax.io.cursor import shorten
from qjax.io.names import AS_IT_IS, Layout
from qjax.io.stored import Held, Stored, piece_bounds
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
# Some folders hold the rotary frequencies too, which follow from the config, or which tokens see which (GPT-2).
_DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class CheckpointTensor(Stored):
    """A tensor in a safetensors file; its bytes are read when asked for."""

    name: str
    """Hugging Face's."""
    shape: tuple[int, ...]
    format: Format
    path: Path
    layout: Layout = AS_IT_IS
    """What is done on loading."""

    def placed(self, layout: Layout) -> "CheckpointTensor":
        """The tensor with ``layout``."""
        format = formats.get("F32") if layout.less_one else self.format
        return replace(self, layout=layout, shape=layout.shape(self.shape), format=format)

    def load(self) -> Array | QTensor:
        """The tensor in memory, in the file's dtype and GGUF's layout."""
        from safetensors import safe_open

        with safe_open(self.path, framework="numpy") as file:
            x = file.get_tensor(self.name)
        return jnp.asarray(self.layout.to_gguf(x))

    @property
    def data(self) -> np.ndarray:
        """The bytes as a GGUF file has them."""
        return np.asarray(self.load()).reshape(-1).view(np.uint8)

    def pieces(self) -> Iterator[np.ndarray]:
        if self.layout != AS_IT_IS or not self.shape:
            yield from super().pieces()
            return
        from safetensors import safe_open

        row_bytes = self.format.nbytes(self.shape) // max(self.shape[0], 1)
        with safe_open(self.path, framework="numpy") as file:
            rows = file.get_slice(self.name)
            for start, stop in piece_bounds(self.format.nbytes(self.shape), max(row_bytes, 1)):
                yield rows[start // row_bytes : stop // row_bytes].reshape(-1).view(np.uint8)


class NF4Tensor(CheckpointTensor):
    """A matrix in several parts, see `bitsandbytes`."""

    def placed(self, layout: Layout) -> "NF4Tensor":
        if layout.transposed:
            raise QjaxError(f"{self.path}: {self.name}: NF4 with rows for columns is not supported")
        # Rows that change their places take their scales along.
        return replace(self, layout=layout, format=self.format if layout == AS_IT_IS else NF4_F32())

    def load(self) -> QTensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="numpy") as file:
            keys, present = {part: bitsandbytes.key(self.name, part) for part in bitsandbytes.PARTS}, set(file.keys())
            parts = {part: file.get_tensor(key) for part, key in keys.items() if key in present}
        try:
            return _each(self.layout.to_gguf, bitsandbytes.from_parts(parts), self.layout)
        except QjaxError as error:
            raise QjaxError(f"{self.path}: {self.name}: {error}") from None

    @property
    def data(self) -> np.ndarray:
        """Raises QjaxError, for a GGUF file has no such blocks."""
        return np.asarray(self.load().to_bytes())

    def pieces(self) -> Iterator[np.ndarray]:
        yield self.data


@dataclass(frozen=True)
class Experts(Stored):
    """A matrix of each expert of a layer, (n_experts, out_features, in_features)."""

    each: tuple[CheckpointTensor, ...]

    @property
    def name(self) -> str:
        return self.each[0].name

    @property
    def path(self) -> Path:
        return self.each[0].path

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.each), *self.each[0].shape)

    @property
    def format(self) -> Format:
        return self.each[0].format

    def placed(self, layout: Layout) -> "Experts":
        return Experts(tuple(tensor.placed(layout) for tensor in self.each))

    def load(self) -> Array | QTensor:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tensor.load() for tensor in self.each))

    @property
    def data(self) -> np.ndarray:
        return np.concatenate([tensor.data for tensor in self.each])

    def pieces(self) -> Iterator[np.ndarray]:
        for tensor in self.each:
            yield from tensor.pieces()


class Checkpoint(NamedTuple):
    """A model as a folder holds it; its tokenizer is `Tokenizer.from_folder`'s to read."""

    config: Config
    tensors: Mapping[str, Stored]
    """By GGUF name, in the order of a GGUF file; what GGUF keeps as a tensor and Hugging Face in config.json among
    them."""


def read_folder(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face folder; the tensors are float32, float16, bfloat16 or NF4, and read when asked for.

    The head is tied where the config says so or lm_head.weight is absent, and config.tied tells.

    Raises QjaxError for files that are missing or damaged, an architecture or tensor that is not known, a
    tensor that is missing or whose type or shape is not the config's, an index that names a file outside the
    folder, and a head that the config calls tied but that differs from the embedding.
    """
    folder = Path(path)
    described = load_json(folder / "config.json")
    config = Config.from_hf(described)
    others = config.traits.classes[described["architectures"][0]].others
    listed = (tensor for file, listed in weight_files(folder) for tensor in _tensors(file, listed))
    listed = (tensor for tensor in listed if not any(part in tensor.name for part in others))
    found = _by_gguf_name(folder, config, listed)
    factors = {name: Held(np.array(values, np.float32)) for name, values in config.factors.items()}
    head = found.get("output.weight")
    config = replace(config, tied=config.tied or head is None)
    if config.tied:
        found.pop("output.weight", None)

    if config.n_layers > len(found):
        raise QjaxError(f"{folder}: config.json has {config.n_layers} layers, more than there are tensors")
    shapes = {name: shape for name, shape in tensor_shapes(config).items() if name not in factors}
    for name in (*shapes, *found):
        if name not in found:
            raise QjaxError(f"{folder}: the tensor {names.to_hf(name, config)} ({name}) is missing")
        tensor, layout = found[name], names.layout(name, config)
        where = f"{tensor.path}: {tensor.name}"
        if name not in shapes:
            raise QjaxError(f"{where} has no place in a model of {config.n_layers} layers (config.json)")
        if tensor.shape != (expected := layout.shape(shapes[name])):
            raise QjaxError(f"{where} has shape {tensor.shape}, expected {expected} by config.json")
    tensors = {name: found[name].placed(names.layout(name, config)) for name in shapes}
    embedding = tensors["token_embd.weight"]
    if config.tied and head is not None and not _equal(head.load(), embedding.load()):
        raise QjaxError(
            f"{head.path}: {head.name} differs from {embedding.name}, yet config.json has "
            "tie_word_embeddings. Remove the one or set the other to false."
        )
    return Checkpoint(config, factors | tensors)


def write_folder(
    path: str | os.PathLike[str],
    config: Config,
    tensors: Mapping[str, Array | QTensor],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Save a model as a Hugging Face folder, each file whole or not at all; the folder is made if need be.

    tensors: by GGUF name, in GGUF's layout, float32, float16, bfloat16 or NF4; what `read_folder` gives is written
    back with the same bytes.  Of NF4 the rows that GGUF interleaves keep their values, but their scales are stored
    without the second quantization.

    Raises QjaxError for a tensor that is missing, unknown or misshapen, or that safetensors has no type for.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    shapes = tensor_shapes(config)
    if unmatched := sorted(shapes.keys() ^ tensors.keys()):
        problem = "is missing" if unmatched[0] in shapes else "has no place in this model"
        raise QjaxError(f"{path}: not written: the tensor {unmatched[0]} {problem}")
    embedding = tensors["token_embd.weight"]
    dtype = "float32" if isinstance(embedding, QTensor) else embedding.dtype.name
    weights: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        if name in config.factors:
            continue  # config.json has them
        x = tensors[name]
        if (x.format not in bitsandbytes.FORMATS) if isinstance(x, QTensor) else (x.dtype.name not in _DTYPES):
            kind = x.format.name if isinstance(x, QTensor) else x.dtype.name
            raise QjaxError(
                f"{path}: not written: {name} is {kind}, and a safetensors folder holds "
                f"{', '.join(_DTYPES)} or NF4. Dequantize it first, or save a GGUF file."
            )
        if x.shape != shape:
            raise QjaxError(f"{path}: not written: {name} has shape {x.shape}, expected {shape}")
        layout = names.layout(name, config)
        x = _each(layout.to_hf, x, layout)
        if layout.less_one and (x.astype(dtype) == x).all():
            x = x.astype(dtype)  # as it was before 1 was added
        for expert, matrix in ((i, x[i]) for i in range(shape[0])) if len(shape) == 3 else [(None, x)]:
            key = names.to_hf(name, config, expert)
            if isinstance(matrix, QTensor):
                parts = bitsandbytes.to_parts(matrix, dtype)
                weights |= {bitsandbytes.key(key, part): values for part, values in parts.items()}
            else:
                weights[key] = np.ascontiguousarray(matrix)

    described = config.to_hf() | {"torch_dtype": dtype}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(isinstance(x, QTensor) for x in tensors.values()):
        described["quantization_config"] = bitsandbytes.config(dtype)
    try:
        with atomic_write(folder / WEIGHTS) as file:
            save_file(weights, file.name, metadata={"format": "pt"})
    except SafetensorError as error:
        raise QjaxError(f"{folder / WEIGHTS}: not written ({error})") from error
    (folder / INDEX).unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.to_folder(folder)
        described |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    dump_json(folder / "config.json", described)


def _by_gguf_name(
    folder: Path, config: Config, listed: Iterable[CheckpointTensor]
) -> dict[str, CheckpointTensor | Experts]:
    found: dict[str, CheckpointTensor | Experts] = {}
    experts: dict[str, dict[int, CheckpointTensor]] = {}
    for tensor in listed:
        name, expert = names.to_gguf(tensor.name, config), names.expert(tensor.name)
        if expert is None:
            found[name] = tensor
        else:
            experts.setdefault(name, {})[expert] = tensor
    for name, each in experts.items():
        if len(each) != config.n_experts or max(each) != len(each) - 1:
            raise QjaxError(
                f"{folder}: {names.to_hf(name, config)} are {len(each)} tensors, expected those of the "
                f"{config.n_experts} experts that config.json has"
            )
        kinds = {(tensor.shape, tensor.format) for tensor in each.values()}
        if len(kinds) > 1:
            raise QjaxError(f"{folder}: {names.to_hf(name, config)} differ in shape or type")
        found[name] = Experts(tuple(each[i] for i in range(config.n_experts)))
    return found


def _each(rearrange: Callable, x: Any, layout: Layout) -> Any:
    """``x``, an array or a QTensor, with its rows rearranged."""
    if layout == AS_IT_IS:
        return x
    return jax.tree.map(rearrange, x.by_rows() if isinstance(x, QTensor) else x)


def _equal(x: Array | QTensor, y: Array | QTensor) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(x), jax.tree.leaves(y)))


def weight_files(folder: Path) -> list[tuple[Path, set[str] | None]]:
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
            quantized = {name for name in keys if bitsandbytes.key(name, bitsandbytes.STATE) in keys}
            parts = {bitsandbytes.key(name, part) for name in quantized for part in bitsandbytes.PARTS if part}
            for name in sorted((keys if listed is None else listed) - parts):
                if name.endswith(_DERIVED):
                    continue
                if name in quantized:
                    yield _nf4_tensor(file, name, opened.get_tensor(bitsandbytes.key(name, bitsandbytes.STATE)))
                    continue
                stored = opened.get_slice(name)
                if (dtype := stored.get_dtype()) not in _FORMATS:
                    raise QjaxError(f"{file}: {name} is {dtype}, expected one of {', '.join(_FORMATS)}")
                yield CheckpointTensor(name, tuple(stored.get_shape()), formats.get(dtype), file)
    except FileNotFoundError:
        raise QjaxError(f"{file}: there is no such file, though {INDEX} names it") from None
    except (SafetensorError, OSError) as error:
        raise QjaxError(f"{file}: not a safetensors file, or cut short ({error}). Fetch it again.") from error


def _nf4_tensor(file: Path, name: str, state: np.ndarray) -> NF4Tensor:
    try:
        _, format, shape = bitsandbytes.read_state(state)
    except QjaxError as error:
        raise QjaxError(f"{file}: {name}: {error}") from None
    return NF4Tensor(name, shape, format, file)
