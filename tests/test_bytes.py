"""Every GGML format, byte for byte: one table of cases for all, against ggml's C and gguf.

test_exact.py takes the same cases to millions of weights; what is particular to a family is in the family's file.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import sampled
from oracles import ggml, weights

import qjax

FORMATS = list(dict.fromkeys(name for name, _ in ggml.CASES))

KINDS = {
    **weights.MODEL_LIKE,
    **weights.KINDS,
    **{kind.__name__: kind for kind in (weights.negative_zero, weights.tiny_model)},
}
# The searches compare products of many weights, and where those are denormal XLA has zeros.  What is equal there too:
# test_kquants.py test_tiny_sub_blocks, test_iq4.py test_where_the_scale_is_zero_in_float16.
TINY = ("log_uniform", "log_uniform_blocks", "float16_denormal_scale")
# Those of a format, else of its family.
LEFT_OUT = {"kquants": TINY, "iquants": TINY} | dict.fromkeys(("IQ1_S", "IQ1_M"), (*TINY, "some_denormal"))

ROWS = 16  # of 4096 weights, of each kind


def kinds_of(name) -> list[str]:
    left_out = LEFT_OUT.get(name, LEFT_OUT.get(qjax.formats.get(name).family, ()))
    return [kind for kind in KINDS if kind not in left_out]


drawn = functools.cache(lambda kind: weights.draw(KINDS[kind], ROWS * 4096))


def weights_for(name) -> np.ndarray:
    """All kinds in one array, so that a case compiles once."""
    return np.concatenate([drawn(kind) for kind in kinds_of(name)])


def our_bytes(name, x, importance=None) -> np.ndarray:
    return np.asarray(qjax.quantize(x, name, importance=importance).to_bytes())


# Encoding.


# What compiles takes most of the time of all tests: by default the searches that compile fast, and two of the others.
def by_default(name, weighted) -> bool:
    return name in ("Q6_K", "IQ3_S") if weighted else name not in ("Q3_K", "Q5_K", "IQ2_S", "IQ3_XXS", "IQ3_S")


CASES = [
    pytest.param(name, weighted, id=f"{name}-{'importance' if weighted else 'plain'}",
                 marks=() if by_default(name, weighted) else pytest.mark.thorough)
    for name, weighted in ggml.CASES
]  # fmt: skip


@pytest.mark.parametrize(("name", "weighted"), CASES)
def test_bytes_equal_ggmls(name, weighted):
    x = weights_for(name)
    importance = weights.importance(x.shape[1]) if weighted else None
    theirs = ggml.reference(name, x, importance)  # first, for it may skip
    ggml.assert_same_bytes(qjax.formats.get(name), our_bytes(name, x, importance), theirs, x, kinds_of(name))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_bytes_equal_ggufs(name):
    """But for blocks of zeros of both signs, for gguf takes the sign of d and m from another zero than C does."""
    kinds = [kind for kind in kinds_of(name) if kind not in ("negative_zero", "zeros_mixed_in")]
    rows = np.repeat([kind in kinds for kind in kinds_of(name)], ROWS)
    x = weights_for(name)
    ours, theirs = our_bytes(name, x)[rows], ggml.PEERS["gguf"](name, x[rows])
    ggml.assert_same_bytes(qjax.formats.get(name), ours, theirs, x[rows], kinds)


def with_importance(use) -> list[str]:
    """The formats for which an importance matrix is so."""
    return [name for name in FORMATS if use(qjax.formats.get(name))]


@pytest.mark.parametrize("name", with_importance(lambda format: format.needs_importance))
def test_importance_is_missing(name):
    with pytest.raises(qjax.QjaxError, match=f"{name} needs an importance matrix"):
        qjax.quantize(np.ones((1, 256), np.float32), name)


@pytest.mark.parametrize("name", with_importance(lambda format: not format.uses_importance))
def test_importance_is_refused(name):
    with pytest.raises(qjax.QjaxError, match=f"{name} has no importance-weighted search"):
        qjax.quantize(np.ones((1, 256), np.float32), name, importance=np.ones(256, np.float32))


# The caller must not matter: a compiler that sees more of the program must not round otherwise.


# By default one of the formats whose programs are large, and one of those that share a search.
LARGE = {name for name in FORMATS if qjax.formats.get(name).family in ("kquants", "iquants")} - {"IQ4_XS"}


@pytest.mark.parametrize("name", sampled(FORMATS, *set(FORMATS) - LARGE - {"Q4_1", "Q5_0", "IQ4_NL"}))
def test_bytes_do_not_depend_on_the_caller(name):
    """All at once: within a larger program, under vmap, with other leading axes, in short rows."""
    format = qjax.formats.get(name)
    x = np.stack([drawn(kind).reshape(2, -1, 1024) for kind in kinds_of(name)])
    importance = weights.importance(1024) if format.uses_importance else None
    theirs = ggml.reference(name, x.reshape(-1, 1024), importance)

    def encode(x):
        return qjax.quantize(x, format, importance=importance)

    @jax.jit
    @jax.vmap
    def program(x):
        # Products before and sums after the quantizer, for XLA to contract and reassociate with it.
        t = encode(x * jnp.float32(1))
        return t, qjax.dequantize(t) + x

    fields = program(x)[0].fields
    rows = format.Fields(*(f.reshape(-1, *f.shape[3:]) for f in fields))
    ggml.assert_same_bytes(format, qjax.QTensor(rows, format).to_bytes(), theirs, x, kinds_of(name))


def callers(format):
    """The ways to call a quantizer."""

    def encode(x):
        return qjax.quantize(x, format).fields

    def with_context(x):
        fields = encode(x * jnp.float32(1))
        return jax.tree.map(lambda f: f, fields), qjax.dequantize(qjax.QTensor(fields, format)) + x

    def scanned(x):
        return jax.lax.scan(lambda carry, row: (carry, encode(row)), 0, x)[1]

    return {
        "eager": encode,
        "jit": jax.jit(encode),
        "jit of jit": jax.jit(lambda x: jax.jit(encode)(x)),
        "vmap": jax.vmap(encode),
        "jit of vmap": jax.jit(jax.vmap(encode)),
        "scan": scanned,
        "map": lambda x: jax.lax.map(encode, x),
        "larger program": jax.jit(lambda x: with_context(x)[0]),
        "larger program, all used": lambda x: jax.jit(with_context)(x)[0],
        "constant": lambda x: jax.jit(lambda: encode(x))(),
        "three axes": lambda x: [f.reshape(len(x), *f.shape[2:]) for f in encode(x.reshape(2, -1, *x.shape[1:]))],
    }


@pytest.mark.parametrize("call", callers(qjax.formats.get("Q4_0")))
@pytest.mark.parametrize("name", sampled(["Q4_0", "Q5_1", "Q8_0"], "Q4_0"))
def test_every_way_to_call(name, call):
    """One by one, of formats that compile fast."""
    format = qjax.formats.get(name)
    x = np.concatenate([drawn(kind)[:8] for kind in ("gaussian", "ties", "bfloat16")])
    fields = format.Fields(*callers(format)[call](jnp.asarray(x)))
    ggml.assert_same_bytes(format, qjax.QTensor(fields, format).to_bytes(), ggml.PEERS["gguf"](name, x), x)


# Decoding.


def random_blocks(format, n_blocks):
    """Every bit pattern of every field: scales that are denormal, infinite and NaN among them."""
    return np.random.default_rng(0).integers(0, 256, (n_blocks, format.type_size), np.uint8)


@pytest.mark.parametrize(("name", "peer"), [(name, peer) for name in FORMATS for peer in ggml.decoders(name)])
def test_decoding_random_bytes(name, peer):
    format = qjax.formats.get(name)
    data = random_blocks(format, 2**20 // format.block_size)
    t = qjax.QTensor.from_bytes(data, name, (len(data), format.block_size))
    ours = np.asarray(qjax.dequantize(t))
    theirs = ggml.decoders(name)[peer](name, data)
    finite = np.isfinite(theirs).mean()
    assert finite > 0.9
    assert finite < 1 or name == "NVFP4"  # whose NaN ggml takes for zero
    if name in ("BF16", "Q8_K"):  # XLA takes numbers, and scales, that are denormal in float32 for zero
        number = np.abs(np.asarray(t.fields[0]).astype(np.float32))
        theirs = np.where((number != 0) & (number < np.finfo(np.float32).tiny), ours, theirs)
    ggml.assert_same_values(format, ours, theirs)


@pytest.mark.parametrize("name", ggml.NAMES)
def test_any_bytes_survive_unpacking_and_packing(name):
    """NaN payloads included: nothing is converted on the way."""
    format = qjax.formats.get(name)
    data = random_blocks(format, 2**12)
    with jax.enable_x64(format.family == "wide"):
        tensor = qjax.QTensor.from_bytes(data, name, (len(data), format.block_size))
        assert tensor.to_bytes().dtype == np.uint8
        ggml.assert_same_bytes(format, tensor.to_bytes(), data)


# Sizes.

# As ggml.h and ggml-common.h have them, and gguf not yet: id, weights and bytes of a block.
NEWER_THAN_GGUF = {"Q2_0": (42, (64, 18)), "Q8_1": (9, (32, 36))}


@pytest.mark.parametrize("name", ggml.NAMES)
def test_sizes_equal_ggufs(name):
    gguf = pytest.importorskip("gguf")
    format = qjax.formats.get(name)
    if name in NEWER_THAN_GGUF:
        ggml_id, sizes = NEWER_THAN_GGUF[name]
    else:
        ggml_id = gguf.GGMLQuantizationType[name]
        sizes = gguf.GGML_QUANT_SIZES[ggml_id]
    assert format.ggml_id == ggml_id
    assert (format.block_size, format.type_size) == sizes
    assert format.nbytes((6, 10 * format.block_size)) == 60 * format.type_size
    assert qjax.formats.by_id(format.ggml_id) is format
