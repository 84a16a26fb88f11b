"""qjax check: blocks against ggml_validate_row_data and gguf-py's decoder, files against damage that was put there."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import fails
from hostile import ggml_files, imatrix_files
from oracles import ggml
from safetensors.numpy import load_file, save_file

import qjax
from qjax import formats
from qjax.formats._format import is_finite
from qjax.io import gguf, hub, splits, stored

pytestmark = pytest.mark.in_haste

# Bytes that make many floats of 16 and 32 bits that are NaN or infinite.
BYTES = np.array([0, 1, 0x3C, 0x7B, 0x7C, 0x7E, 0x7F, 0x80, 0xFC, 0xFF], np.uint8)
# What of them gguf-py decodes, all of it, and a valid block can not overflow.
DECODED = [
    n for n in ggml.NAMES if "gguf" in ggml.decoders(n) and n not in ("MXFP4", "Q8_1", "F64", "I8", "I16", "I32", "I64")
]


def blocks(name: str, n: int = 400) -> np.ndarray:
    format, rng = formats.get(name), np.random.default_rng(0)
    few = rng.choice(BYTES, (n // 2, format.type_size))
    return np.concatenate([few, rng.integers(0, 256, (n // 2, format.type_size), np.uint8)])


def valid(name: str, data: np.ndarray) -> np.ndarray:
    format = formats.get(name)
    return format.valid(format.view(data.reshape(-1)))


@pytest.mark.parametrize("name", [name for name in ggml.NAMES if name != "Q8_1"])
def test_blocks_as_ggml_validates_them(name):
    """But Q8_1, of which it says that there is no such type."""
    data = blocks(name)
    np.testing.assert_array_equal(valid(name, data), [ggml.libggml_validate(name, block) for block in data])


@pytest.mark.parametrize("name", DECODED)
def test_valid_blocks_are_those_with_finite_weights(name):
    data = blocks(name, 200)
    finite = np.isfinite(ggml.dequantize(name, data)).all(axis=1)
    np.testing.assert_array_equal(valid(name, data), finite)
    assert finite.any()
    assert finite.all() == (name == "NVFP4")  # whose scales decode to a number whatever they are


def test_the_one_scale_of_mxfp4_that_is_none():
    data = np.zeros((256, 17), np.uint8)
    data[:, 0] = np.arange(256)
    assert np.flatnonzero(~valid("MXFP4", data)).tolist() == [255]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16])
def test_finite_by_the_bits(dtype):
    values = np.random.default_rng(0).choice(BYTES, 8000).view(dtype)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(is_finite(values), np.isfinite(values))


# ── files ────────────────────────────────────────────────────────────────────────────────────────────


def q8_0(rows: int, columns: int, *invalid: int) -> np.ndarray:
    """Bytes of blocks with a scale of 1, but those of these numbers, which have NaN."""
    data = np.zeros((rows * columns // 32, 34), np.uint8)
    data[:, :2] = np.float16([1]).view(np.uint8)
    data[list(invalid), :2] = np.float16([np.nan]).view(np.uint8)
    return data


def tensors(**invalid):
    return {
        "a": np.ones((3, 5), np.float32),
        "b": qjax.QTensor.from_bytes(q8_0(24, 64, *invalid.get("b", ())), "Q8_0", (2, 12, 64)),
        "c": np.ones((0, 4), np.float16),
        "d": jnp.ones((7, 32), jnp.bfloat16).at[invalid.get("d", ([], []))].set(-jnp.inf),
        "e": np.array(invalid.get("e", 1), np.float32),
    }


DAMAGE = {"b": (31, 32, 47), "d": ([2, 6], [30, 0]), "e": np.nan}
FOUND = [
    # name, format, blocks, invalid ones, the first, where
    ("b", "Q8_0", 48, 3, 31, "[1, 3, 32:64]"),
    ("d", "BF16", 224, 2, 94, "[2, 30]"),
    ("e", "F32", 1, 1, 0, "[0]"),
]


def found(check) -> list:
    return [(t.name, t.format, t.n_blocks, t.n_invalid, t.first, t.where) for t in check.invalid]


@pytest.mark.parametrize("piece_bytes", [100, 2**24])
def test_each_tensor_is_named_with_its_first_block(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(stored, "PIECE_BYTES", piece_bytes)
    gguf.write(tmp_path / "x.gguf", {}, tensors())
    assert qjax.check(tmp_path / "x.gguf").sound
    gguf.write(tmp_path / "x.gguf", {}, tensors(**DAMAGE))
    check = qjax.check(tmp_path / "x.gguf")
    assert not check.sound
    assert found(check) == FOUND
    assert (check.container, check.n_tensors, check.size_bytes) == ("GGUF 3", 5, 60 + 48 * 34 + 448 + 4)


def test_shards(tmp_path):
    gguf.write(tmp_path / "x.gguf", {}, tensors(**DAMAGE))
    report = splits.split(tmp_path / "x.gguf", tmp_path / "m", max_tensors=2)
    assert found(qjax.check(report.files[1].path)) == FOUND


def test_a_file_from_before_gguf(tmp_path):
    data, path = ggml_files.build("GGJT 3", "F32"), tmp_path / "model.bin"
    path.write_bytes(data)
    assert qjax.check(path).sound
    path.write_bytes(data[:-4] + np.float32(np.inf).tobytes())
    (wrong,) = qjax.check(path).invalid
    assert (wrong.name, wrong.first, wrong.where) == ("blk.1.ffn_down.weight", 64 * 96 - 1, "[63, 95]")


def test_a_folder(tmp_path):
    source = hub.BUNDLED["tiny"]
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    x = weights[name].copy()
    x[3, 7] = np.nan
    save_file(weights | {name: x}, tmp_path / "model.safetensors", {"format": "pt"})
    (wrong,) = qjax.check(tmp_path).invalid
    assert (wrong.name, wrong.n_invalid, wrong.where) == ("blk.1.ffn_down.weight", 1, "[3, 7]")


def test_scales_that_blocks_share():
    """Formats without bytes of their own in a file: the blocks of a group have no scale, and the others one."""
    t = qjax.quantize(np.random.default_rng(0).standard_normal((4, 64 * 128)).astype(np.float32), "NF4")
    damaged = qjax.QTensor(t.fields._replace(nested_absmax=t.fields.nested_absmax.at[1].set(jnp.nan)), t.format)

    class Loaded(stored.Stored):
        format, shape, data = t.format, t.shape, None

        def __init__(self, t):
            self.load = lambda: t

        def load(self): ...

    from qjax.soundness import _look_at

    assert _look_at("t", Loaded(t)) is None
    wrong = _look_at("t", Loaded(damaged))
    assert (wrong.n_blocks, wrong.n_invalid, wrong.first, wrong.where) == (512, 256, 256, "[2, 0:64]")


@pytest.mark.parametrize("name", imatrix_files.KIND.sound)
def test_importance_matrices(tmp_path, run, name):
    path = imatrix_files.KIND.write(tmp_path, imatrix_files.KIND.sound[name])
    code, out, _ = run("check", path)
    assert (code, "importance matrix, " in out) == (0, True)
    raw = path.read_bytes()
    path.write_bytes(raw[:-29] if raw.startswith(b"GGUF") else raw[:-1])  # all of the padding, and a byte
    fails(run("check", path), "cut short")


# ── the command ──────────────────────────────────────────────────────────────────────────────────────


def test_exit_codes(run, tmp_path):
    path = tmp_path / "x.gguf"
    gguf.write(path, {}, tensors())
    code, out, err = run("check", path)
    assert (code, err) == (0, "")
    assert out == f"{path}: GGUF 3, 5 tensors, 2.1 KiB: sound\n"
    assert json.loads(run("check", path, "--json")[1]) == {
        "sound": True, "name": str(path), "container": "GGUF 3", "n_tensors": 5, "size_bytes": 2144, "invalid": [],
    }  # fmt: skip
    gguf.write(path, {}, tensors(**DAMAGE))
    code, out, err = run("check", path)
    assert (code, err) == (1, "")
    assert "NOT SOUND, 3 with NaN or infinities" in out
    assert "3 of 48" in out
    assert "[1, 3, 32:64]" in out
    code, out, _ = run("check", path, "--json")
    assert code == 1
    record = json.loads(out)
    assert (record["sound"], [t["first"] for t in record["invalid"]]) == (False, [31, 94, 0])
    path.write_bytes(path.read_bytes()[:-200])
    fails(run("check", path), "cut short")
    fails(run("check", tmp_path / "absent.gguf"), "no such file")
    path.write_bytes(b"\0\1a story, or something else")
    fails(run("check", path), "not a GGUF file")


def test_names_cannot_steer_a_terminal_or_a_page(tmp_path):
    gguf.write(tmp_path / "x.gguf", {}, {"\x1b[2J<b>": np.float32([np.nan])})
    check = qjax.check(tmp_path / "x.gguf")
    assert str(check).replace("\n", "").isprintable()
    assert "<b>" not in check._repr_html_()
    assert "\\x1b" in check._repr_html_()
    assert repr(check) == f"Check({check.headline})"
