"""Config, transformer, cache and generation, against float64 numpy, one another, and algebra."""

import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import sampled
from oracles import formats
from oracles import llama_numpy as oracle

import qjax
from qjax.errors import QjaxError
from qjax.models import cache as caches
from qjax.models import generate, transformer
from qjax.models.config import Config
from qjax.models.generate import GREEDY, Sampling
from qjax.tensor import QTensor

pytestmark = pytest.mark.in_haste

# Every size differs, so that no mistaken axis goes unnoticed.
SMALL = Config("llama", 3, 64, 160, 6, 2, 32, 96, 1024, 1e-5, 1e4, tied=True)
SMOLLM2 = Config("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, 1e-5, 1e5, tied=True)


def random_tensors(config, seed=0):
    """Larger weights than init draws, so that attention and logits are far from uniform."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(
            1 + 0.1 * rng.standard_normal(shape)
            if len(shape) == 1
            else rng.standard_normal(shape) * (2.0 if "attn_q" in name else 1.0) / np.sqrt(shape[1]),
            jnp.float32,
        )
        for name, shape in transformer.tensor_shapes(config).items()
    }


def random_tokens(batch, seq, vocab=SMALL.vocab):
    return np.random.default_rng(batch * seq).integers(0, vocab, (batch, seq)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return transformer.stack(random_tensors(SMALL), SMALL)


def float32_cache(batch, max_seq, config=SMALL):
    return caches.empty(config, batch, max_seq, caches.FLOAT32)


# ── config ─────────────────────────────────────────────────────────────────────────────────────────────────


def gguf_source(config):
    metadata = {key: value for key, (_, value) in config.to_gguf().items()}
    return metadata, transformer.tensor_shapes(config)


@pytest.mark.parametrize("tied", [True, False])
def test_config_round_trips(tied):
    config = replace(SMALL, tied=tied)
    assert Config.from_gguf(*gguf_source(config)) == config
    assert Config.from_hf(config.to_hf()) == config


def test_config_defaults_are_those_of_llama_cpp_and_transformers():
    metadata, shapes = gguf_source(replace(SMALL, n_kv_heads=6, head_dim=10, n_heads=6, d_model=60))
    for key in (
        "attention.key_length",
        "attention.value_length",
        "attention.head_count_kv",
        "rope.freq_base",
    ):
        del metadata[f"llama.{key}"]
    config = Config.from_gguf(metadata, shapes)
    assert (config.head_dim, config.n_kv_heads, config.rope_theta) == (10, 6, 10000.0)
    entries = SMALL.to_hf()
    for key in ("head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings"):
        del entries[key]
    config = Config.from_hf(entries | {"hidden_size": 60})
    assert (config.head_dim, config.n_kv_heads, config.rope_theta, config.tied) == (10, 6, 10000.0, False)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"general.architecture": "mamba"}, "unknown architecture 'mamba'; known: gemma2"),
        ({"llama.rope.scaling.type": "longrope"}, "rotary embedding scaled in this way .*longrope"),
        ({"llama.rope.dimension_count": 16}, "rope.dimension_count is 16, expected the head size 32"),
        ({"llama.block_count": None}, "no key 'llama.block_count'"),
        ({"llama.block_count": 0}, "n_layers is 0"),
        ({"llama.attention.head_count_kv": 4}, "6 heads do not divide among 4"),
        ({"llama.attention.head_count": 0}, "n_heads is 0"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "norm_eps is nan"),
    ],
)
def test_config_refuses_gguf(entries, message):
    metadata, shapes = gguf_source(SMALL)
    metadata = {key: value for key, value in (metadata | entries).items() if value is not None}
    with pytest.raises(QjaxError, match=message):
        Config.from_gguf(metadata, shapes)


def test_config_refuses_rope_factors():
    metadata, shapes = gguf_source(SMALL)
    with pytest.raises(QjaxError, match="rope_freqs"):
        Config.from_gguf(metadata, shapes | {"rope_freqs.weight": (16,)})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "unknown architecture 'MambaForCausalLM'; known: GPT2LM"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no key 'low_freq_factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "linear.*factor 0.0"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rotary embedding scaled .*dynamic"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_config_refuses_hf(entries, message):
    with pytest.raises(QjaxError, match=message):
        Config.from_hf(SMALL.to_hf() | entries)


# ── params ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_stack_and_unstack_are_inverses():
    tensors = random_tensors(SMALL)
    back = transformer.unstack(transformer.stack(tensors, SMALL), SMALL)
    assert list(back) == list(tensors)
    for name in tensors:
        np.testing.assert_array_equal(back[name], tensors[name])


def test_layers_of_equal_formats_are_one_run():
    config = replace(SMALL, n_layers=5)
    tensors = random_tensors(config)
    names = ["Q8_0", "Q8_0", "Q4_0", "Q8_0", "Q8_0"]
    for i, name in enumerate(names):
        tensors[f"blk.{i}.ffn_up.weight"] = qjax.quantize(tensors[f"blk.{i}.ffn_up.weight"], name)
    params = transformer.stack(tensors, config)
    assert [run["attn_norm.weight"].shape[0] for run in params.runs] == [2, 1, 2]
    back = transformer.unstack(params, config)
    for i, name in enumerate(names):
        leaf = back[f"blk.{i}.ffn_up.weight"]
        assert leaf.format.name == name
        np.testing.assert_array_equal(leaf.to_bytes(), tensors[f"blk.{i}.ffn_up.weight"].to_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.attn_k.weight"), "blk.1.attn_k.weight: .*is not there"),
        (lambda t: t.update({"blk.1.attn_k.bias": jnp.ones(3)}), "blk.1.attn_k.bias: .*no such tensor"),
        (
            lambda t: t.update({"output_norm.weight": qjax.quantize(jnp.ones(64), "Q8_0")}),
            "output_norm.weight: stored as Q8_0",
        ),
        (
            lambda t: t.update({"output_norm.weight": jnp.ones(63)}),
            r"output_norm.weight: shape \(63,\), expected",
        ),
    ],
)
def test_stack_refuses(change, message):
    tensors = random_tensors(SMALL)
    change(tensors)
    with pytest.raises(QjaxError, match=message):
        transformer.stack(tensors, SMALL)


def test_init_draws_what_it_says():
    tensors = jax.tree.map(np.asarray, transformer.init(replace(SMALL, d_ff=2048), jax.random.key(0)))
    assert {n: t.shape for n, t in tensors.items()} == transformer.tensor_shapes(replace(SMALL, d_ff=2048))
    assert abs(tensors["blk.1.ffn_up.weight"].std() - 0.02) < 1e-3
    assert abs(tensors["blk.1.ffn_down.weight"].std() - 0.02 / 6**0.5) < 1e-3
    assert not np.array_equal(tensors["blk.0.attn_q.weight"], tensors["blk.1.attn_q.weight"])
    np.testing.assert_array_equal(tensors["blk.2.ffn_norm.weight"], 1)


# ── the forward pass ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("tied", "n_kv_heads"), [(True, 1), (False, 2), (True, 6)])
def test_forward_equals_the_equations(tied, n_kv_heads):
    config = replace(SMALL, tied=tied, n_kv_heads=n_kv_heads)
    tensors, tokens = random_tensors(config), random_tokens(2, 24)
    logits = transformer.forward(config, transformer.stack(tensors, config), tokens)
    expected = [oracle.forward(config, tensors, row) for row in tokens]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_forward_in_bfloat16_is_near_float32(params):
    tokens = random_tokens(2, 24)
    exact = transformer.forward(SMALL, params, tokens)
    rounded = transformer.forward(SMALL, params, tokens, dtype=jnp.bfloat16)
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    # Eight bits of mantissa round by 2^-9 at most; 21 products in a row add up to a few times that.
    assert 2**-11 < error < 2**-5


@pytest.mark.parametrize("format", ["Q4_0", "Q8_0", "BF16"])
def test_quantized_weights_act_as_the_weights_they_stand_for(format):
    def quantized(w):
        return (
            qjax.quantize(w, format) if format == "BF16" else formats.drawn(format, *w.shape, size=w.shape[-1] ** -0.5)
        )

    tensors = {name: quantized(w) if w.ndim == 2 else w for name, w in random_tensors(SMALL).items()}
    dense = {n: qjax.dequantize(t) if isinstance(t, QTensor) else t for n, t in tensors.items()}
    tokens = random_tokens(2, 24)
    packed, plain = (transformer.forward(SMALL, transformer.stack(t, SMALL), tokens) for t in (tensors, dense))
    np.testing.assert_allclose(packed, plain, atol=1e-5)


def test_first_leaves_out_logits_and_changes_none(params):
    tokens = random_tokens(2, 24)
    whole = transformer.forward(SMALL, params, tokens)
    np.testing.assert_allclose(transformer.forward(SMALL, params, tokens, first=10), whole[:, 10:], atol=1e-5)


def test_later_tokens_change_no_earlier_logits(params):
    tokens = random_tokens(2, 24)
    changed = tokens.copy()
    changed[:, 15] = (changed[:, 15] + 1) % SMALL.vocab
    before, after = (np.asarray(transformer.forward(SMALL, params, t)) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :15], after[:, :15])
    assert np.all(np.abs(before[:, 15:] - after[:, 15:]).max(axis=-1) > 1e-3)


def test_a_batch_equals_its_sequences(params):
    tokens = random_tokens(2, 24)
    batch = transformer.forward(SMALL, params, tokens)
    for row, logits in zip(tokens, batch):
        np.testing.assert_allclose(transformer.forward(SMALL, params, row[None])[0], logits, atol=1e-5)


def test_forward_is_differentiable():
    tensors, tokens = random_tensors(SMALL), random_tokens(1, 24)
    params = transformer.stack(tensors, SMALL)

    def loss(params):
        logits = transformer.forward(SMALL, params, tokens[:, :-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1).mean()

    def oracle_loss(tensors):
        logits = oracle.forward(SMALL, tensors, tokens[0, :-1])
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.take_along_axis(logp, tokens[0, 1:, None], -1).mean()

    gradient = transformer.unstack(jax.jit(jax.grad(loss))(params), SMALL)
    for name in (
        "token_embd.weight",
        "blk.0.attn_q.weight",
        "blk.1.ffn_down.weight",
        "blk.2.attn_norm.weight",
    ):
        along = np.asarray(gradient[name], np.float64)
        h = 1e-4 / np.linalg.norm(along)
        ahead, behind = (
            oracle_loss(tensors | {name: np.asarray(tensors[name], np.float64) + sign * h * along}) for sign in (1, -1)
        )
        np.testing.assert_allclose((along**2).sum(), (ahead - behind) / (2 * h), rtol=1e-4)


# ── the cache ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pieces", [[24], [1] * 24, [11, 1, 1, 11]])
def test_steps_equal_the_forward_pass(params, pieces):
    tokens = random_tokens(2, 24)
    logits = np.asarray(transformer.forward(SMALL, params, tokens))
    cache, at = float32_cache(2, 32), 0
    for n in pieces:
        last, cache = transformer.step(SMALL, params, tokens[:, at : at + n], cache)
        at += n
        np.testing.assert_allclose(last, logits[:, at - 1], atol=1e-5)
    assert cache.length == 24


def test_padding_changes_nothing(params):
    tokens = random_tokens(2, 11)
    plain, padded = float32_cache(2, 32), float32_cache(2, 32)
    _, plain = transformer.step(SMALL, params, tokens, plain)
    junk = np.concatenate([tokens, random_tokens(2, 4)], axis=1)
    _, padded = transformer.step(SMALL, params, junk, padded, n_tokens=11)
    assert padded.length == 11
    for token in (5, 90, 2):
        token = np.array([[token], [token + 1]], np.int32)
        expected, plain = transformer.step(SMALL, params, token, plain)
        logits, padded = transformer.step(SMALL, params, token, padded)
        np.testing.assert_allclose(logits, expected, atol=1e-6)


@pytest.mark.parametrize(("name", "bits"), [("f16", 11), ("bf16", 8)])
def test_cache_types_round_by_their_precision(params, name, bits):
    tokens = random_tokens(1, 24)
    exact = np.asarray(transformer.forward(SMALL, params, tokens))[:, 23]
    for types in ({"k": name, "v": "f32"}, {"k": "f32", "v": name}):
        cache = caches.empty(SMALL, 1, 32, caches.cache_types(SMALL, **types))
        logits, _ = transformer.step(SMALL, params, tokens, cache)
        error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
        assert 2.0 ** -(bits + 5) < error < 2.0 ** -(bits - 3)


def test_step_takes_over_the_memory_of_the_cache(params):
    cache = float32_cache(1, 4096)
    compiled = transformer.step.lower(SMALL, params, np.zeros((1, 1), np.int32), cache).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    # One layer's keys and values are read out, a third of the cache; nothing as large as all keys is copied.
    assert memory.temp_size_in_bytes < cache.k.nbytes


# ── memory ─────────────────────────────────────────────────────────────────────────────────────────────────


def abstract_params(config, format_of_layer, head):
    """The shapes of a quantized model's params, without the memory."""

    def make():
        tensors = {}
        for name, shape in transformer.tensor_shapes(config).items():
            weight = jnp.zeros(shape)
            if len(shape) > 1 and "inp" not in name:
                layer = int(name.split(".")[1]) if name.startswith("blk.") else None
                weight = qjax.quantize(weight, head if layer is None else format_of_layer(layer))
            tensors[name] = weight
        return transformer.stack(tensors, config)

    return jax.eval_shape(make)


def dense_layer_nbytes(config):
    shapes = transformer.tensor_shapes(config).items()
    return 4 * sum(np.prod(shape) for name, shape in shapes if name.startswith("blk.0."))


def activation_nbytes(config, batch, rows, keys, scored):
    """Float32 activations alive at once, generously: the residual stream and its norm, q/k/v and the attended
    values, the scores and their softmax, gate, up and their product, two copies of the logits."""
    heads = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    row = 3 * config.d_model + 2 * heads + 3 * config.d_ff + 2 * config.n_heads * keys
    cached = 2 * keys * config.n_kv_heads * config.head_dim
    return 4 * batch * (rows * row + cached + 2 * scored * config.vocab)


# One format is one run of all layers; alternating formats are runs of one layer, whose loops XLA dissolves.
LAYOUTS = {"one run": lambda i: "Q4_1", "runs of one": lambda i: ("Q4_0", "Q4_1")[i % 2]}


@pytest.mark.parametrize("layout", sampled(LAYOUTS, "one run"))
def test_forward_keeps_weights_packed(layout):
    config = replace(SMOLLM2, n_layers=4)
    params = abstract_params(config, LAYOUTS[layout], "Q8_0")
    compiled = transformer.forward.lower(config, params, jnp.zeros((1, 64), jnp.int32), first=56).compile()
    bound = dense_layer_nbytes(config) + activation_nbytes(config, 1, 64, 64, 8)
    assert compiled.memory_analysis().temp_size_in_bytes < bound


@pytest.mark.parametrize("layout", sampled(LAYOUTS, "one run"))
def test_decode_loop_keeps_weights_packed(layout):
    config = replace(SMOLLM2, n_layers=4)
    params = abstract_params(config, LAYOUTS[layout], "Q8_0")

    def start():
        zeros = jnp.zeros(1, jnp.int32)
        return generate.State((caches.empty(config, 1, 256),), zeros, zeros > 0, jax.random.key(0))

    def loop(params, state):
        return generate.decode(config, params, state, 32, GREEDY, jnp.zeros(1, jnp.int32))

    compiled = jax.jit(loop, donate_argnums=1).lower(params, jax.eval_shape(start)).compile()
    bound = dense_layer_nbytes(config) + activation_nbytes(config, 1, 1, 256, 1)
    assert compiled.memory_analysis().temp_size_in_bytes < bound


def test_experts_stay_packed_and_a_step_reads_them_where_they_are():
    config = replace(SMALL, n_layers=2, d_model=256, d_ff=512, n_experts=16, n_experts_used=2)
    params = abstract_params(config, lambda i: "Q8_0", "Q8_0")
    dense = 4 * 3 * 16 * 512 * 256  # a layer's
    forward = transformer.forward.lower(config, params, jnp.zeros((1, 64), jnp.int32), first=63).compile()
    assert forward.memory_analysis().temp_size_in_bytes < dense / 2
    cache = jax.eval_shape(lambda: caches.empty(config, 1, 16))
    step = transformer.step.lower(config, params, jnp.zeros((1, 1), jnp.int32), cache).compile()
    packed = dense * 34 / 128
    assert step.memory_analysis().temp_size_in_bytes < packed / 2


# ── sampling ───────────────────────────────────────────────────────────────────────────────────────────────


def naive_distribution(logits, temperature, top_k, top_p, min_p):
    """Each stage as a list comprehension over (logit, id), in llama.cpp's order; float64."""

    def probabilities(kept, t=1.0):
        e = np.exp([(logit - kept[0][0]) / t for logit, _ in kept])
        return e / e.sum()

    kept = sorted(((float(x), i) for i, x in enumerate(logits)), key=lambda pair: (-pair[0], pair[1]))
    kept = kept[: top_k or len(kept)]
    p = probabilities(kept)
    kept = [c for j, c in enumerate(kept) if j == 0 or p[:j].sum() < top_p]
    p = probabilities(kept)
    kept = [c for c, q in zip(kept, p) if q >= min_p * p[0]]
    out = np.zeros(len(logits))
    if temperature == 0:
        out[kept[0][1]] = 1
    else:
        for (_, i), q in zip(kept, probabilities(kept, temperature)):
            out[i] = q
    return out


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    Sampling(temperature=0.5, top_k=5, top_p=1.0, min_p=0.0),
    Sampling(temperature=1.5, top_k=0, top_p=0.7, min_p=0.0),
    Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.2),
    Sampling(temperature=2.0, top_k=20, top_p=0.9, min_p=0.1),
    Sampling(temperature=1.0, top_k=0, top_p=0.0, min_p=0.0),
    Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=1.0),
    Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0),
    GREEDY,
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_candidates_against_the_naive_stages(sampling):
    logits = np.random.default_rng(1).normal(0, 2, (3, 50)).astype(np.float32)
    logits[2, 10] = logits[2, 20] = logits[2].max() + 1
    ids, p = map(np.asarray, jax.jit(generate.candidates)(logits, sampling))
    settings = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    for row, row_ids, row_p in zip(logits, ids, p):
        got = np.zeros(50)
        got[row_ids] = row_p
        np.testing.assert_allclose(got, naive_distribution(row, *settings), atol=1e-6)


def test_samples_follow_the_probabilities():
    logits = np.random.default_rng(1).normal(0, 2, 50).astype(np.float32)
    n, settings = 40_000, (1.3, 20, 0.9, 0.02)
    sampling = Sampling(settings[0], settings[1], settings[2], settings[3])
    drawn = generate.sample(jax.random.key(0), jnp.broadcast_to(jnp.asarray(logits), (n, 50)), sampling)
    counts, expected = np.bincount(drawn, minlength=50), n * naive_distribution(logits, *settings)
    assert np.all(counts[expected == 0] == 0)
    expected, counts = expected[expected > 0], counts[expected > 0]
    chi2, freedom = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


# ── the stream ─────────────────────────────────────────────────────────────────────────────────────────────


def stream(params, prompt, **options):
    """The chunks; with two stop tokens, though no real ones, so that most tests run one program."""
    options = {"sampling": GREEDY, "types": caches.FLOAT32, "stop_ids": [SMALL.vocab] * 2} | options
    return list(generate.stream(SMALL, params, prompt, **options))


def run(params, prompt, **options):
    """All tokens and the finish reason; checks that only the last chunk has one."""
    chunks = stream(params, prompt, **options)
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    return [token for chunk in chunks for token in chunk.tokens], chunks[-1].finish_reason


@pytest.fixture(scope="module")
def greedy(params):
    """Prompt, and the 40 tokens that the forward pass, repeated on the growing text, finds most likely."""
    prompt = random_tokens(1, 20)[0].tolist()
    text = np.zeros((1, 64), np.int32)
    text[0, :20] = prompt
    for n in range(20, 60):
        text[0, n] = np.asarray(transformer.forward(SMALL, params, text))[0, n - 1].argmax()
    return prompt, text[0, 20:60].tolist()


def test_greedy_text_is_that_of_the_forward_pass(params, greedy):
    prompt, expected = greedy
    assert len(set(expected)) > 3
    assert run(params, prompt, max_tokens=40) == (expected, "length")


def test_the_first_token_comes_alone_and_chunks_grow(params, greedy):
    chunks = stream(params, greedy[0], max_tokens=40)
    assert [len(chunk.tokens) for chunk in chunks] == [1, 2, 4, 8, 16, 9]


@pytest.mark.parametrize("at", [0, 1, 6])
def test_a_stop_token_ends_the_text_and_is_left_out(params, greedy, at):
    prompt, expected = greedy
    at = expected.index(expected[at])
    assert run(params, prompt, max_tokens=40, stop_ids=[SMALL.vocab - 1, expected[at]]) == (
        expected[:at],
        "stop",
    )


@pytest.mark.parametrize("max_tokens", [None, 13, 500])
def test_a_full_context_ends_the_text(params, greedy, max_tokens):
    prompt, expected = greedy
    assert run(params, prompt, n_ctx=32, max_tokens=max_tokens) == (expected[:12], "context")


def test_no_tokens_wanted(params, greedy):
    assert run(params, greedy[0], max_tokens=0) == ([], "length")


def test_a_prompt_longer_than_a_bucket(params):
    prompt = random_tokens(1, 700)[0].tolist()
    logits = transformer.forward(SMALL, params, np.array([prompt]), first=699)
    assert run(params, prompt, max_tokens=1) == ([int(logits.argmax())], "length")


def test_the_seed_decides_the_text(params, greedy):
    hot = Sampling(temperature=2.0, top_p=1.0, min_p=0.0)
    texts = [run(params, greedy[0], max_tokens=40, sampling=hot, seed=seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_numbers_and_lengths_do_not_recompile(params, greedy):
    run(params, greedy[0], max_tokens=40, sampling=Sampling(temperature=0.7))
    before = generate.prefill.__wrapped__._cache_size(), generate.decode.__wrapped__._cache_size()
    for length, sampling in ((18, Sampling(temperature=1.1)), (20, Sampling(top_p=0.5, min_p=0.3))):
        run(params, greedy[0][:length], max_tokens=19 + length, sampling=sampling, seed=length)
    assert (generate.prefill.__wrapped__._cache_size(), generate.decode.__wrapped__._cache_size()) == before


def test_a_batch_decodes_each_sequence_on_its_own(params, greedy):
    """One sequence meets its stop token early and keeps it; the other goes on undisturbed."""
    other = random_tokens(1, 21)[0, 1:].tolist()
    texts = [greedy[1][:21], run(params, other, max_tokens=21)[0]]
    stop = next(token for token in texts[0][1:] if token not in texts[1] and token != texts[0][0])
    state = generate.prefill(
        SMALL, params, np.array([greedy[0], other], np.int32), 20, (float32_cache(2, 64),), jax.random.key(0),
        GREEDY, np.array([stop], np.int32),
    )  # fmt: skip
    first = np.asarray(state.tokens)
    out, n, state = generate.decode(SMALL, params, state, 20, GREEDY, np.array([stop], np.int32))
    assert n == 20
    got = np.concatenate([first[:, None], out[:, :20]], axis=1)
    at = texts[0].index(stop)
    np.testing.assert_array_equal(got[0], texts[0][:at] + [stop] * (21 - at))
    np.testing.assert_array_equal(got[1], texts[1])
    assert state.done.tolist() == [True, False]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        (range(32), {"n_ctx": 32}, "32 tokens leave no room in a context of 32"),
        ([3, 96], {}, "token ids 3 to 96, expected 0 to 95"),
        ([-1], {}, "token ids -1"),
        ([1], {"max_tokens": -1}, "max_tokens is -1"),
        ([1], {"sampling": Sampling(temperature=-1.0)}, "temperature is -1"),
        ([1], {"sampling": Sampling(temperature=float("nan"))}, "temperature is nan"),
        ([1], {"sampling": Sampling(top_p=1.5)}, "top_p is 1.5"),
        ([1], {"sampling": Sampling(min_p=-0.1)}, "min_p is -0.1"),
        ([1], {"sampling": Sampling(top_k=-1)}, "top_k is -1"),
    ],
)
def test_stream_refuses(params, prompt, options, message):
    with pytest.raises(QjaxError, match=message):
        next(generate.stream(SMALL, params, prompt, **options))


def test_layers_are_let_go_while_they_are_stacked():
    """Together they would be in memory twice.  The first one's shapes and the last one's values are still in use."""
    seen = []

    def layers():
        for i in range(8):
            layer = {"codes": jnp.full((3, 5), i, jnp.uint16), "scale": jnp.full(5, i, jnp.float16)}
            seen.append(weakref.ref(layer["codes"]))
            assert sum(ref() is not None for ref in seen) <= 3
            yield layer
            del layer

    stacked = transformer._stack(layers(), 8)
    np.testing.assert_array_equal(stacked["codes"], np.broadcast_to(np.arange(8)[:, None, None], (8, 3, 5)))
    np.testing.assert_array_equal(stacked["scale"], np.broadcast_to(np.arange(8)[:, None], (8, 5)))
    assert (stacked["codes"].dtype, stacked["scale"].dtype) == (jnp.uint16, jnp.float16)
