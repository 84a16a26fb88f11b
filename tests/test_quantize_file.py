"""Whole files: equal to llama-quantize's, byte for byte; whole or not there at all; in little memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qjax import QjaxError, cli
from qjax.io import gguf, imatrix, splits
from qjax.io.imatrix import Entry, Imatrix
from qjax.methods import recipes, rtn
from qjax.methods.importance import select
from qjax.methods.plan import plan
from qjax.quantize_file import quantize_file

# ── models of every kind that the mixtures tell apart ────────────────────────────────────────────────

# name: (architecture, layers, heads, key heads, experts, columns)
MODELS = {
    "llama 70B": ("llama", 80, 8, 1, 0, 256),
    "llama 65B": ("llama", 80, 8, 8, 0, 256),
    "mixtral": ("llama", 17, 8, 2, 8, 256),
    "many experts": ("llama", 20, 4, 4, 128, 256),
    "falcon": ("falcon", 17, 8, 1, 0, 256),
    "qwen2 72B": ("qwen2", 80, 8, 2, 0, 256),
    "jais2 70B": ("jais2", 68, 8, 8, 0, 256),
    "phi3": ("phi3", 17, 8, 8, 0, 256),
    "qwen3moe": ("qwen3moe", 16, 8, 1, 16, 256),
    "gpt2": ("gpt2", 12, 4, 4, 0, 256),
    "rows of 96, tied": ("llama", 11, 4, 2, 0, 96),
    "rows of 288, 4 experts": ("llama", 17, 4, 4, 4, 288),
}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A file with the metadata and the names of a model of MODELS, but few rows, and an importance matrix of it."""
    folder, made = tmp_path_factory.mktemp("kinds"), {}

    def make(kind):
        if kind not in made:
            path = folder / f"{len(made)}.gguf"
            tensors = _tensors(*MODELS[kind])
            gguf.write(path, _metadata(*MODELS[kind]), tensors)
            ones = {
                name: np.ones((len(x) if x.ndim > 2 else 1, x.shape[-1]), np.float32) for name, x in tensors.items()
            }
            entries = {k: Entry(v, np.ones(len(v), np.float32)) for k, v in ones.items() if k.startswith("blk")}
            imatrix.write(path.with_suffix(".imatrix"), Imatrix(entries, ("text.txt",), 7, 512))
            made[kind] = path, path.with_suffix(".imatrix")
        return made[kind]

    return make


def _metadata(architecture, n_layers, n_heads, n_kv_heads, n_experts, columns):
    values = {
        "context_length": 64,
        "embedding_length": columns,
        "feed_forward_length": columns,
        "block_count": n_layers,
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.dimension_count": columns // n_heads,
        "vocab_size": 32,
    }
    if n_experts:
        values |= {"expert_count": n_experts, "expert_used_count": 2}
    return {"general.architecture": architecture} | {f"{architecture}.{key}": v for key, v in values.items()}


def _tensors(architecture, n_layers, n_heads, n_kv_heads, n_experts, columns):
    fused = architecture in ("falcon", "phi3", "gpt2")
    attention = ("attn_qkv",) if fused else ("attn_q", "attn_k", "attn_v")
    mlp = ("up", "down") if architecture in ("phi3", "gpt2") else ("gate", "up", "down")
    stack, suffix = ((n_experts,), "_exps") if n_experts else ((), "")
    matrices = {name: (2, columns) for name in (*attention, "attn_output")}
    matrices |= {f"ffn_{name}{suffix}": (*stack, 2, columns) for name in mlp}
    if n_experts:
        matrices |= {"ffn_down_shexp": (2, columns), "ffn_gate_inp": (n_experts, columns)}
    shapes = {"token_embd.weight": (4, columns), "output_norm.weight": (columns,)}
    if architecture == "gpt2":
        shapes["position_embd.weight"] = (64, columns)
    elif columns != 96:
        shapes["output.weight"] = (4, columns)
    for i in range(n_layers):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in (matrices | {"attn_norm": (columns,)}).items()}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def dry_run(llama_cpp, source, file_type, *flags):
    """What llama-quantize plans, {tensor: type}, fallbacks, MiB, bpw, whether an imatrix is wanting; or why not."""
    command = [llama_cpp / "llama-quantize", "--dry-run", *flags, source, file_type]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = ran.stdout + ran.stderr
    if ran.returncode:
        return re.search(r"failed to quantize: (.*)", said)[1]
    types = {}
    for name, before, rest in re.findall(r"\] (\S+) +- \[.*?\], type = +(\S+), (.*)", said):
        after = re.search(r"\((\w+)\)", rest)
        types[name] = (after[1] if after else before).upper()
    fallbacks = re.search(r"WARNING: (\d+) of \d+ tensor", said)
    size, bpw = re.search(r"quant size  = +([\d.]+) MiB \(([\d.]+) BPW", said).groups()
    return types, int(fallbacks[1]) if fallbacks else 0, size, bpw, "will require an imatrix" in said


def summed_up(plan):
    """A plan in the words of `dry_run`."""
    types = {step.name: step.format.name for step in plan.steps}
    lacks = any(step.lacks_imatrix for step in plan.steps)
    return types, len(plan.fallbacks), f"{plan.size_bytes / 2**20:.2f}", f"{plan.bpw:.2f}", lacks


KINDS = [pytest.param(kind, marks=() if kind in ("falcon", "mixtral") else pytest.mark.exact) for kind in MODELS]


@pytest.mark.parametrize("with_imatrix", [False, True], ids=["", "imatrix"])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_are_llama_quantizes(llama_cpp, model_file, kind, with_imatrix):
    source, matrix = model_file(kind)
    file, importance = gguf.read(source), select(matrix if with_imatrix else None)
    for file_type in recipes.FILE_TYPES:
        theirs = dry_run(llama_cpp, source, file_type, *(("--imatrix", matrix) if with_imatrix else ()))
        recipe = recipes.recipe(file_type)
        if isinstance(theirs, str):
            assert (file_type, theirs) == ("Q1_0", "no tensor type fallback is defined for type q1_0")
            with pytest.raises(QjaxError, match=r"row length \d+ is not a multiple of 128 \(Q1_0 block\)"):
                plan(file.tensors, recipe, file.metadata, importance)
        else:
            assert summed_up(plan(file.tensors, recipe, file.metadata, importance)) == theirs, file_type


@pytest.mark.parametrize(
    ("flags", "chosen", "options"),
    [
        (["--pure"], {"pure": True}, {}),
        (["--output-tensor-type", "Q8_0"], {"output_tensor_type": "q8_0"}, {}),
        (["--token-embedding-type", "q5_0"], {"token_embedding_type": "Q5_0"}, {}),
        (["--leave-output-tensor"], {"leave_output_tensor": True}, {}),
        (
            ["--tensor-type", r"blk\.[12]\.ffn=q8_0", "--tensor-type", "FFN_down=q6_K"],
            {"tensor_types": {r"blk\.[12]\.ffn": "q8_0", "FFN_down": "q6_K"}},
            {},
        ),
        # Counters advance by what the mixture decides alone.
        (["--tensor-type", r"blk\.[0-9]\.attn_v=q4_0"], {"tensor_types": {r"blk\.[0-9]\.attn_v": "q4_0"}}, {}),
        (
            ["--override-kv", "llama.attention.head_count_kv=int:4", "--override-kv", "llama.expert_count=int:4"],
            {},
            {"overrides": dict(map(rtn.override, ["llama.attention.head_count_kv=int:4", "llama.expert_count=int:4"]))},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("kind", ["mixtral", "rows of 96, tied"])
def test_options_are_llama_quantizes(llama_cpp, model_file, kind, flags, chosen, options):
    source, _ = model_file(kind)
    if "--override-kv" in flags and not MODELS[kind][4]:
        pytest.skip("needs a model of experts")
    for file_type in ("Q4_K_M", "IQ3_XXS", "Q2_K_S", "MXFP4_MOE"):
        theirs = dry_run(llama_cpp, source, file_type, *flags)
        ours = quantize_file(source, None, recipes.recipe(file_type, **chosen), dry_run=True, **options).plan
        assert summed_up(ours) == theirs, file_type


# ── files ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny model in float32, and an importance matrix of random numbers."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    quantize_file("tiny", path, "F32")
    rng = np.random.default_rng(0)
    entries = {
        name: Entry(rng.random((1, tensor.shape[-1]), np.float32) ** 4 * 100, np.array([100], np.float32))
        for name, tensor in gguf.read(path).tensors.items()
        if len(tensor.shape) > 1 and name.startswith("blk")
    }
    imatrix.write(path.with_suffix(".imatrix"), Imatrix(entries, ("a text", "another"), 7, 512))
    return path


@pytest.fixture(scope="module")
def smollm2_f32(smollm2_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "f32.gguf"
    quantize_file(smollm2_path, path, "F32", allow_requantize=True)
    return path


def same_file(llama_cpp, source, file_type, folder, matrix=None, flags=(), **options):
    """Fails where a file of ours differs from llama-quantize's."""
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    weighed = ("--imatrix", matrix) if matrix else ()
    command = [llama_cpp / "llama-quantize", *weighed, *flags, source, theirs, file_type, "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    quantize_file(source, ours, file_type, imatrix=str(matrix) if matrix else None, **options)
    if ours.read_bytes() == theirs.read_bytes():
        return
    ours, theirs = gguf.read(ours), gguf.read(theirs)
    assert ours.metadata == theirs.metadata
    assert [*ours.tensors] == [*theirs.tensors]
    for name, tensor in theirs.tensors.items():
        assert ours.tensors[name].format == tensor.format, name
        assert np.array_equal(ours.tensors[name].data, tensor.data), name
    pytest.fail("the files differ in the order of their metadata")


def exact(*cases):
    return [pytest.param(case, marks=pytest.mark.exact) for case in cases]


LISTED = exact("Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_S", "Q6_K", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE")


@pytest.mark.parametrize("file_type", ["Q4_0", "COPY", "BF16", *LISTED])
def test_tiny_files_are_llama_quantizes(llama_cpp, tiny, tmp_path, file_type):
    same_file(llama_cpp, tiny, file_type, tmp_path)


@pytest.mark.parametrize("file_type", ["Q4_0", *exact("IQ3_M", "Q4_K_M", "IQ4_XS", "IQ2_XS", "Q2_K_S")])
def test_tiny_files_with_importance_are_llama_quantizes(llama_cpp, tiny, tmp_path, file_type):
    same_file(llama_cpp, tiny, file_type, tmp_path, tiny.with_suffix(".imatrix"))


@pytest.mark.exact
@pytest.mark.parametrize("file_type", ["Q2_K", "Q3_K_M", "Q4_K_M", "IQ4_XS"])
def test_smollm2_files_are_llama_quantizes(llama_cpp, smollm2_f32, tmp_path, file_type):
    same_file(llama_cpp, smollm2_f32, file_type, tmp_path)


def test_metadata_are_llama_quantizes(llama_cpp, tiny, tmp_path):
    overrides = ["general.name=str:other", "a.b=int:-3", "a.c=float:0.1", "a.d=bool:false"]
    same_file(
        llama_cpp,
        tiny,
        "Q8_0",
        tmp_path,
        tiny.with_suffix(".imatrix"),
        ["--exclude-weights", "ffn_up", *(part for text in overrides for part in ("--override-kv", text))],
        exclude_weights=["ffn_up"],
        overrides=dict(map(rtn.override, overrides)),
    )


def test_requantized_files_are_llama_quantizes(llama_cpp, tiny, tmp_path):
    quantize_file(tiny, tmp_path / "q.gguf", "Q8_0")
    with pytest.raises(QjaxError, match="is Q8_0 already"):
        quantize_file(tmp_path / "q.gguf", tmp_path / "ours.gguf", "Q4_0")
    assert not (tmp_path / "ours.gguf").exists()
    same_file(llama_cpp, tmp_path / "q.gguf", "Q4_0", tmp_path, None, ["--allow-requantize"], allow_requantize=True)


@pytest.fixture(scope="module")
def in_shards(model_file):
    """A model whose layers are in another order than that of their names, in shards."""
    whole = gguf.read(model_file("falcon")[0])
    path = whole.paths[0].with_name("shuffled.gguf")
    order = np.random.default_rng(0).permutation(len(whole.tensors))
    gguf.write(path, whole.metadata, {name: whole.tensors[name] for name in np.array([*whole.tensors])[order].tolist()})
    return Path(splits.split(path, path.with_suffix(""), max_tensors=40).files[0].path)


def test_shards_are_llama_quantizes(llama_cpp, in_shards, tmp_path):
    command = [llama_cpp / "llama-quantize", "--keep-split", in_shards, tmp_path / "theirs.gguf", "Q4_K_M", "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    plans = [quantize_file(in_shards, None, "Q4_K_M", keep_split=keep).plan for keep in (False, True)]
    assert len({frozenset(plan.steps) for plan in plans}) == 2, "the order of the layers counts"
    written = quantize_file(in_shards, tmp_path / "ours.gguf", "Q4_K_M", keep_split=True)
    names = sorted(path.name for path in tmp_path.glob("theirs*"))
    assert written.path == str(tmp_path / names[0].replace("theirs", "ours"))
    assert len(names) > 2
    for name in names:
        theirs, ours = (gguf.read_shard(tmp_path / name.replace("theirs", who)) for who in ("theirs", "ours"))
        assert ours.metadata == theirs.metadata
        kinds = ([(tensor.name, tensor.format) for tensor in file.tensors.values()] for file in (ours, theirs))
        assert next(kinds) == next(kinds)
        assert all(np.array_equal(ours.tensors[name].data, theirs.tensors[name].data) for name in theirs.tensors)


# ── whole or not at all ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fails", [KeyboardInterrupt, MemoryError])
def test_interrupted_work_leaves_nothing(tiny, tmp_path, monkeypatch, fails):
    target, calls = tmp_path / "out.gguf", []
    target.write_bytes(b"precious")

    def quantize(*arguments):
        calls.append(arguments)
        if len(calls) > 20:
            raise fails
        return quantize_slab(*arguments)

    quantize_slab = rtn._quantize
    monkeypatch.setattr(rtn, "_quantize", quantize)
    with pytest.raises(fails):
        quantize_file(tiny, target, "Q8_0")
    assert target.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


MEASURE = """
import resource, sys
from qjax.quantize_file import quantize_file
quantize_file(sys.argv[1], sys.argv[3], "Q8_0")  # JAX and its compiler are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize_file(sys.argv[2], sys.argv[3], "Q8_0")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.exact
@pytest.mark.skipif(sys.platform != "linux", reason="resource counts in other units elsewhere")
def test_memory_does_not_grow_with_the_model(tiny, tmp_path):
    """1.6 GB of float16 in two tensors, one of experts."""
    shapes = {"blk.0.ffn_up.weight": (2**19, 1024), "blk.0.ffn_up_exps.weight": (16, 2**14, 1024)}
    metadata = _metadata(*MODELS["llama 65B"])
    gguf.write(tmp_path / "big.gguf", metadata, {k: np.zeros(shape, np.float16) for k, shape in shapes.items()})
    command = [sys.executable, "-c", MEASURE, tiny, tmp_path / "big.gguf", tmp_path / "out.gguf"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 256


# ── command line ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(monkeypatch, capsys):
    """`qjax quantize` with these arguments: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["qjax", "quantize", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, *capsys.readouterr()

    return call


def test_dry_run_on_the_command_line(run, model_file, tmp_path):
    source, _ = model_file("rows of 96, tied")
    types = tmp_path / "types.txt"
    types.write_text("attn_v=Q8_0\nblk.1.ffn_up=f16 ffn_up=q4_1")
    before = {*source.parent.iterdir()}
    code, out, _ = run(
        source, "7", "--dry-run", "--json", "--tensor-type", "ffn_gate=Q5_0", "--tensor-type-file", types
    )
    chosen = {t["name"]: t["format"] for t in json.loads(out)["tensors"]}
    names = ("blk.0.attn_v", "blk.0.ffn_gate", "blk.0.ffn_up", "blk.1.ffn_up", "token_embd")
    assert (code, [chosen[f"{name}.weight"] for name in names]) == (0, ["Q8_0", "Q5_0", "Q4_1", "F16", "Q8_0"])
    code, out, _ = run(source, "Q4_K", "--dry-run")
    assert code == 0
    assert "77 of 90 tensors fall back to other formats; dry run, nothing written" in out
    assert {*source.parent.iterdir()} == before


def test_a_file_beside_the_source(run, model_file, tmp_path):
    source = tmp_path / "m.gguf"
    source.write_bytes(model_file("rows of 96, tied")[0].read_bytes())
    code, _, _ = run(source, "f16")
    assert (code, sorted(p.name for p in tmp_path.iterdir())) == (0, ["ggml-model-F16.gguf", "m.gguf"])
    assert gguf.read(tmp_path / "ggml-model-F16.gguf").tensors["token_embd.weight"].format.name == "F16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["IN", "OUT", "IQ2_XS", "--tensor-type", "ffn=IQ2_XS"], "needs the tensor's importance"),
        (["IN", "OUT", "Q4_0", "--tensor-type", "conv=Q8_0"], "'conv': matches no matrix"),
        (["IN", "OUT", "Q4_0", "--imatrix", "IN"], "not an importance matrix"),
        (["IN", "OUT", "Q4_0", "--imatrix", "IM", "--include-weights", "conv"], "no entry's name contains 'conv'"),
        (["IN", "OUT", "Q4_0", "--override-kv", "a=b"], "expected KEY=TYPE:VALUE"),
        (["IN", "OUT", "Q4_0", "7"], "expected IN OUT TYPE"),
        (["IN", "IN", "Q4_0"], "is the model to be read"),
        (["IN", "OUT", "Q4_0", "--keep-split"], "is not in shards"),
    ],
)
def test_bad_input_writes_nothing(run, model_file, tmp_path, arguments, message):
    source, matrix = model_file("falcon")
    paths = {"IN": source, "IM": matrix, "OUT": tmp_path / "out.gguf"}
    before = source.read_bytes()
    code, out, err = run(*(paths.get(a, a) for a in arguments))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert re.search(message, err)
    assert [*tmp_path.iterdir()] == []
    assert source.read_bytes() == before
