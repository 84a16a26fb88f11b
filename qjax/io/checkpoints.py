"""Hugging Face folders: config.json, model.safetensors (or shards and their index), tokenizer.json.

Weights are floats, NF4 as bitsandbytes stores it, or what `prequantized` reads: GPTQ, AWQ, FP8.
In memory tensors go by GGUF's names and lie as in GGUF (see `names`); the translation happens here.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax import formats
from qjax.errors import QjaxError, located
from qjax.formats import Format
from qjax.formats.nf4 import NF4_F32
from qjax.formats.plain import Plain
from qjax.io import bitsandbytes, gptq, names, prequantized
from qjax.io.cursor import shorten
from qjax.io.names import AS_IT_IS, Layout
from qjax.io.prequantized import Scheme
from qjax.io.raw_tensor import RawTensor
from qjax.io.safetensors_file import INDEX, WEIGHTS
from qjax.io.stored import Held, Stored
from qjax.io.tokenizer_json import load_json
from qjax.models.config import Config
from qjax.models.transformer import tensor_shapes
from qjax.tensor import QTensor

# The types a weight may have, which safetensors and ggml call by the same names.
FORMATS = ("F32", "F16", "BF16")
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
    dtype: str = ""
    """Of the file, where it is not called as `format`."""

    def placed(self, layout: Layout) -> "CheckpointTensor":
        """The tensor with ``layout``."""
        format = formats.get("F32") if layout.less_one else self.format
        return replace(self, layout=layout, shape=layout.shape(self.shape), format=format, dtype=self.raw.dtype)

    @property
    def raw(self) -> RawTensor:
        """The tensor as it is in the file."""
        return RawTensor(self.name, self.dtype or self.format.name, self.layout.shape(self.shape), self.path)

    def load(self) -> Array | QTensor:
        """The tensor in memory, in the file's dtype and GGUF's layout."""
        return jnp.asarray(self.layout.to_gguf(self.raw.read()))

    @property
    def data(self) -> np.ndarray:
        """The bytes as a GGUF file has them.  Raises QjaxError for formats that it has not."""
        x = self.load()
        return np.asarray(x.to_bytes() if isinstance(x, QTensor) else x).reshape(-1).view(np.uint8)

    def pieces(self) -> Iterator[np.ndarray]:
        yield from self.raw.pieces() if self.layout == AS_IT_IS else super().pieces()


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
            parts = {part: _part(file, self.path, key) for part, key in keys.items() if key in present}
        try:
            return rearranged(self.layout.to_gguf, bitsandbytes.from_parts(parts), self.layout)
        except QjaxError as error:
            raise QjaxError(f"{self.path}: {self.name}: {error}") from None

    def pieces(self) -> Iterator[np.ndarray]:
        yield self.data


@dataclass(frozen=True, kw_only=True)
class PartsTensor(CheckpointTensor):
    """A matrix in several parts, see `prequantized`."""

    scheme: Scheme
    parts: Mapping[str, RawTensor]

    def placed(self, layout: Layout) -> "PartsTensor":
        if layout.transposed:
            raise QjaxError(f"{self.path}: {self.name}: {self.scheme.label} with rows for columns is not supported")
        return replace(self, layout=layout)

    def load(self) -> Array | QTensor:
        return rearranged(self.layout.to_gguf, self.scheme.weight(self.parts, self.format), self.layout)

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

    @property
    def container(self) -> str:
        """What it is stored in, how its matrices were quantized, and which are not read as that."""
        tensors = (each for t in self.tensors.values() for each in (t.each if isinstance(t, Experts) else (t,)))
        in_parts = [t for t in tensors if isinstance(t, PartsTensor)]
        labels = dict.fromkeys(t.scheme.label for t in in_parts)
        scattered = [t.format.name for t in in_parts if isinstance(t.format, Plain) and gptq.GROUPS in t.parts]
        if scattered:
            labels[f"{len(scattered)} matrices with scattered groups (desc_act) read as {scattered[0]}"] = None
        return ", ".join(["safetensors", *labels])


def read_folder(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face folder; the tensors are float32, float16, bfloat16, NF4 or what `prequantized` makes of
    others, and read when asked for.

    The head is tied where the config says so or lm_head.weight is absent, and config.tied tells.

    Raises QjaxError for files that are missing or damaged, an architecture or tensor that is not known, weights
    quantized in other ways, a tensor that is missing or whose type or shape is not the config's, an index that names a
    file outside the folder, and a head that the config calls tied but that differs from the embedding.
    """
    folder = Path(path)
    described = load_json(folder / "config.json")
    with located(folder):
        config = Config.from_hf(described)
    scheme = prequantized.read_scheme(folder, described)
    others = config.traits.classes[described["architectures"][0]].others
    stored = (tensor for file, listed in weight_files(folder) for tensor in _tensors(file, listed, scheme))
    listed = (tensor for tensor in _joined(stored, scheme) if not any(part in tensor.name for part in others))
    found = _by_gguf_name(folder, config, listed)
    factors = {name: Held(np.array(values, np.float32)) for name, values in config.factors.items()}
    head = found.get("output.weight")
    config = replace(config, tied=config.tied or head is None)
    if config.tied:
        found.pop("output.weight", None)

    if config.n_layers > len(found):
        raise QjaxError(f"{folder}: config.json has {config.n_layers} layers, more than there are tensors")
    shapes = {name: shape for name, shape in tensor_shapes(config).items() if name not in factors}
    if scheme is not None:
        # Some programs give each layer a bias, of zeros where the model has none.
        found = {name: t for name, t in found.items() if name in shapes or not _is_bias_of_zeros(t)}
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


def _by_gguf_name(
    folder: Path, config: Config, listed: Iterable[CheckpointTensor]
) -> dict[str, CheckpointTensor | Experts]:
    found: dict[str, CheckpointTensor | Experts] = {}
    experts: dict[str, dict[int, CheckpointTensor]] = {}
    for tensor in listed:
        with located(tensor.path):
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


def rearranged(rearrange: Callable, x: Any, layout: Layout) -> Any:
    """``x``, an array or a QTensor, with its rows rearranged by a method of ``layout``."""
    if layout == AS_IT_IS:
        return x
    return jax.tree.map(rearrange, x.by_rows() if isinstance(x, QTensor) else x)


def _joined(stored: Iterable[CheckpointTensor | RawTensor], scheme: Scheme | None) -> Iterator[CheckpointTensor]:
    """The tensors, and of the parts of a layer, in whatever files, its weight."""
    layers: dict[str, dict[str, RawTensor]] = {}
    for tensor in stored:
        if isinstance(tensor, CheckpointTensor):
            yield tensor
        else:
            layer, _, part = tensor.name.rpartition(".")
            layers.setdefault(layer, {})[part] = tensor
    for layer, parts in layers.items():
        assert scheme is not None
        path = next(iter(parts.values())).path
        try:
            shape, format = scheme.describe(parts)
        except QjaxError as error:
            raise QjaxError(f"{path}: {layer}: {error}") from None
        yield PartsTensor(f"{layer}.weight", shape, format, path, scheme=scheme, parts=parts)


def _is_bias_of_zeros(tensor: CheckpointTensor | Experts) -> bool:
    return tensor.name.endswith(".bias") and not np.asarray(tensor.load()).any()


def _equal(x: Array | QTensor, y: Array | QTensor) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(x), jax.tree.leaves(y)))


# Without separators and drives, Windows' too, on every system, and without halves of characters.
_SHARD = re.compile(r"[^/\\:\0\ud800-\udfff]+\.safetensors", re.DOTALL)


def weight_files(folder: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """The safetensors files of a folder, each with the tensors that the index says it holds."""
    if (folder / WEIGHTS).exists():
        yield folder / WEIGHTS, None
        return
    if not (folder / INDEX).exists():
        raise QjaxError(
            f"{folder}: there is neither {WEIGHTS} nor {INDEX}. Pickled weights (.bin, .pt) are not read; "
            "convert them to safetensors."
        )
    weight_map = load_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise QjaxError(f"{folder / INDEX}: expected an object 'weight_map' from tensor names to file names")
    listed: dict[str, set[str]] = defaultdict(set)
    for name, file in weight_map.items():
        listed[file].add(name)
    for file in listed:
        if not _SHARD.fullmatch(file):
            raise QjaxError(f"{folder / INDEX}: {shorten(file)} is not a safetensors file in the same folder")
    for file, names_in_file in listed.items():
        yield folder / file, names_in_file


def _tensors(file: Path, listed: set[str] | None, scheme: Scheme | None) -> Iterator[CheckpointTensor | RawTensor]:
    """The tensors in a safetensors file, from its header alone; with a scheme, parts of matrices among them."""
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
                    yield _nf4_tensor(file, name, _part(opened, file, bitsandbytes.key(name, bitsandbytes.STATE)))
                    continue
                stored = opened.get_slice(name)
                dtype, shape = stored.get_dtype(), tuple(stored.get_shape())
                if scheme is not None and scheme.part(name, dtype):
                    yield RawTensor(name, dtype, shape, file)
                    continue
                if dtype not in FORMATS:
                    raise QjaxError(f"{file}: {name} is {dtype}, expected one of {', '.join(FORMATS)}")
                yield CheckpointTensor(name, shape, formats.get(dtype), file)
    except FileNotFoundError:
        raise QjaxError(f"{file}: there is no such file, though {INDEX} names it") from None
    except (SafetensorError, OSError) as error:
        raise QjaxError(f"{file}: not a safetensors file, or cut short ({error}). Fetch it again.") from error


def _part(opened: Any, file: Path, key: str) -> np.ndarray:
    """A part of an NF4 tensor; the library reads no types and no axes that numpy has not."""
    dtype, shape = (stored := opened.get_slice(key)).get_dtype(), stored.get_shape()
    if dtype not in bitsandbytes.DTYPES or len(shape) > 2:
        raise QjaxError(
            f"{file}: {key} is {dtype} {shape}, expected {' or '.join(bitsandbytes.DTYPES)}, two axes at most"
        )
    return opened.get_tensor(key)


def _nf4_tensor(file: Path, name: str, state: np.ndarray) -> NF4Tensor:
    try:
        _, format, shape = bitsandbytes.read_state(state)
    except QjaxError as error:
        raise QjaxError(f"{file}: {name}: {error}") from None
    return NF4Tensor(name, shape, format, file)
