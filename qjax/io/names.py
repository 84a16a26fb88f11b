"""The one map between the tensor names of GGUF and of Hugging Face, and the one difference in what they hold.

Rotary embedding turns pairs of rows of attn_q and attn_k. Within each head, Hugging Face pairs row i with row
i + head_dim/2; GGUF's llama pairs neighbours, so the two halves of a head lie interleaved:

    Hugging Face   a0 a1 a2 a3 b0 b1 b2 b3    (ai, bi) is a pair
    GGUF           a0 b0 a1 b1 a2 b2 a3 b3

Source: llama.cpp gguf-py/gguf/tensor_mapping.py and conversion/llama.py (permute).
"""

import re
from typing import NamedTuple, TypeVar

import numpy as np
from jax import Array

from qjax.errors import QjaxError
from qjax.models.config import Config

AnyArray = TypeVar("AnyArray", Array, np.ndarray)


class _Row(NamedTuple):
    gguf: str
    hf: str
    heads: str | None = None
    """The field of Config with the number of heads, where rows are interleaved within each."""


# {} stands for the number of the layer.
_ROWS = (
    _Row("token_embd.weight", "model.embed_tokens.weight"),
    _Row("blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight"),
    _Row("blk.{}.attn_q.weight", "model.layers.{}.self_attn.q_proj.weight", "n_heads"),
    _Row("blk.{}.attn_k.weight", "model.layers.{}.self_attn.k_proj.weight", "n_kv_heads"),
    _Row("blk.{}.attn_v.weight", "model.layers.{}.self_attn.v_proj.weight"),
    _Row("blk.{}.attn_output.weight", "model.layers.{}.self_attn.o_proj.weight"),
    _Row("blk.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    _Row("blk.{}.ffn_gate.weight", "model.layers.{}.mlp.gate_proj.weight"),
    _Row("blk.{}.ffn_up.weight", "model.layers.{}.mlp.up_proj.weight"),
    _Row("blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight"),
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


def interleave(name: str, x: AnyArray, config: Config) -> AnyArray:
    """The tensor with GGUF name ``name`` as GGUF holds it, from Hugging Face's x (rows, ...)."""
    row, _ = _find(_BY_GGUF, name)
    return _swap_head_axes(x, getattr(config, row.heads), 2, -1) if row.heads else x


def deinterleave(name: str, x: AnyArray, config: Config) -> AnyArray:
    """The inverse of `interleave`."""
    row, _ = _find(_BY_GGUF, name)
    return _swap_head_axes(x, getattr(config, row.heads), -1, 2) if row.heads else x


def _find(rows: dict[str, _Row], name: str) -> tuple[_Row, str]:
    pattern = re.sub(r"\.(0|[1-9][0-9]*)\.", ".{}.", name, count=1)
    if pattern not in rows:
        raise QjaxError(f"{name}: no tensor of this name is known, so what it does is not known either")
    return rows[pattern], name[len(pattern.partition("{}")[0]) :].partition(".")[0]


def _swap_head_axes(x: AnyArray, n_heads: int, outer: int, inner: int) -> AnyArray:
    """Rows (n_heads, outer, inner) within each head become (n_heads, inner, outer)."""
    return x.reshape(n_heads, outer, inner, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
