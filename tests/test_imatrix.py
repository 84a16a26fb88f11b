"""Importance matrices: what they sum against algebra in float64, their files against gguf-py and llama-imatrix."""

import contextlib
import json
import math
import re
import struct
from dataclasses import replace

import gguf as gguf_py
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fails
from hostile.imatrix_files import as_gguf, dat
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import llama_numpy as oracle
from oracles.programs import output
from test_evaluate import TEXT, byte_tokenizer, random_model

import qjax
from qjax import evaluate
from qjax.errors import QjaxError
from qjax.io import imatrix
from qjax.io.imatrix import Entry, Imatrix
from qjax.methods import imatrix as method
from qjax.models import transformer
from qjax.models.config import Config
from qjax.quantize_file import quantize_file

pytestmark = pytest.mark.in_haste

# ── the inputs of the matrix products ────────────────────────────────────────────────────────────────

CONFIG = Config("llama", 3, 64, 160, 6, 2, 32, 96, 128, 1e-5, 1e4, tied=True)


def whole(h):
    return h


@pytest.mark.parametrize("tied", [True, False])
def test_observed_inputs_obey_the_equations(tied):
    """Each product's input follows from those before it, but for attention, whose result the stream then shows.

    The middle layer is packed, so that there are three runs.
    """
    config = replace(CONFIG, tied=tied)
    rng = np.random.default_rng(0)
    weights = {
        name: jnp.asarray(rng.standard_normal(shape) / math.sqrt(shape[-1]) + (len(shape) == 1), jnp.float32)
        for name, shape in transformer.tensor_shapes(config).items()
    }
    packed = {n: qjax.quantize(w, "Q8_0") for n, w in weights.items() if n.startswith("blk.1.") and w.ndim == 2}
    params = transformer.stack(weights | packed, config)
    tokens = rng.integers(0, config.vocab, (2, 12))
    logits, observed = transformer.observe(config, params, tokens, whole, first=5)
    head = "token_embd.weight" if tied else "output.weight"
    seen = {name: np.asarray(h, np.float64) for name, h in observed.unstack(config).items()}
    dense = weights | {name: qjax.dequantize(w) for name, w in packed.items()}
    w = {name: np.asarray(value, np.float64) for name, value in dense.items()}
    assert seen.keys() == {n for n in w if len(w[n].shape) == 2 and n != "token_embd.weight"} | {head}

    def close(name, expected):
        np.testing.assert_allclose(seen[name], expected, rtol=1e-4, atol=1e-4, err_msg=name)

    def normed(x, weight):
        return np.apply_along_axis(oracle.rms_norm, -1, x, w[weight], config.norm_eps)

    x = w["token_embd.weight"][tokens]
    for blk in ("blk.0.", "blk.1.", "blk.2."):
        for name in ("attn_q.weight", "attn_k.weight", "attn_v.weight"):
            close(blk + name, normed(x, blk + "attn_norm.weight"))
        x = x + seen[blk + "attn_output.weight"] @ w[blk + "attn_output.weight"].T
        for name in ("ffn_gate.weight", "ffn_up.weight"):
            close(blk + name, normed(x, blk + "ffn_norm.weight"))
        gate, up = (seen[blk + name] @ w[blk + name].T for name in ("ffn_gate.weight", "ffn_up.weight"))
        close(blk + "ffn_down.weight", gate / (1 + np.exp(-gate)) * up)
        x = x + seen[blk + "ffn_down.weight"] @ w[blk + "ffn_down.weight"].T
    close(head, normed(x, "output_norm.weight"))
    np.testing.assert_allclose(logits, (seen[head] @ w[head].T)[:, 5:], rtol=1e-4, atol=1e-4)


# ── collection ───────────────────────────────────────────────────────────────────────────────────────

N_CTX = 32


def test_sums_are_those_of_all_tokens_of_all_windows(monkeypatch):
    """Three windows, two at a time: what fills up the last batch does not count."""
    monkeypatch.setattr(evaluate.ppl, "batch_size", lambda n_ctx, vocab: 2)
    model = random_model(tokenizer=byte_tokenizer(bos_token_id=7, add_bos_token=True))
    found, ppl = evaluate.imatrix(model, TEXT, N_CTX, 3, dataset="tales")
    assert (found.chunk_count, found.chunk_size, found.datasets) == (3, N_CTX, ("tales",))

    windows = evaluate.cut(model, TEXT, N_CTX, 3)
    assert (windows[:, 0] == 7).all()
    logits, observed = transformer.observe(model.config, model.params, windows, whole)
    inputs = {n: np.asarray(h, np.float64) for n, h in observed.unstack(model.config).items() if n.startswith("blk.")}
    assert found.entries.keys() == inputs.keys()
    for name, h in inputs.items():
        assert found.entries[name].counts == [3 * N_CTX]
        np.testing.assert_allclose(found.entries[name].sums[0], (h**2).sum(axis=(0, 1)), rtol=1e-5, err_msg=name)

    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(axis=-1, keepdims=True)
    log_p = [np.log(p[i, t - 1, windows[i, t]]) for i in range(3) for t in range(N_CTX // 2 + 1, N_CTX)]
    assert ppl.mean_nll == pytest.approx(-np.mean(log_p), rel=1e-6)
    assert ppl.n_tokens == len(log_p)


def test_windows_to_pass_over_are_cut_before_the_rest():
    model = random_model(tokenizer=byte_tokenizer())
    text = TEXT[: 6 * N_CTX]
    late, _ = evaluate.imatrix(model, text, N_CTX, first_chunk=3)
    cut, _ = evaluate.imatrix(model, text[3 * N_CTX :], N_CTX)
    for name, entry in late.entries.items():
        np.testing.assert_array_equal(entry.sums, cut.entries[name].sums)
    with pytest.raises(QjaxError, match="192 tokens; after 4 chunks of 32 fewer than two are left"):
        evaluate.imatrix(model, text, N_CTX, first_chunk=4)


def test_the_head_is_seen_if_it_has_a_tensor():
    model = random_model()
    config = replace(model.config, tied=False)
    head = dict(model.tensors) | {"output.weight": model.tensors["token_embd.weight"]}
    untied = replace(model, config=config, params=transformer.stack(head, config))
    for subject, expected in ((model, False), (untied, True)):
        found, _ = evaluate.imatrix(subject, TEXT, N_CTX, 3, process_output=True)
        assert ("output.weight" in found.entries) == expected
        assert len(found.entries) == 7 + expected


def test_a_damaged_model_is_named():
    model = random_model()
    tensors = dict(model.tensors)
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].at[0, 0].set(jnp.nan)
    broken = replace(model, params=transformer.stack(tensors, model.config))
    with pytest.raises(QjaxError, match=r"blk\.0\.ffn_down\.weight: its input has NaN"):
        evaluate.imatrix(broken, TEXT, N_CTX, 3)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────


def entry(*rows, counts):
    return Entry(np.array(rows, np.float32), np.array(counts, np.float32))


MATRIX = Imatrix(
    {
        "blk.0.ffn_down.weight": entry([1, 2, 3], counts=[8]),
        "blk.0.ffn_up_exps.weight": entry([1, 4], [9, 9], [6, 2], counts=[2, 0, 4]),
    },
    ("a.txt", "ü.txt"),
    2,
    4,
)


def test_gguf_py_reads_what_is_written(tmp_path):
    imatrix.write(tmp_path / "m.gguf", MATRIX)
    file = gguf_py.GGUFReader(tmp_path / "m.gguf")
    values = {key: field.contents() for key, field in file.fields.items() if not key.startswith("GGUF.")}
    assert values == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a.txt", "ü.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 4,
    }
    assert file.fields["imatrix.chunk_size"].types == [gguf_py.GGUFValueType.UINT32]
    found = {t.name: (t.tensor_type.name, t.data.tolist()) for t in file.tensors}
    assert list(found.items()) == [
        ("blk.0.ffn_down.weight.in_sum2", ("F32", [1, 2, 3])),
        ("blk.0.ffn_down.weight.counts", ("F32", [8])),
        ("blk.0.ffn_up_exps.weight.in_sum2", ("F32", [[1, 4], [9, 9], [6, 2]])),
        ("blk.0.ffn_up_exps.weight.counts", ("F32", [[2], [0], [4]])),
    ]


def test_importance_is_the_mean_square_and_one_where_nothing_was_seen(tmp_path):
    imatrix.write(tmp_path / "m.gguf", MATRIX)
    for matrix in (MATRIX, imatrix.read(tmp_path / "m.gguf")):
        np.testing.assert_array_equal(matrix.importance("blk.0.ffn_down.weight"), [[1 / 8, 2 / 8, 3 / 8]])
        np.testing.assert_array_equal(matrix.importance("blk.0.ffn_up_exps.weight"), [[0.5, 2], [1, 1], [1.5, 0.5]])
        assert matrix.importance("blk.0.ffn_up.weight") is None
        assert repr(matrix) == "Imatrix(2 tensors, 2 chunks of 4 of a.txt, ü.txt)"


DAT = dat(
    (b"blk.0.ffn_down.weight", 2, [0.25, 0.5, 0.75]),
    (b"blk.0.ffn_up_exps.weight", 1, [0.5, 2, 1, 1, 1.5, 0.5]),
    tail=struct.pack("<ii", 2, 6) + "ü.txt".encode(),
)


def test_the_older_format_holds_means_times_chunks(tmp_path):
    imatrix.write_legacy(tmp_path / "m.dat", MATRIX)
    assert (tmp_path / "m.dat").read_bytes() == DAT
    read = imatrix.read(tmp_path / "m.dat", chunk_size=4)
    assert (read.datasets, read.chunk_count, read.chunk_size) == (("ü.txt",), 2, 4)
    for name in MATRIX.entries:
        np.testing.assert_array_equal(read.importance(name).ravel(), MATRIX.importance(name).ravel())
    np.testing.assert_array_equal(read.entries["blk.0.ffn_down.weight"].counts, [8])


def test_the_oldest_files_end_with_the_entries(tmp_path):
    (tmp_path / "m.dat").write_bytes(dat((b"a", 0, [3, 4])))
    read = imatrix.read(tmp_path / "m.dat")
    assert (read.datasets, read.chunk_count, read.chunk_size) == ((), 0, 512)
    np.testing.assert_array_equal(read.importance("a"), [[3, 4]])  # as they are, without calls


def test_what_is_cut_short_is_refused_wherever(tmp_path):
    path = tmp_path / "cut"
    complete, tail = as_gguf(), len("ü.txt".encode())
    # The padding of the last tensor may be missing, and what the oldest files do not have.
    whole_gguf, whole_dat = range(len(complete) - 28, len(complete)), {len(DAT) - tail - 8, len(DAT) - tail - 4}
    for raw, whole in ((complete, whole_gguf), (DAT, whole_dat)):
        for length in {*range(len(raw))} - {*whole}:
            path.write_bytes(raw[:length])
            with pytest.raises(QjaxError):
                imatrix.read(path)


@settings(deadline=None)
@given(st.binary(max_size=96), st.sampled_from([b"", b"GGUF\3\0\0\0", struct.pack("<ii", 1, 1) + b"w"]))
def test_bytes_of_any_kind_are_read_or_refused(tmp_path_factory, raw, start):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(start + raw)
    with contextlib.suppress(QjaxError):
        imatrix.read(path)


def test_no_matrix_of_nothing_is_written(tmp_path):
    for write in imatrix.WRITERS.values():
        with pytest.raises(QjaxError, match="nothing was seen"):
            write(tmp_path / "m", Imatrix({"w": entry([0, 0], counts=[0])}, (), 0, 4))
    assert not (tmp_path / "m").exists()


# ── merge ────────────────────────────────────────────────────────────────────────────────────────────


def test_merging_adds(tmp_path):
    old = Imatrix({"e": entry([1, 2, 3, 4], counts=[8])}, ("old",), 2, 4)
    new = Imatrix({"e": entry([1, 1], [2, 2], counts=[4, 0]), "w": entry([5], counts=[4])}, ("new",), 1, 4)
    for pair, datasets in (((old, new), ("old", "new")), ((new, old), ("new", "old"))):
        merged = method.merge(pair, 4)
        assert (merged.datasets, merged.chunk_count, merged.chunk_size) == (datasets, 3, 4)
        np.testing.assert_array_equal(merged.entries["e"].sums, [[2, 3], [5, 6]])
        np.testing.assert_array_equal(merged.entries["e"].counts, [12, 8])
        np.testing.assert_array_equal(merged.entries["w"].sums, [[5]])
    for other in (entry([1, 2, 3], counts=[8]), entry([1], [2], [3], [4], counts=[1, 1, 1, 1])):
        with pytest.raises(QjaxError, match="e: sums of shape .* different models"):
            method.merge([new, Imatrix({"e": other}, (), 1, 4)], 4)


# ── statistics ───────────────────────────────────────────────────────────────────────────────────────


def test_statistics_of_vectors_that_are_easily_described():
    even, alone = np.full(16, 8.0), np.eye(16)[3] * 8
    matrix = Imatrix(
        {
            "blk.0.attn_k.weight": entry(even, counts=[2]),
            "blk.1.attn_k.weight": entry(alone, counts=[4]),
            "blk.2.attn_k.weight": entry(3 * alone, counts=[4]),
            "blk.2.ffn_exps.weight": entry(even, alone, counts=[0, 4]),
            "output.weight": entry(even, counts=[1]),
        },
        (),
        1,
        4,
    )
    found = method.statistics(matrix)
    assert [t.name for t in found.tensors] == [
        "blk.0.attn_k.weight", "blk.2.attn_k.weight", "blk.1.attn_k.weight", "blk.2.ffn_exps.weight", "output.weight",
    ]  # fmt: skip
    flat, strong, weak, experts, head = found.tensors
    assert (flat.layer, flat.sum, flat.min, flat.max, flat.mean, flat.sigma) == (0, 64, 4, 4, 4, 0)
    assert (flat.active, flat.n, flat.entropy, flat.entropy_percent, flat.zd) == (100, 16, 4, 100, 0)
    assert (weak.sum, weak.max, weak.mean, weak.sigma) == (2, 2, 1 / 8, pytest.approx(math.sqrt(4 / 16 - 1 / 64)))
    assert (weak.active, weak.entropy, weak.zd) == (100 / 16, 0, 100 / 16)
    assert (flat.cosine, weak.cosine, strong.cosine) == (0, pytest.approx(1 / 4), pytest.approx(1))
    assert (experts.n, experts.sum, experts.cosine) == (16, 2, 0)
    assert head.layer is None
    assert [layer.layer for layer in found.layers] == [0, 1, 2]
    assert found.layers[2].sum == pytest.approx((6 + 2) / 2)
    assert found.layers[2].cosine == pytest.approx(1 / 2)
    assert found._repr_html_().count("<table>") == 2
    with pytest.raises(QjaxError, match="nothing to describe"):
        method.statistics(Imatrix({"w": entry([0], counts=[0])}, (), 0, 4))


# ── command line ─────────────────────────────────────────────────────────────────────────────────────


def test_command(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qjax, "load", lambda name: random_model(tokenizer=byte_tokenizer()), raising=False)
    (tmp_path / "t.txt").write_text(TEXT[:400] + "\n")
    options = ("-f", "t.txt", "-c", N_CTX, "--chunks", 3)
    code, out, err = run("imatrix", "any", *options)
    assert (code, err) == (0, "")
    assert out.startswith("PPL = ")
    assert out.endswith("imatrix.gguf: 7 tensors, 3 chunks of 32 tokens\n")
    first = imatrix.read("imatrix.gguf")
    assert first.datasets == ("t.txt",)

    code, out, _ = run("imatrix", "any", *options, "--no-ppl", "--in-file", "imatrix.gguf", "-o", "two.gguf", "--json")
    report = json.loads(out)
    assert (report["path"], report["n_tensors"], report["chunk_count"]) == ("two.gguf", 7, 6)
    assert report["perplexity"] is None
    for name, values in imatrix.read("two.gguf").entries.items():
        np.testing.assert_array_equal(values.sums, 2 * first.entries[name].sums)

    run("imatrix", "--in-file", "two.gguf", "--output-format", "dat", "-c", N_CTX)
    run("imatrix", "--in-file", "imatrix.dat", "-c", N_CTX, "-o", "back.gguf")
    for name in first.entries:
        np.testing.assert_allclose(imatrix.read("back.gguf").importance(name), first.importance(name), rtol=1e-6)
    files = sorted(path.name for path in tmp_path.iterdir())
    code, out, _ = run("imatrix", "--in-file", "two.gguf", "--show-statistics")
    assert out.splitlines()[0].split() == [
        "Tensor", "Σ(Act²)", "Min", "Max", "μ", "σ", "%", "Active", "N", "Entropy", "E", "(norm)", "ZD", "CosSim",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a MODEL and a text"),
        (("tiny",), "give a MODEL and a text"),
        (("-f", "t.txt"), "give a MODEL and a text"),
        (("--in-file", "missing.gguf"), "missing.gguf: there is no such file"),
        (("tiny", "-f", "t.txt", "--output-format", "npz"), "output format 'npz', expected gguf or dat"),
        (("tiny", "-f", "t.txt", "-o", "nowhere/m.gguf"), "the folder"),
        (("tiny", "-f", "missing.txt"), "missing.txt: cannot be read"),
    ],
)
def test_command_refuses(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("short")
    fails(run("imatrix", *arguments), message)
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────────

TINY = ("-c", 128, "--chunks", 3)


@pytest.fixture(scope="module")
def peers(llama_cpp, tmp_path_factory):
    """A folder with the tiny model, a text, and llama-imatrix's files of it."""
    folder = tmp_path_factory.mktemp("imatrix")
    quantize_file("tiny", folder / "tiny.gguf", "F32")
    (folder / "text").write_text(evaluate.held_out_tales(40))
    options = ("-m", folder / "tiny.gguf", "-f", folder / "text", "-ctk", "f32", "-ctv", "f32", "-fa", "off", *TINY)
    for kind in imatrix.WRITERS:
        out = ("-o", folder / f"theirs.{kind}", "--output-format", kind, "--process-output")
        output(llama_cpp / "llama-imatrix", *options, *out)
    return folder


def test_collected_like_llama_imatrix(peers):
    theirs = imatrix.read(peers / "theirs.gguf")
    text = evaluate.read_text(peers / "text")
    ours, _ = evaluate.imatrix(
        qjax.load(peers / "tiny.gguf"), text, 128, 3, process_output=True, dataset=str(peers / "text")
    )
    assert (ours.chunk_count, ours.chunk_size, ours.datasets) == (3, 128, theirs.datasets)
    assert ours.entries.keys() == theirs.entries.keys()
    for name in theirs.entries:
        np.testing.assert_array_equal(ours.entries[name].counts, theirs.entries[name].counts)
        np.testing.assert_allclose(ours.importance(name), theirs.importance(name), rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("kind", imatrix.WRITERS)
def test_written_and_merged_byte_for_byte_as_llama_imatrix_does(llama_cpp, peers, run, kind):
    read = imatrix.read(peers / f"theirs.{kind}", chunk_size=128)
    imatrix.WRITERS[kind](peers / "again", read)
    assert (peers / "again").read_bytes() == (peers / f"theirs.{kind}").read_bytes()

    inputs = [part for kind in imatrix.WRITERS for part in ("--in-file", peers / f"theirs.{kind}")]
    common = (*inputs, "-c", 128, "--output-format", kind)
    output(llama_cpp / "llama-imatrix", "-m", peers / "tiny.gguf", *common, "-o", peers / "merged")
    assert run("imatrix", *common, "-o", peers / "ours")[0] == 0
    assert (peers / "ours").read_bytes() == (peers / "merged").read_bytes()


def test_described_like_llama_imatrix(llama_cpp, peers):
    """So many layers that the log, of which the last 512 lines may be lost, has all tensors and some of the layers."""
    n_layers = 800
    x = np.exp(2 * np.random.default_rng(0).standard_normal((n_layers, 1, 24)) - 3).astype(np.float32)
    x[x < 0.01] = 0
    layers = range(n_layers)
    entries = {f"blk.{i}.ffn_up.weight": Entry(x[i], np.float32([4 * (i % 3 + 1)])) for i in layers}
    imatrix.write(peers / "deep.gguf", Imatrix(entries, ("t",), 3, 4))

    arguments = ("-m", peers / "tiny.gguf", "--in-file", peers / "deep.gguf", "--show-statistics")
    printed = output(llama_cpp / "llama-imatrix", *arguments)
    rows = re.findall(r"I\s+(\d+)\tffn_up\s*\t(.+)", printed)
    found = method.statistics(imatrix.read(peers / "deep.gguf"))
    assert len(rows) == len(found.tensors) == n_layers
    for ours, (layer, numbers) in zip(found.tensors, rows):
        assert ours.layer == int(layer)
        theirs = [float(number) for number in numbers.replace("%", "").split()]
        values = (ours.sum, ours.min, ours.max, ours.mean, ours.sigma, ours.active, ours.n, ours.entropy)
        values += (ours.entropy_percent, ours.zd, ours.cosine)
        assert values == pytest.approx(theirs, abs=0.0051), ours.name
    means = re.findall(r"I\s+(\d+)\t\s*([\d.]+)\t\s*([\d.]+)%\t\s*([\d.]+)\n", printed)
    assert len(means) > 200
    for ours, theirs in zip(found.layers, means):
        expected = [float(number) for number in theirs]
        assert (ours.layer, ours.sum, ours.zd, ours.cosine) == pytest.approx(expected, abs=0.0051)


def test_llama_quantize_takes_it(llama_cpp, peers):
    read = imatrix.read(peers / "theirs.gguf")
    imatrix.write(peers / "ours.gguf", read)
    arguments = ("--imatrix", peers / "ours.gguf", peers / "tiny.gguf", peers / "q.gguf", "IQ4_XS")
    printed = output(llama_cpp / "llama-quantize", *arguments, last="computed on 3")
    assert f"loaded {len(read.entries)} importance matrix entries from {peers / 'ours.gguf'} computed on 3" in printed
