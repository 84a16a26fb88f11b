"""NF4 with double quantization: against bitsandbytes' stored tensors and against its definition in numpy."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import ggml, weights

import qjax
from qjax.formats import nf4
from qjax.io import bitsandbytes, hub
from qjax.io.tokenizer import Tokenizer
from qjax.model import Model
from qjax.models import transformer
from qjax.models.config import Config
from qjax.quantize_file import quantize_file

NF4 = qjax.formats.get("NF4")


@pytest.fixture(scope="module")
def reference():
    """What tools/make_nf4_reference.py stored: {suffix: array}, and every eighth row as bitsandbytes decodes it."""
    with np.load(Path(__file__).parent / "data" / "nf4_bitsandbytes.npz") as file:
        stored = {key.removeprefix("w."): file[key] for key in file if key.startswith("w.")}
        return stored, file["decoded"]


def reference_weights():
    """As in tools/make_nf4_reference.py."""
    x = (np.random.RandomState(0).standard_normal((24, 704)) * 0.02).astype(np.float32)
    x[5] = 0
    return x


def test_reads_what_bitsandbytes_stored(reference):
    """Decodes it to the same bits."""
    stored, decoded = reference
    t = bitsandbytes.from_parts(stored)
    assert (t.shape, t.format) == ((24, 704), NF4)
    ggml.assert_same_values(NF4, qjax.dequantize(t)[::8], decoded)


def test_stores_what_bitsandbytes_stores(reference):
    stored, _ = reference
    ours = bitsandbytes.to_parts(bitsandbytes.from_parts(stored))
    assert set(ours) == set(stored)
    for key, theirs in stored.items():
        assert (ours[key].shape, ours[key].dtype) == (theirs.shape, theirs.dtype), key
        assert ours[key].tobytes() == theirs.tobytes(), key


def test_quantizes_as_bitsandbytes(reference):
    """The weights' codes bit for bit; the scales within its CPU code's error, which can miss the nearest map entry."""
    stored, _ = reference
    ours = bitsandbytes.to_parts(qjax.quantize(reference_weights(), NF4))
    np.testing.assert_array_equal(ours[""], stored[""])
    offset = json.loads(stored[bitsandbytes.STATE].tobytes())["nested_offset"]
    # Two float32 sums in other orders.
    np.testing.assert_allclose(
        ours["nested_absmax"], stored["nested_absmax"], rtol=0, atol=4 * np.spacing(offset, dtype=np.float32)
    )
    steps = ours["absmax"].astype(int) - stored["absmax"]
    assert np.abs(steps).max() <= 1
    assert np.mean(steps != 0) < 0.02


def in_numpy(x):
    """QLoRA's double quantization of one matrix, in float64 but for what is stored in float32: codes and scales."""
    values, scale_map = (np.sort(table.astype(np.float64)) for table in (nf4.VALUES, nf4.SCALES))
    blocks = x.reshape(-1, 64).astype(np.float64)
    absmax = np.abs(blocks).max(axis=1)
    normalized = blocks / np.where(absmax > 0, absmax, 1)[:, None]
    codes = np.abs(normalized[..., None] - values).argmin(axis=-1)
    offset = absmax.mean()
    groups = np.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
    nested = np.abs(groups).max(axis=1, keepdims=True)
    scales = np.abs((groups / nested)[..., None] - scale_map).argmin(axis=-1)
    decoded = (scale_map[scales] * nested).ravel()[: len(absmax)] + offset
    return codes, scales.ravel()[: len(absmax)], values[codes] * decoded[:, None]


@pytest.mark.parametrize("kind", weights.MODEL_LIKE)
def test_is_the_definition(kind):
    """All but the codes that float32 puts on the other side of a midpoint, fewer than one in a thousand."""
    x = weights.draw(weights.MODEL_LIKE[kind], 2**16)
    t = qjax.quantize(x, "NF4")
    codes, scales, decoded = in_numpy(x)
    qs = np.asarray(t.fields.qs).reshape(-1, 32)
    ours = np.stack([qs >> 4, qs & 15], axis=-1).reshape(-1, 64)
    assert np.mean(ours != codes) < 1e-3
    assert np.mean(np.asarray(t.fields.absmax).ravel() != scales) < 5e-3
    same = (ours == codes).all(axis=1) & (np.asarray(t.fields.absmax).ravel() == scales)
    tolerance = 1e-5 * np.abs(x).max()
    np.testing.assert_allclose(np.asarray(qjax.dequantize(t)).reshape(-1, 64)[same], decoded[same], atol=tolerance)


def test_the_values_are_normal_quantiles():
    """QLoRA appendix E: on each side quantiles at equal steps of probability, the outermost 0.9677083, scaled to 1."""
    from statistics import NormalDist

    outermost, quantile = 0.9677083, NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    expected = np.sort([*positive, 0, *negative]) / max(positive)
    np.testing.assert_allclose(nf4.VALUES, expected, atol=1e-6)


def test_the_map_has_seven_decades():
    assert nf4.SCALES.shape == (256,)
    assert (np.diff(nf4.SCALES) > 0).all()
    assert {0.0, 1.0} <= set(nf4.SCALES.tolist())
    for i in range(7):
        edges = 10.0 ** (i - 7), 10.0 ** (i - 6)
        assert np.histogram(nf4.SCALES[:-1], edges)[0] == np.histogram(-nf4.SCALES, edges)[0] == 2**i


@pytest.mark.parametrize(
    "shape",
    [
        *((64,), (3, 64), (24, 704), (2, 2, 24, 704)),
        *(pytest.param(shape, marks=pytest.mark.exact) for shape in ((5, 640), (2, 3, 512))),
    ],
)
def test_sizes_shapes_and_stacks(shape):
    """Each matrix of a stack is quantized by itself, in as many bytes as announced."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    t = qjax.quantize(x, "NF4")
    assert t.shape == shape
    n_matrices, n_blocks = int(np.prod(shape[:-2])), int(np.prod(shape[-2:])) // 64
    assert t.nbytes == NF4.nbytes(shape) == n_matrices * (n_blocks * 33 + 4 * -(-n_blocks // 256) + 4)
    decoded = np.asarray(qjax.dequantize(t))
    for index in np.ndindex(shape[:-2]):
        np.testing.assert_array_equal(decoded[index], qjax.dequantize(qjax.quantize(x[index], "NF4")))


def test_bits_per_weight():
    """4 + 8/64 + 32/(64·256), as the paper counts; a large tensor takes no more."""
    assert NF4.bpw == 4 + 8 / 64 + 32 / (64 * 256)
    shape = (4096, 4096)
    assert NF4.nbytes(shape) * 8 / np.prod(shape) == pytest.approx(NF4.bpw, abs=1e-5)


def test_vmap_and_scan():
    x = np.random.default_rng(0).standard_normal((2, 24, 704)).astype(np.float32)
    stacked = qjax.quantize(x, "NF4")
    dense = np.asarray(qjax.dequantize(stacked))
    np.testing.assert_array_equal(jax.vmap(qjax.dequantize)(stacked), dense)
    np.testing.assert_array_equal(jax.lax.scan(lambda carry, t: (carry, qjax.dequantize(t)), 0, stacked)[1], dense)


@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_at_most_half_the_widest_gap(seed):
    x = np.random.default_rng(seed).standard_normal((24, 704)).astype(np.float32)
    absmax = np.abs(x.reshape(-1, 64)).max(axis=1, keepdims=True)
    decoded = np.asarray(qjax.dequantize(qjax.quantize(x, "NF4"))).reshape(-1, 64)
    # And the scale's own error: half the widest gap of the map times the largest distance from the mean.
    scale_error = 0.5 * np.diff(nf4.SCALES).max() * np.abs(absmax - absmax.mean()).max()
    assert (np.abs(decoded - x.reshape(-1, 64)) <= 0.5 * np.diff(nf4.VALUES).max() * absmax + scale_error).all()


def without(stored, key):
    return {k: v for k, v in stored.items() if k != key}


def damaged(stored, key, value):
    return {**stored, key: value}


def with_state(stored, **changes):
    state = json.loads(stored[bitsandbytes.STATE].tobytes()) | changes
    return damaged(stored, bitsandbytes.STATE, np.frombuffer(json.dumps(state).encode(), np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: without(s, "nested_absmax"), "nested_absmax of the bitsandbytes tensor is missing"),
        (lambda s: without(s, bitsandbytes.STATE), "bitsandbytes__nf4 of the bitsandbytes tensor is missing"),
        (lambda s: damaged(s, "absmax", s["absmax"][:-1]), "contradicts its quant_state"),
        (lambda s: damaged(s, "", s[""][:-264]), r"quant_state of shape .*qs uint8\(24, 11, 31\)"),
        (lambda s: damaged(s, "nested_absmax", s["nested_absmax"][:1]), r"nested_absmax float32\(1,\)"),
        (lambda s: damaged(s, "absmax", s["absmax"].astype(np.float32)), r"absmax float32\(24, 11\)"),
        (lambda s: damaged(s, "quant_map", s["quant_map"][::-1]), "quant_map that is not NF4's"),
        (lambda s: damaged(s, bitsandbytes.STATE, np.zeros(3, np.uint8)), "quant_state of bitsandbytes is damaged"),
        (lambda s: damaged(s, bitsandbytes.STATE, np.full(10**5, ord("["), np.uint8)), "is damaged"),
        (lambda s: with_state(s, blocksize=128), "only matrices in blocks of 64 and 256"),
        (lambda s: with_state(s, shape=[24, 705]), "only matrices in blocks of 64 and 256"),
        (lambda s: with_state(s, shape=[2, 12, 704]), "only matrices in blocks of 64 and 256"),
        (lambda s: with_state(s, shape=None), "quant_state of bitsandbytes is damaged"),
        (lambda s: with_state(s, shape=[2**40, 2**40]), "contradicts its quant_state"),
        (lambda s: with_state(s, nested_offset="?"), "contradicts its quant_state"),
    ],
)
def test_contradictions_are_refused(reference, damage, message):
    with pytest.raises(qjax.QjaxError, match=message):
        bitsandbytes.from_parts(damage(reference[0]))


def test_has_no_bytes_of_a_gguf_file():
    with pytest.raises(qjax.QjaxError, match="no GGML type id"):
        qjax.quantize(np.ones((3, 64), np.float32), "NF4").to_bytes()
    with pytest.raises(qjax.QjaxError, match="256 blocks share a scale"):
        NF4.unpack(np.zeros((1, 1, NF4.type_size), np.uint8))
    with pytest.raises(qjax.QjaxError, match="256 blocks share a scale"):
        NF4.pack(qjax.quantize(np.ones((3, 64), np.float32), "NF4").fields)


# In tensors: rows share the second scales, and still stand alone.


def stack_of_matrices(*shape):
    return (np.random.default_rng(0).standard_normal(shape) * 0.02).astype(np.float32)


@pytest.mark.parametrize("shape", [(24, 704), (3, 64), (2, 24, 704)])
@pytest.mark.parametrize("rows", [1, slice(2), np.array([[2], [0]])], ids=["one", "slice", "array"])
def test_rows_are_those_of_the_whole(shape, rows):
    """Two groups of 256 blocks that end within a row; less than one; a stack."""
    t = qjax.quantize(stack_of_matrices(*shape), "NF4")
    index = (slice(None), rows) if len(shape) == 3 else rows
    ggml.assert_same_values(NF4, qjax.dequantize(t[index]), np.asarray(qjax.dequantize(t))[index])
    assert t[index].nbytes == nf4.NF4_F32().nbytes(t[index].shape)


def test_products_under_vmap_and_scan():
    x = stack_of_matrices(5, 704)
    t = qjax.quantize(stack_of_matrices(2, 24, 704), "NF4")
    dense = np.asarray(qjax.dequantize(t), np.float64)
    bound = 704 * 2.0**-24 * np.einsum("bi,soi->sbo", np.abs(x), np.abs(dense))
    exact = np.einsum("bi,soi->sbo", x.astype(np.float64), dense)
    mapped = jax.vmap(lambda w: qjax.matmul(jnp.asarray(x), w))(t)
    scanned = jax.lax.scan(lambda _, w: (None, qjax.matmul(jnp.asarray(x), w)), None, t)[1]
    for y in (mapped, scanned):
        assert (np.abs(np.asarray(y) - exact) <= bound).all()


@pytest.fixture(scope="module")
def random_model():
    """Of matrices of two shapes, for each is a quantizer to compile."""
    config = Config("llama", 2, 128, 128, 2, 2, 64, 2048, 64, 1e-5, 1e4, tied=True)
    rng, shapes = np.random.default_rng(0), transformer.tensor_shapes(config)
    tensors = {name: jnp.asarray(rng.standard_normal(shape) * 0.1, jnp.float32) for name, shape in shapes.items()}
    return Model(config, transformer.stack(tensors, config), Tokenizer.from_folder(hub.BUNDLED["tiny"]))


def test_a_model_is_saved_and_loaded(random_model, tmp_path):
    """With the same weights.  Where rows change places (attn_q, attn_k), absmax are float32 from then on."""
    model = random_model.quantize(NF4)
    model.save(tmp_path)
    again = qjax.load(tmp_path)
    kinds = {name: t.format.name for name, t in again.tensors.items() if isinstance(t, qjax.QTensor)}
    assert set(kinds.values()) == {"NF4", "NF4_F32"}
    for name, t in model.tensors.items():
        if not isinstance(t, qjax.QTensor):
            np.testing.assert_array_equal(again.tensors[name], t)
            continue
        assert t.format == NF4
        assert kinds[name] == ("NF4_F32" if name.endswith(("attn_q.weight", "attn_k.weight")) else "NF4")
        ggml.assert_same_values(NF4, qjax.dequantize(again.tensors[name]), qjax.dequantize(t))

    def decoded(w):
        return qjax.dequantize(w) if isinstance(w, qjax.QTensor) else w

    params = jax.tree.map(decoded, again.params, is_leaf=lambda w: isinstance(w, qjax.QTensor))
    dense = dataclasses.replace(again, params=params).logits([1, 2, 3, 4])
    np.testing.assert_allclose(again.logits([1, 2, 3, 4]), dense, rtol=0, atol=1e-4 * np.abs(dense).max())
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(qjax.QjaxError, match="NF4.* has no GGUF type"):
        again.save(tmp_path / "model.gguf")


def test_a_folder_is_quantized_to_a_gguf_file(random_model, tmp_path):
    """Through the weights that it stands for, some rows at a time."""
    random_model.quantize(NF4).save(tmp_path / "nf4")
    folder, target = qjax.load(tmp_path / "nf4"), tmp_path / "model.gguf"
    quantize_file(tmp_path / "nf4", target, "Q8_0", allow_requantize=True)
    for name, t in qjax.load(target).tensors.items():
        source = folder.tensors[name]
        if isinstance(source, qjax.QTensor):
            expected = qjax.quantize(qjax.dequantize(source), "Q8_0")
            np.testing.assert_array_equal(t.to_bytes(), expected.to_bytes(), err_msg=name)


def test_damage_in_a_folder_names_the_tensor(random_model, tmp_path):
    from safetensors.numpy import load_file, save_file

    random_model.quantize({r"blk\.0\.ffn_up": NF4}).save(tmp_path)
    stored, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    for damage in (without(stored, f"{name}.absmax"), damaged(stored, f"{name}.{bitsandbytes.STATE}", np.uint8([5]))):
        save_file(damage, tmp_path / "model.safetensors")
        with pytest.raises(qjax.QjaxError, match=rf"model.safetensors: {name}: .*(absmax|damaged)"):
            qjax.load(tmp_path)
