"""The one map between the tensor names of GGUF and of Hugging Face, and the one difference in what they hold.

Rotary embedding turns pairs of rows of attn_q and attn_k. Within each head, Hugging Face pairs row i with row
i + head_dim/2; so do some architectures in GGUF (`Architecture.halves`). Others, llama among them, pair neighbours
there, so the two halves of a head lie interleaved:

    Hugging Face   a0 a1 a2 a3 b0 b1 b2 b3    (ai, bi) is a pair
    GGUF           a0 b0 a1 b1 a2 b2 a3 b3

Source: llama.cpp gguf-py/gguf/tensor_mapping.py and conversion/llama.py (permute).
"""

import re
from typing import NamedTuple, TypeVar

import numpy as np
from jax import Array

from qjax.errors import QjaxError
from qjax.io.cursor import shorten
from qjax.models.config import Config

AnyArray = TypeVar("AnyArray", Array, np.ndarray)


class _Row(NamedTuple):
    gguf: str
    hf: str
    heads: str | None = None
    """If rows are interleaved within each head: the field of Config with the number of heads."""


# {} stands for the number of the layer.
_ROWS = (
    _Row("token_embd.weight", "model.embed_tokens.weight"),
    _Row("blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight"),
    _Row("blk.{}.attn_q.weight", "model.layers.{}.self_attn.q_proj.weight", "n_heads"),
    _Row("blk.{}.attn_k.weight", "model.layers.{}.self_attn.k_proj.weight", "n_kv_heads"),
    _Row("blk.{}.attn_v.weight", "model.layers.{}.self_attn.v_proj.weight"),
    _Row("blk.{}.attn_output.weight", "model.layers.{}.self_attn.o_proj.weight"),
    _Row("blk.{}.attn_q.bias", "model.layers.{}.self_attn.q_proj.bias", "n_heads"),
    _Row("blk.{}.attn_k.bias", "model.layers.{}.self_attn.k_proj.bias", "n_kv_heads"),
    _Row("blk.{}.attn_v.bias", "model.layers.{}.self_attn.v_proj.bias"),
    _Row("blk.{}.attn_output.bias", "model.layers.{}.self_attn.o_proj.bias"),
    _Row("blk.{}.attn_q_norm.weight", "model.layers.{}.self_attn.q_norm.weight"),
    _Row("blk.{}.attn_k_norm.weight", "model.layers.{}.self_attn.k_norm.weight"),
    _Row("blk.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    _Row("blk.{}.ffn_gate.weight", "model.layers.{}.mlp.gate_proj.weight"),
    _Row("blk.{}.ffn_up.weight", "model.layers.{}.mlp.up_proj.weight"),
    _Row("blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight"),
    _Row("blk.{}.ffn_gate.bias", "model.layers.{}.mlp.gate_proj.bias"),
    _Row("blk.{}.ffn_up.bias", "model.layers.{}.mlp.up_proj.bias"),
    _Row("blk.{}.ffn_down.bias", "model.layers.{}.mlp.down_proj.bias"),
    _Row("output_norm.weight", "model.norm.weight"),
    _Row("output.weight", "lm_head.weight"),
)
_BY_GGUF = {row.gguf: row for row in _ROWS}
_BY_HF = {row.hf: row for row in _ROWS}


def to_gguf(name: str) -> str:
    """GGUF's name of a Hugging Face tensor. Raises QjaxError if there is none."""
    row, layer = _find(_BY_HF, name)
    return row.gguf.format(layer)


def to_hf(name: str) -> str:
    """Hugging Face's name of a GGUF tensor. Raises QjaxError if there is none."""
    row, layer = _find(_BY_GGUF, name)
    return row.hf.format(layer)


def interleaved_heads(name: str, config: Config) -> int | None:
    """In how many heads the rows of a GGUF tensor are interleaved; None if they lie as in Hugging Face."""
    row, _ = _find(_BY_GGUF, name)
    return getattr(config, row.heads) if row.heads and not config.traits.halves else None


def interleave(x: AnyArray, n_heads: int) -> AnyArray:
    """From Hugging Face's rows (n_heads · head_dim, ...) to GGUF's."""
    return x.reshape(n_heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def deinterleave(x: AnyArray, n_heads: int) -> AnyArray:
    """The inverse of `interleave`."""
    return x.reshape(n_heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _find(rows: dict[str, _Row], name: str) -> tuple[_Row, str]:
    """The row for a name, and its layer number as it stands there."""
    layer = re.search(r"(?<=\.)(0|[1-9][0-9]*)(?=\.)", name)
    pattern = name if layer is None else f"{name[: layer.start()]}{{}}{name[layer.end() :]}"
    if pattern not in rows or "{" in name:
        raise QjaxError(f"tensor {shorten(name)} is not known; leaving it out could be wrong")
    return rows[pattern], layer[0] if layer else ""
