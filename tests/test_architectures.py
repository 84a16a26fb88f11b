"""Each architecture against transformers: its logits for a folder, from the folder and from the GGUF file made of it.

data/architectures.json holds some of transformers' logits, so that a machine without it (and torch) compares with them:
`pip install transformers torch`, then `python tests/test_architectures.py` writes them anew.
"""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import sampled
from oracles import programs
from safetensors.numpy import load_file, save_file
from test_evaluate import byte_tokenizer

import qjax
from qjax import QjaxError, evaluate
from qjax.data import tales
from qjax.io import checkpoint_write, checkpoints, gguf, imatrix, names
from qjax.io import logits as predictions
from qjax.models import cache as caches
from qjax.models import generate, transformer
from qjax.models.config import FACTORS, ROPE_FACTORS, Config
from qjax.ops import mlp
from qjax.quantize_file import quantize_file

pytestmark = pytest.mark.in_haste

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
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
GEMMA = {"sliding_window": 20, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
GEMMA |= {"hidden_activation": "gelu_pytorch_tanh"}
PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "partial_rotary_factor": 0.75}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 2, 4, 8, 16, 30.5],
}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
QWEN3MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
FOLDERS = {
    "llama": LLAMA,
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "llama3": LLAMA | {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "head_dim": 32},
    "llama, linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama, yarn": LLAMA | {"rope_scaling": YARN},
    "llama, biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 20},
    "mistral, no window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "gemma2": GEMMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": GEMMA | GEMMA3 | {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3, short": GEMMA | GEMMA3 | {"sliding_window_pattern": 3},
    "gemma3, wide": GEMMA | GEMMA3 | {"query_pre_attn_scalar": 24},
    "phi3": PHI3 | {"sliding_window": 20},
    "phi3, long": PHI3 | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 48},
    "phi3, short": PHI3
    | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 512, "max_position_embeddings": 1024},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None} | MOE,
    "qwen3moe": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"} | QWEN3MOE,
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 5,
        "n_head": 4,
        "n_positions": 256,
        "n_inner": None,
        "layer_norm_epsilon": 2.0**-20,
        "tie_word_embeddings": True,
    },
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
# llama.cpp goes by the number of layers, or has no window (phi3.cpp).
UNSAID = ("gemma3, wide", "phi3")


def drawn(name, shape, less_one=False):
    """Weights of a size with which every part of a layer shows in the logits."""
    x = np.random.default_rng([*name.encode()]).standard_normal(shape).astype(np.float32)
    if name.endswith("norm.weight"):
        # Of few bits, so that nothing is lost when 1 is added.
        return np.round(256 * x) / 1024 if less_one else 1 + x / 4
    return x / 2 if name.endswith(".bias") else x * np.float32(1.5 / shape[-1] ** 0.5)


def hf_shapes(config):
    """The tensors of a folder, as they lie there."""
    shapes = {}
    for name, shape in transformer.tensor_shapes(config).items():
        if name in config.factors:
            continue
        if len(shape) == 3:
            shapes |= {names.to_hf(name, config, i): shape[1:] for i in range(shape[0])}
        else:
            shapes[names.to_hf(name, config)] = names.layout(name, config).shape(shape)
    return shapes


def write(folder, name):
    """A folder as transformers writes it, and its config."""
    described = COMMON | FOLDERS[name]
    config = Config.from_hf(described)
    shapes = hf_shapes(config)
    folder.mkdir()
    less_one = config.traits.norms_less_one
    save_file({n: drawn(n, s, less_one) for n, s in shapes.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described))
    return config


def transformers_model(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def transformers_logits(folder):
    model = transformers_model(folder)
    import torch

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


def test_folders_that_transformers_writes(folder, tmp_path):
    """With the config.json of its newest version; and it reads what is written here."""
    model = transformers_model(folder)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (checkpoints.read_folder(where) for where in (folder, tmp_path / "theirs"))
    assert theirs.config == ours.config
    assert theirs.tensors.keys() == ours.tensors.keys()
    for name, tensor in ours.tensors.items():
        np.testing.assert_array_equal(theirs.tensors[name].load(), tensor.load(), err_msg=name)

    tensors = {name: tensor.load() for name, tensor in ours.tensors.items()}
    checkpoint_write.write_folder(tmp_path / "ours", ours.config, tensors)
    described = json.loads((tmp_path / "ours" / "config.json").read_text())
    # Which some have by default, though in a vocabulary as small as this it would be none.
    (tmp_path / "ours" / "config.json").write_text(json.dumps(described | {"pad_token_id": 0}))
    np.testing.assert_allclose(transformers_logits(tmp_path / "ours"), transformers_logits(folder), atol=1e-5)


@pytest.mark.parametrize("before", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_one_that_also_sees(tmp_path, before):
    config = write(tmp_path / "text", "gemma3")
    described = json.loads((tmp_path / "text" / "config.json").read_text())
    weights = load_file(tmp_path / "text" / "model.safetensors")
    (tmp_path / "both").mkdir()
    renamed = {before + name.removeprefix("model."): x for name, x in weights.items()}
    renamed["model.vision_tower.patch.weight"] = np.ones(3, np.float32)
    save_file(renamed, tmp_path / "both" / "model.safetensors")
    described = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": described, "vision_config": {}}
    (tmp_path / "both" / "config.json").write_text(json.dumps(described))
    checkpoint = checkpoints.read_folder(tmp_path / "both")
    assert checkpoint.config == config
    for name, tensor in checkpoints.read_folder(tmp_path / "text").tensors.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].load(), tensor.load())


def test_what_gemma3s_config_leaves_out():
    said = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    said |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = Config.from_hf({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": said})
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.vocab, config.n_ctx) == (
        8,
        4,
        256,
        262208,
        131072,
    )
    assert (config.rope_theta, config.local_theta, config.rope_scale, config.attn_scalar) == (1e6, 1e4, 1 / 8, None)
    assert [i for i in range(34) if not config.sliding[i]] == [5, 11, 17, 23, 29]


@pytest.mark.parametrize(("architecture", "n_layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_divide_scores_by_something_else(architecture, n_layers):
    """llama.cpp knows them by the number of their layers (gemma2.cpp, gemma3.cpp)."""
    config = Config.from_hf(COMMON | FOLDERS[architecture] | {"num_hidden_layers": n_layers, "hidden_size": 96})
    scalars = {24: 0, 16: 1}  # d_model / n_heads, which llama.cpp takes for granted, and head_dim
    for scalar, said in scalars.items():
        config = Config(**vars(config) | {"attn_scalar": None if scalar == 16 else scalar})
        metadata = {key: value for key, (_, value) in config.to_gguf().items()}
        assert (f"{architecture}.attention.scale" in metadata) == said
        assert Config.from_gguf(metadata, transformer.tensor_shapes(config)) == config


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


@pytest.mark.parametrize(
    "folder",
    sampled([name for name in FOLDERS if "," not in name], "llama", "gemma3", "phi3", "mixtral", "gpt2"),
    indirect=True,
)
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


@pytest.mark.parametrize(
    "folder", sampled(FOLDERS, "llama", "llama, yarn", "gemma3", "phi3, long", "qwen3moe", "gpt2"), indirect=True
)
def test_to_gguf_and_back(folder, tmp_path, request):
    byte_tokenizer().to_folder(folder)
    path = tmp_path / "model.gguf"
    quantize_file(folder, path, "F32")
    file, model = gguf.read(path), qjax.load(path)
    checkpoint = checkpoints.read_folder(folder)
    ours = logits(checkpoint.config, checkpoint.tensors)
    config = checkpoint.config
    windowed = request.node.callspec.params["folder"] == WINDOWED
    if windowed:
        # llama.cpp's llama has no window, and neither have its files.
        assert model.config.window is None
        np.testing.assert_allclose(np.asarray(model.logits(TOKENS))[:, :20], ours[:, :20], atol=1e-5)
    else:
        assert model.config == config
        np.testing.assert_array_equal(model.logits(TOKENS), ours)
    assert {*config.factors} == {*file.tensors} & {*FACTORS}

    model.save(tmp_path / "back")
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name])
    if not windowed:
        back = Config.from_hf(json.loads((tmp_path / "back" / "config.json").read_text()))
        assert back == config


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "smollm3", "gemma2", "gemma3", "phi3", "qwen3moe", "gpt2"])
def test_names_are_those_of_gguf(architecture):
    peer = pytest.importorskip("gguf")
    theirs = peer.get_tensor_name_map(peer.MODEL_ARCH[architecture.upper()], 5)
    config = Config.from_hf(COMMON | FOLDERS[architecture])
    for name in transformer.tensor_shapes(config):
        # Of experts gguf-py knows the name that its converter makes up for all of them.
        theirs_name = names.to_hf(name, config).replace("experts.*.", "experts.")
        assert theirs.get_name(theirs_name, try_suffixes=(".weight", ".bias")) == name


def looked_up_gelu(x):
    """As llama.cpp has it on a CPU: in a table, of float16 and for float16 (ggml-cpu/vec.h, GGML_GELU_FP16)."""
    y = jax.nn.gelu(x.astype(jnp.float16).astype(jnp.float32)).astype(jnp.float16).astype(jnp.float32)
    return jnp.where(jnp.abs(x) < 10, y, jnp.maximum(x, 0))


@pytest.fixture
def gelu_of_llama_cpp(monkeypatch):
    jax.clear_caches()
    monkeypatch.setitem(mlp.ACTIVATIONS, "gelu", looked_up_gelu)
    yield
    jax.clear_caches()


def test_llama_cpp_reads_the_file_in_the_same_way(llama_cpp, folder, tmp_path, request, gelu_of_llama_cpp):
    """Its predictions of a text and ours: log-probabilities within 1e-3, and half a step of the 16 bits that its file
    has for each."""
    if request.node.callspec.params["folder"] in UNSAID:
        pytest.skip("llama.cpp has no word for this")
    byte_tokenizer().to_folder(folder)
    model, text, base = (tmp_path / name for name in ("model.gguf", "text", "base.kld"))
    quantize_file(folder, model, "F32")
    text.write_text(TEXT)
    command = [llama_cpp / "llama-perplexity", "-m", model, "-f", text, "-c", 64, "-ctk", "f32", "-ctv", "f32"]
    programs.output(*command, "-fa", "off", "--kl-divergence-base", base, last="Final estimate")
    ours = qjax.load(model)
    windows = evaluate.cut(ours, TEXT, 64, None)
    theirs = predictions.read(base).of(windows)(windows[:, :-1], 32)
    differ = jax.nn.log_softmax(ours.logits(windows[:, :-1])[:, 32:]) - theirs.decode()
    bound = 1e-3 + theirs.scale[..., None] / 2
    assert (np.abs(np.where(theirs.codes > 0, differ, 0)) <= bound).all()
    assert abs(evaluate.kl_divergence_from(base, ours).mean) < 1e-5


# ── experts ──────────────────────────────────────────────────────────────────────────────────────────

TEXT = "".join(tale.text for tale in tales.generate(0, 4))[: 3 * SEQ]
WITH_EXPERTS = ("mixtral", pytest.param("qwen3moe", marks=pytest.mark.exact))


@pytest.fixture(scope="module", params=WITH_EXPERTS)
def experts(request, tmp_path_factory):
    """A GGUF file of a model with experts."""
    where = tmp_path_factory.mktemp("experts")
    write(where / "hf", request.param)
    byte_tokenizer().to_folder(where / "hf")
    quantize_file(where / "hf", where / "model.gguf", "F32")
    return where / "model.gguf"


def test_packed_experts(experts, tmp_path):
    """A model in Q8_0, one in which its weights are decoded, and as it generates: laid out, activations rounded."""
    qjax.load(experts).quantize("Q8_0").save(tmp_path / "packed.gguf")
    packed = qjax.load(tmp_path / "packed.gguf")
    assert packed.tensors["blk.0.ffn_up_exps.weight"].format.name == "Q8_0"
    config = packed.config
    dense = {n: qjax.dequantize(w) if isinstance(w, qjax.QTensor) else w for n, w in packed.tensors.items()}
    expected = np.asarray(transformer.forward(config, transformer.stack(dense, config), jnp.asarray(TOKENS)))
    np.testing.assert_allclose(packed.logits(TOKENS), expected, atol=1e-4)

    def step(params, tokens, cache, at):
        logits, cache = transformer.step(config, params, tokens, cache)
        return np.linalg.norm(logits - expected[:1, at]) / np.linalg.norm(expected[:1, at]), cache

    # In blocks of few rows, and one token at a time, activations are rounded to 8 bits.
    laid_out = qjax.load(tmp_path / "packed.gguf", only_generate=True).params
    for params, most in ((packed.params, 1e-5), (laid_out, 0.1)):
        error, cache = step(params, TOKENS[:1, :20], caches.empty(config, 1, 32, caches.FLOAT32), 19)
        assert error < most
        for at in range(20, 23):
            error, cache = step(params, TOKENS[:1, at : at + 1], cache, at)
            assert error < most


def test_what_experts_see(experts):
    """Every token is seen by so many experts as it uses, and by the router once."""
    model = qjax.load(experts)
    found, _ = evaluate.imatrix(model, TEXT, 64, 3)
    config = model.config
    assert found.entries.keys() == {n for n, s in transformer.tensor_shapes(config).items() if n[:3] == "blk" and s[1:]}
    for i in range(config.n_layers):
        gate, up, down, router = (
            found.entries[f"blk.{i}.ffn_{name}.weight"] for name in ("gate_exps", "up_exps", "down_exps", "gate_inp")
        )
        assert gate.counts.sum() == config.n_experts_used * router.counts[0] == config.n_experts_used * 3 * 64
        assert (gate.counts == up.counts).all()
        assert (gate.counts == down.counts).all()
        np.testing.assert_allclose(gate.sums.sum(axis=0), config.n_experts_used * router.sums[0], rtol=1e-5)
        assert ((down.sums > 0).any(axis=1) == (down.counts > 0)).all()


def test_experts_see_what_llama_imatrix_says(llama_cpp, experts, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    command = [llama_cpp / "llama-imatrix", "-m", experts, "-f", tmp_path / "text", "-ctk", "f32", "-ctv", "f32"]
    programs.output(*command, "-fa", "off", "-c", 64, "--chunks", 3, "-o", tmp_path / "theirs.gguf")
    theirs = imatrix.read(tmp_path / "theirs.gguf")
    ours, _ = evaluate.imatrix(qjax.load(experts), TEXT, 64, 3)
    assert ours.entries.keys() == theirs.entries.keys()
    for name in theirs.entries:
        np.testing.assert_array_equal(ours.entries[name].counts, theirs.entries[name].counts, err_msg=name)
        np.testing.assert_allclose(ours.importance(name), theirs.importance(name), rtol=1e-3, err_msg=name)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────


def test_learned_positions_have_an_end(tmp_path):
    config = write(tmp_path / "hf", "gpt2")
    checkpoint = checkpoints.read_folder(tmp_path / "hf")
    params = transformer.stack({name: tensor.load() for name, tensor in checkpoint.tensors.items()}, config)
    with pytest.raises(QjaxError, match="a text of 257, but the model has no more than 256 positions"):
        transformer.forward(config, params, jnp.zeros((1, 257), jnp.int32))
    with pytest.raises(QjaxError, match="n_ctx is 300, but the model has no more than 256 positions"):
        next(generate.stream(config, params, [1], n_ctx=300))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(EXPERT), "experts.*w2.weight are 3 tensors, expected those of the 4 experts"),
        (lambda weights: weights.update({EXPERT: np.zeros((64, 95), np.float32)}), "w2.weight differ in shape"),
        (lambda weights: weights.update({EXPERT.replace("2", "4", 1): weights.pop(EXPERT)}), "are 4 tensors"),
    ],
)
def test_experts_that_do_not_fit(tmp_path, change, message):
    write(tmp_path / "hf", "mixtral")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(QjaxError, match=message):
        checkpoints.read_folder(tmp_path / "hf")


EXPERT = "model.layers.0.block_sparse_moe.experts.2.w2.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama3", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic.*Known: linear, llama3, yarn"),
        ("llama", {"rope_scaling": YARN | {"truncate": False}}, "yarn, truncate"),
        ("llama", {"rope_scaling": YARN | {"beta_fast": -1}}, "beta_fast=-1.*makes no sense"),
        ("llama", {"rope_scaling": YARN, "rope_theta": 1.0}, "makes no sense with rope_theta 1.0"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False; only True"),
        ("qwen3moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3moe", {"num_experts_per_tok": 9}, "9 of 8 experts"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"]}, "fsfsf"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("phi3", {"partial_rotary_factor": 0.7}, "11 are turned"),
        ("phi3, long", {"rope_scaling": LONGROPE | {"long_factor": None}}, "long_factor None"),
        ("llama3", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "rope_scaling makes no sense"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "no_rope_layers.*0 for every 4th"),
        ("llama", {"no_rope_layers": [1, 0, 1, 0, 1]}, "no_rope_layers.*none"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"architectures": ["GPTJForCausalLM"]}, "unknown.*known: GPT2LMHeadModel.*SmolLM3ForCausalLM"),
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


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("llama, yarn", {"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier 0.1"),
        ("llama, yarn", {"rope.scaling.factor": float("nan")}, "makes no sense"),
        ("gemma3", {"attention.scale": 0.0}, "attention.scale is 0.0"),
        ("gemma2", {"attention.sliding_window_pattern": [True, False, False, True, True]}, "sffss"),
        ("mixtral", {"expert_used_count": 5}, "5 of 4 experts"),
        ("qwen3moe", {"expert_count": 0, "expert_used_count": 0}, "qwen3moe with 0 experts"),
        ("gemma2", {"expert_count": 4, "expert_used_count": 2}, "gemma2 with 4 experts"),
        ("phi3", {"rope.dimension_count": 18}, "18 are turned"),
    ],
)
def test_gguf_files_that_make_no_sense(name, entries, message):
    config = Config.from_hf(COMMON | FOLDERS[name])
    metadata = {key: value for key, (_, value) in config.to_gguf().items()}
    metadata |= {f"{config.architecture}.{key}": value for key, value in entries.items()}
    with pytest.raises(QjaxError, match=message):
        Config.from_gguf(metadata, transformer.tensor_shapes(config), config.factors)


def test_a_window_of_nothing_is_refused():
    with pytest.raises(QjaxError, match="window is 0"):
        Config.from_hf(COMMON | FOLDERS[WINDOWED] | {"sliding_window": 0})


def test_quantized_factors_are_refused(tmp_path):
    write(tmp_path / "hf", "llama3")
    byte_tokenizer().to_folder(tmp_path / "hf")
    quantize_file(tmp_path / "hf", tmp_path / "model.gguf", "F32")
    file = gguf.read(tmp_path / "model.gguf")
    tensors = {name: tensor.load() for name, tensor in file.tensors.items()}
    tensors[ROPE_FACTORS] = qjax.quantize(jnp.ones((1, 32)), "Q8_0")
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
