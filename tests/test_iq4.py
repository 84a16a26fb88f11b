"""IQ4_NL and IQ4_XS: what test_bytes.py does not see."""

import jax
import numpy as np
import pytest
from oracles import ggml, weights

import qjax

NAMES = ("IQ4_NL", "IQ4_XS")
VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml-common.h


@pytest.mark.parametrize("name", NAMES)
def test_where_the_scale_is_zero_in_float16(name):
    """There, and only there, the search may end elsewhere; the decoded zeros are equal."""
    format = qjax.formats.get(name)
    x = weights.draw(weights.float16_denormal_scale, 2**16)
    ours, theirs = (
        np.asarray(data).reshape(-1, format.type_size)
        for data in (qjax.quantize(x, name).to_bytes(), ggml.reference(name, x))
    )
    kept = (theirs[:, :2].copy().view(np.float16) != 0)[:, 0]
    assert kept.mean() > 0.2
    ggml.assert_same_bytes(format, ours[kept], theirs[kept])
    np.testing.assert_array_equal(ggml.dequantize(name, ours), ggml.dequantize(name, theirs))


@pytest.mark.parametrize("name", NAMES)
def test_representable_weights_survive(name):
    """A block of table entries has a scale without any error, so the search takes that or an equal one."""
    rng = np.random.default_rng(0)
    x = rng.choice(VALUES, (32, 256)).astype(np.float32)
    x[:, ::32] = -127
    x *= 2.0 ** rng.integers(-8, 0, (32, 1))
    np.testing.assert_array_equal(qjax.dequantize(qjax.quantize(x, name)), x)


@pytest.mark.parametrize("name", NAMES)
def test_no_rounding_to_replace(name):
    with pytest.raises(qjax.QjaxError, match=f"{name} has no final rounding step"):
        qjax.quantize(np.ones((1, 256), np.float32), name, rounding="floor")


def test_activations_get_ggmls_quick_rule():
    """Without a search: quantize_row_iq4_nl_ref.  The codes of a zero block are arbitrary there."""
    format = qjax.formats.get("IQ4_NL")
    kinds = {**weights.MODEL_LIKE, "ties": weights.ties, "bfloat16": weights.bfloat16, "student_t": weights.student_t}
    x = np.concatenate([weights.draw(kind, 2**14) for kind in kinds.values()])
    fields = jax.jit(format.encode_activations)(x.reshape(len(x), -1, 32))
    ours, theirs = np.asarray(format.pack(fields)).reshape(-1, 18), ggml.libggml_quantize_activations("IQ4_NL", x)
    theirs = theirs.reshape(-1, 18)
    kept = (theirs[:, :2].copy().view(np.float16) != 0)[:, 0]
    assert kept.mean() > 0.9
    ggml.assert_same_bytes(format, ours[kept], theirs[kept], x.reshape(-1, 32)[kept])
    assert not ours[~kept, :2].any()
