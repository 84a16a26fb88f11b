"""The one map between the tensor names of GGUF and of Hugging Face, and the differences in what they hold.

The experts of a layer are many tensors in Hugging Face and one in GGUF. Norms of some architectures multiply by 1 + w
in Hugging Face, where GGUF holds 1 + w (`Architecture.norms_less_one`); matrices of some are transposed there. And
rotary embedding turns pairs of rows of attn_q and attn_k. Within each head, Hugging Face pairs row i with row
i + head_dim/2; so do some architectures in GGUF (`Architecture.halves`). Others, llama among them, pair neighbours
there, so the two halves of a head lie interleaved:

    Hugging Face   a0 a1 a2 a3 b0 b1 b2 b3    (ai, bi) is a pair
    GGUF           a0 b0 a1 b1 a2 b2 a3 b3

Source: llama.cpp gguf-py/gguf/tensor_mapping.py and conversion/llama.py (permute).
"""

import functools
import re
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jax import Array

from qjax.errors import QjaxError
from qjax.io.cursor import shorten
from qjax.models.config import Config

AnyArray = TypeVar("AnyArray", Array, np.ndarray)

# ── names ────────────────────────────────────────────────────────────────────────────────────────────

# GGUF's name and Hugging Face's; {} stands for the number of the layer.
_COMMON = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.attn_q.bias": "model.layers.{}.self_attn.q_proj.bias",
    "blk.{}.attn_k.bias": "model.layers.{}.self_attn.k_proj.bias",
    "blk.{}.attn_v.bias": "model.layers.{}.self_attn.v_proj.bias",
    "blk.{}.attn_output.bias": "model.layers.{}.self_attn.o_proj.bias",
    "blk.{}.attn_q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blk.{}.attn_k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
    "blk.{}.ffn_gate.bias": "model.layers.{}.mlp.gate_proj.bias",
    "blk.{}.ffn_up.bias": "model.layers.{}.mlp.up_proj.bias",
    "blk.{}.ffn_down.bias": "model.layers.{}.mlp.down_proj.bias",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = "model.layers.{}."
_OWN = {
    "gemma": {
        "blk.{}.post_attention_norm.weight": f"{_LAYER}post_attention_layernorm.weight",
        "blk.{}.ffn_norm.weight": f"{_LAYER}pre_feedforward_layernorm.weight",
        "blk.{}.post_ffw_norm.weight": f"{_LAYER}post_feedforward_layernorm.weight",
    },
    # A second {} stands for the number of the expert: GGUF has all of a layer in one tensor.
    "llama": {
        "blk.{}.ffn_gate_inp.weight": f"{_LAYER}block_sparse_moe.gate.weight",
        "blk.{}.ffn_gate_exps.weight": f"{_LAYER}block_sparse_moe.experts.{{}}.w1.weight",
        "blk.{}.ffn_up_exps.weight": f"{_LAYER}block_sparse_moe.experts.{{}}.w3.weight",
        "blk.{}.ffn_down_exps.weight": f"{_LAYER}block_sparse_moe.experts.{{}}.w2.weight",
    },
    "qwen3moe": {
        "blk.{}.ffn_gate_inp.weight": f"{_LAYER}mlp.gate.weight",
        "blk.{}.ffn_gate_exps.weight": f"{_LAYER}mlp.experts.{{}}.gate_proj.weight",
        "blk.{}.ffn_up_exps.weight": f"{_LAYER}mlp.experts.{{}}.up_proj.weight",
        "blk.{}.ffn_down_exps.weight": f"{_LAYER}mlp.experts.{{}}.down_proj.weight",
    },
    "phi3": {
        "blk.{}.attn_qkv.weight": f"{_LAYER}self_attn.qkv_proj.weight",
        "blk.{}.ffn_up.weight": f"{_LAYER}mlp.gate_up_proj.weight",
    },
    "gpt2": {
        "token_embd.weight": "transformer.wte.weight",
        "position_embd.weight": "transformer.wpe.weight",
        **{
            f"blk.{{}}.{gguf}.{kind}": f"transformer.h.{{}}.{hf}.{kind}"
            for kind in ("weight", "bias")
            for gguf, hf in {
                "attn_norm": "ln_1",
                "attn_qkv": "attn.c_attn",
                "attn_output": "attn.c_proj",
                "ffn_norm": "ln_2",
                "ffn_up": "mlp.c_fc",
                "ffn_down": "mlp.c_proj",
            }.items()
        },
        "output_norm.weight": "transformer.ln_f.weight",
        "output_norm.bias": "transformer.ln_f.bias",
    },
}
_OWN |= dict.fromkeys(("gemma2", "gemma3"), _OWN.pop("gemma"))

# Of GPT-2's names the older folders leave out the beginning; in models that also see there is something before it.
_BASE = "transformer."
_TEXT = (("language_model.", ""), ("model.language_model.", "model."))


def to_gguf(name: str, config: Config) -> str:
    """GGUF's name of a Hugging Face tensor; of an expert's that of all experts. Raises QjaxError if there is none."""
    table = _tables(config.architecture)[1]
    before, after = next(((long, short) for long, short in _TEXT if name.startswith(long)), ("", ""))
    pattern, numbers = _pattern(after + name.removeprefix(before))
    for known in (pattern, _BASE + pattern):
        if known in table and "{" not in name:
            return table[known].format(*numbers)
    raise _unknown(name)


def to_hf(name: str, config: Config, expert: int | None = None) -> str:
    """Hugging Face's name of a GGUF tensor, or of one of its experts. Raises QjaxError if there is none."""
    table = _tables(config.architecture)[0]
    pattern, numbers = _pattern(name)
    if pattern not in table or "{" in name:
        raise _unknown(name)
    return table[pattern].format(*numbers, "*" if expert is None else expert)


def expert(name: str) -> int | None:
    """Which expert of a layer a Hugging Face tensor belongs to, if to one."""
    found = re.search(rf"\.experts\.({_NUMBER})\.", name)
    return int(found[1]) if found else None


@functools.cache
def _tables(architecture: str) -> tuple[dict[str, str], dict[str, str]]:
    """From GGUF's names to Hugging Face's, and back."""
    to_hf = _COMMON | _OWN.get(architecture, {})
    return to_hf, {hf: gguf for gguf, hf in to_hf.items()}


def _pattern(name: str) -> tuple[str, list[str]]:
    return re.sub(_NUMBER, "{}", name), re.findall(_NUMBER, name)


def _unknown(name: str) -> QjaxError:
    return QjaxError(f"tensor {shorten(name)} is not known; leaving it out could be wrong")


_NUMBER = r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.)"

# ── what they hold ───────────────────────────────────────────────────────────────────────────────────


class Layout(NamedTuple):
    """How a tensor of Hugging Face's becomes one of GGUF's."""

    heads: int | None = None
    """rows are interleaved within each of so many heads"""
    less_one: bool = False
    """1 is added"""
    transposed: bool = False

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """In GGUF, of a tensor that has this shape in Hugging Face, or the other way round."""
        return shape[::-1] if self.transposed else shape

    def to_gguf(self, x: Any) -> Any:
        if self.heads is not None:
            return interleave(x, self.heads)
        if self.transposed:
            return x.swapaxes(0, 1)
        return x.astype(np.float32) + np.float32(1) if self.less_one else x

    def to_hf(self, x: Any) -> Any:
        """The inverse of `to_gguf`."""
        if self.heads is not None:
            return deinterleave(x, self.heads)
        if self.transposed:
            return x.swapaxes(0, 1)
        return x.astype(np.float32) - np.float32(1) if self.less_one else x


AS_IT_IS = Layout()


def layout(name: str, config: Config) -> Layout:
    """The layout of a tensor by its GGUF name."""
    kind = name.split(".")[-2] if "." in name else name
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}.get(kind)
    if heads is not None and not config.traits.halves:
        return Layout(heads=heads)
    if config.traits.transposed and name.startswith("blk.") and name.endswith("weight"):
        return Layout(transposed=not kind.endswith("norm"))
    return Layout(less_one=config.traits.norms_less_one and kind.endswith("norm"))


def interleave(x: AnyArray, n_heads: int) -> AnyArray:
    """From Hugging Face's rows (n_heads · head_dim, ...) to GGUF's."""
    return x.reshape(n_heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def deinterleave(x: AnyArray, n_heads: int) -> AnyArray:
    """The inverse of `interleave`."""
    return x.reshape(n_heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
