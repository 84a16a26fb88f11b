"""A model on disk: what it is and where its tensors are, before anything is read.

It may be a GGUF file, an older GGML file, a safetensors folder, a Hub id or a built-in name.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from qjax.errors import QjaxError, located
from qjax.io import checkpoints, ggml_legacy, gguf, hub
from qjax.io import lora as adapters
from qjax.io.gguf import Metadata
from qjax.io.stored import Stored
from qjax.methods import converter
from qjax.models.config import FACTORS, Config
from qjax.tensor import QTensor


@dataclass(frozen=True)
class Source:
    """A model on disk, of any architecture: what it is, and its tensors, not yet read.

    container: "GGUF 3", "GGJT 3" or "safetensors".  paths: of its file or shards, or its folder.
    metadata: what a GGUF file of it says, tokenizer included.  tensors: by GGUF name, in the order of a file.
    """

    name: str
    container: str
    paths: tuple[Path, ...]
    metadata: Metadata
    tensors: Mapping[str, Stored]

    @property
    def path(self) -> Path:
        """The first of ``paths``."""
        return self.paths[0]

    @functools.cached_property
    def config(self) -> Config:
        """Raises QjaxError for an unknown architecture."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        factors = {name: self._vector(name) for name in FACTORS if name in shapes}
        with located(self.path):
            return Config.from_gguf(self.metadata, shapes, factors)

    def _vector(self, name: str) -> tuple[float, ...]:
        values = self.tensors[name].load()
        if isinstance(values, QTensor):
            raise QjaxError(f"{self.path}: {name} is {values.format.name}, expected F32")
        return tuple(np.asarray(values, np.float32).reshape(-1).tolist())


def open_source(
    name: str | os.PathLike[str],
    general: Mapping[str, Any] = MappingProxyType({}),
    lora: str | os.PathLike[str] | None = None,
) -> Source:
    """What `load` would read, but of any architecture, its tensors still on disk.

    general: metadata of a folder's model, as in general.author, that come before what the folder says.
    lora: an adapter, GGUF file or PEFT folder, that its tensors get added.
    Raises QjaxError if there is no such model, its file is damaged, ``general`` are given for a GGUF file, or the
    adapter is none, or for another model.
    """
    source = _open(name, general)
    if lora is None:
        return source
    adapter = adapters.read(lora, source.config)
    return dataclasses.replace(source, tensors=adapter.apply(source.tensors, source.config.architecture))


def _open(name: str | os.PathLike[str], general: Mapping[str, Any]) -> Source:
    path = hub.locate(name)
    built_in = str(name) in hub.names()
    if path.is_dir():
        given = Path(name).expanduser().exists()
        return _folder_source(path, path.resolve().name if given else str(name), general)
    if general:
        raise QjaxError(f"{path}: a GGUF file has its metadata; change them with `qjax set`")
    file = ggml_legacy.read(path) if ggml_legacy.recognizes(path) else gguf.read(path)
    label = str(name) if built_in else path.stem
    return Source(label, file.container, file.paths, file.metadata, file.tensors)


def _folder_source(path: Path, name: str, general: Mapping[str, Any]) -> Source:
    """A safetensors folder, with the metadata that a GGUF file of it would have."""
    checkpoint = checkpoints.read_folder(path)
    config, tensors = checkpoint
    metadata = converter.metadata(path, config, tensors, name, general)
    return Source(name, checkpoint.container, (path,), metadata, tensors)
