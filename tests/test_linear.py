"""matmul and embed against float64 numpy, tiled and whole, and through JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import formats

import qjax
from qjax import QjaxError
from qjax.formats import Affine
from qjax.ops import linear
from qjax.ops.kernels import tiles
from qjax.ops.kernels.columns import columns
from qjax.ops.sharded import shard

pytestmark = pytest.mark.in_haste

WEIGHTS = (
    "dense", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "NF4",
    Affine(bits=3, symmetric=False), Affine(block_size="tensor"),
)  # fmt: skip


@functools.cache
def factors(kind, d_out, d_in, *batch):
    """x, w as matmul takes it, and w in float64."""
    x = np.random.default_rng(1).standard_normal((*batch, d_in)).astype(np.float32)
    return jnp.asarray(x), *matrix(kind, d_out, d_in)


@functools.cache
def matrix(kind, d_out, d_in):
    if kind in formats.LARGEST:
        t = formats.drawn(kind, d_out, d_in, size=d_in**-0.5)
    else:
        w = np.random.default_rng(0).standard_normal((d_out, d_in)).astype(np.float32) / d_in**0.5
        if kind == "dense":
            return jnp.asarray(w), np.asarray(w, np.float64)
        t = qjax.quantize(w, kind)
    return t, np.asarray(qjax.dequantize(t), np.float64)


def rounding_bound(x, w, eps):
    """A sum of n products rounded to ``eps`` in any order: n eps sum |x w| (Higham 2002, section 3.1)."""
    return x.shape[-1] * eps * (np.abs(np.asarray(x, np.float64)) @ np.abs(w).T)


FLOAT32_EPS = 2.0**-24


@pytest.mark.parametrize(
    ("kind", "batch"),
    [
        pytest.param(kind, batch, marks=() if kind in ("dense", "Q4_0") or batch == (2, 3) else pytest.mark.exact)
        for kind in WEIGHTS for batch in [(), (1,), (5,), (2, 3), (200,)]
    ],
    ids=formats.label,
)  # fmt: skip
def test_matmul_is_x_times_w_transposed(kind, batch):
    x, w, exact = factors(kind, 48, 192, *batch)
    y = qjax.matmul(x, w)
    assert (y.shape, y.dtype) == ((*batch, 48), jnp.float32)
    assert (np.abs(y - np.asarray(x, np.float64) @ exact.T) <= rounding_bound(x, exact, FLOAT32_EPS)).all()


@pytest.mark.parametrize(
    ("kind", "rows"), [*((kind, 7) for kind in WEIGHTS), ("dense", 200), ("Q4_0", 200)], ids=formats.label
)
def test_bfloat16_rounds_the_factors_and_sums_in_float32(kind, rows):
    x, w, exact = factors(kind, 48, 192, rows)
    y = qjax.matmul(x, w, dtype=jnp.bfloat16)
    assert y.dtype == jnp.float32
    xb, wb = (np.asarray(a, jnp.bfloat16).astype(np.float64) for a in (x, exact.astype(np.float32)))
    assert (np.abs(y - xb @ wb.T) <= rounding_bound(xb, wb, FLOAT32_EPS)).all()
    # Far from float32's result, so that the test above cannot pass by computing in float32.
    assert not (np.abs(y - np.asarray(x, np.float64) @ exact.T) <= rounding_bound(x, exact, FLOAT32_EPS)).all()


@pytest.mark.parametrize("rows", [7, 200])
@pytest.mark.parametrize("kind", ["dense", "Q4_0", "Q6_K", "BF16", Affine(bits=3)], ids=formats.label)
def test_int8_rounds_each_row_to_steps_of_its_own(kind, rows):
    """Against the same in float64: the product of the rounded factors, and the stated distance from the exact one."""
    x, w, exact = factors(kind, 48, 256, rows)
    y = np.asarray(qjax.matmul(x, w, dtype=jnp.int8))
    x = np.asarray(x, np.float64)
    step_x, step_w = (np.abs(a).max(axis=-1, keepdims=True) / 127 for a in (x, exact))
    rounded = np.rint(x / step_x) @ np.rint(exact / step_w).T * step_x * step_w[:, 0]
    far = (np.abs(x) @ step_w.repeat(256, 1).T + step_x.repeat(256, 1) @ np.abs(exact).T) / 2
    far += 256 / 4 * step_x * step_w[:, 0] + 2.0**-22 * np.abs(rounded)
    assert (np.abs(y - x @ exact.T) <= far).all()
    # What lies halfway between two steps in float64 may lie beside it in float32: 127 is off by 2^-16 there.
    near_x, near_w = (np.abs(np.abs(a) % 1 - 0.5) < 2.0**-15 for a in (x / step_x, exact / step_w))
    flips = near_x @ (np.abs(exact) + step_w).T * step_x + (np.abs(x) + step_x) @ near_w.T * step_w[:, 0]
    assert (np.abs(y - rounded) <= flips + 2.0**-21 * np.abs(rounded)).all()
    assert (near_x.mean(), near_w.mean()) < (0.001, 0.001)
    assert y.dtype == np.float32
    assert np.abs(y - x @ exact.T).max() > 10 * np.abs(y).max() * 2.0**-24


@pytest.mark.parametrize("dtype", [jnp.int16, jnp.int32, jnp.uint8])
def test_other_integers_are_refused(dtype):
    x, w, _ = factors("Q4_0", 48, 192, 7)
    with pytest.raises(QjaxError, match=f"{dtype.__name__}, expected float32, bfloat16 or int8"):
        qjax.matmul(x, w, dtype=dtype)


def test_int8_of_nothing_but_zeros():
    w = qjax.quantize(jnp.zeros((48, 64)), "Q4_0")
    np.testing.assert_array_equal(qjax.matmul(jnp.zeros((3, 64)), w, dtype=jnp.int8), np.zeros((3, 48)))


def test_the_dtype_is_that_of_x_by_default():
    x, w, _ = factors("Q8_0", 48, 192, 7)
    np.testing.assert_array_equal(qjax.matmul(x.astype(jnp.bfloat16), w), qjax.matmul(x, w, dtype=jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("kind", "d_out"),
    [
        *(("dense", 8193), ("Q4_0", 8193), (Affine(bits=3), 8193), ("dense", 16384)),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in (("Q5_1", 8193), ("BF16", 8193), ("NF4", 8193), ("Q4_0", 16384))
        ),
    ],
    ids=formats.label,
)
def test_tiles_give_what_the_whole_gives(kind, d_out, dtype):
    """Above 2^21 weights the product is made tile by tile, the last one smaller if rows are left over."""
    d_in = 256
    assert d_out * d_in > tiles._TILE_WEIGHTS
    x, w, exact = factors(kind, d_out, d_in, 3)
    y = np.asarray(qjax.matmul(x, w, dtype=dtype))
    assert y.shape == (3, d_out)
    xr, wr = (np.asarray(a).astype(dtype).astype(np.float64) for a in (x, exact.astype(np.float32)))
    assert (np.abs(y - xr @ wr.T) <= rounding_bound(xr, wr, FLOAT32_EPS)).all()
    rows = [0, 2**21 // d_in - 1, 2**21 // d_in, d_out - 1]  # both sides of a seam, and the ends
    alone = jax.jit(lambda x, w: qjax.matmul(x, w[np.array(rows)], dtype=dtype))(x, w)
    assert (np.abs(y[:, rows] - alone) <= 2 * rounding_bound(xr, wr[rows], FLOAT32_EPS)).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "NF4"])
def test_the_temporary_stays_below_a_dense_copy(kind):
    """One tile of 8 MiB is dense at a time, although the whole is 64 MiB, in a loop as well as alone."""
    w = jax.eval_shape(lambda: qjax.quantize(jnp.zeros((16384, 1024)), kind))
    x = jax.ShapeDtypeStruct((1, 1024), jnp.float32)

    def loop(x, w):
        return jax.lax.fori_loop(0, 4, lambda _, x: qjax.matmul(x, w)[:, :1024], x)

    for program in (qjax.matmul, loop):
        memory = jax.jit(program).lower(x, w).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 20 * 2**20


def test_many_rows_decode_one_layer_at_a_time():
    """Where the product is larger than the dense matrix that is decoded whole, but not before its turn."""
    layers = jax.eval_shape(lambda: jax.vmap(lambda w: qjax.quantize(w, "Q4_0"))(jnp.zeros((32, 512, 512))))
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    run = jax.jit(lambda x, layers: jax.lax.scan(lambda x, w: (qjax.matmul(x, w), None), x, layers)[0])
    memory = run.lower(x, layers).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 2**20  # all 32 take 32 MiB in float32


@pytest.mark.parametrize(("kind", "rows"), [("dense", 5), ("Q4_0", 5), ("Q5_1", 5), ("Q4_0", 200)])
def test_gradients_go_through_x(kind, rows):
    x, w, exact = factors(kind, 48, 192, rows)
    out = np.random.default_rng(1).standard_normal((rows, 48)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: (qjax.matmul(x, w) * out).sum()))(x)
    assert (np.abs(gradient - out @ exact) <= rounding_bound(out, exact.T, FLOAT32_EPS)).all()


def test_bfloat16_gradients_are_products_of_bfloat16():
    """Both factors are rounded to bfloat16, their products summed in float32, and the sum rounded once more."""
    x, w, _ = factors("dense", 48, 192, 5)
    x, w = (jnp.asarray(a).astype(jnp.bfloat16) for a in (x, w))
    out = np.random.default_rng(1).standard_normal((5, 48)).astype(np.float32)
    gradients = jax.grad(lambda x, w: (qjax.matmul(x, w) * out).sum(), argnums=(0, 1))(x, w)
    xr, wr, outr = (np.asarray(a).astype(jnp.bfloat16).astype(np.float64) for a in (x, w, out))
    for gradient, (a, b) in zip(gradients, ((outr, wr), (outr.T, xr)), strict=True):
        assert gradient.dtype == jnp.bfloat16
        error = np.abs(np.asarray(gradient, np.float64) - a @ b)
        assert (error <= rounding_bound(a, b.T, FLOAT32_EPS) + 2.0**-8 * np.abs(a @ b)).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_under_vmap_and_scan(kind):
    x, w, exact = factors(kind, 48, 192, 5)
    bound = 2 * rounding_bound(x, exact, FLOAT32_EPS)
    whole = qjax.matmul(x, w)
    np.testing.assert_array_less(np.abs(jax.vmap(lambda row: qjax.matmul(row, w))(x) - whole), bound)
    scanned = jax.lax.scan(lambda _, row: (None, qjax.matmul(row, w)), None, x)[1]
    np.testing.assert_array_less(np.abs(scanned - whole), bound)

    experts = jax.tree.map(lambda a: np.stack([a, a[::-1]]), w)
    both = np.asarray(jax.vmap(lambda w: qjax.matmul(x, w))(experts))
    np.testing.assert_array_less(np.abs(both[1][:, ::-1] - whole), bound)


@pytest.mark.parametrize(
    ("kind", "ids"),
    [*((kind, [[0, 5], [5, 47]]) for kind in WEIGHTS), *((kind, ids) for kind in ("dense", "NF4") for ids in ([3], 7))],
    ids=formats.label,
)
def test_embed_takes_rows(kind, ids):
    _, w, exact = factors(kind, 48, 192)
    rows = jax.jit(qjax.embed)(w, np.asarray(ids))
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, exact[np.asarray(ids)].astype(np.float32))


def test_embed_decodes_only_those_rows():
    w = jax.eval_shape(lambda: qjax.quantize(jnp.zeros((32768, 512)), "Q4_0"))
    memory = jax.jit(qjax.embed).lower(w, jax.ShapeDtypeStruct((4,), jnp.int32)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**20


# ── which body ───────────────────────────────────────────────────────────────────────────────────────


def explained(x, w, platform="cpu", **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_platform", lambda w: platform)
        return qjax.explain_matmul(x, w, **options)


def test_the_body_follows_from_platform_rows_and_format():
    _, dense, _ = factors("dense", 48, 192)
    _, nibbles, _ = factors("Q4_0", 48, 192)
    _, looked_up, _ = factors("NF4", 48, 192)
    few, many = jnp.ones((2, 8, 192)), jnp.ones((17, 192))
    assert repr(explained(few, nibbles)) == "tiles: Q4_0 on cpu, 16 rows of x: decoded as float32 where used"
    assert repr(explained(few, nibbles, "gpu")) == "pallas: Q4_0 on a GPU, 16 rows of x (up to 16)"
    assert explained(few, nibbles, "gpu").fitting == ("pallas", "tiles")
    assert explained(many, nibbles, "gpu").body == "tiles"
    assert explained(few[:0], nibbles, "gpu").body == "tiles"
    assert explained(few, looked_up, "gpu").body == "tiles"
    assert repr(explained(few, dense, "gpu")) == "dense: w is dense float32 as it is multiplied"
    assert repr(explained(few, dense, dtype=jnp.bfloat16)).startswith("tiles: float32 on cpu, 16 rows of x: decoded as")
    laid_out = columns(nibbles)
    assert repr(explained(few, laid_out)) == "columns: w is laid out with its rows last"
    assert repr(explained(few, shard(nibbles, jax.make_mesh((1, 1), ("data", "model")), None))).startswith("sharded: w")


def test_where_a_matrix_lies_is_known_but_for_tracers():
    x, w, _ = factors("Q4_0", 48, 192, 5)
    where = next(iter(w.fields.qs.devices())).platform
    assert qjax.explain_matmul(x, w).why.startswith(f"Q4_0 on {where}, 5 rows")
    shapes = jax.eval_shape(lambda: (x, w))
    assert qjax.explain_matmul(*shapes).body == qjax.explain_matmul(x, w).body


def test_a_body_can_be_asked_for():
    x, w, exact = factors("dense", 48, 192, 5)
    bound = rounding_bound(x, exact, FLOAT32_EPS)
    for body in ("dense", "tiles"):
        assert qjax.explain_matmul(x, w, body=body).body == body
        assert (np.abs(qjax.matmul(x, w, body=body) - np.float64(x) @ exact.T) <= bound).all()


def test_a_body_that_does_not_fit_is_an_error():
    x, w, _ = factors("Q4_0", 48, 192, 5)
    fits = r"What fits: tiles \(Q4_0 on cpu, 5 rows of x: decoded as float32 where used\)\.$"
    for body, why in {
        "tile": "is unknown",
        "dense": "does not fit: w is Q4_0, not dense float32",
        "columns": "does not fit: w is not laid out as Columns",
        "sharded": "does not fit: w is not Sharded",
        "pallas": "does not fit: it needs a GPU, w is on cpu",
    }.items():
        with pytest.raises(qjax.QjaxError, match=f"^matmul: body '{body}' {why}. {fits}"):
            explained(x, w, body=body)
    with pytest.raises(qjax.QjaxError, match="17 rows of x, not 1 to 16"):
        explained(jnp.ones((17, 192)), w, "gpu", body="pallas")
    with pytest.raises(qjax.QjaxError, match="the kernel does not decode NF4"):
        explained(x, factors("NF4", 48, 192)[1], "gpu", body="pallas")
    with pytest.raises(qjax.QjaxError, match="body 'tile' is unknown"):
        qjax.matmul(x, w, body="tile")
