"""Recipes and plans: which tensor gets what, in the words of llama.cpp's own snapshots; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import sampled, shared
from oracles import ggml, schemas

import qjax
from qjax import Affine, QjaxError, formats
from qjax.io.imatrix import Entry, Imatrix
from qjax.methods import importance, recipes, rtn
from qjax.methods.plan import plan
from qjax.tensor import QTensor

MATRIX = (64, 96)
TENSORS = {
    "token_embd.weight": jnp.ones(MATRIX),
    "blk.0.attn_norm.weight": jnp.ones(96, jnp.bfloat16),
    "blk.0.attn_q.weight": jnp.ones(MATRIX),
    "blk.0.attn_q.bias": jnp.ones(64),
    "blk.0.attn_q_norm.weight": jnp.ones((2, 96)),
    "blk.0.ffn_down.weight": jnp.ones(MATRIX, jnp.bfloat16),
    "blk.0.ffn_gate_inp.weight": jnp.ones((2, 96)),
    "output_norm.weight": jnp.ones(96),
}
UNTIED = TENSORS | {"output.weight": jnp.ones(MATRIX)}
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": np.array([2], np.int32),
}


def planned(recipe, tensors=TENSORS, metadata=METADATA, **options):
    """The names of the formats of the tensors that change."""
    steps = plan(tensors, recipes.recipe(recipe, **options), metadata).steps
    return {step.name: step.format.name for step in steps if step.changes}


@pytest.mark.parametrize(
    "model", ["gemma-3-4b-it", "gpt-oss-120b", "meta-llama-3.1-70b-instruct", "qwen3-0.6b", "qwen3-14b"]
)
def test_types_are_those_of_llama_cpps_snapshots(model):
    schema = schemas.read(shared(f"peers/llama-quantize-types/{model}.schema"))
    for file_type, expected in schema.types.items():
        steps = plan(schema.tensors, recipes.recipe(file_type), schema.metadata).steps
        assert {step.name: step.format.name for step in steps} == expected, file_type


MATRICES = ("token_embd", "blk.0.attn_q", "blk.0.ffn_down")


# What llama-quantize does with these names (llama-quant.cpp): vectors, norms and routers stay, the head is finer.
@pytest.mark.parametrize(
    ("recipe", "tensors", "options", "expected"),
    [
        ("Q4_0", TENSORS, {}, dict.fromkeys(MATRICES, "Q4_0") | {"token_embd": "Q8_0"}),
        ("2", TENSORS, {"pure": True}, dict.fromkeys(MATRICES, "Q4_0")),
        ("q5_1", UNTIED, {}, dict.fromkeys(MATRICES, "Q5_1") | {"output": "Q8_0"}),
        ("Q5_1", UNTIED, {"leave_output_tensor": True}, dict.fromkeys(MATRICES, "Q5_1")),
        (
            "Q5_1",
            UNTIED,
            {
                "output_tensor_type": "q4_1",
                "token_embedding_type": "q4_0",
                "tensor_types": {"FFN": "q8_0", "f": "q4_0"},
            },
            {"output": "Q4_1", "token_embd": "Q4_0", "blk.0.attn_q": "Q5_1", "blk.0.ffn_down": "Q8_0"},
        ),
        ("F32", TENSORS, {}, {"blk.0.ffn_down": "F32"}),
        (formats.get("Q4_1"), TENSORS, {}, dict.fromkeys(MATRICES, "Q4_1")),
        (
            {r"attn_.*\.weight": "Q5_0", "attn_q": "Q8_0", "ffn": Affine(bits=3)},
            TENSORS,
            {},
            {"token_embd": "F16", "blk.0.attn_q": "Q5_0", "blk.0.ffn_down": "Affine(3 bits, block 32, symmetric)"},
        ),
        (recipes.COPY, TENSORS, {}, {}),
        ("copy", TENSORS, {"tensor_types": {"ffn": "F16"}}, {"blk.0.ffn_down": "F16"}),
    ],
)
def test_who_gets_what(recipe, tensors, options, expected):
    named = {f"{name}.weight": format for name, format in expected.items()}
    assert planned(recipe, tensors, **options) == named | {"blk.0.attn_norm.weight": "F32"}


def test_file_types_are_llama_cpps_numbers():
    gguf = pytest.importorskip("gguf")
    newer = {"Q1_0": 40, "Q2_0": 41}  # than the peer; ggml.md section 2
    for name, (number, _) in recipes.FILE_TYPES.items():
        suffix = f"MOSTLY_{name}" if name != "F32" else "ALL_F32"
        assert number == newer.get(name) or number == gguf.LlamaFileType[suffix]
        assert recipes.recipe(str(number)) == recipes.recipe(name.lower())


def test_the_table_is_well_formed():
    roles = {role for _, _, role in recipes.ROLES}
    for rule in recipes.RULES:
        assert {*rule.file_types.split()} <= recipes.FILE_TYPES.keys()
        assert {*rule.roles.split()} <= roles
        assert {c.removeprefix("not ") for c in rule.when.split(", ") if c} <= recipes.CONDITIONS.keys()
        assert formats.get(rule.format).name == rule.format
    for wanted, other in recipes.FALLBACKS.items():
        assert formats.get(wanted).block_size > formats.get(other).block_size


def test_every_row_of_the_table_can_decide():
    """A row that an earlier one always forestalls would be a mistake in the order."""
    for i, rule in enumerate(recipes.RULES):
        for file_type in rule.file_types.split() or recipes.FILE_TYPES:
            roles = rule.roles.split() or ["other"]
            earlier = [row for role in roles for row in recipes.rules(file_type, role) if row in recipes.RULES[:i]]
            conditions = {*rule.when.split(", ")}
            if not any({*row.when.split(", ")} <= conditions | {""} for row in earlier):
                break
        else:
            pytest.fail(f"{rule} is never reached")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("Q4_O", "unknown file type 'Q4_O'. Did you mean Q4_1 or Q4_0"),
        ("1234", "unknown file type '1234'"),
        ({"(": "Q4_0"}, "no regular expression"),
        ({"attn": "Q9"}, "unknown format 'Q9'"),
        ({"conv": "Q4_0"}, "'conv': matches no matrix of this model. Names are like token_embd.weight"),
        ({"norm": "Q4_0"}, "'norm': matches no matrix"),
    ],
)
def test_bad_recipes(recipe, message):
    with pytest.raises(QjaxError, match=message.replace("(", r"\(").replace("?", r"\?")):
        planned(recipe)


@pytest.mark.parametrize("text", ["ffn_down", "=Q4_0", "ffn_down="])
def test_bad_assignments(text):
    with pytest.raises(QjaxError, match="expected REGEX=TYPE"):
        recipes.assignments([text])
    assert recipes.assignments(["a=q4_0", "b=q8_0", "a=q8_0"]) == {"a": formats.get("Q4_0"), "b": formats.get("Q8_0")}


def test_rows_that_do_not_divide():
    """A Format is meant, so it is an error; a file type falls back as llama-quantize does, and the plan says so."""
    tensors = TENSORS | {"blk.0.ffn_down.weight": jnp.ones((4, 100)), "blk.0.attn_v.weight": jnp.ones((4, 64))}
    with pytest.raises(
        QjaxError, match=r"^blk.0.ffn_down.weight: row length 100 is not a multiple of 32 \(Q4_0 block\)"
    ):
        planned(formats.get("Q4_0"), tensors)
    made = plan(tensors, recipes.recipe("Q4_K_M"), METADATA)
    assert {s.name: (s.wanted.name, s.format.name) for s in made.fallbacks if s.wanted} == {
        "blk.0.attn_q.weight": ("Q4_K", "Q5_0"),
        "blk.0.attn_v.weight": ("Q6_K", "Q8_0"),
        "blk.0.ffn_down.weight": ("Q6_K", "F16"),
    }
    assert "3 of 9 tensors fall back" in str(made)
    with pytest.raises(QjaxError, match=r"^token_embd.weight: row length 96 is not a multiple of 128 \(Q1_0 block\)"):
        planned("Q1_0", pure=True)


def test_missing_metadata_are_named():
    with pytest.raises(QjaxError, match=r"llama.attention.head_count: expected a whole number, found None.*--pure"):
        planned("Q4_K_M", metadata={"general.architecture": "llama", "llama.block_count": 1})
    assert planned("Q4_0", metadata={}, pure=True)["blk.0.attn_q.weight"] == "Q4_0"


def test_requantizing_is_refused_unless_asked_for():
    tensors = {"token_embd.weight": qjax.quantize(np.ones(MATRIX, np.float32), "Q4_1")}
    made = plan(tensors, recipes.recipe("Q5_0"), METADATA)
    with pytest.raises(QjaxError, match="token_embd.weight: is Q4_1 already.*--allow-requantize"):
        made.check()
    made.check(allow_requantize=True)
    assert planned("Q5_0", tensors) == {"token_embd.weight": "Q8_0"}
    assert planned(formats.get("Q4_1"), tensors) == {}, "what is there already is left alone"


# ── importance ───────────────────────────────────────────────────────────────────────────────────────


def imatrix(**entries):
    """By tensor, the values of each matrix."""
    stacked = {name: np.atleast_2d(np.asarray(values, np.float32)) for name, values in entries.items()}
    return Imatrix({k: Entry(v, np.ones(len(v), np.float32)) for k, v in stacked.items()}, ("a.txt", "b.txt"), 3, 512)


WIDE = {"blk.0.attn_q.weight": np.ones((4, 256), np.float32), "token_embd.weight": np.ones((8, 256), np.float32)}


def test_a_missing_importance_is_named():
    recipe = recipes.recipe("IQ2_XS")
    with pytest.raises(QjaxError, match=r"^blk.0.attn_q.weight: IQ2_XS needs the tensor's importance.*--imatrix FILE"):
        plan(WIDE, recipe, METADATA).check()
    elsewhere = importance.select(imatrix(**{"blk.7.attn_q.weight": np.ones(256)}))
    with pytest.raises(QjaxError, match=r"^blk.0.attn_q.weight: IQ2_XS needs"):
        plan(WIDE, recipe, METADATA, elsewhere).check()
    there = importance.select(imatrix(**{"blk.0.attn_q.weight": np.ones(256)}))
    plan(WIDE, recipe, METADATA, there).check()
    plan(WIDE, recipes.recipe("Q2_K"), METADATA).check()
    with pytest.raises(QjaxError, match="Q2_K needs"):
        plan(WIDE, recipes.recipe("Q2_K_S"), METADATA).check()


@pytest.mark.parametrize(
    ("values", "message"),
    [(np.ones(255), "has 255 values for it, expected 1 × 256"), (np.full(256, np.nan), "has NaN or infinite values")],
)
def test_a_bad_importance_is_named(values, message):
    bad = importance.select(imatrix(**{"blk.0.attn_q.weight": values}))
    with pytest.raises(QjaxError, match=rf"^blk.0.attn_q.weight: .*{message}"):
        plan(WIDE, recipes.recipe("Q4_K_M"), METADATA, bad)
    embedding = importance.select(imatrix(**{"token_embd.weight": np.ones(255)}))
    plan(WIDE, recipes.recipe("Q4_K_M"), METADATA, embedding).check()


def test_which_entries_count():
    matrix = imatrix(**{"blk.0.attn_q.weight": np.ones(4), "blk.0.ffn_up.weight": np.ones(4), "output.weight": [1.0]})
    assert [*importance.select(matrix, include=["attn", "out"]).by_name] == ["blk.0.attn_q.weight", "output.weight"]
    assert [*importance.select(matrix, exclude=["blk"]).by_name] == ["output.weight"]
    assert not importance.select(None)
    for options, message in (
        ({"include": ["conv"]}, "no entry's name contains 'conv'. Names are like blk.0.attn_q.weight"),
        ({"include": ["a"], "exclude": ["b"]}, "cannot be used together"),
    ):
        with pytest.raises(QjaxError, match=message):
            importance.select(matrix, **options)
    with pytest.raises(QjaxError, match="of which importance matrix"):
        importance.select(None, exclude=["ffn"])


@pytest.mark.parametrize("name", sampled(["Q4_1", "IQ4_NL"], "IQ4_NL"))
def test_experts_have_each_their_own_importance(name, monkeypatch):
    """Also where slabs end inside of rows, which a format that does not weigh rows as a whole lets them."""
    monkeypatch.setattr(rtn, "SLAB_WEIGHTS", (1024, 256))
    monkeypatch.setattr(rtn, "_LARGE_SLABS", 1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 15, 96)).astype(np.float32)
    weights = rng.random((3, 96)).astype(np.float32) ** 4
    options = rtn.Options(importance.select(imatrix(w=weights)))
    ours = rtn.quantize_tensor("w", jnp.asarray(x), formats.get(name), options)
    theirs = np.stack([ggml.reference(name, *expert) for expert in zip(x, weights)])
    ggml.assert_same_bytes(formats.get(name), ours.to_bytes(), theirs, x)
    assert (ours.to_bytes()[1] != ggml.reference(name, x[1], weights[0])).any()


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(3, 32), (1, 2**16 + 32), (2**12 + 3, 32 * 17)])
@pytest.mark.parametrize("format", ["Q8_0", Affine(bits=3, symmetric=False)], ids=str)
def test_slabs_make_the_same_as_the_whole(format, shape):
    """And stand for the same numbers, which are read in slabs, too."""
    _compare_with_the_whole(formats.get(format), shape)


@pytest.mark.parametrize(
    "format", [Affine(bits=3), Affine(block_size="row"), Affine(block_size="tensor"), "NF4"], ids=str
)
def test_blocks_of_any_size_make_the_same_as_the_whole(format, monkeypatch):
    """Longer than a slab, too; and where all share a scale, which slabs must not part."""
    monkeypatch.setattr(rtn, "SLAB_WEIGHTS", (1024, 256))
    monkeypatch.setattr(rtn, "_LARGE_SLABS", 1)
    _compare_with_the_whole(formats.get(format), (2, 5, 448))


def _compare_with_the_whole(format, shape):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    whole = qjax.quantize(x, format)
    slabs = rtn.quantize_tensor("w", jnp.asarray(x), format)
    assert (slabs.format, slabs.shape) == (whole.format, shape)
    jax.tree.map(np.testing.assert_array_equal, slabs.fields, whole.fields)
    read = rtn.quantize_tensor("w", slabs, formats.get("F32"), rtn.Options(allow_requantize=True))
    np.testing.assert_array_equal(read, qjax.dequantize(whole))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights_are_named(bad):
    x = jnp.ones(MATRIX).at[3, 5].set(bad)
    with pytest.raises(QjaxError, match=r"^w: the weight at \(3, 5\) is NaN or infinite"):
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


@pytest.mark.parametrize(
    ("text", "value", "type_name"),
    [
        ("a.b=int:-7", 7, "UINT32"),  # as llama-quantize stores it
        ("a.b=float:1e-5", 1e-5, "FLOAT32"),
        ("a.b=bool:true", True, "BOOL"),
        ("a.b=str:x=int:3", "x=int:3", "STRING"),
    ],
)
def test_overrides(text, value, type_name):
    key, typed = rtn.override(text)
    assert (key, typed.value, typed.type_name) == ("a.b", value, type_name)


@pytest.mark.parametrize("text", ["a", "a=7", "a=u8:7", "=int:7", "a=int:x", "a=bool:yes", "a=int:4294967296"])
def test_bad_overrides(text):
    with pytest.raises(QjaxError, match="override 'a?"):
        rtn.override(text)
