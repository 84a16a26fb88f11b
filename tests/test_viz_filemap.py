"""The map of a GGUF file, and the picture of a tensor in it: gguf-py says where things lie."""

import io
import struct

import gguf as gguf_py
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

import qjax
from qjax import viz
from qjax.viz import filemap
from qjax.viz.figure import png


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(0).standard_normal((6, 256)).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory, weights):
    """Written by gguf-py: rows of four formats, of sizes that need padding, and some metadata of every kind."""
    path = tmp_path_factory.mktemp("filemap") / "owl.gguf"
    writer = gguf_py.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_bool("owl.flies", True)
    writer.add_array("tokenizer.ggml.tokens", ["to", "whit", "töö"])
    writer.add_array("owl.numbers", [1, 2, 3])
    writer.add_tensor("token_embd.weight", weights[:3, :32], raw_dtype=None)
    for layer in range(2):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", weights[layer, :5].copy())
        for name, kind in (("attn_q", "Q4_0"), ("ffn_down", "Q8_0"), ("ffn_up", "F16")):
            kind = gguf_py.GGMLQuantizationType[kind]
            blocks = gguf_py.quants.quantize(weights[:3], kind)
            writer.add_tensor(f"blk.{layer}.{name}.weight", blocks, raw_dtype=None if kind.name == "F16" else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(path):
    return qjax.gguf.read(path)


def test_regions_are_where_gguf_py_finds_them(path, file):
    reader, data = gguf_py.GGUFReader(path), path.read_bytes()
    regions = viz.file_regions(file)
    at = 0
    for region in regions:
        assert region.start == at
        assert region.size > 0
        at = region.stop
    assert at == len(data)

    metadata = {r.name: r.start for r in regions if r.kind == "metadata"}
    assert metadata == {key: f.offset for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    infos = {r.name: r.start for r in regions if r.kind == "tensor infos"}
    assert infos == {t.name: t.field.offset for t in reader.tensors}
    held = {(r.name, r.kind, r.start, r.size) for r in regions[1:] if r.kind not in filemap._FRAME}
    assert held == {(t.name, t.tensor_type.name, int(t.data_offset), int(t.n_bytes)) for t in reader.tensors}
    padding = [r for r in regions if r.kind == "padding"]
    assert len(padding) > 3
    assert not any(any(data[r.start : r.stop]) for r in padding)


def write(path, tensors=b"", data=b""):
    path.write_bytes(struct.pack("<4sIqq", b"GGUF", 3, bool(tensors), 0) + tensors + data)
    return qjax.gguf.read(path)


def test_what_follows_the_last_tensor_counts_as_padding(tmp_path):
    info = struct.pack("<Q1sIqIQ", 1, b"w", 1, 4, 0, 0)
    padding = bytes(-(24 + len(info)) % 32)
    file = write(tmp_path / "x.gguf", info, padding + bytes(16) + b"more than is needed")
    assert [(r.kind, r.size) for r in viz.file_regions(file)] == [
        ("fixed part", 24), ("tensor infos", len(info)), ("padding", len(padding)), ("F32", 16), ("padding", 19),
    ]  # fmt: skip


def test_shards_are_mapped_one_by_one(tmp_path, path):
    from qjax.io.splits import split

    shard = split(path, tmp_path / "part", max_tensors=4).files[1].path
    with pytest.raises(qjax.QjaxError, match=r"one of 3 shards.*read_shard"):
        viz.plot_file_map(qjax.gguf.read(shard))
    assert sum(r.kind not in filemap._FRAME for r in viz.file_regions(qjax.gguf.read_shard(shard))) == 4


def test_map_says_what_it_shows(path, file):
    alt = viz.plot_file_map(file).alt
    reader = gguf_py.GGUFReader(path)
    sizes = {"Q4_0": 2 * 3 * 144, "Q8_0": 2 * 3 * 272, "F16": 2 * 3 * 512}
    assert f"map of owl.gguf, {path.stat().st_size} bytes: fixed part 24, metadata " in alt
    assert all(f" {kind} {size}" in alt for kind, size in sizes.items())
    assert alt.endswith(f"the data begin at byte {reader.data_offset}")


def test_tensor_says_what_it_shows(path, file, weights):
    alt = viz.plot_tensor(file, "blk.1.attn_q.weight").alt
    (found,) = (t for t in gguf_py.GGUFReader(path).tensors if t.name == "blk.1.attn_q.weight")
    decoded = gguf_py.quants.dequantize(found.data, found.tensor_type)
    assert f"Q4_0, 4.5 bits per weight, shape 3×256, 768 weights, 432 bytes from byte {found.data_offset:,};" in alt
    assert f"the first block: 18 bytes, 32 weights, beginning {bytes(found.data.ravel()[:16]).hex(' ')};" in alt
    assert f"read back {', '.join(f'{value + 0.0:.2g}' for value in decoded.ravel()[:4])};" in alt
    assert alt.endswith(f"mean {decoded.mean():.3f}, standard deviation {decoded.std():.2g}")


def test_plain_tensor_shows_several_blocks(file, weights):
    assert "the first 4 blocks: 16 bytes, 4 weights" in viz.plot_tensor(file, "token_embd.weight").alt
    few = viz.plot_tensor(file, "blk.0.attn_norm.weight").alt
    assert "5 weights, 20 bytes" in few
    assert ", ".join(f"{value:.2g}" for value in weights[0, :4]) in few


@pytest.mark.parametrize("values", [[np.nan] * 4, []])
def test_weights_that_cannot_be_shown(tmp_path, values):
    qjax.gguf.write(tmp_path / "x.gguf", {}, {"w": np.array(values, np.float32)})
    with pytest.raises(qjax.QjaxError, match="'w' has no finite weights"):
        viz.plot_tensor(qjax.gguf.read(tmp_path / "x.gguf"), "w")


def test_infinite_weights_are_left_out(tmp_path):
    qjax.gguf.write(tmp_path / "x.gguf", {}, {"w": np.array([1, np.inf, 3, np.nan], np.float32)})
    assert "read back 1, inf, 3, nan; mean 2.000" in viz.plot_tensor(qjax.gguf.read(tmp_path / "x.gguf"), "w").alt


FIGURES = {
    "map": lambda file, folder: viz.plot_file_map(file),
    "map of nothing": lambda file, folder: viz.plot_file_map(write(folder / "x.gguf")),
    "map of tiny": lambda file, folder: viz.plot_file_map(_tiny(folder)),
    "tensor": lambda file, folder: viz.plot_tensor(file, "blk.1.ffn_down.weight"),
    "vector": lambda file, folder: viz.plot_tensor(file, "blk.0.attn_norm.weight"),
    "one value": lambda file, folder: viz.plot_tensor(_ones(folder), "w"),
}


def _tiny(folder):
    qjax.load("tiny").save(folder / "tiny.gguf")
    return qjax.gguf.read(folder / "tiny.gguf")


def _ones(folder):
    qjax.gguf.write(folder / "x.gguf", {}, {"w": np.ones((2, 300), np.float32)})
    return qjax.gguf.read(folder / "x.gguf")


@pytest.mark.parametrize("name", FIGURES)
def test_figure(name, file, tmp_path):
    """Small enough to store, not cut off, legible, described in words, and no name of a tensor out of its place."""
    figure = FIGURES[name](file, tmp_path)
    picture = png(figure)
    assert len(picture) < 80_000
    assert len(Image.open(io.BytesIO(picture)).convert("RGB").getcolors()) > 20
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= drawn.x0 < drawn.x1 <= width, drawn
    assert 0 <= drawn.y0 < drawn.y1 <= height, drawn
    assert all(text.get_fontsize() >= 10 for text in figure.findobj(Text))
    assert repr(figure) == f"Figure: {figure.alt}"
    for ax in figure.axes:
        boxes = [Text.get_window_extent(text) for text in ax.texts]
        for i, box in enumerate(boxes):
            assert ax.bbox.x0 - 1 <= box.x0 < box.x1 <= ax.bbox.x1 + 1, ax.texts[i]
            assert not any(box.overlaps(other) for other in boxes[:i]), ax.texts[i]


def test_formats_of_one_family_differ_in_grey(file):
    """In lightness, not only in hue."""
    colours = filemap._colours(file)
    grey = [np.dot(to_rgb(colours[name]), (0.299, 0.587, 0.114)) for name in ("Q8_0", "Q4_0")]
    assert grey[1] > grey[0] + 0.1
    assert colours["F16"] != colours["F32"]


def test_rows_have_round_sizes():
    assert [filemap._round_up(size) for size in (24, 1001, 290 * 2**10, 11.7 * 2**20)] == [
        25, 1500, 300 * 2**10, 15 * 2**20,
    ]  # fmt: skip
