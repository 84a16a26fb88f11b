"""Models written as Hugging Face folders, the inverse of `checkpoints.read_folder`."""

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.formats.plain import Plain
from qjax.io import bitsandbytes, names
from qjax.io.atomic import atomic_folder
from qjax.io.checkpoints import FORMATS, rearranged
from qjax.io.names import AS_IT_IS, Layout
from qjax.io.safetensors_file import INDEX, Part, shards, write_shards
from qjax.io.stored import Stored
from qjax.io.tokenizer import Tokenizer
from qjax.io.tokenizer_json import dump_json
from qjax.models.config import Config
from qjax.models.transformer import tensor_shapes
from qjax.tensor import QTensor

AnyTensor = Array | QTensor | Stored


def write_folder(
    path: str | os.PathLike[str],
    config: Config,
    tensors: Mapping[str, AnyTensor],
    tokenizer: Tokenizer | None = None,
    max_bytes: int | None = None,
) -> list[Path]:
    """Save a model as a Hugging Face folder, which is made if need be; see `atomic_folder`.

    tensors: by GGUF name, in GGUF's layout, float32, float16, bfloat16 or NF4; what `read_folder` gives is written
    back with the same bytes.  Of NF4 the rows that GGUF interleaves keep their values, but their scales are stored
    without the second quantization.  A Stored tensor is read when its turn comes.
    max_bytes: of a file of weights, see `safetensors_file.shards`; the files are returned.

    Raises QjaxError for a tensor that is missing, unknown or misshapen, or that safetensors has no type for, and where
    weights are in the way of shards; one file takes the place of what was there.
    """
    shapes = tensor_shapes(config)
    if unmatched := sorted(shapes.keys() ^ tensors.keys()):
        problem = "is missing" if unmatched[0] in shapes else "has no place in this model"
        raise QjaxError(f"{path}: not written: the tensor {unmatched[0]} {problem}")
    embedding = _format(tensors["token_embd.weight"])
    dtype = embedding.dtype if isinstance(embedding, Plain) else "float32"
    parts: dict[str, Part] = {}
    for name, shape in shapes.items():
        if name in config.factors:
            continue  # config.json has them
        x, format = tensors[name], _format(tensors[name])
        is_nf4 = isinstance(x, QTensor) and format in bitsandbytes.FORMATS
        if format.name not in FORMATS and not is_nf4:
            raise QjaxError(
                f"{path}: not written: {name} is {format.name}, and a safetensors folder holds "
                f"{', '.join(FORMATS)} or NF4. Dequantize it first, or save a GGUF file."
            )
        if x.shape != shape:
            raise QjaxError(f"{path}: not written: {name} has shape {x.shape}, expected {shape}")
        layout = names.layout(name, config)
        for expert in range(shape[0]) if len(shape) == 3 else (None,):
            key = names.to_hf(name, config, expert)
            parts |= _parts(key, x, format, layout, expert, dtype)

    described = config.to_hf() | {"torch_dtype": dtype}
    if any(isinstance(x, QTensor) for x in tensors.values()):
        described["quantization_config"] = bitsandbytes.config(dtype)
    if tokenizer is not None:
        described |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        if (padding := tokenizer.to_gguf().get("tokenizer.ggml.padding_token_id")) is not None:
            described["pad_token_id"] = padding
    folder, files = Path(path), shards(parts, max_bytes)
    if len(files) > 1 and (there := sorted(folder.glob("model*.safetensors*"))):
        raise QjaxError(f"{there[0]}: exists already. Remove it, or write to another folder.")
    with atomic_folder(folder, last="config.json") as made:
        if tokenizer is not None:
            try:
                tokenizer.to_folder(made)
            except QjaxError as error:
                raise QjaxError(f"{path}: not written: {error}") from None
        write_shards(made, files)
        dump_json(made / "config.json", described)
    if len(files) == 1:
        (folder / INDEX).unlink(missing_ok=True)
    return [folder / file for file in files]


def _format(x: AnyTensor) -> Format:
    # jax.Array has a `format` too: its memory layout.
    return formats.plain_format(x.dtype) if isinstance(x, Array | np.ndarray) else x.format


def _parts(key: str, x: AnyTensor, format: Format, layout: Layout, expert: int | None, dtype: str) -> dict[str, Part]:
    """What a tensor, or one of its experts, is in a file, by name.  dtype: of the model."""
    if isinstance(x, QTensor):
        matrix = rearranged(layout.to_hf, x if expert is None else x[expert], layout)
        return {bitsandbytes.key(key, part): Part.of(v) for part, v in bitsandbytes.to_parts(matrix, dtype).items()}
    shape = layout.shape(x.shape if expert is None else x.shape[1:])
    pieces = functools.partial(_pieces, x, layout, expert)
    if layout.less_one:
        values = layout.to_hf(_values(x))
        # As it was before 1 was added, if it was.
        if (values.astype(dtype) == values).all():
            format, values = formats.plain_format(dtype), values.astype(dtype)
        pieces = functools.partial(_bytes, values)
    return {key: Part(format.name, shape, pieces)}


def _pieces(x: Array | Stored, layout: Layout, expert: int | None) -> Iterator[np.ndarray]:
    """The bytes of a plain tensor, or one of its experts, in Hugging Face's layout."""
    if isinstance(x, Stored) and layout == AS_IT_IS and expert is None:
        yield from x.pieces()
    else:
        values = _values(x) if expert is None else _values(x)[expert]
        yield from _bytes(layout.to_hf(values))


def _values(x: Array | Stored) -> np.ndarray:
    if not isinstance(x, Stored):
        return np.asarray(x)
    assert isinstance(x.format, Plain)
    return x.data.reshape(-1).view(jnp.dtype(x.format.dtype)).reshape(x.shape)


def _bytes(values: np.ndarray) -> Iterator[np.ndarray]:
    yield np.ascontiguousarray(values).reshape(-1).view(np.uint8)
