"""From a Hugging Face folder to a GGUF file and back: `qjax convert`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qjax import formats
from qjax.errors import QjaxError
from qjax.io import checkpoint_write, gguf
from qjax.io import lora as lora_files
from qjax.io.checkpoints import FORMATS
from qjax.io.imatrix import Imatrix
from qjax.io.tokenizer import Tokenizer
from qjax.io.tokenizer_json import load_json
from qjax.methods import converter, rtn
from qjax.quantize_file import QuantizedFile, quantize_file
from qjax.source import open_source
from qjax.tensor import describe_size

MAX_SHARD_BYTES = 5 * 10**9
"""Of a file of weights, as on the Hub."""


@dataclass(frozen=True)
class WrittenAdapter:
    """What `adapter_to_gguf` wrote; with ``dry_run`` would write."""

    path: str
    n_matrices: int
    size_bytes: int
    """of the file"""
    written: bool

    def __str__(self) -> str:
        what = f"{self.path}: adapter of {self.n_matrices} matrices, {describe_size(self.size_bytes)}"
        return what if self.written else f"{what}; dry run, nothing written"


@dataclass(frozen=True)
class WrittenFolder:
    """What `convert` wrote, or would write: then there are no files."""

    path: str
    outtype: str
    n_tensors: int
    size_bytes: int
    """of all tensors together"""
    files: tuple[str, ...]
    """of weights"""

    def __str__(self) -> str:
        what = f"{self.path}: {self.n_tensors} tensors in {self.outtype}, {describe_size(self.size_bytes)}"
        return f"{what}, in {len(self.files)} files" if self.files else f"{what}; dry run, nothing written"


def to_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None,
    outtype: str = "auto",
    *,
    general: Mapping[str, Any] = MappingProxyType({}),
    lora: str | os.PathLike[str] | None = None,
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    allow_requantize: bool = False,
    allow_nonfinite: bool = False,
    max_tensors: int | None = None,
    max_bytes: int | None = None,
    no_tensor_first_split: bool = False,
    receipt: bool | None = None,
    dry_run: bool = False,
) -> QuantizedFile:
    """Writes a folder as a GGUF file, as llama.cpp's converter does, in one pass, whatever the type.

    source: what `load` takes.
    outtype: f32, f16, bf16, q8_0, tq1_0 or tq2_0, as the converter makes them; auto, the first of bf16 and f16 that a
    matrix has, else f16; or a file type of llama-quantize, as of a file of the converter in which matrices keep their
    types.
    general: metadata, as in general.author, that come before what the folder says.  lora: as in `load`.
    The rest as in `quantize_file`.  Raises QjaxError as that does.
    """
    opened = open_source(source, general, lora)
    return quantize_file(
        opened,
        target,
        converter.outtype(outtype, opened.tensors),
        imatrix=imatrix,
        allow_requantize=allow_requantize,
        allow_nonfinite=allow_nonfinite,
        max_tensors=max_tensors,
        max_bytes=max_bytes,
        no_tensor_first_split=no_tensor_first_split,
        receipt=receipt,
        dry_run=dry_run,
    )


def to_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    outtype: str = "auto",
    *,
    lora: str | os.PathLike[str] | None = None,
    max_bytes: int | None = MAX_SHARD_BYTES,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
) -> WrittenFolder:
    """Writes a model as a safetensors folder that transformers loads, one tensor at a time in memory.

    source: what `load` takes.  outtype: f32, f16, bf16, to which quantized weights are decoded, or auto: what the first
    matrix of 16 bits is; where there is none f32, if all are, else f16.
    max_bytes: of a file, more are shards with an index.  lora: as in `load`.
    Raises QjaxError for an unknown outtype or architecture, a tokenizer or rotary embedding that such folders have no
    words for, a file in the way, and weights that are NaN or infinite, or become so, unless ``allow_nonfinite``.
    """
    opened, folder = open_source(source, lora=lora), Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.samefile(path) for path in opened.paths)):
        what = "the model to be read" if folder.is_dir() else "a file, and a folder is to be written"
        raise QjaxError(f"{folder}: is {what}; write to another name (GGUF files end in .gguf)")
    whole = all(tensor.format.name == "F32" for tensor in opened.tensors.values())
    chosen = outtype.upper() if outtype.lower() != "auto" else "F32" if whole else converter.auto(opened.tensors)
    if chosen not in FORMATS:
        raise QjaxError(f"outtype {outtype!r}: a folder holds {', '.join(FORMATS).lower()}; or give auto")
    format, options = formats.get(chosen), rtn.Options(allow_nonfinite=allow_nonfinite)
    config, tokenizer = opened.config, Tokenizer.from_gguf(opened.metadata)
    tensors = {
        name: tensor if tensor.format == format else rtn.Pending(name, tensor, format, options)
        for name, tensor in opened.tensors.items()
    }
    size = sum(format.nbytes(tensor.shape) for tensor in tensors.values())
    files: Sequence[Path] = ()
    if not dry_run:
        files = checkpoint_write.write_folder(folder, config, tensors, tokenizer, max_bytes)
    return WrittenFolder(str(folder), format.name, len(tensors), size, tuple(map(str, files)))


def adapter_to_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    outtype: str = "f32",
    *,
    base: str | os.PathLike[str] | None = None,
    general: Mapping[str, Any] = MappingProxyType({}),
    dry_run: bool = False,
) -> WrittenAdapter:
    """Writes the LoRA adapter in a PEFT folder as a GGUF file, as llama.cpp's convert_lora_to_gguf.py does.

    outtype: f32, f16, bf16 or q8_0.  base: the model it is for, by default what adapter_config.json names; only its
    config counts.  general: as in `to_gguf`.
    Raises QjaxError for another outtype, and as `load` does for the base and `lora.read` for the adapter.
    """
    folder, target = Path(source), Path(target)
    if target.suffix != ".gguf":
        raise QjaxError(f"{target}: adapters are written as GGUF; give a name that ends in .gguf")
    named = base or load_json(folder / lora_files.CONFIG).get("base_model_name_or_path")
    if not named:
        raise QjaxError(f"{folder}: {lora_files.CONFIG} names no base model; give it as base (--base)")
    adapter = lora_files.read(folder, open_source(named).config)
    metadata = converter.adapter_metadata(adapter, folder.resolve().name, general)
    tensors = converter.adapter_tensors(adapter, outtype)
    if not dry_run:
        gguf.write(target, metadata, tensors)
    return WrittenAdapter(str(target), len(adapter.pairs), gguf.size_bytes(metadata, tensors), not dry_run)
