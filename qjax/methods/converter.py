"""A Hugging Face folder as llama.cpp's converter (convert_hf_to_gguf.py) makes a GGUF file of it, before anything is
quantized: the metadata, the order of the tensors, and which of them become float32.

Source: conversion/base.py (prepare_metadata, set_gguf_parameters, prepare_tensors).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qjax import formats
from qjax.errors import QjaxError
from qjax.io import model_card
from qjax.io.checkpoints import CheckpointTensor, Experts
from qjax.io.gguf import Metadata, Value, ValueType
from qjax.io.lora import Adapter, Merged
from qjax.io.stored import Held, Stored
from qjax.io.tokenizer import Tokenizer
from qjax.methods import plan as planning
from qjax.methods import recipes, rtn
from qjax.methods.recipes import Recipe
from qjax.models.config import Config

# The order of what all architectures say, and of what only some do; what else there is follows.
_SHARED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.freq_base",
    "rope.freq_base_swa",
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "expert_count",
    "expert_used_count",
    "attention.key_length",
    "attention.value_length",
)
_OWN = ("vocab_size", "rope.dimension_count")
# What comes first for some, whose classes write all themselves.
_FIRST = {
    "gemma2": ("context_length", "embedding_length", "block_count"),
    "phi3": (
        "context_length",
        "rope.scaling.original_context_length",
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
    ),
}
_OF_ADAPTERS = ("F32", "F16", "BF16", "Q8_0")


def metadata(
    folder: Path,
    config: Config,
    tensors: Mapping[str, Stored],
    model_id: str,
    general: Mapping[str, Any],
) -> Metadata:
    """What the converter says of the model in ``folder``, its tokenizer included.

    tensors: by GGUF name.  model_id, general: as `model_card.general` takes them.
    Raises QjaxError for a tokenizer that GGUF has no words for.
    """
    of_model = {key: Value(ValueType[kind.upper()], value) for key, (kind, value) in config.to_gguf().items()}
    of_card = model_card.general(folder, {name: t.shape for name, t in tensors.items()}, model_id, general)
    first = (*_FIRST.get(config.architecture, ()), *_SHARED)
    shared, own = ([f"{config.architecture}.{key}" for key in keys] for keys in (first, _OWN))
    early = f"{config.architecture}.rope.scaling.attn_factor"  # said with the factors of rotary embedding, its tensors
    order = ["general.architecture", early, "general.type", *of_card, *shared, "general.file_type", *own, *of_model]
    entries = Metadata(of_model) | {"general.type": "model"} | of_card
    entries["general.file_type"] = recipes.FILE_TYPES[auto(tensors)].id
    ordered = Metadata({key: entries.typed[key] for key in dict.fromkeys(order) if key in entries})
    ordered["general.quantization_version"] = rtn.QUANTIZATION_VERSION
    return ordered | Tokenizer.from_folder(folder).to_gguf()


def outtype(name: str, tensors: Mapping[str, Stored]) -> Recipe:
    """A file type as `recipes.outtype` takes it, or "auto": `auto` of these tensors.  Raises QjaxError as it does."""
    return recipes.outtype(auto(tensors) if name.lower() == "auto" else name)


def auto(tensors: Mapping[str, Stored]) -> str:
    """The file type of the first matrix of 16 bits; F16 where there is none."""
    of_matrices = (tensor.format.name for tensor in in_order(tensors).values() if len(tensor.shape) > 1)
    return next((name for name in of_matrices if name in ("BF16", "F16")), "F16")


def in_order(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """In the order of the converter: what config.json holds, then file by file, by Hugging Face's names."""

    def place(item: tuple[str, Stored]) -> tuple[str, str]:
        tensor = item[1].base if isinstance(item[1], Merged) else item[1]
        if isinstance(tensor, Experts):
            # When the last of them is read.
            return max(each.path.name for each in tensor.each), tensor.name
        return (tensor.path.name, tensor.name) if isinstance(tensor, CheckpointTensor) else ("", "")

    return dict(sorted(tensors.items(), key=place))


def staged(tensors: Mapping[str, Stored], described: Metadata) -> dict[str, Stored]:
    """The tensors of a folder as they lie in a file of the converter in which every matrix keeps its type."""
    ordered = in_order(tensors)
    return rtn.pending(ordered, planning.plan(ordered, recipes.CONVERTED, described, in_order=True))


def adapter_metadata(adapter: Adapter, model_id: str, general: Mapping[str, Any]) -> Metadata:
    """What convert_lora_to_gguf.py says of an adapter in a folder."""
    shapes = {name: (len(pair.b), pair.a.shape[1]) for name, pair in adapter.pairs.items()}
    first = {"general.architecture": adapter.architecture, "general.type": "adapter", "adapter.type": "lora"}
    of_card = model_card.general(adapter.path, shapes, model_id, general, adapter=True)
    last = {"adapter.lora.alpha": adapter.alpha, "general.quantization_version": rtn.QUANTIZATION_VERSION}
    return Metadata(first) | of_card | last


def adapter_tensors(adapter: Adapter, outtype: str) -> dict[str, Stored]:
    """As that makes them: f32, f16, bf16 or q8_0, where a row does not divide f16.  Raises QjaxError for others."""
    if outtype.upper() not in _OF_ADAPTERS:
        raise QjaxError(f"outtype {outtype!r}: an adapter is written as {', '.join(_OF_ADAPTERS).lower()}")
    wanted, tensors = formats.get(outtype.upper()), {}
    for name, pair in adapter.pairs.items():
        for part, values in (("lora_a", pair.a), ("lora_b", pair.b)):
            format = formats.get("F16") if values.shape[1] % wanted.block_size else wanted
            tensors[f"{name}.{part}"] = rtn.Pending(f"{name}.{part}", Held(values), format, rtn.Options())
    return tensors
