"""Recipes and round-to-nearest: which tensor gets what, what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Affine, QjaxError, formats
from qjax.methods import recipes, rtn
from qjax.tensor import QTensor

MATRIX = (64, 96)
TENSORS = {
    "token_embd.weight": jnp.ones(MATRIX),
    "blk.0.attn_norm.weight": jnp.ones(96, jnp.bfloat16),
    "blk.0.attn_q.weight": jnp.ones(MATRIX),
    "blk.0.attn_q.bias": jnp.ones(64),
    "blk.0.attn_q_norm.weight": jnp.ones((2, 96)),
    "blk.0.ffn_down.weight": jnp.ones(MATRIX, jnp.bfloat16),
    "output_norm.weight": jnp.ones(96),
}
UNTIED = TENSORS | {"output.weight": jnp.ones(MATRIX)}


def chosen(recipe, tensors=TENSORS, **options):
    plan = rtn.plan(tensors, recipes.recipe(recipe), rtn.Options(**options))
    return {name: format.name for name, format in plan.items() if format is not None}


# What llama-quantize does with these names (llama-quant.cpp): 1-D tensors and norms stay float32, the head is finer.
@pytest.mark.parametrize(
    ("recipe", "tensors", "expected"),
    [
        (
            "Q4_0",
            TENSORS,
            {"token_embd.weight": "Q8_0", "blk.0.attn_q.weight": "Q4_0", "blk.0.ffn_down.weight": "Q4_0"},
        ),
        (
            "q5_1",
            UNTIED,
            {"token_embd.weight": "Q5_1", "output.weight": "Q8_0"}
            | {"blk.0.attn_q.weight": "Q5_1", "blk.0.ffn_down.weight": "Q5_1"},
        ),
        ("F32", TENSORS, {"blk.0.ffn_down.weight": "F32"}),
        (
            formats.get("Q4_1"),
            TENSORS,
            dict.fromkeys(("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight"), "Q4_1"),
        ),
        (
            {r"attn_.*\.weight": "Q5_0", "attn_q": "Q8_0", "ffn": Affine(bits=3)},
            TENSORS,
            {"token_embd.weight": "F16", "blk.0.attn_q.weight": "Q5_0"}
            | {"blk.0.ffn_down.weight": "Affine(3 bits, block 32, symmetric)"},
        ),
        (recipes.COPY, TENSORS, {}),
    ],
)
def test_who_gets_what(recipe, tensors, expected):
    assert chosen(recipe, tensors) == expected | {"blk.0.attn_norm.weight": "F32"}


def test_file_types_are_llama_cpps_numbers():
    gguf = pytest.importorskip("gguf")
    for name in recipes.names():
        suffix = f"MOSTLY_{name}" if name != "F32" else "ALL_F32"
        assert recipes.recipe(name).file_type == gguf.LlamaFileType[suffix]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("Q4_O", "unknown file type 'Q4_O'. Did you mean Q4_1 or Q4_0"),
        ({"(": "Q4_0"}, "no regular expression"),
        ({"attn": "Q9"}, "unknown format 'Q9'"),
    ],
)
def test_bad_recipes(recipe, message):
    with pytest.raises(QjaxError, match=message.replace("(", r"\(").replace("?", r"\?")):
        recipes.recipe(recipe)


def test_row_that_does_not_divide_is_named():
    tensors = {"token_embd.weight": jnp.ones(MATRIX), "blk.3.ffn_down.weight": jnp.ones((4, 100))}
    with pytest.raises(
        QjaxError, match=r"^blk.3.ffn_down.weight: row length 100 is not a multiple of 32 \(Q4_0 block\)"
    ):
        chosen("Q4_0", tensors)


def test_requantizing_is_refused_unless_asked_for():
    tensors = {"token_embd.weight": qjax.quantize(np.ones(MATRIX, np.float32), "Q4_1")}
    with pytest.raises(QjaxError, match="token_embd.weight: is Q4_1 already.*--allow-requantize"):
        chosen("Q5_0", tensors)
    assert chosen("Q5_0", tensors, allow_requantize=True) == {"token_embd.weight": "Q8_0"}
    assert chosen(formats.get("Q4_1"), tensors) == {}, "what is there already is left alone"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights_are_named(bad):
    x = jnp.ones(MATRIX).at[3, 5].set(bad)
    with pytest.raises(QjaxError, match=r"^w: 1 of 6144 weights are NaN or infinite, the first at \(3, 5\)"):
        rtn.quantize_tensor("w", x, formats.get("Q4_0"))
    asked = rtn.quantize_tensor("w", x, formats.get("Q4_0"), rtn.Options(allow_nonfinite=True))
    finite = np.asarray(qjax.dequantize(asked))[:3]
    np.testing.assert_array_equal(finite, 1)


def test_overflowing_scales_are_named():
    with pytest.raises(QjaxError, match="^w: weights of up to 1e[+]10 overflow what Q8_0 can hold"):
        rtn.quantize_tensor("w", jnp.full(MATRIX, 1e10), formats.get("Q8_0"))


def test_plain_formats_give_arrays():
    x = jnp.linspace(-1, 1, 96)[None]
    for name in ("F32", "F16", "BF16"):
        result = rtn.quantize_tensor("w", x, formats.get(name))
        assert not isinstance(result, QTensor)
        np.testing.assert_array_equal(result, x.astype(result.dtype))
