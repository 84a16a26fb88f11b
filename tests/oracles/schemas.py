"""llama.cpp's snapshots of the type llama-quantize gives each tensor (tests/snapshots/*.schema):

    # n_embd=1024, n_ff=3072, ...
    [Q2_K] q2_K                       file type, and the type of every matrix but
    blk.0.attn_output.weight q3_K     these

They are without an importance matrix.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

# What the headers leave out: architecture, head size, and whether there is an output.weight.
_MODELS = {
    "gemma-3-4b-it": ("gemma3", 256, False),
    "gpt-oss-120b": ("gpt-oss", 64, True),
    "meta-llama-3.1-70b-instruct": ("llama", 128, True),
    "qwen3-0.6b": ("qwen3", 128, True),
    "qwen3-14b": ("qwen3", 128, True),
}


class Schema(NamedTuple):
    metadata: dict
    tensors: dict[str, np.ndarray]
    """The matrices, by name; only their shapes are real"""
    types: dict[str, dict[str, str]]
    """File type to tensor name to type, all in capitals"""


def read(path: Path) -> Schema:
    text = path.read_text(encoding="utf-8")
    n = {key: int(value) for key, value in re.findall(r"(n_\w+)=(\d+)", text)}
    architecture, head_dim, has_output = _MODELS[path.stem]
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in _shapes(n, head_dim, has_output).items()}
    metadata = {
        "general.architecture": architecture,
        f"{architecture}.block_count": n["n_layer"],
        f"{architecture}.attention.head_count": n["n_head"],
        f"{architecture}.attention.head_count_kv": n["n_head_kv"],
        f"{architecture}.expert_count": n.get("n_expert", 0),
    }
    sections = re.findall(r"^\[(\w+)\] (\w+)\n((?:[^\[\n]+\n)*)", text, re.MULTILINE)
    types = {}
    for file_type, default, lines in sections:
        listed = dict(line.split() for line in lines.splitlines())
        assert listed.keys() <= tensors.keys()
        types[file_type] = {name: listed.get(name, default).upper() for name in tensors}
    assert len(types) == text.count("\n[")
    return Schema(metadata, tensors, types)


def _shapes(n: dict[str, int], head_dim: int, has_output: bool) -> dict[str, tuple[int, ...]]:
    d, ff, q, kv = n["n_embd"], n["n_ff"], n["n_head"] * head_dim, n["n_head_kv"] * head_dim
    stack, suffix = ((n["n_expert"],), "_exps") if "n_expert" in n else ((), "")
    layer = {
        "attn_q": (q, d),
        "attn_k": (kv, d),
        "attn_v": (kv, d),
        "attn_output": (d, q),
        f"ffn_gate{suffix}": (*stack, ff, d),
        f"ffn_up{suffix}": (*stack, ff, d),
        f"ffn_down{suffix}": (*stack, d, ff),
    }
    embeddings = ("token_embd", "output") if has_output else ("token_embd",)
    shapes = {f"{name}.weight": (n["n_vocab"], d) for name in embeddings}
    return shapes | {f"blk.{i}.{k}.weight": shape for i in range(n["n_layer"]) for k, shape in layer.items()}
