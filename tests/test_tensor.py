"""QTensor as a container: shapes, bytes, and how it travels through JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import formats, ggml

import qjax
from qjax import QTensor
from qjax.formats import Affine

FORMATS = ("Q4_0", "Q5_1", "Q8_0", "F32", "BF16", Affine(bits=3), Affine(bits=1, block_size=8))


def random_weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(params=FORMATS, ids=formats.label)
def format(request):
    return qjax.formats.get(request.param)


def assert_equal(a: QTensor, b: QTensor):
    assert a.format == b.format
    for mine, other in zip(a.fields, b.fields, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()  # NaN equals itself


def test_shape_and_size(format):
    t = qjax.quantize(random_weights(2, 6, 64), format)
    assert (t.shape, t.ndim, t.size) == ((2, 6, 64), 3, 768)
    assert t.nbytes == format.nbytes((2, 6, 64)) == sum(np.asarray(f).nbytes for f in t.fields)
    assert t.bpw == format.bpw
    assert t.fields._fields == tuple(field.name for field in format.layout)


def test_the_round_trip_is_close(format):
    x = random_weights(6, 64)
    error = np.abs(np.asarray(qjax.dequantize(qjax.quantize(x, format))) - x)
    step = np.abs(x).max() / 2 ** (format.bpw / 2)  # far coarser than any format here
    assert error.max() < 2 * step


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dequantize_to_a_dtype_rounds_the_float32_result(dtype):
    t = qjax.quantize(random_weights(6, 64), "Q5_1")
    assert qjax.dequantize(t, dtype).dtype == dtype
    np.testing.assert_array_equal(qjax.dequantize(t, dtype), np.asarray(qjax.dequantize(t)).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_quantize_computes_in_float32(dtype):
    x = random_weights(4, 64).astype(dtype)
    assert_equal(qjax.quantize(x, "Q4_1"), qjax.quantize(np.asarray(x, np.float32), "Q4_1"))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F32", "F16", "BF16"])
@pytest.mark.parametrize("rows", [(), (3,), (2, 3)])
def test_bytes_and_back(name, rows):
    format = qjax.formats.get(name)
    shape = (*rows, 96)
    data = np.random.default_rng(0).integers(0, 256, format.nbytes(shape), np.uint8)
    t = QTensor.from_bytes(data, name, shape)
    assert t.shape == shape
    assert t.to_bytes().shape == (*rows, format.nbytes((96,)))
    ggml.assert_same_bytes(format, t.to_bytes(), data)
    assert_equal(QTensor.from_bytes(t.to_bytes(), format, shape), t)
    assert_equal(QTensor.from_bytes(data.reshape(-1, 1), name, shape), t)


def test_bytes_of_the_wrong_number():
    with pytest.raises(qjax.QjaxError, match=r"Q4_0 tensor of shape \(2, 64\) takes 72 bytes, found 71"):
        QTensor.from_bytes(np.zeros(71, np.uint8), "Q4_0", (2, 64))
    with pytest.raises(qjax.QjaxError, match="row length 48 is not a multiple of 32"):
        QTensor.from_bytes(np.zeros(54, np.uint8), "Q4_0", (2, 48))
    with pytest.raises(qjax.QjaxError, match="NF4 has no GGML type id"):
        QTensor.from_bytes(np.zeros(qjax.formats.get("NF4").nbytes((2, 64)), np.uint8), "NF4", (2, 64))


def test_a_format_without_an_id_has_no_file_layout():
    with pytest.raises(qjax.QjaxError, match="no GGML type id"):
        qjax.quantize(random_weights(2, 32), Affine()).to_bytes()


@pytest.mark.parametrize("rows", [1, slice(None, None, -2), np.array([[3], [0]])], ids=["one", "slice", "array"])
def test_rows_stay_quantized(format, rows):
    t = qjax.quantize(random_weights(6, 64), format)
    np.testing.assert_array_equal(qjax.dequantize(t[rows]), np.asarray(qjax.dequantize(t))[rows])
    assert t[rows].format == format


def test_rows_of_a_stack(format):
    t = qjax.quantize(random_weights(2, 6, 64), format)
    dense = np.asarray(qjax.dequantize(t))
    np.testing.assert_array_equal(qjax.dequantize(t[1]), dense[1])
    np.testing.assert_array_equal(qjax.dequantize(t[0, 2:4]), dense[0, 2:4])
    np.testing.assert_array_equal(qjax.dequantize(t[:, 3]), dense[:, 3])


@pytest.mark.parametrize("rows", [1, slice(2, 4), np.array([[3], [0]])], ids=["one", "slice", "array"])
def test_rows_with_a_scale_of_the_whole_tensor(rows):
    t = qjax.quantize(random_weights(2, 6, 64), Affine(block_size="tensor"))
    np.testing.assert_array_equal(qjax.dequantize(t[0, rows]), np.asarray(qjax.dequantize(t))[0, rows])


def test_it_is_a_pytree_that_stacks_scans_and_maps(format):
    matrices = [qjax.quantize(random_weights(6, 64, seed=i), format) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *matrices)
    assert stacked.shape == (3, 6, 64)
    seen = []

    def body(carry, t):
        seen.append(t.shape)
        return carry + qjax.dequantize(t).sum(), qjax.dequantize(t)

    _, scanned = jax.lax.scan(body, 0.0, stacked)
    mapped = jax.vmap(lambda t: (seen.append(t.shape), qjax.dequantize(t))[1])(stacked)
    assert set(seen) == {(6, 64)}
    for i, matrix in enumerate(matrices):
        np.testing.assert_array_equal(np.asarray(scanned)[i], qjax.dequantize(matrix))
        np.testing.assert_array_equal(np.asarray(mapped)[i], qjax.dequantize(matrix))


def test_jit_takes_and_returns_it(format):
    t = qjax.quantize(random_weights(6, 64), format)
    traced = []

    @jax.jit
    def double(t):
        traced.append(t.format)
        return QTensor(t.fields, t.format), qjax.dequantize(t)

    same, dense = double(t)
    double(same)
    assert traced == [format]  # the format is static, and an equal one does not compile again
    assert_equal(same, t)
    np.testing.assert_array_equal(dense, qjax.dequantize(t))


def test_device_put_moves_every_field(format):
    device = jax.devices()[0]
    t = jax.device_put(qjax.quantize(random_weights(6, 64), format), device)
    assert all(f.devices() == {device} for f in t.fields)
    mesh = jax.sharding.Mesh(np.array([device]), ("rows",))
    sharded = jax.device_put(t, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows")))
    assert_equal(sharded, t)


def test_it_can_be_built_abstractly(format):
    t = jax.eval_shape(lambda x: qjax.quantize(x, format), jax.ShapeDtypeStruct((1024, 4096), jnp.float32))
    assert (t.shape, t.nbytes) == ((1024, 4096), format.nbytes((1024, 4096)))


def test_reprs_say_what_it_is_and_never_the_data():
    t = qjax.quantize(random_weights(256, 4096), "Q4_0")
    assert repr(t) == "QTensor(Q4_0, 256×4096, 4.50 bpw, 576.0 KiB)"
    html = t._repr_html_()
    assert repr(t) in html
    assert "<code>qs</code></td><td>uint8</td><td>256×128×16" in html
    assert "0x" not in html
    assert repr(qjax.formats.get("Q4_0")) == "Q4_0 (32 weights in 18 bytes, 4.5 bpw)"
    assert "4.5 bits per weight" in qjax.formats.get("Q4_0")._repr_html_()
    assert "per row" in repr(Affine(block_size="row"))
    assert repr(qjax.quantize(random_weights(4, 64), Affine(block_size="row"))).startswith("QTensor(Affine(4 bits")


@pytest.mark.parametrize("name", ["MXFP4", "Q8_0", "F16"])
def test_importance_is_refused_where_nothing_uses_it(name):
    with pytest.raises(qjax.QjaxError, match=f"{name} has no importance-weighted search"):
        qjax.quantize(random_weights(2, 32), name, importance=np.ones(32, np.float32))


@pytest.mark.parametrize(
    ("row", "format", "hint"),
    [
        (100, "Q4_0", r"multiple of 32 \(Q4_0 block\)\. Use F16, BF16 or Affine\(block_size='row'\)"),
        (32, Affine(block_size=64), r"multiple of 64 .* Use one of MXFP4, Q4_0, IQ4_NL, Q4_1\."),
        (576, "Q6_K", r"multiple of 256 .* Use one of Q5_1, Q5_0, Q4_1, Q8_0\."),
        (576, "Q2_K", r"multiple of 256 .* Use one of Q2_0, NF4, MXFP4, "),
    ],
)
def test_a_row_that_does_not_divide_names_what_fits(row, format, hint):
    """The nearest in bits per weight, of those that can be quantized to."""
    with pytest.raises(qjax.QjaxError, match=f"row length {row} is not a {hint}"):
        qjax.quantize(random_weights(2, row), format)


@pytest.mark.parametrize("name", ["I8", "I32", "F64", "F16", "Q8_0", "Q8_K", "TQ1_0", "NVFP4", "NF4"])
def test_encodable_formats_are_those_that_encode(name):
    format, x = qjax.formats.get(name), jax.ShapeDtypeStruct((2, 256), jnp.float32)
    if format.encodable:
        assert jax.eval_shape(lambda x: qjax.quantize(x, name), x).shape == (2, 256)
    else:
        with pytest.raises(qjax.QjaxError, match=f"{name} .* Use "):
            jax.eval_shape(lambda x: qjax.quantize(x, name), x)


def test_a_format_that_needs_importance_is_refused_without():
    class Needy(type(qjax.formats.get("Q4_0"))):
        name, needs_importance = "Needy", True

    with pytest.raises(qjax.QjaxError, match="Needy needs an importance matrix"):
        qjax.quantize(random_weights(2, 32), Needy())
    assert qjax.quantize(random_weights(2, 32), Needy(), importance=np.ones(32, np.float32)).shape == (2, 32)
