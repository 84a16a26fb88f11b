"""What fuzzing found, kept: inputs that a reader once did not take as it should."""

import json
from typing import NamedTuple

from . import seeds
from .mutation import Input
from .packing import Tree


class Case(NamedTuple):
    """An input of a target, and whether it is to be refused."""

    target: str
    files: Tree
    refused: bool = True
    patches: tuple = ()

    @property
    def input(self) -> Input:
        return Input(self.files, list(self.patches))


def _config(**entries) -> Case:
    return Case("config_json", {"config.json": seeds.HF_LLAMA | entries})


def _gguf_config(*entries: list, which: int = 0) -> Case:
    """Those of a seed that has other values for some keys."""
    seed, changed = seeds.CONFIG_GGUF[which], {entry[0]: entry for entry in entries}
    kept = [entry for entry in seed["metadata"] if entry[0] not in changed]
    return Case("config_gguf", {"model.gguf": seed | {"metadata": [*kept, *entries]}})


def _peft(weights: Tree, **config) -> Case:
    tensors = {f"base_model.model.model.layers.0.self_attn.{name}.weight": tensor for name, tensor in weights.items()}
    described = {"lora_alpha": 16, **config}
    return Case("lora", {"adapter_config.json": described, "adapter_model.safetensors": {"tensors": tensors}})


def _nf4(**dtypes: str) -> Case:
    """The seed with other types for some parts of a matrix."""
    folder = seeds.PREQUANTIZED[5]
    tensors = dict(folder["model.safetensors"]["tensors"])
    for part, dtype in dtypes.items():
        name = next(name for name in tensors if name.rpartition("weight.")[2].startswith(part))
        tensors[name] = [dtype, *tensors[name][1:]]
    return Case("prequantized", folder | {"model.safetensors": {"tensors": tensors}})


def _nf4_state(**entries) -> Case:
    """The seed with other entries in what its matrices say of themselves."""
    folder = seeds.PREQUANTIZED[5]
    tensors = dict(folder["model.safetensors"]["tensors"])
    for name in [name for name in tensors if name.endswith("bitsandbytes__nf4")]:
        packed = json.dumps(json.loads(tensors[name][2]) | entries).encode()
        tensors[name] = ["U8", [len(packed)], packed]
    return Case("prequantized", folder | {"model.safetensors": {"tensors": tensors}})


def _long_tokens() -> Tree:
    long = "a" * 300_000
    vocab = {token: i for i, token in enumerate(("<unk>", "a", "b", long, long + "b", long + "bb"))}
    merges = [[long, "b"], [long + "b", "b"]]
    return {"added_tokens": [], "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": merges}}


_PAIR = {"q_proj.lora_A": ["F32", [2, 8], None], "q_proj.lora_B": ["F32", [8, 2], None]}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _quantized(method: str, bits: float) -> Tree:
    return {"quantization_config": {"quant_method": method, "bits": bits}}


_STATE = "w.quant_state.bitsandbytes__nf4"
_AWQ = seeds.PREQUANTIZED[3]
_TOO_LARGE = [12, [1e308] * 10]
_DIGITS = "9" * 5000  # Python reads no longer numbers than of 4300.

CASES: dict[str, Case] = {
    # config.json: whatever is no number raised TypeError, ValueError or OverflowError
    "a size that is a text": _config(hidden_size="8"),
    "a size that is a list": _config(num_hidden_layers=[1]),
    "a size that is null": _config(vocab_size=None),
    "a size that is infinite": _config(intermediate_size=float("inf")),
    "an epsilon that is a text": _config(rms_norm_eps="small"),
    "an epsilon beyond all floats": _config(rms_norm_eps=10**400),
    "architectures that are an object": _config(architectures={"0": "LlamaForCausalLM"}),
    "an architecture that is an object": _config(architectures=[{}]),
    "rope_scaling that is a list": _config(rope_scaling=["yarn"]),
    "layer_types of lists": Case(
        "config_json", {"config.json": seeds.CONFIG_JSON[7] | {"layer_types": [["full_attention"]]}}
    ),
    "factors for 2^24 channels, which filled the memory": _config(
        head_dim=2**24, rope_scaling=_LLAMA3 | {"original_max_position_embeddings": 8192}
    ),
    "longrope with an original context of nothing": Case(
        "config_json", {"config.json": seeds.CONFIG_JSON[10] | {"original_max_position_embeddings": 1}}
    ),
    "a share of the channels that is no number": Case(
        "config_json", {"config.json": seeds.CONFIG_JSON[10] | {"partial_rotary_factor": float("nan")}}
    ),
    "biases of experts, which have none": Case(
        "config_json", {"config.json": seeds.CONFIG_JSON[3] | {"mlp_bias": True}}
    ),
    # GGUF
    "an embedding without axes": Case(
        "config_gguf", {"model.gguf": seeds.CONFIG_GGUF[0] | {"tensors": [["token_embd.weight", [], 0]]}}
    ),
    "an architecture that is an array": _gguf_config(["general.architecture", 9, [4, [1, 2]]]),
    "head counts of each layer": _gguf_config(["llama.attention.head_count", 9, [4, [2, 2]]]),
    "a kind of scaling that is an array": _gguf_config(["llama.rope.scaling.type", 9, [4, [1, 2]]]),
    "no weights in more rows than 64 bits count": Case(
        "gguf", {"model.gguf": {"tensors": [["w", [0, 2**62, 2**62], 0]]}}
    ),
    "no rows, of more bytes than 64 bits count": Case("gguf", {"model.gguf": {"tensors": [["w", [2**62, 0], 0]]}}),
    "a shard of 99999, for which the folder was searched 99999 times": Case(
        "splits",
        {
            "m-00001-of-99999.gguf": {
                "metadata": [["split.no", 2, 0], ["split.count", 4, 99999], ["split.tensors.count", 5, 0]]
            }
        },
    ),
    "a NaN that signals": Case("imatrix_dat", {"imatrix.dat": seeds.DAT[1]}, patches=((0, 29, "u32", 0x7F800001),)),
    # messages: names steered terminals, or were as long as a file
    "a name with control characters": Case("imatrix_dat", {"imatrix.dat": {"entries": [["\x1b[2J", 1, [-1.0]]]}}),
    "a type with control characters": _peft({"q_proj.lora_A": ["\x1b[2J\n", [2, 8], None]}),
    "a kind of adapter as long as a file": _peft(_PAIR, peft_type="x" * 100_000),
    # adapters
    "halves without rows": _peft({"k_proj.lora_A": ["F32", [1, 8], None], "k_proj.lora_B": ["F32", [4, 0], None]}),
    "halves without axes, one of them asked for its rank": _peft(
        {"q_proj.lora_A": ["F32", [], None], "q_proj.lora_B": ["F32", [8, 2], None]}, use_rslora=True
    ),
    "a half of more axes than numpy has": _peft({"q_proj.lora_A": ["F32", [1] * 65, None]}),
    "an infinite alpha": _peft(_PAIR, lora_alpha=float("inf")),
    "a general.type that is an array": Case("lora", {"adapter.gguf": {"metadata": [["general.type", 9, [4, []]]]}}),
    # folders
    "an expert with a number that Python does not read": Case(
        "safetensors",
        {
            "config.json": seeds.SAFETENSORS[2]["config.json"],
            "model.safetensors": {
                "tensors": {f"model.layers.0.block_sparse_moe.experts.{_DIGITS}.w1.weight": ["F32", [8, 8], None]}
            },
        },
    ),
    "a token with a number that Python does not read": Case(
        "tokenizer_folder",
        seeds.TOKENIZER_FOLDERS[4] | {"tokenizer_config.json": {"added_tokens_decoder": {_DIGITS: {"content": "x"}}}},
    ),
    "a chat template that is no text": Case(
        "tokenizer_folder", seeds.TOKENIZER_FOLDERS[1] | {"chat_template.jinja": b"\xed\xa0\x80"}
    ),
    "4.0 bits": Case("prequantized", _AWQ | {"config.json": _AWQ["config.json"] | _quantized("awq", 4.0)}),
    "an NF4 part of a type that numpy has not": _nf4(quant_state="F8_E4M3"),
    "NF4 scales of a type that numpy has not": _nf4(absmax="F8_E5M2"),
    "an NF4 part of more axes than numpy has": Case(
        "prequantized",
        _AWQ | {"model.safetensors": {"tensors": {"w": ["U8", [1], None], _STATE: ["U8", [1] * 65, None]}}},
    ),
    "more layers than any memory has names for": _config(num_hidden_layers=2**40),
    "tokens as long as a file, cut everywhere": Case(
        "tokenizer_folder",
        {"tokenizer.json": seeds.CHARACTERS_JSON | _long_tokens()},
        refused=False,
    ),
    # numbers that are too large for float32, of which numpy warned
    "factors of longrope": _config(
        rope_scaling={"rope_type": "longrope", "short_factor": [1e39] * 8, "long_factor": [1.0] * 8}
        | {"original_max_position_embeddings": 32}
    ),
    "an offset of scales": _nf4_state(nested_offset=1e39),
    "wavelengths of llama3": _config(
        rope_theta=1e39,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 32},
    ),
    "a magnitude": _config(rope_scaling={"rope_type": "yarn", "factor": 4.0, "attention_factor": 1e39}),
    "scores": Case(
        "tokenizer",
        {"model.gguf": {"metadata": [*seeds.TOKENIZERS["llama"][:2], ["tokenizer.ggml.scores", 9, _TOO_LARGE]]}},
        refused=False,
    ),
    "sums that are merged": Case("imatrix_dat", {"imatrix.dat": {"entries": [["blk.0.attn_q.weight", 1, [6e35]]]}}),
    # texts
    "a shard named by half a character": Case(
        "safetensors",
        seeds.SAFETENSORS[1] | {"model.safetensors.index.json": {"weight_map": {"w": "\ud800.safetensors"}}},
    ),
    "a set in a set, of which Python warned": Case("arguments", {"types.txt": "[[a]]=Q4_0"}),
    "a size with a number that Python does not read": Case("arguments", {"size.txt": _DIGITS}),
    "parentheses as deep as Python reads no expression": Case(
        "arguments", {"types.txt": f"{'(' * 5000}a{')' * 5000}=F16"}
    ),
    "a separator of records beside a number": Case(
        "probes", {"questions.winogrande": "1,a _ b,x,y,2\x1e\n"}, refused=False
    ),
    "a line end within a line of CSV": Case("probes", {"questions.winogrande": "1,A\rb _ c,x,y,1\n"}),
    "a card of lists in lists, which took seconds": Case(
        "card", {"README.md": f"---\ntags: {'[a,' * 5000}\n---\n"}, refused=False
    ),
    "a card with a number in base 60, which Python does not write": Case(
        "card", {"README.md": f"---\nversion: 1{':59' * 20000}\n---\n"}, refused=False
    ),
    "a card of a million short lines": Case("card", {"README.md": "---\nx:\n" + " é\n" * 10**6}, refused=False),
    "a card with nothing for a number": Case("card", {"README.md": '---\nversion: !!int ""\n---\n'}, refused=False),
}
