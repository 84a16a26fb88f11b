"""Valid files of every kind that is read, as small as can be, as trees (see `packing`)."""

import json
import struct

import numpy as np

from qjax.formats.nf4 import SCALES, VALUES

from .packing import Tree

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

# ── vocabularies ─────────────────────────────────────────────────────────────────────────────────────

_BYTE_LEVEL = ["<|endoftext|>", "a", "b", "c", "Ġ", "ab", "Ġa", "abc", "<|x|>", "Ċ"]
_MERGES = ["a b", "Ġ a", "ab c"]
_PIECES = ["<unk>", "<s>", "</s>", "<0x0A>", "<0x41>", "▁", "a", "b", "ab", "▁a"]
_PIECE_TYPES = [2, 3, 3, 6, 6, 1, 1, 1, 1, 1]
_SCORES = [0.0, 0.0, 0.0, 0.0, 0.0, -5.0, -4.0, -3.0, -1.0, -2.0]
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message.content | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENIZERS: dict[str, list] = {
    "gpt2": [
        ["tokenizer.ggml.model", STRING, "gpt2"],
        ["tokenizer.ggml.pre", STRING, "llama-bpe"],
        ["tokenizer.ggml.tokens", ARRAY, [STRING, _BYTE_LEVEL]],
        ["tokenizer.ggml.token_type", ARRAY, [I32, [3, 1, 1, 1, 1, 1, 1, 1, 4, 1]]],
        ["tokenizer.ggml.merges", ARRAY, [STRING, _MERGES]],
        ["tokenizer.ggml.bos_token_id", U32, 0],
        ["tokenizer.ggml.eos_token_id", U32, 0],
        ["tokenizer.ggml.add_eos_token", BOOL, True],
        ["tokenizer.chat_template", STRING, _TEMPLATE],
        ["general.name", STRING, "Phi-3 mini"],
    ],
    "llama": [
        ["tokenizer.ggml.model", STRING, "llama"],
        ["tokenizer.ggml.tokens", ARRAY, [STRING, _PIECES]],
        ["tokenizer.ggml.scores", ARRAY, [F32, _SCORES]],
        ["tokenizer.ggml.token_type", ARRAY, [I32, _PIECE_TYPES]],
        ["tokenizer.ggml.add_space_prefix", BOOL, True],
        ["tokenizer.ggml.unknown_token_id", U32, 0],
    ],
    "gemma4": [
        ["tokenizer.ggml.model", STRING, "gemma4"],
        ["tokenizer.ggml.tokens", ARRAY, [STRING, ["<bos>", "a", "b", "ab", "▁", "\n\n", "</s>", "<|tool_response>"]]],
        ["tokenizer.ggml.merges", ARRAY, [STRING, ["a b"]]],
        ["tokenizer.ggml.bos_token_id", U32, 0],
        ["tokenizer.ggml.fim_pad_token_id", U32, 2],
    ],
    "without pre": [
        ["tokenizer.ggml.model", STRING, "gpt2"],
        ["tokenizer.ggml.tokens", ARRAY, [STRING, ["a", "b", "<|end|>", "<|call|>", "<|return|>", "<PRE>", "<mask>"]]],
        ["tokenizer.ggml.merges", ARRAY, [STRING, []]],
        ["tokenizer.ggml.eot_token_id", U32, 2],
    ],
}

# ── GGUF ─────────────────────────────────────────────────────────────────────────────────────────────

_NUMBERS = [
    ["a", 0, 255],
    ["b", 1, -1],
    ["c", 2, 65535],
    ["d", 3, -1],
    ["e", U32, 7],
    ["f", I32, -7],
    ["g", F32, 0.5],
    ["h", F32, float("nan")],
    ["i", BOOL, True],
    ["j", 10, 2**63],
    ["k", 11, -(2**62)],
    ["l", 12, 0.25],
]
_ARRAYS = [
    ["general.architecture", STRING, "llama"], ["m", ARRAY, [U32, [1, 2]]], ["n", ARRAY, [STRING, ["x", "\udcff"]]],
    ["o", ARRAY, [BOOL, [True, False]]], ["p", ARRAY, [ARRAY, [[F32, [1.0]], [STRING, ["y"]]]]], ["r", STRING, "two\n"],
]  # fmt: skip

_LLAMA = [
    ["general.architecture", STRING, "llama"],
    ["llama.context_length", U32, 64],
    ["llama.embedding_length", U32, 8],
    ["llama.block_count", U32, 1],
    ["llama.feed_forward_length", U32, 8],
    ["llama.attention.head_count", U32, 2],
    ["llama.attention.head_count_kv", U32, 1],
    ["llama.rope.freq_base", F32, 1e4],
    ["llama.attention.layer_norm_rms_epsilon", F32, 1e-5],
]


def _of(architecture: str, tensors: list, *more: list) -> Tree:
    metadata = [[key.replace("llama", architecture), kind, value] for key, kind, value in _LLAMA]
    metadata[0][2] = architecture
    return {"metadata": [*metadata, *([f"{architecture}.{key}", kind, value] for key, kind, value in more)]} | {
        "tensors": [["token_embd.weight", [8, 10], 0], *tensors]
    }


GGUF: list[Tree] = [
    {"metadata": _NUMBERS, "tensors": [["s", [], 0]]},
    {"metadata": _ARRAYS, "tensors": [["w", [32, 2], 8], ["v", [3], 0], ["e", [0, 2], 24]]},
    {"metadata": [["general.alignment", U32, 32]], "tensors": [["blk.0.x", [256], 14], ["blk.1.x", [256], 14]]},
    {"version": 2, "metadata": [], "tensors": []},
]

CONFIG_GGUF: list[Tree] = [
    _of(
        "llama", [["rope_freqs.weight", [2], 0]], ["rope.scaling.type", STRING, "linear"],
        ["rope.scaling.factor", F32, 2.0],
    ) | {"data": bytes(320) + struct.pack("<2f", 1.0, 2.0) + bytes(24)},
    _of(
        "gemma3", [], ["attention.key_length", U32, 4], ["attention.value_length", U32, 4],
        ["attention.sliding_window", U32, 16], ["attention.sliding_window_pattern", ARRAY, [BOOL, [False]]],
        ["attention.scale", F32, 0.5], ["rope.freq_base_swa", F32, 1e4], ["final_logit_softcapping", F32, 30.0],
    ),
    _of("gemma2", [], ["attn_logit_softcapping", F32, 50.0], ["attention.sliding_window_pattern", U32, 2]),
    _of(
        "phi3", [["rope_factors_long.weight", [1], 0], ["rope_factors_short.weight", [1], 0]],
        ["rope.dimension_count", U32, 2], ["rope.scaling.original_context_length", U32, 32],
        ["rope.scaling.type", STRING, "longrope"], ["rope.scaling.attn_factor", F32, 1.5],
    ) | {"data": bytes(320) + struct.pack("<f28xf28x", 1.0, 2.0)},
    _of(
        "qwen3moe", [], ["expert_count", U32, 4], ["expert_used_count", U32, 2],
        ["expert_feed_forward_length", U32, 8], ["expert_weights_norm", BOOL, False],
    ),
    _of("gpt2", [["blk.0.attn_qkv.bias", [24], 0]], ["attention.layer_norm_epsilon", F32, 1e-5]),
    _of(
        "llama", [["output.weight", [8, 10], 0]], ["rope.scaling.type", STRING, "yarn"],
        ["rope.scaling.factor", F32, 4.0], ["rope.scaling.yarn_beta_fast", F32, 32.0],
        ["rope.scaling.yarn_attn_factor", F32, 1.0], ["rope.scaling.yarn_ext_factor", F32, 1.0],
    ),
]  # fmt: skip


def _shard(no: int, count: int, n_tensors: int, tensors: list, *metadata: list) -> Tree:
    numbers = ["split.no", 2, no], ["split.count", 2, count], ["split.tensors.count", I32, n_tensors]
    return {"metadata": [*metadata, *numbers], "tensors": tensors}


SPLITS: list[Tree] = [
    {
        "m-00001-of-00002.gguf": _shard(0, 2, 3, [["a", [4], 0]], ["general.architecture", STRING, "llama"]),
        "m-00002-of-00002.gguf": _shard(1, 2, 3, [["b", [4], 0], ["c", [32], 2]]),
    },
    {"m-00001-of-00001.gguf": _shard(0, 1, 1, [["a", [4], 0]])},
    {"m.gguf": GGUF[2]},
]

# ── files from before GGUF ───────────────────────────────────────────────────────────────────────────

_OLD_TOKENS = [*(b"", b"", b""), *(bytes([byte]) for byte in (65, 200)), b" the", b"\xc3\xa9"]


def _ggml(magic: bytes, version: int | None, scores: bool, kind: int = 0, kv: int = 2) -> Tree:
    matrix = [2, 2]
    tensors = [
        ["tok_embeddings.weight", [2, len(_OLD_TOKENS)], kind],
        ["norm.weight", [2], 0],
        ["output.weight", [2, len(_OLD_TOKENS)], kind],
        ["layers.0.attention_norm.weight", [2], 0],
        *([f"layers.0.attention.w{which}.weight", matrix, kind] for which in "qo"),
        *([f"layers.0.attention.w{which}.weight", [2, kv], kind] for which in "kv"),
        ["layers.0.ffn_norm.weight", [2], 0],
        *([f"layers.0.feed_forward.w{i}.weight", matrix, kind] for i in (1, 2, 3)),
    ]
    tokens = [[token, -float(i) if scores else None] for i, token in enumerate(_OLD_TOKENS)]
    return {"magic": magic, "version": version, "sizes": [2, 256, 1, 1, 2, 0], "tokens": tokens, "tensors": tensors}


GGML: list[Tree] = [
    _ggml(b"tjgg", 3, scores=True),
    _ggml(b"tjgg", 1, scores=True, kind=1),
    _ggml(b"fmgg", 1, scores=True, kind=1),
    _ggml(b"lmgg", None, scores=False),
]

# ── what is measured ─────────────────────────────────────────────────────────────────────────────────

DAT: list[Tree] = [
    {
        "entries": [["blk.0.attn_q.weight", 2, [1.0, 0.0, 2.0]], ["blk.1.attn_q.weight", 0, [0.5, 1.0, 1.0]]],
        "chunks": 2,
        "dataset": "text.txt",
    },
    {"entries": [["output.weight", 1, [1.0]]]},
]

_IMATRIX = [
    ["general.type", STRING, "imatrix"],
    ["imatrix.datasets", ARRAY, [STRING, ["text.txt"]]],
    ["imatrix.chunk_count", U32, 2],
    ["imatrix.chunk_size", U32, 512],
]
IMATRIX: list[Tree] = [
    {
        "metadata": _IMATRIX,
        "tensors": [
            ["blk.0.attn_q.weight.counts", [1, 1], 0],
            ["blk.0.attn_q.weight.in_sum2", [4], 0],
            ["blk.0.ffn_up_exps.weight.counts", [1, 2], 0],
            ["blk.0.ffn_up_exps.weight.in_sum2", [2, 2], 0],
        ],
        "data": struct.pack("<f28x4f16x2f24x4f16x", 64, 1, 2, 0, 3, 32, 0, 1, 2, 0, 0),
    },
]

LOGITS: list[Tree] = [
    {"vocab": 5, "tokens": [[0, 1, 2, 3, 4, 4]], "scales": [[0.5, -3.0], [0.25, -2.0]]},
    {"vocab": 4, "tokens": [[0, 1, 2], [3, 3, 3]]},
]

PROBES: list[Tree] = [
    {"questions.hellaswag": "The sun\n1\nsets\nrises\nsings\nswims\nTwo\n3\na\nb\nc\nd\n"},
    {"questions.winogrande": '1,The cup fell as _ was full,"cup, the",table,1\n\n2,A _ b,x,y,2\n'},
    {"questions.choices": [["Why?", [["so", "no"], [0, 1]], [["a"], [0]]], ["Q", [["x", "y"], [1, 0]], []]]},
    {"questions.jsonl": [
        {"prompt": "p", "choices": ["a", "b"], "answer": 1},
        {"context": "c", "endings": ["x", "y"], "label": "0", "kind": "k"},
    ]},
]  # fmt: skip

# ── folders ──────────────────────────────────────────────────────────────────────────────────────────

_HF_SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def _hf(name: str, **more) -> Tree:
    return {"architectures": [name], "model_type": name.removesuffix("ForCausalLM").lower(), **_HF_SIZES, **more}


HF_LLAMA = _hf("LlamaForCausalLM")
CONFIG_JSON: list[Tree] = [
    _hf("LlamaForCausalLM", tie_word_embeddings=False, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }),
    _hf("MistralForCausalLM", sliding_window=16, rope_scaling={"type": "linear", "factor": 2.0}, head_dim=4),
    _hf("LlamaForCausalLM", attention_bias=True, mlp_bias=True, rope_scaling={"rope_type": "default"}),
    _hf("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    _hf("Qwen2ForCausalLM", hidden_act="silu", rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0,
        "mscale_all_dim": 0.5,
    }),
    _hf("Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True),
    _hf("SmolLM3ForCausalLM", no_rope_layers=[1]),
    _hf("Gemma2ForCausalLM", query_pre_attn_scalar=4, attn_logit_softcapping=50.0, layer_types=["sliding_attention"]),
    _hf("Gemma3ForCausalLM", sliding_window_pattern=6, rope_parameters={
        "full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4},
    }),
    {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {**_HF_SIZES, "sliding_window": 4}},
    _hf("Phi3ForCausalLM", partial_rotary_factor=0.5, original_max_position_embeddings=32, rope_scaling={
        "type": "su", "short_factor": [1.0], "long_factor": [2.0],
    }),
    {
        "architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64,
        "layer_norm_epsilon": 1e-5, "vocab_size": 10, "activation_function": "gelu_new",
    },
    _hf("LlamaForCausalLM", quantization_config={"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}),
    _hf("LlamaForCausalLM", quantization_config={"quant_method": "awq", "w_bit": 4, "version": "GEMM"}),
    _hf("LlamaForCausalLM", quantization_config={"quant_method": "fp8", "weight_block_size": [4, 4]}),
    _hf("LlamaForCausalLM", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
]  # fmt: skip

_LINEAR = [f"self_attn.{which}_proj" for which in "qkvo"] + [f"mlp.{which}_proj" for which in ("gate", "up", "down")]


def _weights(matrix, size: int = 8, kv: int = 4, vocab: int = 10, dtype: str = "F32") -> Tree:
    """The tensors of a Llama of one layer; ``matrix(name, rows)`` gives those of a linear layer."""
    tensors = {"model.embed_tokens.weight": [dtype, [vocab, size], None], "model.norm.weight": [dtype, [size], None]}
    for name in _LINEAR:
        rows = kv if name.endswith(("k_proj", "v_proj")) else size
        tensors |= matrix(f"model.layers.0.{name}", rows)
    norms = ("input_layernorm", "post_attention_layernorm")
    return tensors | {f"model.layers.0.{norm}.weight": [dtype, [size], None] for norm in norms}


def _plain(name: str, rows: int) -> Tree:
    return {f"{name}.weight": ["BF16", [rows, 8], None]}


def _gptq(name: str, rows: int) -> Tree:
    groups = np.zeros(8, np.int32).tobytes()
    return {
        f"{name}.qweight": ["I32", [1, rows], None], f"{name}.qzeros": ["I32", [1, rows // 8], None],
        f"{name}.scales": ["F16", [1, rows], None], f"{name}.g_idx": ["I32", [8], groups],
    }  # fmt: skip


def _gptq3(name: str, rows: int) -> Tree:
    return {
        f"{name}.qweight": ["I32", [3, rows], None], f"{name}.qzeros": ["I32", [1, rows * 3 // 32], None],
        f"{name}.scales": ["BF16", [1, rows], None],
    }  # fmt: skip


def _act_order(name: str, rows: int) -> Tree:
    groups = np.array([0, 1] * 4, np.int32).tobytes()
    return {
        f"{name}.qweight": ["I32", [1, rows], None], f"{name}.qzeros": ["I32", [2, rows // 8], None],
        f"{name}.scales": ["F16", [2, rows], None], f"{name}.g_idx": ["I32", [8], groups],
    }  # fmt: skip


def _awq(name: str, rows: int) -> Tree:
    return {
        f"{name}.qweight": ["I32", [8, rows // 8], None], f"{name}.qzeros": ["I32", [1, rows // 8], None],
        f"{name}.scales": ["F16", [1, rows], None],
    }  # fmt: skip


def _fp8(name: str, rows: int) -> Tree:
    return {
        f"{name}.weight": ["F8_E4M3", [rows, 8], None],
        f"{name}.weight_scale_inv": ["F32", [-(-rows // 4), 2], None],
    }


def _nf4(nested: bool):
    def parts(name: str, rows: int) -> Tree:
        w, state = f"{name}.weight", {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [rows, 64]}
        parts = {
            w: ["U8", [rows * 32, 1], None],
            f"{w}.absmax": ["U8" if nested else "F32", [rows], None],
            f"{w}.quant_map": ["F32", [16], VALUES.astype("<f4").tobytes()],
        }
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
            parts[f"{w}.nested_absmax"] = ["F32", [-(-rows // 256)], None]
            parts[f"{w}.nested_quant_map"] = ["F32", [256], SCALES.astype("<f4").tobytes()]
        packed = json.dumps(state).encode()
        return parts | {f"{w}.quant_state.bitsandbytes__nf4": ["U8", [len(packed)], packed]}

    return parts


def _quantized(method: str, **more) -> Tree:
    return {"quantization_config": {"quant_method": method, **more}}


# ── tokenizers of folders ────────────────────────────────────────────────────────────────────────────

_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_BYTE_LEVEL_JSON = {
    "added_tokens": [
        {"id": 0, "content": "<|endoftext|>", "special": True},
        {"id": 8, "content": "<|x|>", "special": False},
    ],
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_REGEX}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    },
    "post_processor": {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel"},
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<|endoftext|>"}}, {"Sequence": {"id": "A"}}],
                "pair": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|x|>"}}, {"Sequence": {"id": "B"}}],
            },
        ],
    },
    "model": {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(_BYTE_LEVEL)},
        "merges": [["a", "b"], "Ġ a", ["ab", "c"]],
        "ignore_merges": True,
    },
}
_SMOLLM_SPLITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False},
    ],
}
_FALCON_SPLITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
    ],
}
CHARACTERS_JSON = {
    "added_tokens": [{"id": 1, "content": "<s>", "special": True}],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": "first"},
    "post_processor": None,
    "model": {
        "type": "BPE",
        "byte_fallback": True,
        "vocab": {token: i for i, token in enumerate(_PIECES)},
        "merges": ["a b", "▁ a"],
    },
}
_SETTINGS = {
    "bos_token": {"content": "<|endoftext|>"},
    "eos_token": "<|endoftext|>",
    "add_bos_token": True,
    "add_prefix_space": True,
    "chat_template": [{"name": "default", "template": _TEMPLATE}, {"name": "tool_use", "template": "{{ tools }}"}],
}
SENTENCEPIECE: list[Tree] = [
    [
        *([1, [[1, piece], [2, score], [3, kind]]] for piece, score, kind in zip(_PIECES, _SCORES, _PIECE_TYPES)),
        [2, [[3, 2], [4, 10], [35, 1]]],
        [3, [[1, "identity"], [3, 1]]],
    ],
]

TOKENIZER_FOLDERS: list[Tree] = [
    {"tokenizer.json": _BYTE_LEVEL_JSON, "tokenizer_config.json": _SETTINGS, "config.json": {"vocab_size": 12}},
    {"tokenizer.json": _BYTE_LEVEL_JSON | {"pre_tokenizer": _SMOLLM_SPLITS}, "chat_template.jinja": _TEMPLATE},
    {"tokenizer.json": _BYTE_LEVEL_JSON | {"pre_tokenizer": _FALCON_SPLITS, "post_processor": {"type": "ByteLevel"}}},
    {"tokenizer.json": CHARACTERS_JSON, "config.json": {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1}},
    {
        "tokenizer.model": SENTENCEPIECE[0],
        "tokenizer_config.json": {
            "added_tokens_decoder": {"10": {"content": "<|new|>", "special": True}}, "bos_token": "<s>",
            "add_prefix_space": False,
        },
        "added_tokens.json": {"<new>": 11},
        "config.json": {"architectures": ["Phi3ForCausalLM"], "vocab_size": 14, "text_config": {"vocab_size": 13}},
    },
    {
        "tokenizer.model": SENTENCEPIECE[0],
        "tokenizer.json": CHARACTERS_JSON | {"normalizer": None, "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
        }},
        "config.json": {"architectures": ["GemmaForCausalLM"]},
    },
]  # fmt: skip


def _folder(tensors: Tree, config: Tree = None, **files: Tree) -> Tree:
    return {"config.json": config or _hf("LlamaForCausalLM"), "model.safetensors": {"tensors": tensors}, **files}


_NORMS = {"model.norm.weight", "model.layers.0.input_layernorm.weight"}
_PLAIN_WEIGHTS = _weights(_plain)
_WIDE = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "head_dim": 64}
_EXPERTS = {
    f"model.layers.0.block_sparse_moe.experts.{i}.w{j}.weight": ["F32", [8, 8], None] for i in (0, 1) for j in (1, 2, 3)
}
SAFETENSORS: list[Tree] = [
    _folder(_PLAIN_WEIGHTS, **{"README.md": "---\nlicense: mit\n---\n", "generation_config.json": {"top_k": 40}}),
    {
        "config.json": _hf("LlamaForCausalLM"),
        "model.safetensors.index.json": {
            "metadata": {"total_size": 1},
            "weight_map": {
                name: f"model-{1 + (name in _NORMS)}.safetensors" for name in _PLAIN_WEIGHTS
            },
        },
        "model-1.safetensors": {"tensors": {n: t for n, t in _PLAIN_WEIGHTS.items() if n not in _NORMS}},
        "model-2.safetensors": {"tensors": {n: t for n, t in _PLAIN_WEIGHTS.items() if n in _NORMS}},
    },
    _folder(
        {name: tensor for name, tensor in _PLAIN_WEIGHTS.items() if ".mlp." not in name} | _EXPERTS
        | {"model.layers.0.block_sparse_moe.gate.weight": ["F32", [2, 8], None]}
        | {"lm_head.weight": ["F32", [10, 8], None], "model.rotary_emb.inv_freq": ["F32", [2], None]},
        _hf("MixtralForCausalLM", num_local_experts=2, num_experts_per_tok=1),
    ),
    _folder(
        _PLAIN_WEIGHTS | {"lm_head.weight": ["F32", [10, 8], None]},
        _hf("LlamaForCausalLM", tie_word_embeddings=True),
    ),
    _folder(
        {
            "wte.weight": ["F32", [10, 8], None], "wpe.weight": ["F32", [64, 8], None],
            "ln_f.weight": ["F32", [8], None], "ln_f.bias": ["F32", [8], None],
            **{f"h.0.{name}.weight": ["F32", shape, None] for name, shape in {
                "ln_1": [8], "ln_2": [8], "attn.c_attn": [8, 24], "attn.c_proj": [8, 8], "mlp.c_fc": [8, 32],
                "mlp.c_proj": [32, 8],
            }.items()},
            **{f"h.0.{name}.bias": ["F32", [n], None] for name, n in {
                "ln_1": 8, "ln_2": 8, "attn.c_attn": 24, "attn.c_proj": 8, "mlp.c_fc": 32, "mlp.c_proj": 8,
            }.items()},
        },
        CONFIG_JSON[11],
    ),
]  # fmt: skip

PREQUANTIZED: list[Tree] = [
    _folder(
        _weights(_gptq, kv=8, dtype="F16"),
        _hf("LlamaForCausalLM", num_key_value_heads=2) | _quantized("gptq", bits=4),
    ),
    _folder(
        _weights(_gptq3, 32, 32),
        _hf("LlamaForCausalLM", hidden_size=32, intermediate_size=32, num_key_value_heads=2)
        | _quantized("gptq", bits=3),
    ),
    _folder(
        _weights(_act_order, kv=8, dtype="F16"), _hf("LlamaForCausalLM", num_key_value_heads=2),
        **{"quantize_config.json": {"bits": 4, "checkpoint_format": "gptq_v2"}},
    ),
    _folder(
        _weights(_awq, kv=8) | {"model.layers.0.self_attn.q_proj.bias": ["F32", [8], None]},
        _hf("LlamaForCausalLM", num_key_value_heads=2) | _quantized("awq", bits=4),
    ),
    _folder(_weights(_fp8), _hf("LlamaForCausalLM") | _quantized("fp8", weight_block_size=[4, 4])),
    _folder(
        _weights(_nf4(nested=True), 64, 64),
        _hf("LlamaForCausalLM", num_key_value_heads=1) | _WIDE | _quantized("bitsandbytes", load_in_4bit=True),
    ),
    _folder(_weights(_nf4(nested=False), 64, 64), _hf("LlamaForCausalLM", num_key_value_heads=1) | _WIDE),
]  # fmt: skip

# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────

_BASE = "base_model.model.model.layers.0.self_attn"
LORA: list[Tree] = [
    {
        "adapter_config.json": {"peft_type": "LORA", "lora_alpha": 16, "r": 2, "target_modules": ["q_proj"]},
        "adapter_model.safetensors": {
            "tensors": {
                f"{_BASE}.q_proj.lora_A.weight": ["F32", [2, 8], None],
                f"{_BASE}.q_proj.lora_B.weight": ["BF16", [8, 2], None],
            }
        },
    },
    {
        "adapter_config.json": {"lora_alpha": 16.0, "use_rslora": True},
        "adapter_model.safetensors": {
            "tensors": {
                f"{_BASE}.k_proj.lora_A.weight": ["F32", [1, 8], None],
                f"{_BASE}.k_proj.lora_B.weight": ["F32", [4, 1], None],
            }
        },
    },
    {
        "adapter.gguf": {
            "metadata": [
                ["general.architecture", STRING, "llama"],
                ["general.type", STRING, "adapter"],
                ["adapter.type", STRING, "lora"],
                ["adapter.lora.alpha", F32, 16.0],
            ],
            "tensors": [["blk.0.attn_q.weight.lora_a", [8, 2], 0], ["blk.0.attn_q.weight.lora_b", [2, 8], 1]],
        }
    },
]

# ── texts ────────────────────────────────────────────────────────────────────────────────────────────

TEMPLATES = [
    _TEMPLATE,
    "{%- set ns = namespace(n=0) -%}{%- for m in messages if m.role != 'system' -%}{%- set ns.n = ns.n + loop.index -%}"
    "{{ m.content.split('\n') | join(', ') }}{%- if loop.last %}{% break %}{% endif -%}{%- endfor -%}{{ ns.n }}",
    "{% macro f(x, n=2) %}{{ x * n }}{% endmacro %}{{ f('ab') ~ f(x=[1, 2]) }}{{ tools | tojson(indent=2) }}{{ (1,) }}",
    "{% if messages[0]['content'][:2] is not string %}{{ raise_exception('no ' ~ messages | length) }}{% endif %}",
    "{% generation %}{{ messages | map(attribute='role') | list | replace('a', 'b') | indent(2) }}{% endgeneration %}"
    "{{ strftime_now('%Y') | length }}{{ '%s-%s' | format('a', 2) }}{{ '{:>4}'.format('x') }}{{ [3, 1] | sort | sum }}",
    "{{ {'a': 1}.items() | list }}{{ 'a b'.strip('a').replace(' ', '_').splitlines() }}{{ 2 ** 8 % 7 // 2 - 1 / 3 }}"
    "{{ messages | groupby('role') | list | length }}{{ ', '.join(['x', 'y']) }}{{ 'x%d' % 3 }}{{ ' a ' | trim }}",
]
MESSAGES = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "<|x|> {{ a }} %s é"},
    {"role": "assistant", "content": "1", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1]}}}]},
]
CHATS: list[Tree] = [{"template.jinja": template, "messages.json": {"messages": MESSAGES}} for template in TEMPLATES]

CARDS: list[Tree] = [
    {
        "README.md": [
            "---\n", "license: apache-2.0\n", "language:\n- en\n- no\n", "base_model: org/Base-7B-v1.5\n",
            "datasets:\n- https://huggingface.co/datasets/org/data\n- {name: x, url: y}\n", "tags: [a, b]\n",
            "model_creator: 5\n", "date: 2024-01-01T00:00:00Z\n", "x: !!int 1:30\n", "y: 0x1F\n", "---\n", "# Title\n",
        ],
        "config.json": {"_name_or_path": "org/Tiny-Llama-135M-Instruct-v0.2"},
        "generation_config.json": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1},
    },
    {"README.md": "---\na: &x [1, 2]\nb: *x\nbase_model: [a/b-8x7b1-chat, 'ssh://x', 3]\nlicense_name: !!str 1\n"},
]  # fmt: skip

_SETTINGS_TO_MAKE = {
    "set": ("general.name=STRING:Owl", "b=INT8:0x10", "m=ARRAY[INT32]:[1, 2]", 'p=ARRAY[STRING]:["a"]', "g=FLOAT32:1"),
    "value": ("c=9", "i=false", "m=[1]"),
    "rename": ("r=s",),
    "remove": ("a b",),
}
ARGUMENTS: list[Tree] = [
    {"types.txt": "ffn_down=Q6_K attn_v=q8_0\nblk\\.(0|1)\\.=F16"},
    *({"file_type.txt": name} for name in ("Q4_K_M", "tq1_0", "15", "COPY")),
    {"override.txt": "llama.context_length=int:5"},
    *({"size.txt": size} for size in ("2.5MB", "500", "1G")),
    *(
        {f"{name}.txt": text, "model.gguf": {"metadata": _NUMBERS[:3] + _NUMBERS[8:9] + _ARRAYS, "tensors": []}}
        for name, texts in _SETTINGS_TO_MAKE.items()
        for text in texts
    ),
]
