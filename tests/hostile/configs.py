"""Hugging Face folders whose config.json is not what it says."""

import json

from hostile.folders import CONFIG, DEEP, model
from hostile.kind import Kind

from qjax.io import checkpoints


def config(without: str = "", **changes) -> dict[str, bytes]:
    """The sound folder with other entries in config.json, or without one."""
    return model(config={key: value for key, value in (CONFIG | changes).items() if key != without})


SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
NUMBERS = ("rms_norm_eps", "rope_theta")
WRONG = ("many", [1], {"a": 1}, True)
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

BAD = {
    "none": ({"model.safetensors": b""}, "config.json: there is no such file"),
    "nothing": (model(config=b""), "config.json: not a JSON file"),
    "no JSON": (model(config=b"{'a': 1}"), "config.json: not a JSON file"),
    "no text": (model(config=b"\xff\xfe{}"), "config.json: not a JSON file"),
    "a list": (model(config=[]), "config.json: expected a JSON object, found a list"),
    "a hundred thousand deep": (lambda: model(config=DEEP), "config.json: not a JSON file"),
    "a hundred thousand deep in an entry": (
        lambda: model(config=b'{"a": ' * 10**5), "config.json: not a JSON file"
    ),
    "a number of 10,000 digits": (
        model(config=json.dumps(CONFIG).encode().replace(b'"hidden_size": 24', b'"hidden_size": ' + b"9" * 10_000)),
        "config.json: not a JSON file",
    ),
    "no architecture": (config("architectures"), "unknown architecture '.none given.'; known: "),
    "an architecture of number 3": (config(architectures=3), "architectures is 3, expected"),
    "an architecture of lists": (config(architectures=[["LlamaForCausalLM"]]), r"unknown architecture \['Llama"),
    "architectures of no name": (config(architectures=[]), "unknown architecture"),
    "another architecture": (config(architectures=["GPTJForCausalLM"]), "unknown architecture 'GPTJForCausalLM'"),
    "an architecture that steers": (config(architectures=["\x1b[2J"]), r"unknown architecture '\\x1b\[2J'"),
    "an architecture of a megabyte": (
        lambda: config(architectures=["x" * 10**6]), "unknown architecture 'xxx.*; known: "
    ),
    **{
        f"{key} {value!r}": (config(**{key: value}), f"config: {key} is .*, expected a (whole )?number")
        for key in (*SIZES, *NUMBERS)
        for value in WRONG
    },
    **{f"{key} 1.5": (config(**{key: 1.5}), f"config: {key} is 1.5, expected a whole number") for key in SIZES},
    **{
        f"no {key}": (config(key), f"there is no key '{key}'")
        for key in SIZES
        if key not in ("num_key_value_heads", "head_dim")
    },
    **{
        f"{key} -1": (config(**{key: -1}), "expected a positive number|heads do not divide")
        for key in (*SIZES, *NUMBERS)
    },
    "no heads": (config(num_attention_heads=0), "n_heads is 0, expected a positive number"),
    "no layers": (config(num_hidden_layers=0), "n_layers is 0, expected a positive number"),
    "NaN": (config(rms_norm_eps=float("nan")), "norm_eps is nan, expected a positive number"),
    "layers ∞": (config(num_hidden_layers=float("inf")), "num_hidden_layers is inf, expected a whole number"),
    "a base of NaN": (config(rope_theta=float("nan")), "rope_theta is nan, expected a positive number"),
    "layers 10^12": (config(num_hidden_layers=10**12), "layers is 10*, expected a whole number up to 1048576"),
    "layers 10^12 in a regular order": (
        config(num_hidden_layers=10**12, architectures=["SmolLM3ForCausalLM"], no_rope_layers=[1] * 3),
        "more than there are tensors|no_rope_layers is|num_hidden_layers is",
    ),
    "layers 10^12, some with a window": (
        config(
            num_hidden_layers=10**12,
            architectures=["Gemma3ForCausalLM"],
            layer_types=["full_attention", "sliding_attention"] * 3,
            sliding_window=8,
        ),
        "layer_types|num_hidden_layers is",
    ),
    "heads of 2^40 with factors": (
        config(head_dim=2**40, rope_scaling=LLAMA3), "head_dim is 1099511627776, expected"
    ),
    "heads of 2^31 with factors": (config(head_dim=2**31, rope_scaling=LLAMA3), "head_dim is 2147483648, expected"),
    "columns 2^62": (config(hidden_size=2**62), "expected .* by config.json|hidden_size is"),
    "a vocabulary of 2^62": (config(vocab_size=2**62), "expected .* by config.json|vocab_size is"),
    "a layer too few": (config(num_hidden_layers=1), "model.layers.1..* has no place in a model of 1 layers"),
    "a layer too many": (config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight .* is missing"),
    "5 KV heads": (config(num_key_value_heads=5), "6 heads do not divide among 5 KV heads"),
    "heads of 7": (config(head_dim=7), "head_dim is 7, of which 7 are turned"),
    "scaling of text": (config(rope_scaling="linear"), "rope_scaling is 'linear', expected an object"),
    "scaling of a list": (config(rope_scaling=[1]), r"rope_scaling is \[1\], expected an object"),
    "scaling by text": (config(rope_scaling=LLAMA3 | {"factor": "8"}), "factor is '8', expected a number"),
    "scaling without a factor": (
        config(rope_scaling={"rope_type": "linear"}), "there is no key 'factor'|linear.*factor"
    ),
    "scaling of another kind": (config(rope_scaling={"rope_type": ["linear"]}), "rotary embedding scaled"),
    "rope parameters of text": (config(rope_parameters="x"), "rope_parameters is 'x', expected an object"),
    "an activation of a list": (config(hidden_act=["silu"]), "hidden_act is"),
    "another activation": (config(hidden_act="relu"), "hidden_act is 'relu'"),
    "kinds of layers of number 5": (config(layer_types=5), "layer_types is 5, expected a list"),
    "a window of text": (
        config(architectures=["MistralForCausalLM"], sliding_window="x"), "sliding_window is 'x', expected a whole"
    ),
    "quantized by number 3": (config(quantization_config=3), "quantization_config is 3, expected an object"),
    "quantized by a list": (config(quantization_config={"quant_method": ["gptq"]}), "quantized by"),
    "quantized otherwise": (config(quantization_config={"quant_method": "\x1b[2J"}), r"quantized by '\\x1b\[2J'"),
}  # fmt: skip

KIND = Kind(checkpoints.read_folder, "", {"sound": config(), "with factors": config(rope_scaling=LLAMA3)}, BAD)
