"""Hugging Face folders whose weights are not what they say: safetensors files, their headers, and the index of shards.

Source: the safetensors library's README.
"""

import json
import struct
from collections.abc import Mapping

import numpy as np
from hostile.kind import Kind

from qjax.io import checkpoints

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
MIXTRAL = CONFIG | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
LAYER = {
    "input_layernorm": (24,), "self_attn.q_proj": (48, 24), "self_attn.k_proj": (16, 24), "self_attn.v_proj": (16, 24),
    "self_attn.o_proj": (24, 48), "post_attention_layernorm": (24,), "mlp.gate_proj": (40, 24),
    "mlp.up_proj": (40, 24), "mlp.down_proj": (24, 40),
}  # fmt: skip
SHAPES = {"model.embed_tokens.weight": (50, 24), "model.norm.weight": (24,)} | {
    f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in LAYER.items()
}
NORM = "model.norm.weight"


def header_of(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    header, at = {}, 0
    for name, shape in shapes.items():
        stop = at + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    return header


N_BYTES = 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())


def tensors(header, n_bytes: int = N_BYTES, size: int | None = None) -> bytes:
    """A safetensors file of zeros.  header: an object, or text.  size: of the header, if not what it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(n_bytes)


def model(weights: bytes | None = None, *, config=None, **files: bytes) -> dict[str, bytes]:
    """The sound folder, with other weights or another config.json."""
    config = CONFIG if config is None else config
    content = {"config.json": config if isinstance(config, bytes) else json.dumps(config).encode()}
    return content | {WEIGHTS: tensors(header_of(SHAPES)) if weights is None else weights} | files


def norm(**changes) -> dict[str, bytes]:
    """The folder in which the header says something else of one tensor."""
    header = header_of(SHAPES)
    return model(tensors(header | {NORM: header[NORM] | changes}))


def shapes(**changes) -> dict[str, bytes]:
    """The folder with other tensors in layer 1, or without those that are None."""
    full = {f"model.layers.1.{name.replace('__', '.')}.weight": shape for name, shape in changes.items()}
    listed = {name: shape for name, shape in (SHAPES | full).items() if shape is not None}
    return model(tensors(header_of(listed), 4 * sum(int(np.prod(shape)) for shape in listed.values())))


# ── shards ───────────────────────────────────────────────────────────────────────────────────────────

FILES = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
HALVES = [dict(list(SHAPES.items())[i::2]) for i in range(2)]
WEIGHT_MAP = {name: file for file, half in zip(FILES, HALVES) for name in half}


def sharded(index=None, **placed) -> dict[str, bytes]:
    """The folder in shards.  index: something else in its place.  placed: more, or other files for tensors."""
    if index is None:
        index = {"metadata": {}, "weight_map": WEIGHT_MAP | placed}
    content = model(**{INDEX: index if isinstance(index, bytes) else json.dumps(index).encode()})
    del content[WEIGHTS]
    sizes = (4 * sum(int(np.prod(shape)) for shape in half.values()) for half in HALVES)
    return content | {file: tensors(header_of(half), n) for file, half, n in zip(FILES, HALVES, sizes)}


def head_in(file) -> dict[str, bytes]:
    return sharded(**{"lm_head.weight": file})


DEEP = b"[" * 10**5
NOT_READ = "not a safetensors file, or cut short"
OUTSIDE = "not a safetensors file in the same folder"
AT = [1200 * 4, 1200 * 4 + 96]
"""Where the norm stands."""

BAD = {
    # ── headers
    "nothing": (model(b""), NOT_READ),
    "4 bytes": (model(bytes(4)), NOT_READ),
    "a header of 0 bytes": (model(bytes(64)), NOT_READ),
    "cut in the header": (lambda: model(tensors(header_of(SHAPES))[:100]), NOT_READ),
    "cut in the data": (lambda: model(tensors(header_of(SHAPES), N_BYTES - 1)), NOT_READ),
    "bytes after the data": (lambda: model(tensors(header_of(SHAPES), N_BYTES + 1)), NOT_READ),
    "a header of 2^63 bytes": (model(tensors(header_of(SHAPES), size=2**63)), NOT_READ),
    "a header of 2^64-1 bytes": (model(tensors(header_of(SHAPES), size=2**64 - 1)), NOT_READ),
    "a header of 100 MB": (model(tensors(header_of(SHAPES), size=10**8)), NOT_READ),
    "a header that is no JSON": (model(tensors(b"{" * 64)), NOT_READ),
    "a header that is a list": (model(tensors([])), NOT_READ),
    "a header of bytes that are no text": (model(tensors(b'{"\xff": 1}')), NOT_READ),
    "a header 100,000 deep": (lambda: model(tensors(b'{"a":' + DEEP)), NOT_READ),
    "a header of a million blanks": (lambda: model(tensors(b" " * 10**6)), NOT_READ),
    "no tensors": (model(tensors({}, 0)), "config.json has 2 layers, more than there are tensors"),
    "metadata of numbers": (model(tensors(header_of(SHAPES) | {"__metadata__": {"a": 1}})), NOT_READ),
    # ── tensors
    "a type that is none": (norm(dtype="F31"), NOT_READ),
    "a type of numbers": (norm(dtype=0), NOT_READ),
    "another type": (norm(dtype="I32"), "model.norm.weight is I32, expected one of F32, F16, BF16"),
    "no type": (norm(dtype=None), NOT_READ),
    "a shape that is larger than its bytes": (norm(shape=[25]), NOT_READ),
    "a shape that overflows": (norm(shape=[2**40, 2**40]), NOT_READ),
    "a shape of -1": (norm(shape=[-1, -24]), NOT_READ),
    "a shape of text": (norm(shape="24"), NOT_READ),
    "a shape of 10,000 axes": (lambda: norm(shape=[24] + [1] * 10_000), r"has shape \(24, 1, 1.*, expected \(24,\)"),
    "another shape": (norm(shape=[2, 12]), r"model.norm.weight has shape \(2, 12\), expected \(24,\)"),
    "offsets beyond the data": (norm(data_offsets=[N_BYTES, N_BYTES + 96]), NOT_READ),
    "offsets of 2^63": (norm(data_offsets=[2**63, 2**63 + 96]), NOT_READ),
    "offsets of 2^65": (norm(data_offsets=[2**65, 2**65 + 96]), NOT_READ),
    "offsets of -96": (norm(data_offsets=[-96, 0]), NOT_READ),
    "offsets backwards": (norm(data_offsets=AT[::-1]), NOT_READ),
    "offsets that overlap": (norm(data_offsets=[0, 96]), NOT_READ),
    "one offset": (norm(data_offsets=AT[:1]), NOT_READ),
    "a gap": (
        lambda: model(tensors(header_of({"gap": (1,)} | SHAPES) | {"gap": None}, N_BYTES + 4)), NOT_READ
    ),
    "a tensor too few": (shapes(self_attn__q_proj=None), r"model.layers.1.self_attn.q_proj.weight \(blk.1.attn_q.weig"),
    "a tensor of another shape": (shapes(self_attn__q_proj=(24, 48)), r"\(24, 48\), expected \(48, 24\)"),
    "a tensor that is not known": (shapes(self_attn__z_proj=(3,)), "z_proj.weight' is not known"),
    "a name that steers": (
        lambda: model(tensors(header_of(SHAPES | {"\x1b[2J\n\u202e": (3,)}), N_BYTES + 12)),
        r"tensor '\\x1b\[2J\\n\\u202e' is not known",
    ),
    "a known name that steers": (
        lambda: model(tensors(header_of(SHAPES | {"model.layers.1.\u2066.weight": (3,)}), N_BYTES + 12)),
        r"\\u2066.weight' is not known",
    ),
    "a name of a megabyte": (
        lambda: model(tensors(header_of(SHAPES | {"x" * 10**6: (3,)}), N_BYTES + 12)), "tensor 'xxx.* is not known"
    ),
    "a part of a quantized matrix": (
        lambda: model(tensors(header_of(SHAPES | {f"{NORM}.quant_state.bitsandbytes__nf4": (3,)}), N_BYTES + 12)),
        "the quant_state of bitsandbytes is damaged",
    ),
    "layer 10^30": (
        lambda: model(
            tensors(header_of(SHAPES | {f"model.layers.{10**30}.input_layernorm.weight": (3,)}), N_BYTES + 12)
        ),
        "input_layernorm.weight' is not known",
    ),
    "layer 10^5000": (
        lambda: model(
            tensors(header_of(SHAPES | {f"model.layers.1{'0' * 5000}.input_layernorm.weight": (3,)}), N_BYTES + 12)
        ),
        "input_layernorm.weight' is not known",
    ),
    "expert 10^5000": (
        lambda: model(
            tensors(header_of(SHAPES | {f"model.layers.0.block_sparse_moe.experts.1{'0' * 5000}.w1.weight": (3,)}),
                    N_BYTES + 12),
            config=MIXTRAL,
        ),
        "w1.weight' is not known",
    ),
    "expert 9 of 4": (
        lambda: model(
            tensors(header_of(SHAPES | {"model.layers.0.block_sparse_moe.experts.9.w1.weight": (3,)}), N_BYTES + 12),
            config=MIXTRAL,
        ),
        "are 1 tensors, expected those of the 4 experts",
    ),
    # ── the index
    "no weights": ({"config.json": json.dumps(CONFIG).encode()}, r"neither model.safetensors nor .*Pickled"),
    "an index that is no JSON": (sharded(b"{"), r"index.json: not a JSON file"),
    "an index that is a list": (sharded([]), r"index.json: expected a JSON object, found a list"),
    "an index 100,000 deep": (lambda: sharded(DEEP), r"index.json: not a JSON file"),
    "an index of bytes that are no text": (sharded(b"\xff\xfe"), r"index.json: not a JSON file"),
    "no weight_map": (sharded({}), "expected an object 'weight_map'"),
    "a weight_map that is a list": (sharded({"weight_map": ["a"]}), "expected an object 'weight_map'"),
    "an empty weight_map": (sharded({"weight_map": {}}), "config.json has 2 layers, more than there are tensors"),
    "a file called 3": (head_in(3), "expected an object 'weight_map'"),
    **{
        f"the shard {file!r}": (head_in(file), OUTSIDE)
        for file in (
            *("../secret.safetensors", "..\\secret.safetensors", "/secret.safetensors", "C:secret.safetensors"),
            *("//host/secret.safetensors", "a/../../secret.safetensors", "config.json", "", ".", "..safetensors/"),
        )
    },
    "a shard that steers": (head_in("\x1b[2J/.safetensors"), r"'\\x1b\[2J/.safetensors' is not a safetensors file"),
    "a shard that is not there": (head_in("gone.safetensors"), "gone.safetensors: there is no such file"),
    "a shard with NUL": (head_in("\0.safetensors"), r"\\x00.safetensors.*(no such file|not a safetensors file)"),
    "a shard of a long name": (head_in("x" * 5000 + ".safetensors"), "not a safetensors file|no such file"),
    "a shard of bytes that are no text": (head_in("\udcff.safetensors"), "not a safetensors file|no such file"),
    "a tensor that is not in its shard": (head_in(FILES[0]), "lm_head.weight, which .* places here, is missing"),
    "a hundred thousand shards": (
        lambda: sharded({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(10**5)}}), "there is no such file"
    ),
}  # fmt: skip

KIND = Kind(checkpoints.read_folder, "", {"one file": model(), "shards": sharded()}, BAD)
