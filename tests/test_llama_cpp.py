"""The files qjax writes, run by llama.cpp: it loads them, speaks, and finds the same perplexity.

Needs llama.cpp's programs, in the folder that QJAX_LLAMA_CPP names.
"""

import re
from dataclasses import replace

import pytest
from conftest import shared
from oracles import programs

import qjax
from qjax import evaluate
from qjax.io import hub
from qjax.models import cache
from qjax.quantize_file import quantize_file

CHUNKS = 16


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tales.txt"
    # llama-perplexity drops one newline at the end of a file.
    path.write_text(evaluate.held_out_tales() + "\n")
    return path


@pytest.fixture(scope="module")
def files(llama_cpp, tmp_path_factory):
    """The tiny model as qjax writes it, and the Q4_0 file with its weights decoded by llama-quantize."""
    folder = tmp_path_factory.mktemp("tiny")
    paths = {name: folder / f"{name}.gguf" for name in ("F16", "Q4_0", "decoded")}
    for name in ("F16", "Q4_0"):
        quantize_file("tiny", paths[name], name)
    programs.output(llama_cpp / "llama-quantize", "--allow-requantize", paths["Q4_0"], paths["decoded"], "F32")
    return paths


def their_perplexity(llama_cpp, model, text, n_ctx=512, chunks=CHUNKS):
    command = [llama_cpp / "llama-perplexity", "-m", model, "-f", text, "-c", n_ctx, "--chunks", chunks]
    output = programs.output(*command, "-ctk", "f32", "-ctv", "f32", "-fa", "off", last="Final estimate")
    found = re.search(r"Final estimate: PPL = ([\d.]+)", output)
    assert found, output[-2000:]
    return float(found[1])


@pytest.mark.parametrize(("file", "theirs"), [("F16", "F16"), ("Q4_0", "decoded")])
def test_perplexity_of_the_same_weights(llama_cpp, files, text, file, theirs):
    ours = qjax.perplexity(qjax.load(files[file]), evaluate.read_text(text), chunks=CHUNKS, precision="float32")
    assert their_perplexity(llama_cpp, files[theirs], text) == pytest.approx(ours.value, rel=0.005)


@pytest.mark.exact
def test_a_real_model_of_another_architecture(llama_cpp, tmp_path):
    """Gemma 3 with 270 million weights (Q4_K_M); natural text, in chunks longer than its window."""
    try:
        packed = hub.locate("gemma-3-270m")
    except qjax.QjaxError as error:
        pytest.skip(str(error))
    text, decoded = shared("corpora/wiki.test.raw"), tmp_path / "decoded.gguf"
    programs.output(llama_cpp / "llama-quantize", "--allow-requantize", packed, decoded, "F32")
    ours = qjax.perplexity(qjax.load(packed), evaluate.read_text(text), n_ctx=1024, chunks=4, precision="float32")
    theirs = their_perplexity(llama_cpp, decoded, text, n_ctx=1024, chunks=4)
    assert ours.value == pytest.approx(theirs, rel=2e-3)


PROMPT = "Once upon a time"


def their_text(llama_cpp, model):
    command = [llama_cpp / "llama-completion", "-m", model, "-p", PROMPT, "-n", 24, "--temp", 0, "-no-cnv"]
    # What it prints last; the text, which comes through the same thread, is then out.
    output = programs.output(*command, "--no-warmup", "-ctk", "f32", "-ctv", "f32", last="graphs reused")
    assert PROMPT in output
    return output[output.rindex(PROMPT) :]


@pytest.mark.parametrize(("file", "theirs"), [("F16", "F16"), ("Q4_0", "decoded")])
def test_it_tells_the_same_tale(llama_cpp, files, file, theirs):
    ours = str(qjax.load(files[file], cache_k="f32", cache_v="f32").generate(PROMPT, max_tokens=16))
    assert their_text(llama_cpp, files[theirs]).startswith(ours)


def test_the_packed_file_speaks(llama_cpp, files):
    """With llama.cpp's own 8-bit activations, so perhaps another tale, but one in English."""
    told = their_text(llama_cpp, files["Q4_0"])
    assert re.match(PROMPT + r" there was a [a-z]+", told)


# The types of the tables that compare with llama-quantize; its tests in test_quantize_file.py hold the bytes.
TINY_TYPES = ["Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_S", "Q6_K", "IQ4_XS", "TQ2_0"]


def assert_runs(llama_cpp, path, text):
    """llama.cpp finds our perplexity, but for its 8-bit activations."""
    ours = qjax.perplexity(qjax.load(path), evaluate.read_text(text), chunks=CHUNKS, precision="float32")
    assert their_perplexity(llama_cpp, path, text) == pytest.approx(ours.value, rel=0.02)


@pytest.mark.exact
@pytest.mark.parametrize("file_type", TINY_TYPES)
def test_each_type_runs(llama_cpp, text, tmp_path, file_type):
    quantize_file("tiny", tmp_path / "tiny.gguf", file_type)
    assert_runs(llama_cpp, tmp_path / "tiny.gguf", text)


@pytest.mark.exact
def test_a_type_that_needs_importance_runs(llama_cpp, text, tmp_path):
    matrix, _ = qjax.imatrix(qjax.load("tiny"), evaluate.read_text(text), chunks=CHUNKS, score=False)
    quantize_file("tiny", tmp_path / "tiny.gguf", "IQ3_M", imatrix=matrix)
    assert_runs(llama_cpp, tmp_path / "tiny.gguf", text)


@pytest.mark.exact
@pytest.mark.parametrize("file_type", ["Q2_K", "Q3_K_M", "Q4_K_M", "IQ4_XS"])
def test_each_type_of_smollm2_runs(llama_cpp, smollm2_path, text, tmp_path, file_type):
    quantize_file(smollm2_path, tmp_path / "smollm2.gguf", file_type, allow_requantize=True)
    assert_runs(llama_cpp, tmp_path / "smollm2.gguf", text)


CACHE_CHUNKS = 8


@pytest.fixture(scope="module")
def predictions(llama_cpp, text, tmp_path_factory):
    """The tiny model in float32, as a file, and llama.cpp's predictions from an f32 cache: by the length of a head."""
    folder, found = tmp_path_factory.mktemp("predictions"), {}
    tiny = qjax.load("tiny")
    for head_dim in (64, 128):
        model, base = folder / f"{head_dim}.gguf", folder / f"{head_dim}.kld"
        # The same matrices make half as many heads of twice the length: no model that says much, but one of that shape.
        config = replace(tiny.config, head_dim=head_dim, n_heads=256 // head_dim, n_kv_heads=128 // head_dim)
        metadata = tiny.metadata | {key: value for key, (_, value) in config.to_gguf().items()}
        replace(tiny.quantize("F32"), config=config, metadata=metadata).save(model)
        command = [llama_cpp / "llama-perplexity", "-m", model, "-f", text, "-c", 512, "--chunks", CACHE_CHUNKS]
        options = ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "--kl-divergence-base", base]
        programs.output(*command, *options, last="Final estimate")
        found[head_dim] = model, base
    return found


@pytest.mark.parametrize(
    ("k", "v", "head_dim", "rotated"),
    [
        *((kind, kind, 64, True) for kind in cache.TYPES),
        ("q8_0", "q4_0", 64, True),
        ("q4_0", "f16", 64, True),
        ("q4_0", "q4_0", 64, False),
        ("q4_0", "q4_1", 128, True),
    ],
)
def test_perplexity_and_divergence_through_cache_types(llama_cpp, predictions, monkeypatch, k, v, head_dim, rotated):
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "0" if rotated else "1")
    path, base = predictions[head_dim]
    command = [llama_cpp / "llama-perplexity", "-m", path, "--kl-divergence", "--kl-divergence-base", base]
    output = programs.output(*command, "-ctk", k, "-ctv", v, "-fa", "on", last="Same top p:", tries=20)
    theirs = {name: float(number) for name, number in re.findall(r"(Mean +KLD|Mean PPL\(Q\)) *: *([\d.]+)", output)}
    ours = evaluate.kl_divergence_from(base, qjax.load(path, cache_k=k, cache_v=v))
    # What is hardly a model magnifies the least difference in rounding; a rotation of another size it shows in the KLD.
    assert theirs["Mean PPL(Q)"] == pytest.approx(ours.ppl, rel=0.0002 if head_dim == 64 else 0.005)
    # Printed to six decimals.
    assert theirs["Mean    KLD"] == pytest.approx(ours.mean, rel=0.02, abs=1e-6)
