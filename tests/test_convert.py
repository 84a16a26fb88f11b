"""Folders to GGUF and back: against llama.cpp's converter, byte for byte, and against transformers.

The converter runs where llama.cpp's sources are at hand and Python has torch and transformers; what
it says of some models is stored here.
"""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import fails
from oracles.programs import converted
from safetensors.numpy import load_file, save_file
from test_architectures import FOLDERS, WINDOWED, hf_shapes, transformers_logits
from test_architectures import write as write_model
from test_evaluate import byte_tokenizer

import qjax
from qjax import formats
from qjax.convert import to_folder, to_gguf
from qjax.io import gguf, hub, imatrix, names, splits
from qjax.io.imatrix import Entry, Imatrix
from qjax.io.tokenizer import Tokenizer
from qjax.methods import recipes
from qjax.methods.plan import plan
from qjax.models import transformer
from qjax.models.config import Config
from qjax.quantize_file import quantize_file
from qjax.source import open_source

pytestmark = pytest.mark.in_haste

# ── what the converter writes, stored ────────────────────────────────────────────────────────────────

FIRST = "general.architecture general.type general.name general.version general.finetune general.basename "
FIRST += "general.size_label A.block_count A.context_length A.embedding_length A.feed_forward_length "
FIRST += "A.attention.head_count A.attention.head_count_kv "
NORM, LENGTHS = "A.attention.layer_norm_rms_epsilon ", "A.attention.key_length A.attention.value_length "
LAST = "general.file_type A.vocab_size A.rope.dimension_count general.quantization_version"
# The entries of each architecture but its tokenizer's; "A" stands for it.
ENTRIES = {
    "llama": f"{FIRST}A.rope.freq_base {NORM}{LENGTHS}{LAST}",
    "llama, linear": f"{FIRST}A.rope.scaling.type A.rope.scaling.factor A.rope.freq_base {NORM}{LENGTHS}{LAST}",
    "mistral": f"{FIRST}A.rope.freq_base {NORM}{LENGTHS}{LAST}",
    "qwen2": f"{FIRST}A.rope.freq_base {NORM}general.file_type general.quantization_version",
    "qwen3": f"{FIRST}A.rope.freq_base {NORM}{LENGTHS}general.file_type general.quantization_version",
    "smollm3": f"{FIRST}A.rope.freq_base {NORM}{LAST}",
}

IN_FLOAT32 = ("ffn_gate_inp.weight", "position_embd.weight")  # matrices that are never rounded


@pytest.fixture(params=FOLDERS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    """A folder of each architecture, named so that its name says all."""
    path = tmp_path / "Tiny-owl-1B-Instruct-v0.1"
    write_model(path, kind)
    byte_tokenizer().to_folder(path)
    return path


def test_metadata_and_order_are_the_converters(folder, kind):
    source = open_source(folder)
    if kind in ENTRIES:
        expected = ENTRIES[kind].replace("A.", f"{source.config.architecture}.").split()
        assert [key for key in source.metadata if not key.startswith("tokenizer.")] == expected
    assert source.metadata["general.name"] == "Tiny Owl 1B Instruct v0.1"
    made = {name: step.format.name for name, step in steps(to_gguf(folder, None, "bf16", dry_run=True)).items()}
    config, factors = source.config, list(source.config.factors)
    in_file = sorted((name for name in made if name not in factors), key=lambda name: names.to_hf(name, config))
    assert [*made] == factors + in_file
    matrices = {name for name, t in source.tensors.items() if len(t.shape) > 1 and not name.endswith(IN_FLOAT32)}
    assert made == {name: "BF16" if name in matrices else "F32" for name in source.tensors}


def steps(written):
    return {step.name: step for step in written.plan.steps}


SHAPES = {
    "token_embd.weight": (32, 512),
    "output.weight": (32, 512),
    "position_embd.weight": (64, 512),
    "output_norm.weight": (512,),
    "blk.0.attn_q.weight": (32, 512),
    "blk.0.attn_q.bias": (32,),
    "blk.0.attn_q_norm.weight": (2, 16),
    "blk.0.ffn_gate_inp.weight": (8, 512),
    "blk.0.ffn_up_exps.weight": (8, 64, 512),
    "blk.0.ffn_down_exps.weight": (8, 512, 96),
    "blk.0.ffn_down.weight": (512, 40),
}
ALWAYS_F32 = ("position_embd", "output_norm", "attn_q.bias", "attn_q_norm", "ffn_gate_inp")


@pytest.mark.parametrize(
    ("outtype", "others"),
    [
        ("f32", {}),
        ("F16", {}),
        ("bf16", {}),
        ("q8_0", {"blk.0.ffn_down.weight": "F16"}),
        ("tq1_0", dict.fromkeys(("token_embd.weight", "output.weight", "blk.0.ffn_down.weight"), "F16")),
        ("tq2_0", dict.fromkeys(("token_embd.weight", "output.weight", "blk.0.ffn_down.weight"), "F16")),
    ],
)
def test_types_are_the_converters(outtype, others):
    """conversion/base.py prepare_tensors: what always is F32, the ends of a ternary model, rows that do not divide."""
    if outtype.startswith("tq"):
        others = others | {"blk.0.ffn_down_exps.weight": "F16"}
    tensors = {name: np.zeros(shape, np.float16) for name, shape in SHAPES.items()}
    made = plan(tensors, recipes.outtype(outtype), {}, in_order=True)
    assert [step.name for step in made.steps] == [*SHAPES]
    for step in made.steps:
        f32 = any(part in step.name for part in ALWAYS_F32)
        assert step.format.name == ("F32" if f32 else others.get(step.name, outtype.upper())), step.name


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["float32", "bfloat16", "float16"], "BF16"),
        (["float16", "bfloat16", "float32"], "F16"),
        (["float32", "float32", "float32"], "F16"),
    ],
)
def test_auto_is_the_first_matrix_of_16_bits(tmp_path, dtypes, expected):
    """In the order of the converter: lm_head, embed_tokens, the layers; norms do not count."""
    config = write_model(tmp_path / "m", "llama")
    byte_tokenizer().to_folder(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    chosen = dict(zip(("lm_head.weight", "model.embed_tokens.weight"), dtypes[:2]))
    cast = {
        name: x.astype("float16" if x.ndim == 1 and expected != "F16" else chosen.get(name, dtypes[2]))
        for name, x in weights.items()
    }
    save_file(cast, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    made = steps(to_gguf(tmp_path / "m", None, dry_run=True))
    assert made["blk.0.ffn_up.weight"].format.name == expected
    assert made["output_norm.weight"].format.name == "F32"
    assert config.n_layers == 5


# ── in one pass ──────────────────────────────────────────────────────────────────────────────────────


def importance(path):
    rng = np.random.default_rng(0)
    entries = {
        name: Entry(rng.random((1, tensor.shape[-1]), np.float32) ** 4 * 100, np.array([100], np.float32))
        for name, tensor in open_source("tiny").tensors.items()
        if len(tensor.shape) > 1 and name.startswith("blk")
    }
    imatrix.write(path, Imatrix(entries, ("text",), 7, 512))
    return path


def listed(*types):
    return [pytest.param(*case, marks=pytest.mark.exact) for case in types]


@pytest.mark.parametrize(
    ("outtype", "between", "weighed"),
    [("q4_0", "bf16", False), *listed(("q4_k_m", "f32", False), ("iq4_xs", "bf16", True), ("Q2_K", "f32", True))],
)
def test_one_pass_is_as_good_as_two(tmp_path, outtype, between, weighed):
    """The same bytes as by way of a file of the converter, and as `qjax quantize` from the folder."""
    matrix = importance(tmp_path / "imatrix") if weighed else None
    to_gguf("tiny", tmp_path / "one.gguf", outtype, imatrix=matrix)
    to_gguf("tiny", tmp_path / "between.gguf", between)
    quantize_file(tmp_path / "between.gguf", tmp_path / "two.gguf", outtype, imatrix=matrix)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    quantize_file("tiny", tmp_path / "three.gguf", outtype, imatrix=matrix)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "three.gguf").read_bytes()


def test_shards_of_a_folder(tmp_path):
    """A sharded folder to shards of GGUF: what one file has."""
    to_folder("tiny", tmp_path / "tiny", max_bytes=2_000_000)
    assert len([*(tmp_path / "tiny").glob("*.safetensors")]) > 3
    written = to_gguf(tmp_path / "tiny", tmp_path / "s.gguf", max_tensors=20, max_bytes=3 * 10**6)
    to_gguf(tmp_path / "tiny", tmp_path / "w.gguf")
    assert written.path == str(tmp_path / "s-00001-of-00003.gguf")
    whole, shards = gguf.read(tmp_path / "w.gguf"), gguf.read(written.path)
    assert shards.metadata == whole.metadata
    assert all(np.array_equal(shards.tensors[name].data, t.data) for name, t in whole.tensors.items())
    assert [*shards.tensors] == [*whole.tensors]


@pytest.mark.parametrize(
    ("max_tensors", "max_bytes", "first", "expected"),
    [
        (2, None, False, ["ab", "cd", "e"]),
        (None, 100, False, ["a", "b", "cde"]),  # b alone has more
        (None, 110, False, ["a", "b", "cde"]),
        (2, 100, False, ["a", "b", "cd", "e"]),
        (2, None, True, ["", "ab", "cd", "e"]),
        (None, None, False, ["abcde"]),
        (5, 1000, True, ["", "abcde"]),
    ],
)
def test_division_is_gguf_pys(max_tensors, max_bytes, first, expected):
    sizes = {"a": 40, "b": 120, "c": 60, "d": 31, "e": 9}
    tensors = {name: Sized(size) for name, size in sizes.items()}
    divided = splits.divide(tensors, max_tensors, max_bytes, first)
    assert ["".join(group) for group in divided] == expected
    peer = pytest.importorskip("gguf")
    writer = peer.GGUFWriter(
        None, "llama", split_max_tensors=max_tensors or 0, split_max_size=max_bytes or 0, small_first_shard=first
    )
    for name, size in sizes.items():
        writer.add_tensor(name, np.zeros(size, np.int8))
    assert [[*group] for group in writer.tensors] == [[*group] for group in divided]


class Sized(gguf.Stored):
    def __init__(self, size):
        self.shape, self.format = (size,), formats.get("I8")

    data = load = None


# ── the way back ─────────────────────────────────────────────────────────────────────────────────────


def test_there_and_back(folder, kind, tmp_path):
    """Weights, config and tokenizer are those of the start, in one file and in shards."""
    before = load_file(folder / "model.safetensors")
    to_gguf(folder, tmp_path / "m.gguf", "f32")
    assert to_folder(tmp_path / "m.gguf", tmp_path / "back").outtype == "F32"
    written = to_folder(tmp_path / "m.gguf", tmp_path / "shards", max_bytes=100_000)
    assert len(written.files) > 5
    after = load_file(tmp_path / "back" / "model.safetensors")
    shards = {name: x for file in written.files for name, x in load_file(file).items()}
    assert before.keys() == after.keys() == shards.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x)
        np.testing.assert_array_equal(shards[name], x)
    if kind != WINDOWED:
        configs = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back"))
        assert Config.from_hf(next(configs)) == Config.from_hf(next(configs))
    assert Tokenizer.from_folder(tmp_path / "back").to_gguf().typed == Tokenizer.from_folder(folder).to_gguf().typed


def test_transformers_loads_what_came_back(folder, kind, tmp_path):
    """The same logits to the last bit; and its tokenizer's ids are ours."""
    if kind == WINDOWED:
        pytest.skip("llama.cpp's files have no window")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    to_gguf(folder, tmp_path / "m.gguf", "f32")
    to_folder(tmp_path / "m.gguf", tmp_path / "back", max_bytes=100_000)
    np.testing.assert_array_equal(transformers_logits(tmp_path / "back"), transformers_logits(folder))
    text = "Ünïcode, and 3 owls."
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")(text)["input_ids"]
    assert ids == Tokenizer.from_folder(folder).encode(text)


@pytest.mark.parametrize(
    ("outtype", "dtype"), [("auto", "float16"), ("f32", "float32"), ("bf16", "bfloat16"), ("F16", "float16")]
)
def test_quantized_weights_are_decoded(tmp_path, outtype, dtype):
    quantize_file("tiny", tmp_path / "q.gguf", "Q4_0", allow_requantize=True)
    to_folder(tmp_path / "q.gguf", tmp_path / "back", outtype)
    weights = load_file(tmp_path / "back" / "model.safetensors")
    assert {x.dtype.name for x in weights.values()} == {dtype}
    tensor = gguf.read(tmp_path / "q.gguf").tensors["blk.1.ffn_down.weight"]
    decoded = np.asarray(qjax.dequantize(tensor.load())).astype(dtype)
    np.testing.assert_array_equal(weights["model.layers.1.mlp.down_proj.weight"], decoded)
    described = json.loads((tmp_path / "back" / "config.json").read_text())
    assert described["torch_dtype"] == dtype


def test_the_type_stays_on_the_way_back(tmp_path):
    """The tiny model's bfloat16, though norms are float32 in between: the file of the start."""
    to_gguf("tiny", tmp_path / "m.gguf")
    to_folder(tmp_path / "m.gguf", tmp_path / "back")
    before, after = (path / "model.safetensors" for path in (hub.BUNDLED["tiny"], tmp_path / "back"))
    assert before.read_bytes() == after.read_bytes()


MEASURE = """
import resource, sys
from qjax.convert import to_folder
to_folder("tiny", sys.argv[2] + "0", "f32")  # JAX and its compiler are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
to_folder(sys.argv[1], sys.argv[2], "f32")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.exact
@pytest.mark.skipif(sys.platform != "linux", reason="resource counts in other units elsewhere")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """760 MB of float16 in 20 layers, of which one tensor at a time is in memory."""
    config = Config("llama", 20, 1024, 4096, 8, 2, 128, 256, 64, 1e-5, 1e4, True)
    entries = byte_tokenizer().to_gguf() | {key: value for key, (_, value) in config.to_gguf().items()}
    shapes = transformer.tensor_shapes(config)
    gguf.write(tmp_path / "big.gguf", entries, {n: Zeros(shape) for n, shape in shapes.items()})
    command = [sys.executable, "-c", MEASURE, tmp_path / "big.gguf", tmp_path / "back"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 256


class Zeros(gguf.Stored):
    def __init__(self, shape):
        self.shape, self.format = shape, formats.get("F16")

    load = None

    @property
    def data(self):
        return np.zeros(self.format.nbytes(self.shape), np.uint8)


# ── the converter itself ─────────────────────────────────────────────────────────────────────────────

# Deliberate differences, which no model below has: the name of a pre-tokenizer that does the same as another
# (starcoder's is written as smollm); an lm_head.weight equal to the embedding that config.json calls tied is left out;
# weights that overflow float16 are an error; a head_dim in config.json that follows from the rest is not written for
# qwen2, qwen3moe and smollm3, and is for Mixtral though config.json has none; Gemma's other scales of scores and orders
# of windows are written, which llama.cpp takes for granted (SAID_BY_US).

NARROW = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 11,  # so that 10 comes before 2
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
WIDE = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 1}
CONVERTER = "convert_hf_to_gguf.py"
OF_FOLDERS = ("head_dim", "no_rope_layers")  # which depend on the sizes there
VOCABULARIES = {"llama3": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2", "smollm3": "llama-bpe", "qwen3moe": "qwen2"}
VOCABULARIES |= {kind: "llama-spm" for kind in FOLDERS if kind.startswith("gemma")}
VOCABULARIES |= {kind: "phi-3" for kind in FOLDERS if kind.startswith("phi3")}
# What it needs, or what else would be a deliberate difference.
OF_CONVERTER = {kind: {"head_dim": 16} for kind in ("mixtral", "gemma2", "gemma3")}
OF_CONVERTER |= {kind: {"head_dim": 32} for kind in ("qwen3", "llama3")}
OF_CONVERTER |= {"gpt2": {"n_ctx": 256, "n_layer": 11}, "phi3": {"original_max_position_embeddings": 48}}
SAID_BY_US = ("gemma3, short", "gemma3, wide")


def model_for_the_converter(folder, sources, kind, dtype="bfloat16", **changes):
    """A folder whose tokenizer the converter knows by what it does."""
    vocabulary = sources / "models" / f"ggml-vocab-{VOCABULARIES.get(kind, 'gpt-2')}.gguf"
    tokenizer = Tokenizer.from_gguf(gguf.read(vocabulary).metadata)
    described = NARROW | {key: value for key, value in FOLDERS[kind].items() if key not in OF_FOLDERS} | changes
    described |= {"vocab_size": tokenizer.vocab_size, "torch_dtype": dtype}
    described |= OF_CONVERTER.get(kind.partition(",")[0], {})
    config = Config.from_hf(described)
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape, np.float32).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
        for name, shape in hf_shapes(config).items()
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer.to_folder(folder)
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def same(ours, theirs):
    """Fails where two files differ, saying where."""
    if ours.read_bytes() == theirs.read_bytes():
        return
    ours, theirs = gguf.read_shard(ours), gguf.read_shard(theirs)
    assert [*ours.metadata.typed.items()] == [*theirs.metadata.typed.items()]
    assert [(n, t.format.name, t.shape) for n, t in ours.tensors.items()] == [
        (n, t.format.name, t.shape) for n, t in theirs.tensors.items()
    ]
    for name, tensor in theirs.tensors.items():
        assert np.array_equal(ours.tensors[name].data, tensor.data), name
    pytest.fail("the files differ in their padding")


@pytest.mark.exact
def test_files_of_every_architecture_are_the_converters(llama_cpp_sources, kind, tmp_path):
    if kind in SAID_BY_US:
        pytest.skip("here more is said than by the converter")
    folder = model_for_the_converter(tmp_path / "Tiny-owl-7M-Instruct-v0.1", llama_cpp_sources, kind)
    converted(llama_cpp_sources / CONVERTER, folder, tmp_path / "theirs.gguf")
    to_gguf(folder, tmp_path / "ours.gguf")
    same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.exact
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto"])
def test_files_of_every_type_are_the_converters(llama_cpp_sources, tmp_path, outtype, dtype):
    folder = model_for_the_converter(tmp_path / "model", llama_cpp_sources, "llama", dtype, **WIDE)
    converted(llama_cpp_sources / CONVERTER, folder, tmp_path / "theirs.gguf", "--outtype", outtype)
    to_gguf(folder, tmp_path / "ours.gguf", outtype)
    same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.exact
@pytest.mark.parametrize(
    "flags",
    [
        ["--split-max-tensors", 20],
        ["--split-max-size", "1M"],
        ["--split-max-size", "300K", "--split-max-tensors", 50, "--no-tensor-first-split"],
        ["--no-tensor-first-split", "--split-max-tensors", 1000],
        ["--split-max-size", "1G"],
        ["--model-name", "A name", "--metadata", "METADATA"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_options_are_the_converters(run, llama_cpp_sources, tmp_path, flags):
    """On a folder in shards, with a card."""
    folder = model_for_the_converter(tmp_path / "one", llama_cpp_sources, "qwen3")
    weights = load_file(folder / "model.safetensors")
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    parts = {file: dict([*weights.items()][i::3]) for i, file in enumerate(files)}
    for file, part in parts.items():
        save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    card = "---\nlicense: mit\nbase_model: Org/Base-7B\ntags: [a, b]\nlanguage:\n- en\n- no\n---\n# A model"
    (folder / "README.md").write_text(card)
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 20, "repetition_penalty": 1.05}))
    (tmp_path / "given.json").write_text(json.dumps({"general.author": "me", "general.tags": ["c"]}))
    flags = [tmp_path / "given.json" if flag == "METADATA" else flag for flag in flags]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    converted(llama_cpp_sources / CONVERTER, folder, tmp_path / "theirs" / "m.gguf", *flags)
    code, _, err = run("convert", folder, tmp_path / "ours" / "m.gguf", *flags)
    assert (code, err) == (0, "")
    listings = [sorted(path.name for path in (tmp_path / who).iterdir()) for who in ("ours", "theirs")]
    assert listings[0] == listings[1]
    for name in listings[0]:
        same(tmp_path / "ours" / name, tmp_path / "theirs" / name)


# ── command line ─────────────────────────────────────────────────────────────────────────────────────


def test_on_the_command_line(run, tmp_path):
    code, out, _ = run("convert", "tiny", tmp_path / "t.gguf", "--outtype", "q8_0", "--model-name", "Owl")
    assert (code, out.startswith(f"{tmp_path / 't.gguf'}: Q8_0, ")) == (0, True)
    assert gguf.read(tmp_path / "t.gguf").metadata["general.name"] == "Owl"
    code, out, _ = run("convert", tmp_path / "t.gguf", tmp_path / "t", "--json")
    report = json.loads(out)
    assert (code, report["outtype"], report["files"]) == (0, "F16", [str(tmp_path / "t" / "model.safetensors")])
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run("convert", tmp_path / "t.gguf", tmp_path / "u", "--dry-run", "--outtype", "bf16")
    assert (code, "in BF16, 7.0 MiB; dry run, nothing written" in out) == (0, True)
    code, out, _ = run("convert", "tiny", tmp_path / "u.gguf", "--dry-run", "--outtype", "q4_k_m")
    assert (code, "dry run, nothing written" in out) == (0, True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "OUT.gguf", "--outtype", "q4_j"], "unknown file type 'q4_j'. Did you mean"),
        (["tiny", "OUT", "--outtype", "q4_0"], "outtype 'q4_0': a folder holds f32, f16, bf16; or give auto"),
        (["EMPTY", "OUT.gguf"], "config.json: there is no such file"),
        (["nothing", "OUT.gguf"], "nothing: no such file or folder"),
        (["tiny", "FOLDER.gguf"], "cannot write: it is not a regular file"),
        (["tiny", "FILE"], "is a file, and a folder is to be written"),
        (["TINY", "TINY"], "is the model to be read"),
        (["tiny", "NOWHERE/m.gguf"], "the folder"),
        (["tiny", "OUT", "--model-name", "x"], "a folder is written without such options"),
        (["FILE.gguf", "OUT.gguf", "--model-name", "x"], "a GGUF file has its metadata; change them with `qjax set`"),
        (["FILE.gguf", "OUT.gguf", "--outtype", "q8_0"], "is Q6_K already"),
        (["tiny", "OUT.gguf", "--metadata", "FILE"], "not a JSON file"),
        (["tiny", "OUT.gguf", "--metadata", "GIVEN"], "metadata 'general.nmae': no such key"),
        (
            ["tiny", "OUT.gguf", "--split-max-size", "1T"],
            "size '1T': expected a number of bytes, or K, M or G of them",
        ),
        (["tiny", "OUT.gguf", "--outtype", "iq2_xs"], "needs the tensor's importance"),
    ],
)
def test_bad_input_writes_nothing(run, tmp_path, arguments, message):
    (tmp_path / "FOLDER.gguf").mkdir()
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("a file")
    (tmp_path / "GIVEN").write_text('{"general.nmae": "x"}')
    (tmp_path / "TINY").symlink_to(hub.BUNDLED["tiny"])
    if "FILE.gguf" in arguments:
        quantize_file("tiny", tmp_path / "FILE.gguf", "Q4_0")
    before = sorted(tmp_path.iterdir())
    fails(run("convert", *(tmp_path / a if a[0].isupper() else a for a in arguments)), message)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("300K", 300_000), ("5GB", 5 * 10**9), ("2M", 2 * 10**6), ("7B", 7)]
)
def test_sizes_as_the_converter_takes_them(text, size):
    assert splits.parse_size(text, fine=True) == size
