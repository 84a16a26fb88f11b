"""LoRA adapters that are not what they say: as GGUF files, and as PEFT saves them."""

import json
import math
from pathlib import Path

import numpy as np
from hostile import folders
from hostile.folders import DEEP, NOT_READ, header_of, tensors
from hostile.gguf_bytes import build_floats, entry_of
from hostile.kind import Kind

from qjax.io import lora
from qjax.models.config import Config

PREFIX = "base_model.model.model.layers.0.mlp.up_proj.lora_"
SHAPES = {f"{PREFIX}A.weight": (2, 24), f"{PREFIX}B.weight": (40, 2)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
METADATA = {
    "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 4.0,
}  # fmt: skip
HALVES = {"blk.0.ffn_up.weight.lora_a": (2, 24), "blk.0.ffn_up.weight.lora_b": (40, 2)}


def read(path: Path) -> lora.Adapter:
    return lora.read(path, Config.from_hf(folders.CONFIG))


def as_gguf(metadata: dict | None = None, shapes: dict | None = None) -> bytes:
    """The sound one with other metadata or tensors, or without those that are None."""
    entries = [entry_of(key, value) for key, value in (METADATA | (metadata or {})).items() if value is not None]
    kept = {name: shape for name, shape in (HALVES | (shapes or {})).items() if shape is not None}
    return build_floats(entries, {name: np.ones(shape) for name, shape in kept.items()})


GGUF = Kind(
    read,
    "adapter.gguf",
    {"sound": as_gguf()},
    {
        "no type": (as_gguf({"general.type": None}), "no LoRA adapter: general.type and adapter.type are"),
        "a type of an array": (as_gguf({"general.type": [1, 2]}), "no LoRA adapter: general.type"),
        "another kind": (as_gguf({"adapter.type": "\x1b[2J"}), r"no LoRA adapter.*\\x1b\[2J"),
        "no alpha": (as_gguf({"adapter.lora.alpha": None}), "adapter.lora.alpha None"),
        "alpha of text": (as_gguf({"adapter.lora.alpha": "4"}), "adapter.lora.alpha '4'"),
        "alpha of NaN": (as_gguf({"adapter.lora.alpha": math.nan}), "adapter.lora.alpha nan"),
        "no tensors": (as_gguf(shapes=dict.fromkeys(HALVES)), "there are no tensors"),
        "half a pair": (as_gguf(shapes={"blk.0.ffn_up.weight.lora_a": None}), r"found b \(40, 2\); expected a"),
        "ranks apart": (as_gguf(shapes={"blk.0.ffn_up.weight.lora_a": (3, 24)}), r"found a \(3, 24\), b \(40, 2\)"),
        "a rank of 0": (
            as_gguf(shapes={"blk.0.ffn_up.weight.lora_a": (0, 24), "blk.0.ffn_up.weight.lora_b": (40, 0)}), "expected a"
        ),
        "a half of one axis": (as_gguf(shapes={"blk.0.ffn_up.weight.lora_a": (24,)}), r"found a \(24,\)"),
        "a half of no axes": (as_gguf(shapes={"blk.0.ffn_up.weight.lora_a": ()}), r"found a \(\)"),
        "another tensor": (as_gguf(shapes={"\x1b[2J": (3,)}), r"adapter.gguf: .*found .* \(3,\)|no LoRA"),
        "the embedding": (
            as_gguf(shapes={"token_embd.weight.lora_a": (2, 24), "token_embd.weight.lora_b": (50, 2)}),
            "changes the embedding, which is not supported",
        ),
        "cut short": (as_gguf()[:-300], "cut short"),
    },
)  # fmt: skip


def as_folder(weights: bytes | None = None, config=None, **changes) -> dict[str, bytes]:
    config = CONFIG | changes if config is None else config
    return {
        lora.CONFIG: config if isinstance(config, bytes) else json.dumps(config).encode(),
        lora.WEIGHTS: of(SHAPES) if weights is None else weights,
    }


def of(shapes: dict) -> bytes:
    return tensors(header_of(shapes), 4 * sum(math.prod(shape) for shape in shapes.values()))


PEFT = Kind(
    read,
    "",
    {"sound": as_folder()},
    {
        "no config": ({lora.WEIGHTS: of(SHAPES)}, "adapter_config.json: there is no such file"),
        "a config that is a list": (as_folder(config=[]), "expected a JSON object, found a list"),
        "a config that is deep": (lambda: as_folder(config=DEEP), "adapter_config.json: not a JSON file"),
        "no weights": ({lora.CONFIG: json.dumps(CONFIG).encode()}, NOT_READ),
        "no safetensors": (as_folder(bytes(40)), NOT_READ),
        "alpha of text": (as_folder(lora_alpha="x"), "lora_alpha is 'x', expected a number"),
        "no alpha": (as_folder(lora_alpha=None), "lora_alpha is None, expected a number"),
        "alpha of NaN": (as_folder(lora_alpha=math.nan), "lora_alpha is nan, expected a number"),
        "alpha of 10^400": (as_folder(lora_alpha=10**400), "lora_alpha is 1000.*, expected a number"),
        "a pattern of alphas": (as_folder(alpha_pattern={"\x1b[2J": 3}), r"alpha_pattern is .*x1b.*which GGUF cannot"),
        "DoRA": (as_folder(use_dora=True), "use_dora is True, which GGUF cannot express"),
        "a tensor that is no half": (as_folder(of(SHAPES | {"\x1b[2J": (3,)})), r"\\x1b\[2J is no part of a LoRA pair"),
        "a tensor that is not known": (
            as_folder(of(SHAPES | {"base_model.model.z.lora_A.weight": (3, 3)})), "tensor 'z.weight' is not known"
        ),
        "layer 10^5000": (
            lambda: as_folder(of({f"base_model.model.model.layers.1{'0' * 5000}.mlp.up_proj.lora_A.weight": (3, 3)})),
            "is not known",
        ),
        "half a pair": (as_folder(of({f"{PREFIX}A.weight": (2, 24)})), r"found a \(2, 24\); expected a"),
        "no tensors": (as_folder(of({})), "there are no tensors"),
    },
)  # fmt: skip
