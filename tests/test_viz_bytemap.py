"""The wires of blocks against layouts taken from ggml's decoders, their equations, and the map as a page."""

import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import sampled

import qjax
from qjax import viz
from qjax.viz import wiring
from qjax.viz.bytemap import _COLOURS

pytestmark = pytest.mark.in_haste

STORED = [f for f in map(qjax.formats.get, qjax.formats.names()) if f.ggml_id is not None and f.block_size > 1]
# Code books take most blocks to find out; one of them stands for the others.
COSTLY = ("IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ3_S", "IQ3_XXS")
each_format = pytest.mark.parametrize(
    "format",
    [pytest.param(f, marks=[pytest.mark.exact] if f.name in COSTLY else [], id=f.name) for f in STORED],
)


def random_block(format, seed=0) -> np.ndarray:
    """Random bytes, with weights that are numbers."""
    rng = np.random.default_rng(seed)
    while True:
        block = rng.integers(0, 256, format.type_size).astype(np.uint8)
        if np.isfinite(wiring.decoded(format, block[None])).all():
            return block


# ── layouts, as ggml-quants.c dequantize_row_* reads them ──────────────────────────────────────────────────


def bits(byte: int, high: int = 7, low: int = 0) -> list[int]:
    """The numbers of bits high..low of a byte, the lowest first."""
    return [8 * byte + bit for bit in range(low, high + 1)]


def nibble(byte: int, is_high: bool) -> list[int]:
    return bits(byte, 7, 4) if is_high else bits(byte, 3, 0)


def six_bits(start: int, j: int) -> dict[str, list[int]]:
    """get_scale_min_k4: scale and minimum of sub-block j, of the 12 bytes from ``start``."""
    if j < 4:
        return {"s": bits(start + j, 5, 0), "m": bits(start + j + 4, 5, 0)}
    return {
        "s": nibble(start + j + 4, False) + bits(start + j - 4, 7, 6),
        "m": nibble(start + j + 4, True) + bits(start + j, 7, 6),
    }


def q4_0(i):
    return {"d": bits(0) + bits(1), "q": nibble(2 + i % 16, i >= 16)}


def q5_1(i):
    fifth = bits(4 + i // 8, i % 8, i % 8)
    return {"d": bits(0) + bits(1), "m": bits(2) + bits(3), "h": fifth, "q": nibble(8 + i % 16, i >= 16)}


def q8_0(i):
    return {"d": bits(0) + bits(1), "q": bits(2 + i)}


def q2_k(i):
    run, shift = divmod(i // 32, 4)
    return {
        "s": nibble(i // 16, False), "m": nibble(i // 16, True),
        "q": bits(16 + 32 * run + i % 32, 2 * shift + 1, 2 * shift),
        "d": bits(80) + bits(81), "dmin": bits(82) + bits(83),
    }  # fmt: skip


def q4_k(i):
    scales = {"d": bits(0) + bits(1), "dmin": bits(2) + bits(3)} | six_bits(4, i // 32)
    return scales | {"q": nibble(16 + 32 * (i // 64) + i % 32, i % 64 >= 32)}


def q5_k(i):
    scales = {"d": bits(0) + bits(1), "dmin": bits(2) + bits(3)} | six_bits(4, i // 32)
    fifth = bits(16 + i % 32, i // 32, i // 32)
    return scales | {"h": fifth, "q": nibble(48 + 32 * (i // 64) + i % 32, i % 64 >= 32)}


def q6_k(i):
    half, quarter, j = i // 128, i % 128 // 32, i % 32
    return {
        "q": nibble(64 * half + 32 * (quarter % 2) + j, quarter >= 2),
        "h": bits(128 + 32 * half + j, 2 * quarter + 1, 2 * quarter),
        "s": bits(192 + i // 16),
        "d": bits(208) + bits(209),
    }


def iq4_xs(i):
    j = i // 32
    return {
        "d": bits(0) + bits(1),
        "t": bits(2 + j // 4, 2 * (j % 4) + 1, 2 * (j % 4)),
        "s": nibble(4 + j // 2, j % 2 == 1),
        "q": nibble(8 + 16 * j + i % 16, i % 32 >= 16),
    }


def tq1_0(i):
    byte = i % 32 if i < 160 else 32 + (i - 160) % 16 if i < 240 else 48 + (i - 240) % 4
    return {"q" if i < 240 else "h": bits(byte), "d": bits(52) + bits(53)}


def mxfp4(i):
    return {"e": bits(0), "q": nibble(1 + i % 16, i >= 16)}


LAYOUTS = {
    "Q4_0": q4_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q2_K": q2_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k,
    "IQ4_XS": iq4_xs, "TQ1_0": tq1_0, "MXFP4": mxfp4,
}  # fmt: skip


@pytest.mark.parametrize("name", sampled(LAYOUTS, "Q4_0", "Q2_K", "IQ4_XS", "TQ1_0", "MXFP4"))
def test_wires_are_the_layout(name):
    """Names, bits from the lowest to the highest, and weights of all of them."""
    expected = {}
    for weight in range(qjax.formats.get(name).block_size):
        for symbol, its_bits in LAYOUTS[name](weight).items():
            expected.setdefault((symbol, tuple(its_bits)), []).append(weight)
    found = {(wire.symbol, wire.bits): list(wire.weights) for wire in viz.wires(name)}
    assert found == expected


@each_format
def test_every_bit_is_on_one_wire(format):
    assert sorted(bit for wire in viz.wires(format) for bit in wire.bits) == list(range(8 * format.type_size))
    assert {weight for wire in viz.wires(format) for weight in wire.weights} == set(range(format.block_size))
    assert viz.wires(format) is viz.wires(format.name), "found out once"


@each_format
def test_equation(format):
    """With the numbers of the wires it gives each weight, but for what it leaves to a table."""
    rule = wiring.equation(format)
    block = random_block(format)
    weights = wiring.decoded(format, block[None])[0]
    values = [{w.symbol: w.value(block) for w in viz.wires(format) if i in w.weights} for i in range(format.block_size)]
    if not rule:
        assert format.name in ("NVFP4", "IQ1_M"), "no field d of floats"
    elif "v" not in rule:
        assert np.array_equal(np.float32([eval(rule, {}, known) for known in values]), weights)
    else:
        units = np.float64([eval(rule, {}, known | {"v": 1}) for known in values])
        v = weights[units != 0] / units[units != 0]
        assert np.array_equal(v * 8, np.rint(v * 8)), "whole eighths in all code books"
        assert np.abs(v).max() <= 1300


@pytest.mark.parametrize(
    ("name", "table"),
    [
        # ggml-common.h kvalues_iq4nl and kvalues_mxfp4
        ("IQ4_XS", [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]),
        ("MXFP4", [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]),
    ],
)
def test_numbers_of_a_table(name, table):
    """The last factor is what the code stands for, as is shown with the weight."""
    format = qjax.formats.get(name)
    block = random_block(format)
    codes = {wire.weights[0]: wire.value(block) for wire in viz.wires(name) if wire.symbol == "q"}
    for weight, text in enumerate(wiring.in_numbers(format, block)):
        factor = re.search(r"× \(?(−?\d+|v)\)? = ", text)[1].replace("−", "-")
        assert factor in (str(table[codes[weight]]), "v"), text
        assert (factor == "v") == (" × v = 0" in text), "of a sub-block whose scale is zero"


def test_value_is_of_the_fields_type():
    block = bytearray(34)
    block[:4] = np.float16(-1.5).tobytes() + bytes([0x80, 0x7F])
    d, first, second = viz.wires("Q8_0")[:3]
    values = [wire.value(np.frombuffer(bytes(block), np.uint8)) for wire in (d, first, second)]
    assert values == [-1.5, -128, 127]


def test_words():
    wires = {wire.places: wire for wire in viz.wires("Q4_K")}
    assert [wires[place].symbol for place in ("6 (7–6), 14 (3–0)", "10 (7–6), 14 (7–4)", "1, 0")] == ["s", "m", "d"]
    assert [wiring.ranges(numbers) for numbers in ([5, 3, 4, 9], [])] == ["3–5, 9", "none"]
    assert wiring.typeset(wiring.equation("Q4_K")) == "d × s × q − dmin × m"
    block = np.array([0x00, 0xBC, *[0x7F] * 16], np.uint8)  # d = -1, codes 15 and 7
    assert wiring.in_numbers("Q4_0", block)[0] == "−1 × (15 − 8) = −7"
    assert wiring.in_numbers("Q4_1", np.insert(block, 2, [0, 0xBC]))[16] == "−1 × 7 + (−1) = −8"


def test_no_map_without_bytes():
    with pytest.raises(qjax.QjaxError, match="no GGML type id"):
        viz.wires("NF4")


# ── the page ───────────────────────────────────────────────────────────────────────────────────────────────


class Page(HTMLParser):
    """Cells (text, title, class) of the two grids, the rows of the other tables, and the attributes of the map."""

    def __init__(self, markup: str):
        super().__init__()
        self.cells: dict[str, list] = {}
        self.tables: list[list[list[str]]] = []
        self.attributes: dict = {}
        self._into = None
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if attributes.get("class") == "qjax-map":
            self.attributes = attributes
        elif tag == "table":
            self._grid = attributes.get("class")
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            if tag == "td" and self._grid:
                self.cells.setdefault(self._grid, []).append(attributes)
        self._into = tag

    def handle_data(self, data):
        if self._into in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "Q8_K", "TQ1_0", "NVFP4", "IQ2_XXS"])
def test_page(name):
    """It has every byte and every weight, says what they are, and is small; and it is the same each time."""
    format = qjax.formats.get(name)
    block = random_block(format)
    page = viz.byte_map(format, block, weight=format.block_size - 1)
    assert page == viz.byte_map(format.name, block.tobytes(), weight=format.block_size - 1)
    assert len(page) < 64_000
    assert format.name in page.alt
    assert not re.search("https?:|<script", page)

    parsed = Page(page)
    legend, bytes_table, weights_table, reading = parsed.tables
    assert "".join(text for row in bytes_table[1:] for text in row[1:]) == block.tobytes().hex()
    shown = [float(text) for row in weights_table[1:] for text in row[1:]]
    weights = wiring.decoded(format, block[None])[0]
    unit = float(re.search("in units of ([^<]+)<", page)[1])
    assert np.allclose(np.float64(shown) * unit, weights, atol=0.51 * unit)
    assert max(map(abs, shown)) <= 99
    assert sum(float(row[-1]) for row in legend[1:-1]) == pytest.approx(format.bpw, rel=1e-4)
    assert [row[0] for row in legend[1:]] == [*(field.name for field in format.layout), "all"]

    wires = viz.wires(format)
    assert len(parsed.attributes["data-wires"].split(";")) == len(wires)
    assert len(reading) == 1 + sum(format.block_size - 1 in wire.weights for wire in wires)
    places = {(bit // 8, wire.weights) for wire in wires for bit in wire.bits}
    lit = {byte for byte, fed in places if format.block_size - 1 in fed}
    assert {i for i, cell in enumerate(parsed.cells["bytes"]) if "on" in cell["class"].split()} == lit
    for i in (0, format.type_size - 1):
        fed = {weight for byte, weights in places if byte == i for weight in weights}
        assert parsed.cells["bytes"][i]["title"].endswith(f"feeds weights {wiring.ranges(fed)}")
    assert [cell["title"].split(" = ")[0] for cell in parsed.cells["weights"]] == [
        f"weight {i}" for i in range(format.block_size)
    ]
    # One stop of the Tab key in each grid, and every way of pointing runs the same script.
    assert all(sum("tabindex" in cell for cell in cells) == 1 for cells in parsed.cells.values())
    assert {parsed.attributes[f"on{event}"] for event in ("click", "keydown", "keyup")} == {"this.onpointermove(event)"}
    assert html.unescape(parsed.attributes["onpointermove"]) == parsed.attributes["onpointermove"]


def test_colours_suffice():
    assert max(len(format.layout) for format in STORED) <= len(_COLOURS)


def test_numbers_that_are_none():
    """A block of zeros, and one whose scale is infinite, have maps as well."""
    zeros = Page(viz.byte_map("Q4_0", bytes(18)))
    assert {text for row in zeros.tables[2][1:] for text in row} == {"0"}
    infinite = Page(viz.byte_map("Q8_0", bytes([0x00, 0x7C]) + bytes([1] * 31 + [0])))
    assert infinite.tables[2][1][1:] == ["inf"] * 31 + ["nan"]


@pytest.mark.parametrize(
    ("block", "weight", "message"), [(bytes(17), 0, "18 bytes, found 17"), (bytes(18), 32, "0 to 31")]
)
def test_refuses(block, weight, message):
    with pytest.raises(qjax.QjaxError, match=message):
        viz.byte_map("Q4_0", block, weight)
