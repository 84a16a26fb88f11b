"""The scripts of benchmarks/, as far as a test can judge them: what they count, take turns with, make and show."""

import importlib
import json
import sys

import numpy as np
import pytest
from conftest import ROOT
from oracles import programs

import qjax
from qjax import QjaxError
from qjax.io import gguf
from qjax.models.config import Config

pytestmark = pytest.mark.in_haste


def script(name):
    """A script of benchmarks/ as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


SHAPE = dict(architecture="llama", n_layers=2, d_model=256, d_ff=512, n_heads=4, n_kv_heads=2, head_dim=64)
SHAPE |= dict(vocab=50000, n_ctx=512, norm_eps=1e-5, rope_theta=500000.0)
# Of each layer: q and output, k and v, gate and up and down.
LAYER_WEIGHTS = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def random_model(request, tmp_path_factory, smollm2_path):
    """A file as the script makes it, in a mixture, its head the embedding or not."""
    models = script("models")
    path = tmp_path_factory.mktemp("models") / "small-Q4_K_M.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "SMOLLM2", smollm2_path)
        models.write_random(path, "small", Config(**SHAPE, tied=request.param), "Q4_K_M")
    return path


@pytest.mark.thorough
def test_random_models_have_the_statistics_of_untrained_ones(random_model):
    file = gguf.read(random_model)
    formats = {name: tensor.format.name for name, tensor in file.tensors.items()}
    tied = "output.weight" not in formats
    assert formats["token_embd.weight" if tied else "output.weight"] == "Q6_K"
    assert formats["blk.0.ffn_gate.weight"] == "Q4_K"
    weights = {
        name: np.asarray(qjax.dequantize(file.tensors[name].load()))
        for name in formats
        if "ffn" in name and "norm" not in name
    }
    for name, w in weights.items():
        assert w.std() == pytest.approx(0.02, rel=0.02), name
        assert abs(np.corrcoef(w.ravel(), np.roll(w.ravel(), 32))[0, 1]) < 0.02, name
    same_format = [w for name, w in weights.items() if formats[name] == "Q4_K"]
    assert not np.array_equal(same_format[0], same_format[1])
    assert np.array_equal(file.tensors["output_norm.weight"].load(), np.ones(256))


def test_random_models_run_here_and_in_llama_cpp(random_model, llama_cpp):
    model = qjax.load(random_model)
    assert len(model.generate("Once upon a time", max_tokens=4).tokens) == 4
    theirs = json.loads(
        programs.output(llama_cpp / "llama-bench", "-m", random_model, "-p", 0, "-n", 4, "-r", 1, "-o", "json")
    )
    assert theirs[0]["model_n_params"] == model.n_weights


def test_what_is_counted_of_a_model(random_model):
    decode, perplexity = script("decode"), script("perplexity")
    file = gguf.read(random_model)
    tied = "output.weight" not in file.tensors
    head = 50000 * 256
    assert perplexity.operations(random_model, 512) == 512 * 2 * 2 * LAYER_WEIGHTS + 256 * 2 * head
    assert perplexity.operations(random_model, 9) == 9 * 2 * 2 * LAYER_WEIGHTS + 5 * 2 * head
    weights = sum(t.nbytes for name, t in file.tensors.items() if tied or name != "token_embd.weight")
    # Two layers, keys and values of two heads of 64 numbers in 16 bits.
    assert decode.bytes_per_token(random_model, 100) == weights + 100 * 2 * 2 * 2 * 64 * 2


def test_names_of_models(tmp_path):
    models = script("models")
    (tmp_path / "llama-1b-Q4_0.gguf").write_bytes(b"there already")
    assert models.make(tmp_path, "llama-1b-Q4_0").read_bytes() == b"there already"
    with pytest.raises(QjaxError, match="expected MODEL-TYPE, MODEL one of smollm2-135m, llama-1b, llama-8b"):
        models.make(tmp_path, "gpt-Q4_0")
    with pytest.raises(QjaxError, match="Q4_0"):
        models.make(tmp_path, "llama-1b-Q4_O")
    # As published: 1.24 and 8.03 billion.
    sizes = {name: sum(map(np.prod, models.tensor_shapes(config).values())) for name, config in models.SHAPES.items()}
    assert sizes == {"llama-1b": 1235814400, "llama-8b": 8030261248}


def test_sides_take_turns():
    side_by_side, order = script("side_by_side"), []
    found = side_by_side.turns(
        2, lambda: order.append("ours") or len(order), lambda: order.append("theirs") or len(order)
    )
    assert order == ["ours", "theirs"] * 3
    # The first turn does not count.
    assert found == [[3, 5], [4, 6]]


def test_a_program_is_watched():
    side_by_side = script("side_by_side")
    code = "import sys, time; held = bytearray(2**26); time.sleep(0.5); print('out'); print('log', file=sys.stderr)"
    run = side_by_side.run([sys.executable, "-c", code])
    assert (run.output, run.log) == ("out\n", "log\n")
    assert run.wall_s > 0.5
    if sys.platform == "linux":
        assert 2**26 < run.anonymous < 2**27
    with pytest.raises(QjaxError, match="ended with 3: wrong"):
        side_by_side.run([sys.executable, "-c", "import sys; print('wrong', file=sys.stderr); sys.exit(3)"])


def test_programs_that_are_missing(monkeypatch):
    side_by_side = script("side_by_side")
    monkeypatch.delenv("QJAX_LLAMA_CPP", raising=False)
    with pytest.raises(QjaxError, match="QJAX_LLAMA_CPP has to name the folder"):
        side_by_side.llama_cpp("llama-bench")


def test_the_line_through_the_models():
    decode = script("decode")
    rows = [{"token_mb": mb, "qjax_ts": 1e3 / (2 + 40 * mb / 1e3)} for mb in (90, 700, 4600)]
    assert decode.line(rows) == "2.0 ms + 40.0 ms a GB (25.0 GB/s); the models lie up to 0% off it"


def test_the_clock_of_llama_cpps_log():
    perplexity = script("perplexity")
    log = "0.02.646.991 I perplexity: calculating over 2 chunks\n1.05.716.994 I perplexity: ETA 1.06.748.276 I Final"
    assert perplexity.clock(log, "calculating") == [2.646991]
    assert perplexity.clock(log, "Final") == [66.748276]
    assert perplexity.clock(log[:60], "Final") == []


def test_the_page_shows_the_results(tmp_path, monkeypatch):
    table = script("table")
    text = table.README.read_text(encoding="utf-8")
    assert text == table.update(text), "run python benchmarks/table.py"
    side_by_side = script("side_by_side")
    limits = dict(memory_gb_s=59.0, float32_gflop_s=250.0, bfloat16_gflop_s=490.0)
    row = dict(model="small-Q4_0", qjax_ts=100.0, llama_cpp_ts=200.0, ratio=0.5, goal="0.4×, 1×", limit=0.31)
    side_by_side.write(tmp_path / "decode.json", [row], limits=limits, turns=3, conclusion="2 ms + 40 ms a GB")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    shown = table.update(text)
    assert "| small-Q4_0 | 100.0 | 200.0 | 0.50 | 0.4×, 1× | – | – | – | 31% | – |" in shown
    assert "2 ms + 40 ms a GB" in shown
    assert "59 GB/s" in shown
    monkeypatch.undo()
    assert table.update(shown) == text
