"""Cache types: against gguf's quantizers in a float64 forward pass, one another, and algebra."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from conftest import sampled
from oracles import ggml
from oracles import llama_numpy as oracle
from test_models import random_tensors, random_tokens

import qjax
from qjax.errors import QjaxError
from qjax.models import cache as caches
from qjax.models import generate, transformer
from qjax.models.cache import CacheType, CacheTypes, cache_types
from qjax.models.config import Config
from qjax.models.generate import GREEDY

pytestmark = pytest.mark.in_haste

SMALL = Config("llama", 2, 48, 64, 4, 2, 64, 96, 1024, 1e-5, 1e4, tied=True)
QUANTIZED = [name for name in caches.TYPES if name not in ("f32", "f16", "bf16")]


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(SMALL)


@pytest.fixture(scope="module")
def params(tensors):
    return transformer.stack(tensors, SMALL)


# ── which types, and where they rotate ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("head_dim", "k", "v", "rotations"),
    [
        # llama-kv-cache.cpp: 64 must divide the head; keys then take the largest power of two, values always 64.
        (64, "q8_0", "q4_0", (64, 64)),
        (128, "q8_0", "q8_0", (128, 64)),
        (192, "iq4_nl", "q5_1", (64, 64)),
        (256, "q4_1", "q5_0", (256, 64)),
        (96, "q8_0", "q8_0", (1, 1)),
        (32, "q8_0", "q8_0", (1, 1)),
        (128, "q8_0", "f16", (128, 1)),
        (128, "f32", "q8_0", (1, 64)),
        (128, "bf16", "f16", (1, 1)),
    ],
)
def test_rotation_is_where_llama_cpp_has_it(head_dim, k, v, rotations):
    config = replace(SMALL, head_dim=head_dim)
    types = cache_types(config, k, v)
    assert (types.k.n_rot, types.v.n_rot) == rotations
    assert (types.k.name, types.v.name) == (k, v)
    assert cache_types(config, k.upper(), v.title()) == types
    plain = cache_types(config, k, v, rotate=False)
    assert (plain.k.n_rot, plain.v.n_rot) == (1, 1)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"k": "q9"}, "cache_k is 'q9', expected one of f32, f16, bf16, q8_0, .*iq4_nl"),
        ({"v": "q4_k"}, "cache_v is 'q4_k', expected one of"),
        ({"v": "q8_0"}, "cache_v is q8_0, whose blocks of 32 do not divide the model's head size of 48. Use f32"),
    ],
)
def test_refused_types(types, message):
    with pytest.raises(QjaxError, match=message):
        cache_types(replace(SMALL, head_dim=48), **types)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotation_alone_changes_no_logits(head_dim):
    config = replace(SMALL, head_dim=head_dim)
    tensors = random_tensors(config)
    rotated = cache_types(config, "q8_0", "q8_0")
    types = CacheTypes(*(CacheType(qjax.formats.get("F32"), t.n_rot) for t in rotated))
    assert types.k.n_rot >= types.v.n_rot == 64
    logits = transformer.forward(config, transformer.stack(tensors, config), TOKENS, types=types)
    np.testing.assert_allclose(logits, [oracle.forward(config, tensors, row) for row in TOKENS], atol=1e-5)


# ── what is held ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", caches.TYPES)
def test_the_cache_takes_what_its_formats_say(k):
    cache = caches.empty(SMALL, 3, 128, cache_types(SMALL, k, "q5_1"))
    n = SMALL.n_layers * 3 * SMALL.n_kv_heads * 128 * SMALL.head_dim
    bpw = {
        "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5, "iq4_nl": 4.5,
    }  # fmt: skip
    assert cache.k.nbytes == n * bpw[k] / 8
    assert cache.nbytes == n * (bpw[k] + 6) / 8 == sum(leaf.nbytes for leaf in jax.tree.leaves((cache.k, cache.v)))
    assert cache.max_seq == 128


def rounded(name, n_rot):
    """What llama.cpp's cache makes of a key or value, in numpy: rotated, quantized, and all undone."""
    h = scipy.linalg.hadamard(n_rot) / n_rot**0.5
    round_trip = {
        "f32": lambda x: x,
        "f16": lambda x: x.astype(np.float16).astype(np.float64),
        "bf16": lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64),
    }.get(name, lambda x: ggml.dequantize(name.upper(), ggml.PEERS["gguf"](name.upper(), x.astype(np.float32))))

    def held(x):
        turned = x.reshape(-1, n_rot) @ h
        return (round_trip(turned.reshape(1, -1)).reshape(-1, n_rot) @ h).ravel()

    return held


def effect(logits, exact):
    """How far apart two sets of logits are.  Sums in another order move a few numbers across a rounding boundary,
    which is a small part of what the rounding itself does."""
    return np.linalg.norm(np.asarray(logits, np.float64) - exact)


def forward(params, tokens, types):
    """Of one shape in all tests, so that each type is compiled once."""
    assert tokens.shape == (2, 32)
    return transformer.forward(SMALL, params, tokens, types=types)


TOKENS = random_tokens(2, 32, SMALL.vocab)
PAIRS = [*zip(caches.TYPES, caches.TYPES), ("q8_0", "iq4_nl"), ("f16", "q4_0"), ("q4_0", "f32")]
EACH_PAIR = pytest.mark.parametrize("pair", PAIRS, ids="-".join)
# The loops that generate compile for long, and take the fields of a type as they come: one, all there are, and keys and
# values of different types.  Those of f32 are test_models.py's.
LOOPS = [("f16", "f16"), ("q5_1", "q5_1"), ("q8_0", "iq4_nl"), ("q4_0", "f32")]


@EACH_PAIR
def test_forward_rounds_keys_and_values_as_the_equations_say(tensors, params, pair):
    if "iq4_nl" in pair:
        pytest.skip("gguf has no quantizer for IQ4_NL; test_iq4.py has ggml's")
    exact = oracle.forward(SMALL, tensors, TOKENS[0])
    names = ("q8_0" if pair[0] in QUANTIZED else pair[0], *pair)
    held = (rounded(name, 64 if name in QUANTIZED else 1) for name in names)
    expected = oracle.forward(SMALL, tensors, TOKENS[0], *held)
    logits = forward(params, TOKENS, cache_types(SMALL, *pair))[0]
    assert effect(logits, expected) < 0.1 * effect(expected, exact) + 1e-3


@pytest.mark.parametrize(
    "pair",
    [*sampled(LOOPS, ("q8_0", "iq4_nl")), *(pytest.param(p, marks=pytest.mark.exact) for p in PAIRS if p not in LOOPS)],
    ids="-".join,
)
def test_generated_text_is_that_of_the_forward_pass(params, pair):
    """A batch of two; each token made is the likeliest by the forward pass through the same types."""
    types, stop = cache_types(SMALL, *pair), np.array([SMALL.vocab], np.int32)
    cache, key = (caches.empty(SMALL, 2, 64, types),), jax.random.key(0)
    state = generate.prefill(SMALL, params, TOKENS[:, :20], 20, cache, key, GREEDY, stop)
    first = np.asarray(state.tokens)
    made, _, state = generate.decode(SMALL, params, state, 12, GREEDY, stop)
    text = np.concatenate([TOKENS[:, :20], first[:, None], made[:, :12]], axis=1)
    logits = np.asarray(forward(params, text[:, :-1], types))[:, 19:]
    chosen = np.take_along_axis(logits, text[:, 20:, None], axis=-1)[..., 0]
    assert np.all(chosen > logits.max(-1) - 0.01)
    (cache,) = state.cache
    assert cache.length == 32
    assert cache.types == types


@pytest.mark.parametrize("pair", [("q8_0", "q5_1"), ("q4_0", "f32")], ids="-".join)
def test_steps_equal_the_forward_pass(params, pair):
    types = cache_types(SMALL, *pair)
    exact, logits = (forward(params, TOKENS, t) for t in (caches.FLOAT32, types))
    cache, steps = caches.empty(SMALL, 2, 64, types), []
    for at in range(32):
        last, cache = transformer.step(SMALL, params, TOKENS[:, at : at + 1], cache)
        steps.append(last)
    assert effect(jnp.stack(steps, axis=1), logits) < 0.1 * effect(logits, exact)


def test_float16_is_rounded_to(params):
    """XLA could leave out a conversion and its inverse."""
    logits, exact = (forward(params, TOKENS, t) for t in (caches.FLOAT16, caches.FLOAT32))
    assert 2**-17 < effect(logits, exact) / np.linalg.norm(exact) < 2**-8


# ── in place ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("k", "v"), [("q8_0", "iq4_nl"), ("f16", "q5_0")])
def test_the_decode_loop_copies_no_cache(k, v):
    """In a batch of two; the keys and values of one layer of 16 are decoded at a time."""
    config = replace(SMALL, n_layers=16)
    params = transformer.stack(random_tensors(config), config)
    zeros = jnp.zeros(2, jnp.int32)
    cache = caches.empty(config, 2, 2048, cache_types(config, k, v))
    state = generate.State((cache,), zeros, zeros > 0, jax.random.key(0))

    def loop(params, state):
        return generate.decode(config, params, state, 32, GREEDY, jnp.zeros(1, jnp.int32))

    memory = jax.jit(loop, donate_argnums=1).lower(params, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    decoded_layer = 4 * 2 * 2 * SMALL.n_kv_heads * 2048 * SMALL.head_dim
    assert memory.temp_size_in_bytes < 2 * decoded_layer + 2**20 < cache.nbytes
