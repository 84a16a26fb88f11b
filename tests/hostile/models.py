"""GGUF files of a llama model whose metadata and tensors do not go together."""

import math

import numpy as np
from hostile.gguf_bytes import build_floats, entry_of
from hostile.kind import Kind
from hostile.tokenizers_gguf import BPE, N

import qjax

METADATA = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 32, "llama.embedding_length": 8,
    "llama.feed_forward_length": 8, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
} | {f"tokenizer.ggml.{key}": value for key, value in BPE.items()}  # fmt: skip
SHAPES = {
    "token_embd.weight": (N, 8), "output_norm.weight": (8,), "blk.0.attn_norm.weight": (8,),
    "blk.0.attn_q.weight": (8, 8), "blk.0.attn_k.weight": (4, 8), "blk.0.attn_v.weight": (4, 8),
    "blk.0.attn_output.weight": (8, 8), "blk.0.ffn_norm.weight": (8,), "blk.0.ffn_gate.weight": (8, 8),
    "blk.0.ffn_up.weight": (8, 8), "blk.0.ffn_down.weight": (8, 8),
}  # fmt: skip


def model(metadata: dict | None = None, shapes: dict | None = None) -> bytes:
    """The sound one with other metadata or tensors, or without those that are None."""
    entries = [entry_of(key, value) for key, value in (METADATA | (metadata or {})).items() if value is not None]
    kept = {name: shape for name, shape in (SHAPES | (shapes or {})).items() if shape is not None}
    return build_floats(entries, {name: np.ones(shape) for name, shape in kept.items()})


def keyed(key: str, value) -> bytes:
    return model({f"llama.{key}": value})


def gemma(key: str, value) -> bytes:
    """Of an architecture with windows in some layers."""
    metadata = dict.fromkeys(key for key in METADATA if key.startswith("llama."))
    metadata |= {key.replace("llama.", "gemma2."): value for key, value in METADATA.items() if key.startswith("llama.")}
    return model(metadata | {"general.architecture": "gemma2", f"gemma2.{key}": value})


WHOLE = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "rope.dimension_count", "attention.key_length", "expert_count",
)  # fmt: skip
REAL = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor")
BAD = {
    "no architecture": (model({"general.architecture": None}), "no key 'general.architecture'"),
    "another architecture": (model({"general.architecture": "mamba"}), "unknown architecture 'mamba'"),
    "an architecture of number 3": (model({"general.architecture": 3}), "unknown architecture 3"),
    "an architecture of an array": (model({"general.architecture": [3]}), "unknown architecture"),
    "an architecture that steers": (model({"general.architecture": "\x1b[2J"}), r"unknown architecture '\\x1b\[2J'"),
    **{
        f"{key} of {value!r}": (keyed(key, value), f"llama.{key} is .*, expected a (whole )?number")
        for key in (*WHOLE, *REAL)
        for value in ("many", [1, 2], True)
    },
    **{f"{key} of NaN": (keyed(key, math.nan), f"llama.{key} is nan, expected a whole number") for key in WHOLE},
    "scaling of number 3": (keyed("rope.scaling.type", 3), "rope.scaling.type is 3, expected a text"),
    "scaling of an array": (keyed("rope.scaling.type", [3]), "rope.scaling.type is .*, expected a text"),
    "layers 2^32-1": (keyed("block_count", 2**32 - 1), "block_count is 4294967295, more than there are tensors"),
    "no layers": (keyed("block_count", 0), "n_layers is 0"),
    "-1 layers": (keyed("block_count", -1), "n_layers is -1"),
    "a layer more": (keyed("block_count", 2), "blk.1.attn_norm.weight: .* it is not there"),
    "no heads": (keyed("attention.head_count", 0), "n_heads is 0"),
    "no KV heads": (keyed("attention.head_count_kv", 0), "n_kv_heads is 0"),
    "heads 2^32-1": (keyed("attention.head_count", 2**32 - 1), "is 0, expected|expected a positive|shape"),
    "columns 2^32-1": (keyed("embedding_length", 2**32 - 1), "heads|head_dim|expected .* by the config"),
    "a context of none": (keyed("context_length", 0), "n_ctx is 0"),
    "a base of NaN": (keyed("rope.freq_base", math.nan), "rope_theta is nan"),
    "windows of text": (
        gemma("attention.sliding_window_pattern", "x"), "window_pattern is 'x', expected a whole number"
    ),
    "windows of many layers": (
        gemma("attention.sliding_window_pattern", [1] * 10**5), "window_pattern is array.*, expected a whole number"
    ),
    "windows of texts": (
        gemma("attention.sliding_window_pattern", ["a", "b"]), "window_pattern is .*, expected a whole number"
    ),
    "a window of text": (gemma("attention.sliding_window", "x"), "sliding_window is 'x', expected a whole number"),
    "a soft cap of NaN": (gemma("attn_logit_softcapping", math.nan), "attn_softcap is nan, expected 0 or more"),
    "no embedding": (model(shapes={"token_embd.weight": None}), "no tensor token_embd.weight"),
    "an embedding of no axes": (model(shapes={"token_embd.weight": ()}), "token_embd.weight"),
    "an embedding of no rows": (model(shapes={"token_embd.weight": (0, 8)}), "vocab is 0"),
    "an embedding of one axis": (model(shapes={"token_embd.weight": (64,)}), "no tensor token_embd.weight of two axes"),
    "more tokens than rows": (model(shapes={"token_embd.weight": (5, 8)}), f"the tokenizer has {N} tokens, the embedd"),
    "a tensor missing": (model(shapes={"blk.0.ffn_up.weight": None}), "blk.0.ffn_up.weight: .* it is not there"),
    "a tensor too many": (model(shapes={"blk.0.z.weight": (3,)}), "blk.0.z.weight: a llama model has no such tensor"),
    "a tensor too many that steers": (model(shapes={"\x1b[2J": (3,)}), r"\\x1b\[2J: a llama model has no such tensor"),
    "a tensor of another shape": (model(shapes={"blk.0.attn_k.weight": (8, 8)}), r"shape \(8, 8\), expected \(4, 8\)"),
    "factors of another number": (model(shapes={"rope_freqs.weight": (3,)}), "3 factors for the 2 frequencies"),
    "factors of no axes": (model(shapes={"rope_freqs.weight": ()}), "1 factors for the 2 frequencies"),
    "no tokenizer": (model({"tokenizer.ggml.model": None}), "no tokenizer.ggml.model"),
}  # fmt: skip

KIND = Kind(qjax.load, "model.gguf", {"sound": model()}, BAD)
