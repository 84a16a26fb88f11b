"""Each architecture against transformers: its logits for a folder, from the folder and from the GGUF file made of it.

data/architectures.json holds some of transformers' logits, so that a machine without it (and torch) compares with them:
`pip install transformers torch`, then `python tests/test_architectures.py` writes them anew.
"""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import programs
from safetensors.numpy import load_file, save_file
from test_evaluate import byte_tokenizer

import qjax
from qjax import QjaxError, evaluate
from qjax.data import tales
from qjax.io import checkpoints, gguf, names
from qjax.model import quantize_file
from qjax.models import cache as caches
from qjax.models import transformer
from qjax.models.config import Config

DATA = Path(__file__).parent / "data" / "architectures.json"
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "rms_norm_eps": 2.0**-20,  # in float32 too, as GGUF has it
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
FOLDERS = {
    "llama": LLAMA,
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "llama3": LLAMA | {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "head_dim": 32},
    "llama, linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama, biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 20},
    "mistral, no window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "no_rope_layers": [1, 1, 1, 0, 1],
        "pad_token_id": 0,
    },
}
SEQ, SHOWN = 100, (0, 19, 20, 57, 99)
TOKENS = np.random.default_rng(0).integers(0, COMMON["vocab_size"], (2, SEQ)).astype(np.int32)
WINDOWED = "mistral"


def drawn(name, shape):
    """Weights of a size with which every part of a layer shows in the logits."""
    x = np.random.default_rng([*name.encode()]).standard_normal(shape).astype(np.float32)
    if name.endswith("norm.weight"):
        return 1 + x / 4
    return x / 2 if name.endswith(".bias") else x * np.float32(1.5 / shape[-1] ** 0.5)


def write(folder, name):
    """A folder as transformers writes it, and its config."""
    described = COMMON | FOLDERS[name]
    config = Config.from_hf(described)
    shapes = {names.to_hf(n): s for n, s in transformer.tensor_shapes(config).items() if n != transformer.ROPE_FACTORS}
    folder.mkdir()
    save_file({n: drawn(n, s) for n, s in shapes.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described))
    return config


def transformers_logits(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def shown(logits):
    return logits[0, SHOWN, :12]


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path):
    write(tmp_path / "hf", request.param)
    return tmp_path / "hf"


def logits(config, tensors):
    params = transformer.stack({name: tensor.load() for name, tensor in tensors.items()}, config)
    return np.asarray(transformer.forward(config, params, jnp.asarray(TOKENS)))


def test_the_folder_says_what_transformers_says(folder, request):
    checkpoint = checkpoints.read_folder(folder)
    ours = logits(checkpoint.config, checkpoint.tensors)
    stored = json.loads(DATA.read_text())[request.node.callspec.params["folder"]]
    np.testing.assert_allclose(shown(ours), stored, atol=1e-4)


def test_all_logits_are_those_of_transformers(folder):
    theirs = transformers_logits(folder)
    checkpoint = checkpoints.read_folder(folder)
    ours = logits(checkpoint.config, checkpoint.tensors)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert theirs.std() > 0.5


def test_stored_logits_differ_where_models_differ():
    """The same tokens and weights: what an architecture adds can be seen in what the test above compares."""
    stored = {name: np.array(values) for name, values in json.loads(DATA.read_text()).items()}
    assert stored.keys() == FOLDERS.keys()
    plain = stored.pop("llama")
    np.testing.assert_allclose(stored.pop("mistral, no window"), plain, atol=1e-4)
    for name, values in stored.items():
        assert np.abs(values - plain)[-1].max() > 0.05, name
    # The window is 20 long: a token sees all before it until then.
    np.testing.assert_allclose(stored[WINDOWED][:2], plain[:2], atol=1e-4)
    assert np.abs(stored[WINDOWED][2] - plain[2]).max() > 1e-3


def test_through_a_cache(folder):
    """A prompt and then one token at a time: the same as all at once."""
    checkpoint = checkpoints.read_folder(folder)
    config = checkpoint.config
    params = transformer.stack({name: tensor.load() for name, tensor in checkpoint.tensors.items()}, config)
    whole = np.asarray(transformer.forward(config, params, jnp.asarray(TOKENS)))
    cache = caches.empty(config, 2, SEQ, caches.FLOAT32)
    last, cache = transformer.step(config, params, TOKENS[:, :30], cache)
    np.testing.assert_allclose(last, whole[:, 29], atol=1e-4)
    for at in range(30, 36):
        last, cache = transformer.step(config, params, TOKENS[:, at : at + 1], cache)
        np.testing.assert_allclose(last, whole[:, at], atol=1e-4)


def test_to_gguf_and_back(folder, tmp_path, request):
    byte_tokenizer().to_folder(folder)
    path = tmp_path / "model.gguf"
    quantize_file(folder, path, "F32")
    file, model = gguf.read(path), qjax.load(path)
    checkpoint = checkpoints.read_folder(folder)
    ours = logits(checkpoint.config, checkpoint.tensors)
    windowed, config = request.node.callspec.params["folder"] == WINDOWED, checkpoint.config
    if windowed:
        # llama.cpp's llama has no window, and neither have its files.
        assert model.config.window is None
        np.testing.assert_allclose(np.asarray(model.logits(TOKENS))[:, :20], ours[:, :20], atol=1e-5)
    else:
        assert model.config == config
        np.testing.assert_array_equal(model.logits(TOKENS), ours)
    assert ("rope_freqs.weight" in file.tensors) == bool(config.rope_factors)

    model.save(tmp_path / "back")
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name])
    if not windowed:
        back = Config.from_hf(json.loads((tmp_path / "back" / "config.json").read_text()))
        assert back == config


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "smollm3"])
def test_names_are_those_of_gguf(architecture):
    peer = pytest.importorskip("gguf")
    theirs = peer.get_tensor_name_map(peer.MODEL_ARCH[architecture.upper()], 5)
    config = Config.from_hf(COMMON | FOLDERS[architecture])
    for name in transformer.tensor_shapes(config):
        assert theirs.get_name(names.to_hf(name), try_suffixes=(".weight", ".bias")) == name


def test_llama_cpp_reads_the_file_in_the_same_way(llama_cpp, folder, tmp_path):
    """Its predictions of a text, in 16 bits each, and ours."""
    byte_tokenizer().to_folder(folder)
    model, text, base = (tmp_path / name for name in ("model.gguf", "text", "base.kld"))
    quantize_file(folder, model, "F32")
    text.write_text("".join(tale.text for tale in tales.generate(0, 4))[: 3 * SEQ])
    command = [llama_cpp / "llama-perplexity", "-m", model, "-f", text, "-c", 64, "-ctk", "f32", "-ctv", "f32"]
    programs.output(*command, "-fa", "off", "--kl-divergence-base", base, last="Final estimate")
    result = evaluate.kl_divergence_from(base, qjax.load(model))
    assert abs(result.mean) < 1e-5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn.*Known: linear, llama3"),
        ("llama3", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "rope_scaling makes no sense"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "no_rope_layers.*0 for every 4th"),
        ("llama", {"no_rope_layers": [1, 0, 1, 0, 1]}, "no_rope_layers.*none"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, "unknown.*known: LlamaForCausalLM.*SmolLM3ForCausalLM"),
    ],
)
def test_what_would_be_wrong_is_refused(name, change, message):
    with pytest.raises(QjaxError, match=message):
        Config.from_hf(COMMON | FOLDERS[name] | change)


@pytest.mark.parametrize(
    ("entries", "scale"),
    [
        ({}, 1),
        ({"rope.scaling.factor": 4.0}, 1 / 4),
        ({"rope.scale_linear": 2.0}, 1 / 2),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, 1),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1),
    ],
)
def test_linear_scaling_in_gguf_is_read_as_llama_cpp_reads_it(entries, scale):
    config = Config.from_hf(COMMON | LLAMA)
    metadata = {key: value for key, (_, value) in config.to_gguf().items()}
    metadata |= {f"llama.{key}": value for key, value in entries.items()}
    assert Config.from_gguf(metadata, transformer.tensor_shapes(config)).rope_scale == scale


def test_a_window_of_nothing_is_refused():
    with pytest.raises(QjaxError, match="window is 0"):
        Config.from_hf(COMMON | FOLDERS[WINDOWED] | {"sliding_window": 0})


def test_quantized_factors_are_refused(tmp_path):
    write(tmp_path / "hf", "llama3")
    byte_tokenizer().to_folder(tmp_path / "hf")
    quantize_file(tmp_path / "hf", tmp_path / "model.gguf", "F32")
    file = gguf.read(tmp_path / "model.gguf")
    tensors = {name: tensor.load() for name, tensor in file.tensors.items()}
    tensors[transformer.ROPE_FACTORS] = qjax.quantize(jnp.ones((1, 32)), "Q8_0")
    gguf.write(tmp_path / "other.gguf", file.metadata, tensors)
    with pytest.raises(QjaxError, match=r"rope_freqs\.weight is Q8_0, expected F32"):
        qjax.load(tmp_path / "other.gguf")


def test_factors_that_config_json_cannot_say(tmp_path):
    config = Config.from_hf(COMMON | FOLDERS["llama3"])
    assert config.rope_factors[0] == 1
    assert max(config.rope_factors) == 8
    with pytest.raises(QjaxError, match=re.escape("rope_freqs.weight")):
        Config(**vars(config) | {"rope_factors": (*config.rope_factors[:-1], 7.5)}).to_hf()
    with pytest.raises(QjaxError, match="3 factors for the 16 frequencies"):
        Config(**vars(config) | {"rope_factors": (1.0, 2.0, 3.0)})


if __name__ == "__main__":
    import tempfile

    found = {}
    for name in FOLDERS:
        with tempfile.TemporaryDirectory() as where:
            write(Path(where) / "hf", name)
            found[name] = np.round(shown(transformers_logits(Path(where) / "hf")).astype(float), 6).tolist()
    DATA.write_text(json.dumps(found, indent=0).replace(",\n", ", ").replace("], [", "],\n[") + "\n")
