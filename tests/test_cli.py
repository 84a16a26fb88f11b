"""The command line: data on stdout, one line on stderr for bad input, exit codes."""

import errno
import io
import json
import subprocess
import sys

import jax
import pytest
from conftest import fails

from qjax.io import gguf, hub
from qjax.io.tokenizer import Tokenizer
from qjax.model import Model
from qjax.models import transformer
from qjax.models.config import Config

pytestmark = pytest.mark.in_haste

CONFIG = Config(
    architecture="llama",
    n_layers=1,
    d_model=64,
    d_ff=64,
    n_heads=2,
    n_kv_heads=1,
    head_dim=32,
    vocab=2048,
    n_ctx=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
    tied=True,
)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A small random model."""
    path = tmp_path_factory.mktemp("models") / "random.gguf"
    params = transformer.stack(transformer.init(CONFIG, jax.random.key(0)), CONFIG)
    tokenizer = Tokenizer.from_folder(hub.BUNDLED["tiny"])
    metadata = tokenizer.to_gguf() | {k: v for k, (_, v) in CONFIG.to_gguf().items()}
    Model(CONFIG, params, tokenizer, metadata=metadata).save(path)
    return str(path)


def test_info(run, model_file):
    code, out, _ = run("info", model_file)
    assert code == 0
    assert "llama.block_count" in out
    assert "blk.0.ffn_down.weight" in out
    code, out, _ = run("info", model_file, "--json")
    record = json.loads(out)
    file = gguf.read(model_file)
    assert record["bpw"] == file.bpw == 32
    assert {t["name"]: tuple(t["shape"]) for t in record["tensors"]} == {n: t.shape for n, t in file.tensors.items()}
    assert record["metadata"]["llama.block_count"] == {"type": "UINT32", "value": 1}


def test_quantize(run, model_file, tmp_path):
    target = tmp_path / "q.gguf"
    code, out, err = run("quantize", model_file, target, "q4_0")
    assert (code, err) == (0, "")
    assert "Q4_0" in out
    types = {name: t.format.name for name, t in gguf.read(target).tensors.items()}
    assert types["blk.0.ffn_up.weight"] == "Q4_0"
    assert types["token_embd.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"
    code, out, _ = run("quantize", model_file, target, "Q4_0", "--pure", "--json")
    report = json.loads(out)
    assert report["bpw"] == gguf.read(target).bpw < 4.6


def test_generate(run, model_file):
    code, out, _ = run("generate", model_file, "-p", "Once", "-n", 5)
    assert code == 0
    assert out.startswith("Once")
    code, as_json, _ = run("generate", model_file, "-p", "Once", "-n", 5, "--json")
    record = json.loads(as_json)
    assert record["prompt"] + record["text"] + "\n" == out
    assert len(record["tokens"]) == 5
    again = [run("generate", model_file, "-p", "A", "-n", 6, "--temp", 1.5, "-s", seed)[1] for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_perplexity(run, model_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The fox found a red ball. " * 40)
    code, out, _ = run("perplexity", model_file, "-f", text, "-c", 32, "--chunks", 3, "--json")
    assert code == 0
    record = json.loads(out)
    assert record["n_tokens"] == 3 * 15
    # A random model is close to knowing nothing.
    assert 1500 < record["value"] < 3000
    assert record["precision"] in ("float32", "bfloat16")
    assert (record["cache_k"], record["cache_v"]) == ("f32", "f32")
    options = ["-f", text, "-c", 32, "--chunks", 3, "--precision", "float32", "-ctk", "q4_0", "-ctv", "Q8_0"]
    record = json.loads(run("perplexity", model_file, *options, "--json")[1])
    assert (record["cache_k"], record["cache_v"]) == ("q4_0", "q8_0")
    assert "cache q4_0/q8_0" in run("perplexity", model_file, *options)[1]


TEXT = "Once upon a time\r\n<|im_start|> naïve 🦊\n"


def test_tokenize(run, model_file, tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_folder(hub.BUNDLED["tiny"])
    ids = tokenizer.encode(TEXT, parse_special=True)
    code, out, _ = run("tokenize", model_file, "-p", TEXT, "--json")
    assert code == 0
    assert json.loads(out)["ids"] == ids
    assert json.loads(out)["count"] == len(ids)
    assert len(json.loads(out)["pieces"]) == len(ids)
    path = tmp_path / "text"
    path.write_bytes(TEXT.encode())
    assert json.loads(run("tokenize", model_file, "-f", path, "--ids")[1]) == ids
    plain = tokenizer.encode(TEXT, add_special=False)
    assert json.loads(run("tokenize", model_file, "-f", path, "--ids", "--no-bos", "--no-parse-special")[1]) == plain
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert json.loads(run("tokenize", model_file, "--ids")[1]) == ids


@pytest.mark.parametrize("options", [[], ["--ids"], ["--show-count"], ["--no-bos", "--no-parse-special"]])
def test_tokenize_prints_what_llama_tokenize_prints(llama_cpp, run, smollm2_path, tmp_path, options):
    path = tmp_path / "text"
    path.write_bytes(TEXT.encode())
    code, out, _ = run("tokenize", smollm2_path, "-f", path, *options)
    assert code == 0
    command = [llama_cpp / "llama-tokenize", "-m", smollm2_path, "-f", path, "--no-escape", "--log-disable", *options]
    theirs = subprocess.run(list(map(str, command)), capture_output=True, timeout=60, check=True)
    assert out.splitlines() == theirs.stdout.decode(errors="replace").splitlines()


def test_compare(run, model_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The fox found a red ball. " * 40)
    out = tmp_path / "table.json"
    arguments = ["compare", model_file, "-f", text, "-c", 32, "--chunks", 4, "--types", "Q4_0,Q8_0", "-o", out]
    code, table, err = run(*arguments)
    assert code == 0
    assert "Q4_0" in table
    assert "Q8_0" in table
    assert "about" in err
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    code, again, err = run(*arguments)
    assert again == table
    assert "resuming" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "absent.gguf"], "absent.gguf: no such file"),
        (["quantize", "MODEL", "OUT.gguf", "Q4_O"], "Did you mean Q4_1 or Q4_0"),
        (["quantize", "MODEL", "OUT", "Q4_0"], "give a name that ends in .gguf"),
        (["quantize", "MODEL", "MODEL", "Q4_0"], "is the model to be read"),
        (["quantize", "MODEL", "no/such/folder/OUT.gguf", "Q4_0"], "no/such/folder"),
        (["quantize", "MODEL", "OUT.gguf", "Q4_0", "--rounding", "nearst_even"], "nearest_even"),
        (["perplexity", "MODEL", "-f", "SHORT", "-c", "32"], "two contexts of 32 need 64"),
        (["perplexity", "MODEL", "-f", "SHORT", "-c", "128"], "trained for at most 64"),
        (["perplexity", "MODEL", "-f", "absent.txt"], "absent.txt: cannot be read"),
        (["perplexity", "MODEL", "-f", "MODEL", "-c", "32"], "not UTF-8 text"),
        (["perplexity", "MODEL", "-f", "SHORT", "--precision", "float64"], "expected float32, bfloat16, int8 or auto"),
        (["tokenize", "MODEL", "-p", "x", "-f", "SHORT"], "by -p or by -f, not both"),
        (["tokenize", "MODEL", "-f", "MODEL"], "not UTF-8 text"),
        (["compare", "MODEL"], "give the text to measure on"),
        (["generate", "MODEL", "-p", ""], "prompt is empty"),
        (["generate", "MODEL", "-p", "x", "--top-p", "2"], "top_p is 2.0, expected a number from 0 to 1"),
        (["generate", "MODEL", "-p", "x", "-ctk", "q4"], "cache_k is 'q4'"),
        (["perplexity", "MODEL", "-f", "SHORT", "--cache-type-v", "q4_k"], "cache_v is 'q4_k', expected one of f32"),
        (["generate", "NOT_GGUF", "-p", "x"], "not a GGUF file"),
        (["info", "CUT"], "incomplete download"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, model_file, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SHORT").write_text("too short")
    (tmp_path / "NOT_GGUF").write_bytes(b"PK\3\4 a zip file")
    with open(model_file, "rb") as file:
        (tmp_path / "CUT").write_bytes(file.read()[:-1000])
    before = {p.name for p in tmp_path.iterdir()}
    fails(run(*(model_file if a == "MODEL" else a for a in arguments)), message)
    assert {p.name for p in tmp_path.iterdir()} == before, "nothing is left behind"


def test_full_disk(run, model_file, tmp_path, monkeypatch):
    target = tmp_path / "q.gguf"
    target.write_bytes(b"precious")

    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qjax.io.atomic.os.fsync", fsync)
    code, out, err = run("quantize", model_file, target, "Q4_0")
    assert (code, out) == (1, "")
    assert err == f"qjax: {target}: not written (No space left on device); what was there before is unchanged\n"
    assert target.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["q.gguf"]


def test_interrupt(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qjax.info.info", interrupted)
    code, _, err = run("info", "tiny")
    assert code == 130
    assert err == "qjax: interrupted\n"


def test_reader_that_goes_away():
    """`qjax info tiny | head -1` ends quietly."""
    command = [sys.executable, "-m", "qjax", "info", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() in (0, 1)


def test_usage_errors_exit_with_2(run):
    for arguments in (["quantise"], ["generate"], ["perplexity", "tiny", "--chunks", "0"]):
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert err


AT_THE_END = """
import atexit, os, signal, sys
import qjax.cli
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv = ["qjax", "--help"]
qjax.cli.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
def test_ctrl_c_after_the_end_changes_nothing():
    ended = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
