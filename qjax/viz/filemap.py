"""A model file as a picture: what each of its bytes is for, and what one tensor in it holds."""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Patch

from qjax.errors import QjaxError
from qjax.io.gguf import GGUFFile, TensorInfo
from qjax.io.gguf_metadata import pack_string
from qjax.tensor import QTensor, dequantize, describe_shape, describe_size
from qjax.viz.figure import Figure, canvas, styled
from qjax.viz.plots import BLUE
from qjax.viz.tradeoff import colour_and_marker

FIXED_BYTES = 24
"""Magic number, version, and how many tensors and entries of metadata follow."""

ROWS = 8
"""A file is drawn in so many rows at most."""

HEX_COLUMNS, HEX_LINES = 16, 4

# What is not the data of a tensor, in the order of the file.
_FRAME = {"fixed part": "#555555", "metadata": "#C9C5BA", "tensor infos": "#8F8B80", "padding": "#FFFFFF"}
_HATCH = "////"
# Rows have a round number of bytes: one of these times a power of ten or of 1024.
_ROUND = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
# Of a letter of the 10-point font, in points.
_LETTER = 5.8


class Region(NamedTuple):
    """Bytes of a file that belong together, ``size`` of them from byte ``start``.

    kind: "fixed part", "metadata", "tensor infos", "padding", or of a tensor's data the name of the format.
    name: the key or the tensor, "" where there is none.
    """

    name: str
    kind: str
    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


def file_regions(file: GGUFFile) -> list[Region]:
    """All bytes of a GGUF file, from the first to the last, without gaps.

    Raises QjaxError for a model in shards, each of which has a map of its own.
    """
    if len(file.paths) > 1:
        raise QjaxError(
            f"{file.paths[0]}: is one of {len(file.paths)} shards. Read one alone, with qjax.gguf.read_shard."
        )
    entries = ((key, "metadata", len(pack_string(key)) + len(v.pack())) for key, v in file.metadata.typed.items())
    infos = ((name, "tensor infos", _info_bytes(name, t)) for name, t in file.tensors.items())
    regions, at = [], 0
    for name, kind, size in (("", "fixed part", FIXED_BYTES), *entries, *infos):
        regions.append(Region(name, kind, at, size))
        at += size
    for name, tensor in file.tensors.items():
        regions += _padding(at, tensor.offset)
        regions.append(Region(name, tensor.format.name, tensor.offset, tensor.nbytes))
        at = regions[-1].stop
    return regions + _padding(at, file.size_bytes)


def _info_bytes(name: str, tensor: TensorInfo) -> int:
    """Name, number of dimensions, dimensions, type, offset."""
    return len(pack_string(name)) + 4 + 8 * len(tensor.shape) + 4 + 8


def _padding(start: int, stop: int) -> list[Region]:
    return [Region("", "padding", start, stop - start)] if stop > start else []


# ── the map ────────────────────────────────────────────────────────────────────────────────────────────────


@styled
def plot_file_map(file: GGUFFile) -> Figure:
    """All bytes of a GGUF file to scale, and twice a part of them enlarged: all before the data, and the 256 bytes
    around the beginning of the data.

    Raises QjaxError as `file_regions`.
    """
    regions = file_regions(file)
    colours, sizes = _colours(file), _sizes(regions)
    start = next((r.start for r in regions if r.kind not in _FRAME), file.size_bytes)
    row_bytes = _round_up(file.size_bytes / ROWS)
    n_rows = math.ceil(file.size_bytes / row_bytes)

    # In inches, from above: title and legend, the rows, and two strips, each with its own title and axis.
    map_top, map_height, strip_height, strip_room = 0.72, 0.1 + 0.42 * n_rows, 0.3, 1.1
    strip_top = map_top + map_height + 0.95
    height = strip_top + strip_room + strip_height + 0.6
    figure = canvas(8.6, height)
    figure.alt = (
        f"map of {file.paths[0].name}, {file.size_bytes} bytes: "
        + ", ".join(f"{kind} {size}" for kind, size in sizes.items())
        + f"; the data begin at byte {start}"
    )
    legend = [
        Patch(facecolor=colours[kind], edgecolor="#555555", label=f"{kind}, {describe_size(size)}",
              hatch=_HATCH if kind == "padding" else None)
        for kind, size in sizes.items()
    ]  # fmt: skip
    figure.legend(
        handles=legend, loc="upper left", ncols=4, bbox_to_anchor=(0.09, 1 - 0.33 / height), handlelength=1.2,
        columnspacing=1.4, borderaxespad=0, borderpad=0,
    )  # fmt: skip
    figure.text(
        0.85 / 8.6, 1 - 0.25 / height, f"{file.paths[0].name}, {describe_size(file.size_bytes)}",
        weight="bold", size=11,
    )  # fmt: skip

    _rows(_axes(figure, map_height, map_top), regions, colours, row_bytes, n_rows)
    before = _axes(figure, strip_height, strip_top)
    _strip(before, regions, colours, 0, max(start, 1))
    before.set_title(f"Enlarged: the {start:,} bytes before the data")
    around = _axes(figure, strip_height, strip_top + strip_room)
    first = max(start - 128, 0)
    last = min(first + 256, file.size_bytes)
    _strip(around, regions, colours, first, last)
    around.set_xticks(range(first - first % 64 + 64, last, 64))
    around.set_xticks(range(first - first % 32 + 32, last, 32), minor=True)
    around.set_title("Enlarged further: where the data begin, a mark each 32 bytes")
    return figure


def _axes(figure: Figure, height: float, top: float) -> Axes:
    """Axes over the width of the figure, ``height`` inches high, their upper edge ``top`` inches from the figure's."""
    width, whole = figure.get_size_inches()
    ax = figure.add_axes((0.85 / width, 1 - (top + height) / whole, 1 - 1.1 / width, height / whole))
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_yticks([])
    return ax


def _rows(ax: Axes, regions: list[Region], colours: Mapping[str, str], row_bytes: float, n_rows: int) -> None:
    """The whole file, ``row_bytes`` a row; a layer's name stands above its first byte, a tensor's within."""
    ax.set(xlim=(0, row_bytes), ylim=(n_rows, -0.1))
    points_per_byte = ax.get_window_extent().width * 72 / ax.figure.dpi / row_bytes
    for row in range(n_rows):
        _bar(ax, regions, colours, row * row_bytes, (row + 1) * row_bytes, y=row + 0.45, height=0.5)
    free = (-1.0, 0.0)
    for layer, members in itertools.groupby((r for r in regions if r.kind not in _FRAME), key=lambda r: _layer(r.name)):
        place, width = divmod(next(members).start, row_bytes), (len(layer) + 1) * _LETTER / points_per_byte
        if place[1] + width > row_bytes:
            # Where it goes on in the next row.
            place = place[0] + 1, 0.0
        if layer and place >= free:
            ax.text(place[1], place[0] + 0.4, layer, va="bottom", color="#555555")
            free = place[0], place[1] + width
    unit, name = _unit(row_bytes)
    ax.set_yticks([row + 0.7 for row in range(n_rows)], [f"{row * row_bytes / unit:g}" for row in range(n_rows)])
    ax.tick_params(length=0)
    ax.set_xticks(np.linspace(0, row_bytes, 6), [f"{row_bytes / unit * i / 5:g}" for i in range(6)])
    ax.set_xlabel(f"{name} from the beginning of a row; on the left, {name} from the beginning of the file")


def _strip(ax: Axes, regions: list[Region], colours: Mapping[str, str], start: int, stop: int) -> None:
    """The bytes from ``start`` to ``stop`` in one row."""
    ax.set(xlim=(start, stop), ylim=(1, 0), xlabel="byte of the file")
    _bar(ax, regions, colours, start, stop, y=0, height=1)
    ax.xaxis.set_major_formatter("{x:,.0f}")


def _bar(
    ax: Axes, regions: list[Region], colours: Mapping[str, str], start: float, stop: float, y: float, height: float
) -> None:
    """What lies from byte ``start`` to ``stop``, with the names that find room, x being bytes from the axes' left."""
    points_per_byte = ax.get_window_extent().width * 72 / ax.figure.dpi / (stop - start)
    left = ax.get_xlim()[0] - start
    cut = [(r, max(r.start, start), min(r.stop, stop)) for r in regions if r.start < stop and r.stop > start]
    data, padding = ([part for part in cut if (part[0].kind == "padding") == wanted] for wanted in (False, True))
    ax.broken_barh(
        [(a + left, b - a) for _, a, b in data],
        (y, height),
        facecolors=[colours[r.kind] for r, _, _ in data],
        # A line around what is thinner than the line would hide it.
        edgecolors=["#FBFAF7" if (b - a) * points_per_byte > 4 else "none" for _, a, b in data],
        linewidth=0.6,
    )
    ax.broken_barh(
        [(a + left, b - a) for _, a, b in padding],
        (y, height),
        facecolor=colours["padding"],
        edgecolor="#555555",
        linewidth=0.6,
        hatch=_HATCH,
    )
    for region, a, b in cut:
        label = _short(region)
        if label and len(label) * _LETTER < (b - a) * points_per_byte - 2:
            ax.text(
                (a + b) / 2 + left, y + height / 2, label, ha="center", va="center_baseline",
                color=_ink(colours[region.kind]),
                bbox={"facecolor": "#FFFFFF", "edgecolor": "none", "pad": 1} if region.kind == "padding" else None,
            )  # fmt: skip


def _short(region: Region) -> str:
    """What to write upon a region."""
    if region.kind in ("fixed part", "padding"):
        return region.kind
    if region.kind == "metadata":
        return region.name
    return region.name.removeprefix(f"{_layer(region.name)}.").removesuffix(".weight")


def _layer(name: str) -> str:
    """``blk.3`` of the tensor ``blk.3.attn_q.weight``; "" outside the layers."""
    prefix, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return f"{prefix}.{number}" if prefix == "blk" and number.isdigit() else ""


# ── one tensor ─────────────────────────────────────────────────────────────────────────────────────────────


@styled
def plot_tensor(file: GGUFFile, name: str) -> Figure:
    """One tensor of a file: where it lies, how its bytes begin, and how its weights are distributed.

    Raises KeyError if there is no such tensor, QjaxError if it has no finite weight, and as `file_regions`.
    """
    tensor, regions, colours = file.tensors[name], file_regions(file), _colours(file)
    w = _weights(tensor)
    finite = w[np.isfinite(w)]
    if not finite.size:
        raise QjaxError(f"{tensor.path}: tensor {name!r} has no finite weights to show")
    n_blocks = min(max(1, HEX_COLUMNS // tensor.format.type_size), tensor.nbytes // tensor.format.type_size)
    first = bytes(next(tensor.pieces())[: n_blocks * tensor.format.type_size])
    mean, spread = _tidy(float(finite.mean())), float(finite.std())

    figure = canvas(8.6, 4.4)
    strip = _axes(figure, 0.28, top=0.42)
    strip.set(xlim=(0, file.size_bytes), ylim=(1, 0), xticks=[])
    faded = {kind: _blend(colour, 0.75) for kind, colour in colours.items()}
    _bar(strip, [r._replace(name="") for r in regions if r.kind != "padding"], faded, 0, file.size_bytes, 0, 1)
    strip.broken_barh([(tensor.offset, tensor.nbytes)], (0, 1), facecolor=colours[tensor.format.name])
    strip.plot(tensor.offset + tensor.nbytes / 2, 1.25, "^", color="#222222", clip_on=False)
    strip.set_title(f"{name} in {file.paths[0].name}")

    blocks = "the first block" if n_blocks == 1 else f"the first {n_blocks} blocks"
    facts = [
        f"{tensor.format.name}, {tensor.format.bpw:g} bits per weight",
        f"shape {describe_shape(tensor.shape)}, {tensor.size:,} weights",
        f"{tensor.nbytes:,} bytes from byte {tensor.offset:,}",
        "",
        f"{blocks}: {len(first)} bytes, {n_blocks * tensor.format.block_size} weights",
    ]
    figure.text(0.1, 0.74, "\n".join(facts), va="top", linespacing=1.5)
    figure.text(0.1, 0.45, _hex_dump(first), va="top", linespacing=1.5, family="monospace")
    begins = ", ".join(f"{value + 0.0:.2g}" for value in w[:4])  # without the sign of a zero
    figure.text(0.1, 0.11, f"read back: {begins} …")

    ax = figure.add_axes((0.65, 0.14, 0.325, 0.52))
    share, edges = np.histogram(finite, bins=np.linspace(*_range(finite), 65))
    ax.stairs(100 * share / w.size, edges, fill=True, color=BLUE)
    ax.set(xlabel="weight", ylabel="% of weights", title=f"mean {mean}, σ {spread:.2g}")
    figure.alt = (
        f"{name} in {file.paths[0].name}: {', '.join(facts[:3])}; {facts[-1]}, beginning "
        f"{first[:HEX_COLUMNS].hex(' ')}; read back {begins}; mean {mean}, standard deviation {spread:.2g}"
    )
    return figure


def _weights(tensor: TensorInfo) -> Float32[np.ndarray, " n"]:
    x = tensor.load()
    return np.asarray(dequantize(x) if isinstance(x, QTensor) else x, np.float32).reshape(-1)


def _hex_dump(data: bytes) -> str:
    """Lines of HEX_COLUMNS bytes; what does not find room is counted."""
    lines = [data[i : i + HEX_COLUMNS].hex(" ") for i in range(0, len(data), HEX_COLUMNS)]
    hidden = len(data) - HEX_COLUMNS * HEX_LINES
    return "\n".join(lines if hidden <= 0 else [*lines[:HEX_LINES], f"and {hidden} more"])


def _range(w: np.ndarray) -> tuple[float, float]:
    """From the smallest to the largest weight, and around them if they are one."""
    low, high = float(w.min()), float(w.max())
    return (low, high) if low < high else (low - 1, high + 1)


def _tidy(x: float) -> str:
    """Three decimals, and no sign before a zero."""
    return f"{x:.3f}".replace("-0.000", "0.000")


# ── colours and units ──────────────────────────────────────────────────────────────────────────────────────


def _colours(file: GGUFFile) -> dict[str, str]:
    """By kind of region; the formats of a family have its colour, the larger the darker."""
    stored = {t.format.name: t.format for t in file.tensors.values()}
    colours = dict(_FRAME)
    families = itertools.groupby(sorted(stored.values(), key=lambda f: (f.family, -f.bpw)), key=lambda f: f.family)
    for family, members in families:
        for i, format in enumerate(members):
            colours[format.name] = _blend(colour_and_marker(family)[0], min(0.1 + 0.35 * i, 0.8))
    return colours


def _sizes(regions: Iterable[Region]) -> dict[str, int]:
    """Bytes by kind, the frame first, then formats by size."""
    sizes: dict[str, int] = {}
    for region in regions:
        sizes[region.kind] = sizes.get(region.kind, 0) + region.size
    of_formats = sorted(sizes.keys() - _FRAME.keys(), key=lambda kind: (-sizes[kind], kind))
    return {kind: sizes[kind] for kind in (*_FRAME, *of_formats) if kind in sizes}


def _blend(colour: str, white: float) -> str:
    """``colour`` with so much white in it, from 0 to 1."""
    red, green, blue = (1 - (1 - part) * (1 - white) for part in to_rgb(colour))
    return to_hex((red, green, blue))


def _ink(colour: str) -> str:
    """What can be read upon ``colour``."""
    red, green, blue = to_rgb(colour)
    return "#FFFFFF" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "#222222"


def _unit(size: float) -> tuple[int, str]:
    """Bytes in the unit for ``size``, and its name."""
    power = min(int(math.log2(max(size, 1))) // 10, 3)
    return 1024**power, ("bytes", "KiB", "MiB", "GiB")[power]


def _round_up(size: float) -> float:
    """The next round number of bytes."""
    unit, _ = _unit(size)
    tens = unit * 10 ** math.floor(math.log10(max(size / unit, 1)))
    return tens * next((n for n in _ROUND if n * tens >= size), 10)
