"""Models on eight devices: what test_placement.py runs where a CPU passes for them; not collected by itself."""

import functools
import math
import re
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.formats import drawn

import qjax
from qjax.models import cache as caches
from qjax.models import generate, parts, placement, transformer
from qjax.models.cache import Cache
from qjax.models.config import Config
from qjax.models.transformer import Params
from qjax.ops import sharded
from qjax.ops.sharded import Sharded
from qjax.tensor import dequantize

pytestmark = pytest.mark.in_haste

DEVICES = jax.devices()
CPU, ACCELERATORS = DEVICES[0], DEVICES[1:]

SMALL = Config("llama", 5, 64, 96, 4, 2, 16, 80, 128, 1e-5, 1e4, tied=True)
# d_ff is eight super-blocks of 256, d_model two.
WIDE = Config("llama", 2, 512, 2048, 8, 8, 64, 512, 64, 1e-5, 1e4, tied=True)
TOKENS = np.random.default_rng(0).integers(0, 80, (2, 3)).astype(np.int32)


def test_there_are_eight_devices():
    assert len(DEVICES) == 8


WIDTH, N_ROWS = 512, 2048


@functools.cache
def pool(format):
    """A random matrix, of whose rows the others are made."""
    if format in (None, "F16"):
        values = np.random.default_rng(1).standard_normal((N_ROWS, WIDTH)) / np.sqrt(WIDTH)
        return jnp.asarray(values, "float16" if format else "float32")
    return drawn(format, N_ROWS, WIDTH, size=2 / np.sqrt(WIDTH))


def random_tensors(config, formats=None):
    """By GGUF name; formats: of the matrices, by the part of the name that says which, else float32."""
    rng = np.random.default_rng(0)

    def draw(name, shape):
        if len(shape) == 1:
            return jnp.asarray(1 + 0.1 * rng.standard_normal(shape), jnp.float32)
        rows, columns = shape
        source = pool((formats or {}).get(name.split(".")[-2]))
        block_size = source.format.block_size if isinstance(source, qjax.QTensor) else 1
        chosen = rng.integers(0, N_ROWS, rows * -(-columns // WIDTH))

        def cut(values):
            values = np.asarray(values)[chosen]
            return jnp.asarray(values.reshape(rows, -1, *values.shape[2:])[:, : columns // block_size])

        return jax.tree.map(cut, source)

    return {name: draw(name, shape) for name, shape in transformer.tensor_shapes(config).items()}


def on_mesh(config, tensors, data, model):
    mesh = jax.make_mesh((data, model), ("data", "model"))
    return placement.stack(tensors.items(), config, placement.over_mesh(config, mesh))


# ── over a mesh ──────────────────────────────────────────────────────────────────────────────────────


class Case(NamedTuple):
    """A model on one device and over a mesh, and what the programs for the mesh make of TOKENS."""

    config: Config
    single: Params
    meshed: Params
    said: str
    programs: tuple[jax.stages.Compiled, ...]
    logits: jax.Array
    last: jax.Array
    cache: Cache

    @property
    def mesh(self):
        return sharded.mesh_of(self.meshed.token_embd)


AFFINE = qjax.Affine(bits=3)
FORMATS = {
    "token_embd": "Q6_K", "attn_q": "Q4_0", "attn_k": AFFINE, "attn_v": "Q4_K", "attn_output": "F16",
    "ffn_gate": "Q4_K", "ffn_down": "Q6_K",
}  # fmt: skip
OTHERS = {
    "token_embd": "Q4_0", "attn_q": "Q6_K", "attn_k": "F16", "attn_output": AFFINE,
    "ffn_gate": "Q4_0", "ffn_up": AFFINE, "ffn_down": "Q4_K", "output": "Q6_K",
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((FORMATS, WIDE, 1, 8, "model 8"), marks=pytest.mark.exact),
        (OTHERS, replace(WIDE, n_kv_heads=2, tied=False), 2, 4, "data 2, model 4; whole on each: attn_k, attn_v"),
        # d_ff is seven super-blocks and 224 rows on each device.
        pytest.param((FORMATS | {"attn_output": "Q4_0"},
                      replace(WIDE, d_ff=1792, n_heads=6, n_kv_heads=3, vocab=500), 1, 8,
                      "model 8; whole on each: attn_k, attn_output, attn_q, attn_v, ffn_down, token_embd"),
                     marks=pytest.mark.thorough),
    ],
    ids=lambda case: case[-1],
)  # fmt: skip
def case(request):
    formats, config, data, model, said = request.param
    tensors = random_tensors(config, formats)
    single, meshed = transformer.stack(tensors, config), on_mesh(config, tensors, data, model)
    tokens = jax.device_put(TOKENS, jax.NamedSharding(sharded.mesh_of(meshed.token_embd), jax.P("data")))
    (cache,) = parts.empty_cache(config, meshed, 2, 16, caches.FLOAT32)
    forward = transformer.forward.lower(config, meshed, tokens).compile()
    step = transformer.step.lower(config, meshed, tokens, cache).compile()
    return Case(config, single, meshed, said, (forward, step), forward(meshed, tokens), *step(meshed, tokens, cache))


def test_what_does_not_divide_is_whole(case):
    assert parts.describe(case.meshed) == f"8 devices: {case.said}"


def test_logits_agree(case):
    expected = transformer.forward(case.config, case.single, TOKENS)
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(case.logits, expected, atol=1e-5)
    np.testing.assert_allclose(case.last, expected[:, -1], atol=1e-5)


def test_a_device_holds_its_piece_only(case):
    model = case.mesh.shape["model"]
    leaves = jax.tree.leaves(case.meshed, is_leaf=lambda leaf: isinstance(leaf, Sharded))
    matrices = [leaf for leaf in leaves if isinstance(leaf, Sharded)]
    assert len(matrices) == 7 * len(case.meshed.runs) + (1 if case.config.tied else 2)
    for matrix in matrices:
        for values in jax.tree.leaves(matrix.matrix):
            expected = values.nbytes if matrix.split is None else values.nbytes // model
            assert {shard.data.nbytes for shard in values.addressable_shards} == {expected}


def test_the_cache_stays_in_pieces(case):
    data, model = case.mesh.devices.shape
    heads = case.config.n_kv_heads
    piece = (2, 2 // data, heads if heads % model else heads // model, 16, 64)
    for (rows,) in (case.cache.k.fields, case.cache.v.fields):
        assert {shard.data.shape for shard in rows.addressable_shards} == {piece}
        assert np.abs(rows[:, :, :, :3]).min() > 0
        assert not np.any(rows[:, :, :, 3:])


def sent(program):
    """(dtype, number of values) of all that devices send each other in a compiled program."""
    found = re.findall(r" = (.*) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
                       program.as_text())  # fmt: skip
    arrays = [array for types in found for array in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", types)]
    return [(dtype, math.prod(int(n) for n in sizes.split(",") if n)) for dtype, sizes in arrays]


def test_no_weight_is_sent(case):
    """What layers make of some tokens is; the smallest matrix, cut or not, has more values than that."""
    largest = TOKENS.size * max(case.config.d_ff, case.config.vocab)
    assert largest < 64 * case.config.d_model
    for program in case.programs:
        arrays = sent(program)
        assert {dtype for dtype, _ in arrays} <= {"f32", "s32"}
        assert 0 < max(n for _, n in arrays) <= largest


def test_a_weight_that_is_sent_is_seen():
    """As it is without Sharded: then the compiler collects the rows, because matmul takes them in a loop."""
    w = on_mesh(WIDE, random_tensors(WIDE, {"token_embd": "Q4_0"}), 1, 8).token_embd
    arrays = sent(jax.jit(qjax.matmul).lower(jnp.ones((2, 512)), w.matrix).compile())
    assert {dtype for dtype, _ in arrays} == {"u8", "f16"}
    assert max(n for _, n in arrays) == 512 * 512 // 2


@pytest.mark.parametrize(("shape", "axes"), [((8,), ("data",)), ((2, 4), ("model", "data"))])
def test_a_mesh_may_lack_an_axis_or_turn_them(shape, axes):
    tensors = random_tensors(SMALL)
    mesh = jax.make_mesh(shape, axes)
    params = placement.stack(tensors.items(), SMALL, placement.over_mesh(SMALL, mesh))
    sizes = dict(zip(axes, shape))
    assert dict(sharded.mesh_of(params.token_embd).shape) == {"data": 1, "model": 1} | sizes
    # Neighbours along an axis stay neighbours.
    of_mesh = sharded.mesh_of(params.token_embd).devices
    given = mesh.devices if axes[0] == "data" else mesh.devices.T
    assert (of_mesh == given.reshape(of_mesh.shape)).all()
    expected = transformer.forward(SMALL, transformer.stack(tensors, SMALL), TOKENS)
    np.testing.assert_allclose(parts.forward(SMALL, params, TOKENS), expected, atol=1e-5)


def test_batches_that_do_not_divide():
    tensors = random_tensors(SMALL)
    single, meshed = transformer.stack(tensors, SMALL), on_mesh(SMALL, tensors, 4, 2)
    tokens = np.random.default_rng(1).integers(0, 80, (6, 10)).astype(np.int32)
    logits = parts.forward(SMALL, meshed, tokens, first=4)
    assert logits.shape == (6, 6, 80)
    np.testing.assert_allclose(logits, transformer.forward(SMALL, single, tokens, first=4), atol=1e-5)
    # What is observed must not be counted twice, so that such a batch is not filled up.
    keep = [parts.observe(SMALL, params, tokens, jnp.sum, first=10)[1] for params in (single, meshed)]
    for one, eight in zip(jax.tree.leaves(keep[0]), jax.tree.leaves(keep[1]), strict=True):
        np.testing.assert_allclose(eight, one, atol=1e-3)


MIXTURE = replace(SMALL, n_layers=2, n_experts=4, n_experts_used=2, tied=False)
WINDOWS = replace(SMALL, architecture="gemma2", n_layers=3, window=2, full_every=2, attn_softcap=5.0, logit_softcap=3.0)
GPT2 = replace(
    SMALL, architecture="gpt2", n_layers=3, n_kv_heads=4, biases=("attn_qkv", "attn_output", "ffn_up", "ffn_down")
)


@pytest.mark.parametrize(
    "config",
    [MIXTURE, pytest.param(WINDOWS, marks=pytest.mark.thorough), pytest.param(GPT2, marks=pytest.mark.exact)],
    ids=lambda config: config.architecture,
)
def test_other_architectures(config):
    """Over a mesh and by layers: what lies beside the matrices comes along."""
    tensors = transformer.init(config, jax.random.key(0))
    tensors = {name: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape) for name, x in tensors.items()}
    single = transformer.stack(tensors, config)
    logits = transformer.forward(config, single, TOKENS)
    for params in (on_mesh(config, tensors, 2, 4), by_layers(2, tensors, config=config)):
        np.testing.assert_allclose(parts.forward(config, params, TOKENS), logits, atol=1e-5)
        cache = parts.empty_cache(config, params, 2, 16, caches.FLOAT32)
        np.testing.assert_allclose(parts.step(config, params, TOKENS, cache)[0], logits[:, -1], atol=1e-5)


def test_load_over_a_mesh(tmp_path):
    text = "".join(tale.text for tale in qjax.data.tales.generate(0, 10))
    one, eight = qjax.load("tiny"), qjax.load("tiny", mesh=jax.make_mesh((4, 2), ("data", "model")))
    assert one.placement == ""
    assert eight.placement == "8 devices: data 4, model 2"
    assert repr(eight).endswith("7.0 MiB; 8 devices: data 4, model 2)")
    a, b = (qjax.perplexity(model, text, n_ctx=64, chunks=5, precision="float32") for model in (one, eight))
    assert b.value == pytest.approx(a.value, rel=1e-6)
    assert (b.n_tokens, b.chunks) == (a.n_tokens, a.chunks)
    small = eight.quantize({"ffn_down": "F16"})
    assert small.placement == eight.placement
    small.save(tmp_path / "eight.gguf")
    one.quantize({"ffn_down": "F16"}).save(tmp_path / "one.gguf")
    assert (tmp_path / "eight.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


@pytest.mark.parametrize("arguments", [pytest.param(("perplexity", "-c", 64, "--chunks", 3, "--precision", "float32"),
                                                    marks=pytest.mark.thorough),
                                       pytest.param(("generate", "-p", "A fox", "-n", 4), marks=pytest.mark.exact)],
                         ids=lambda a: a[0])  # fmt: skip
def test_command_line(run, arguments):
    """On two devices: the same in print, and a word on where it was computed."""
    command, *options = arguments
    one, two = (run(command, "tiny", *options, *more) for more in ((), ("--devices", 2)))
    assert (one[0], one[2]) == (0, "")
    assert two == (0, one[1], f"tiny: 2 devices: {'data' if command == 'perplexity' else 'model'} 2\n")


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────


def devices_of(params):
    """(embedding, each layer, head): the device of each, its tensors being together."""
    layers = [run for run in params.runs for _ in run["attn_norm.weight"]]
    pieces = [params.token_embd, *layers, [params.output_norm, params.output]]
    found = [set().union(*(leaf.devices() for leaf in jax.tree.leaves(piece))) for piece in pieces]
    assert {len(devices) for devices in found} == {1}
    return [devices.pop() for devices in found]


def llama_cpp_devices(n_layers, n_gpu_layers, n_gpus):
    """-1 for the CPU or the number of the GPU, for each layer and the head, by the arithmetic of llama.cpp's
    load_tensors, GPUs of equal memory: their shares summed up, and the first sum above where a layer stands."""
    n_gpu_layers = n_gpu_layers if n_gpu_layers >= 0 else n_layers + 1
    start, active = max(n_layers + 1 - n_gpu_layers, 0), min(n_gpu_layers, n_layers + 1)
    splits = np.cumsum(np.full(n_gpus, 1 / n_gpus, np.float32), dtype=np.float32)
    return [
        -1 if i < start or i - start >= active
        else int(np.searchsorted(splits, np.float32(i - start) / np.float32(active), side="right"))
        for i in range(n_layers + 1)
    ]  # fmt: skip


@pytest.mark.parametrize("n_gpus", [1, 2, 4])
@pytest.mark.parametrize("n_gpu_layers", [0, 1, 2, 4, 5, 6, 99, -1])
@pytest.mark.parametrize("tied", [True, False])
def test_layers_go_where_llama_cpp_puts_them(n_gpu_layers, n_gpus, tied):
    config = replace(SMALL, tied=tied)
    place = placement.by_layers(config, n_gpu_layers, CPU, ACCELERATORS[:n_gpus])
    params = placement.stack(random_tensors(config).items(), config, place)
    embedding, *layers = devices_of(params)
    gpus = llama_cpp_devices(5, n_gpu_layers, n_gpus)
    assert layers == [CPU if gpu < 0 else ACCELERATORS[gpu] for gpu in gpus]
    # With the first layer, which is the CPU unless nothing is left there.
    assert embedding == layers[0]
    assert (params.output is not None) == (not tied or embedding != layers[-1])


def by_layers(n_gpu_layers, tensors, n_gpus=1, config=SMALL):
    place = placement.by_layers(config, n_gpu_layers, CPU, ACCELERATORS[:n_gpus])
    return placement.stack(tensors.items(), config, place)


def identity(h):
    return h


def test_parts_compute_what_the_whole_does():
    tensors = random_tensors(SMALL)
    tensors["blk.3.ffn_up.weight"] = qjax.quantize(tensors["blk.3.ffn_up.weight"], "Q4_0")
    whole, params = transformer.stack(tensors, SMALL), by_layers(5, tensors, n_gpus=2)
    said = "embedding, layer 0 on cpu:0; layers 1 to 3 on cpu:1; layer 4, head on cpu:2"
    assert parts.describe(params) == said

    logits, seen = parts.observe(SMALL, params, TOKENS, identity)
    expected, expected_seen = transformer.observe(SMALL, whole, TOKENS, identity)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(parts.forward(SMALL, params, TOKENS, first=1), expected[:, 1:], atol=1e-5)
    seen, expected_seen = seen.unstack(SMALL), expected_seen.unstack(SMALL)
    assert seen.keys() == expected_seen.keys()
    for name in seen:
        np.testing.assert_allclose(seen[name], expected_seen[name], atol=1e-5, err_msg=name)

    types = caches.FLOAT32
    last, grown = parts.step(SMALL, params, TOKENS, parts.empty_cache(SMALL, params, 2, 16, types))
    _, expected_cache = transformer.step(SMALL, whole, TOKENS, caches.empty(SMALL, 2, 16, types))
    np.testing.assert_allclose(last, expected[:, -1], atol=1e-5)
    for part, cache in zip(parts.parts(params), grown):
        assert sharded.devices(cache.k) == sharded.devices(cache.v) == sharded.devices(part)
        assert cache.length == 3
    for field in ("k", "v"):
        joined = np.concatenate([dequantize(getattr(cache, field)) for cache in grown])
        np.testing.assert_allclose(joined, dequantize(getattr(expected_cache, field)), atol=1e-5)


@pytest.mark.thorough
def test_generation_and_its_end_in_parts():
    tensors = random_tensors(SMALL)

    def text(params, stop):
        stream = generate.stream(SMALL, params, [3, 1, 4], max_tokens=40, stop_ids=[stop], seed=3)
        chunks = list(stream)
        return [token for chunk in chunks for token in chunk.tokens], chunks[-1].finish_reason

    whole, params = transformer.stack(tensors, SMALL), by_layers(1, tensors)
    assert parts.describe(params) == "embedding, layers 0 to 4 on cpu:0; head on cpu:1"
    none = SMALL.vocab
    expected = text(whole, none)
    assert expected[1] == "length"
    assert text(params, none) == expected
    stop = expected[0][30]
    assert text(params, stop) == text(whole, stop) == (expected[0][: expected[0].index(stop)], "stop")


@pytest.mark.thorough
def test_models_made_of_a_placed_one_lie_where_it_does(tmp_path):
    whole = qjax.load("tiny")
    place = placement.by_layers(whole.config, 3, CPU, ACCELERATORS[:1])
    model = replace(whole, params=placement.stack(whole.tensors.items(), whole.config, place), place=place)
    assert model.placement == "embedding, layers 0 to 1 on cpu:0; layers 2 to 3, head on cpu:1"
    assert (model.n_weights, model.nbytes) == (whole.n_weights, whole.nbytes)
    small = model.quantize({"ffn_down": "F16"})
    assert small.placement == model.placement
    small.save(tmp_path / "parts.gguf")
    whole.quantize({"ffn_down": "F16"}).save(tmp_path / "whole.gguf")
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    np.testing.assert_allclose(model.logits([5, 3, 9]), whole.logits([5, 3, 9]), atol=1e-5)
