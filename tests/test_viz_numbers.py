"""Types of numbers, their bits and their pictures: ml_dtypes, numpy and struct say what the bits mean."""

import io
import re
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

import qjax
from qjax import viz
from qjax.viz import numbers

pytestmark = pytest.mark.in_haste

PEERS = {
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "int8": np.int8,
    "uint8": np.uint8,
    "int4": ml_dtypes.int4,
    "uint4": ml_dtypes.uint4,
}
FLOATS = [name for name in PEERS if "int" not in name]

each_type = pytest.mark.parametrize("name", PEERS)
each_float = pytest.mark.parametrize("name", FLOATS)


def patterns(name):
    return np.arange(2 ** numbers.number_type(name).bits)


def theirs(name):
    """The values of all patterns."""
    codes = patterns(name).astype(np.uint16 if len(patterns(name)) > 256 else np.uint8)
    return codes.view(PEERS[name]).astype(np.float64)


# ── what patterns mean ─────────────────────────────────────────────────────────────────────────────────────


@each_type
@pytest.mark.filterwarnings("ignore:invalid value")
def test_decode(name):
    ours = numbers.number_type(name).decode(patterns(name))
    numbers_only = ~np.isnan(theirs(name))
    assert np.array_equal(ours, theirs(name), equal_nan=True)
    assert np.array_equal(np.signbit(ours)[numbers_only], np.signbit(theirs(name))[numbers_only])


@each_type
@pytest.mark.filterwarnings("ignore:invalid value")
def test_every_number_is_encoded_as_itself(name):
    finite = np.isfinite(theirs(name))
    assert np.array_equal(numbers.number_type(name).encode(theirs(name)[finite]), patterns(name)[finite])


@each_float
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_nearest_at_the_ties_and_at_the_end(name):
    """Halfway between two numbers, a hair to either side, and where the numbers end."""
    v = numbers.values(name)[:: 1 if numbers.number_type(name).bits < 16 else 7].astype(np.float32)
    end = v[-1] + (v[-1] - v[-2]) * np.array([0.5, 1, 2, 1e4], np.float32)
    middle = (v[1:] / 2 + v[:-1] / 2).astype(np.float32)
    x = np.concatenate([middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), end, -end])
    x = np.append(x, [np.inf, -np.inf]).astype(np.float32)
    assert np.array_equal(numbers.nearest(x, name), x.astype(PEERS[name]).astype(np.float64), equal_nan=True)


@each_float
@given(x=st.floats(width=32, allow_nan=False))
@example(x=-0.0)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_nearest(name, x):
    expected = np.float32(x).astype(PEERS[name]).astype(np.float64)
    found = numbers.nearest(x, name)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.isnan(expected) or np.signbit(found) == np.signbit(expected)


@given(x=st.floats(width=32))
def test_fp32_is_what_struct_packs(x):
    code = int(numbers.number_type("fp32").encode(x))
    assert struct.pack("<I", code) == struct.pack("<f", x) or np.isnan(x)
    assert np.isnan(x) == np.isnan(numbers.number_type("fp32").decode(code))


@given(bits=st.integers(0x00800000, 0x7F000000))
def test_tf32_is_fp32_with_13_bits_rounded_off(bits):
    to_even = bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF
    x, expected = struct.unpack("<2f", struct.pack("<2I", bits, to_even))
    assert numbers.nearest(x, "tf32") == expected


@each_float
@pytest.mark.filterwarnings("ignore:invalid value")
def test_properties(name):
    """ml_dtypes takes NumPy's types as well."""
    t, info = numbers.number_type(name), ml_dtypes.finfo(PEERS[name])
    assert (t.bits, t.exponent_bits, t.mantissa_bits) == (info.bits, info.nexp, info.nmant)
    assert (t.largest, t.smallest_normal, t.smallest) == (info.max, info.smallest_normal, info.smallest_subnormal)
    assert t.epsilon == info.eps
    assert t.count == np.unique(theirs(name)[np.isfinite(theirs(name))]).size == numbers.values(name).size


@pytest.mark.parametrize("name", ["int1", "int4", "int8", "uint1", "uint5", "int32"])
@given(x=st.floats(-(2**33), 2**33))
def test_integers_round_to_even_and_stop_at_their_ends(name, x):
    bits, signed = numbers.number_type(name).bits, not name.startswith("u")
    lowest = -(2 ** (bits - 1)) if signed else 0
    assert numbers.nearest(x, name) == min(max(round(x), lowest), lowest + 2**bits - 1)


def test_one_exponent_bit_is_an_even_grid():
    assert np.array_equal(numbers.values("e1m2"), np.arange(-7, 8) / 2)


def test_the_codes_of_mxfp4_are_e2m1():
    """A block whose largest is 6 has the scale 1, and holds all values."""
    block = np.resize(numbers.values("e2m1"), (1, 32)).astype(np.float32)
    assert np.array_equal(qjax.dequantize(qjax.quantize(block, "MXFP4")), block)


@pytest.mark.parametrize("name", ["fp64", "int0", "int33", "e0m3", "e9m2", "e4m24", "E4M3", "", "e4m3 "])
def test_unknown_types(name):
    with pytest.raises(qjax.QjaxError, match="unknown type of numbers"):
        numbers.number_type(name)


def test_too_many_to_list():
    with pytest.raises(qjax.QjaxError, match="fp32 has 2\\^32 patterns"):
        numbers.values("fp32")


# ── bits ───────────────────────────────────────────────────────────────────────────────────────────────────


def rows(table):
    """The cells of each type, without markup."""
    found = re.findall(r"<tr>(.*?)</tr>", table)
    cells = [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row)] for row in found[1:]]
    return {name: rest for name, *rest in cells}


@given(x=st.floats(width=32, allow_nan=False))
def test_bit_table_shows_the_bits(x):
    shown = rows(viz.bit_table(repr(x)))
    fp32 = f"{struct.unpack('<I', struct.pack('<f', x))[0]:032b}"
    assert shown["fp32"][:3] == [fp32[:1], fp32[1:9], fp32[9:]]
    assert shown["fp32"][5] == "exact"
    assert "".join(shown["bf16"][:3]) == f"{np.float32(x).astype(ml_dtypes.bfloat16).view(np.uint16):016b}"
    assert "".join(shown["int8"][:3]) == f"{round(min(max(x, -128), 127)) & 255:08b}"


def test_bit_table_in_words():
    table = viz.bit_table("1/3", ["e4m3", "e2m1"])
    assert rows(table) == {
        "e4m3": ["0", "0101", "011", "1.375 × 2⁻²", "0.34375", "+0.031"],
        "e2m1": ["0", "00", "1", "0.5 × 2⁰, denormal", "0.5", "+0.5"],
    }
    assert repr(table) == "Html: The bits of 1/3: e4m3 0.34375, e2m1 0.5"
    assert table._repr_html_() == table == str(table)


@pytest.mark.parametrize(
    ("number", "e4m3", "e5m2", "e2m1"),
    [
        ("464", ["448", "-0.034"], ["448", "-0.034"], ["6", "-0.99"]),
        ("70000", ["nan", "overflow"], ["inf", "overflow"], ["6", "-1"]),
        ("-inf", ["nan", "overflow"], ["-inf", "exact"], ["-6", "overflow"]),
        ("nan", ["nan", "exact"], ["nan", "exact"], ["has no NaN", ""]),
        ("0", ["0", "exact"], ["0", "exact"], ["0", "exact"]),
    ],
)
def test_bit_table_at_the_ends(number, e4m3, e5m2, e2m1):
    shown = rows(viz.bit_table(number))
    assert [shown[name][4:] for name in ("e4m3", "e5m2", "e2m1")] == [e4m3, e5m2, e2m1]


@pytest.mark.parametrize("typed", ["", "0,1", "1/0", "1/", "<script>alert(1)</script>", "x" * 1000])
def test_what_is_no_number_is_said(typed):
    table = viz.bit_table(typed)
    assert "is not a number" in table
    assert "<script>" not in table
    assert len(table.alt) < 120
    assert {*map(tuple, rows(table).values())} == {("–",) * 6}
    assert rows(table).keys() == rows(viz.bit_table("1")).keys(), "as high as a table of a number"


# ── pictures ───────────────────────────────────────────────────────────────────────────────────────────────

W = np.random.default_rng(0).standard_normal((40, 64))

FIGURES = {
    "number lines": lambda: viz.plot_number_lines(["uint4", "int4", "e2m1", "e3m0", "int6", "e2m3", "e3m2"]),
    "coverage": lambda: viz.plot_coverage(W, {"whole numbers": np.arange(-8.0, 8), "a few": np.array([0.0, 1, 2])}),
    "steps": lambda: viz.plot_steps(["fp32", "bf16", "fp16", "e5m2", "e4m3", "int8"]),
    "weights": lambda: viz.plot_weights({"a": W, "b": 3 * W[:7], "c": np.arange(9.0) - 4}),
    "splits": lambda: viz.plot_splits({k: {"e1m6": 40.0, "e2m5": 43.0, "e3m4": 38.0 + len(k)} for k in ("x", "long")}),
    "bound": lambda: viz.plot_bound({"integers": {2.0: 9.0, 8.0: 40.0}, "floats of some kind": {4.0: 19.0, 7.9: 44}}),
} | {
    f"staircase of {name}": lambda name=name: viz.plot_staircase(name)
    for name in ("uint4", "int8", "e3m0", "e2m1", "e4m3", "e5m2")
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure(name):
    """A picture of the promised size, small enough to store, not cut off, and described in words."""
    figure = FIGURES[name]()
    data, metadata = figure._repr_png_()
    picture = Image.open(io.BytesIO(data))
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert len(data) < 80_000
    assert np.allclose(picture.size, np.array([width, height]) * figure.dpi, atol=1)
    assert 0 <= drawn.x0 < drawn.x1 <= width, drawn
    assert 0 <= drawn.y0 < drawn.y1 <= height, drawn
    assert all(text.get_fontsize() >= 10 for text in figure.findobj(Text))
    assert metadata["alt"] == figure.alt != viz.Figure.alt


def test_coverage_counts_the_values_that_are_nearest_to_a_number():
    grid = np.linspace(-5, 5, 21)
    nearest = {int(np.argmin(np.abs(grid - w))) for w in W.ravel()}
    assert f"evenly, {len(nearest)} of 21 used" in viz.plot_coverage(W, {"evenly": grid}).alt
    assert 10 < len(nearest) < 21


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_steps_are_numpys_spacing(name):
    dtype = {"fp32": np.float32, "fp16": np.float16}[name]
    x = np.append(np.arange(1, 2000) * 2.0**-8, [2.0**-20, 2.0**-24, 2.0**15])
    assert np.array_equal(numbers._step(numbers.number_type(name), x), np.spacing(x.astype(dtype)).astype(float))


def test_steps_end_with_the_numbers():
    assert np.isnan(numbers._step(numbers.number_type("e4m3"), np.array([448.0, 449.0]))).tolist() == [False, True]
    assert numbers._step(numbers.number_type("int8"), np.array([0.1, 127.0])).tolist() == [1, 1]


def test_staircase_in_words():
    assert viz.plot_staircase("e4m3").alt.startswith(
        "e4m3: a staircase of 253 values, largest 448, smallest step 0.00195; values in the octaves from 2^-9 to 2^8: "
        "1 in the first, 7 in the last"
    )


def test_weights_in_words():
    gaussian, uniform = np.random.default_rng(0).standard_normal((2, 100_000)), np.linspace(-1, 1, 10_001)
    assert "kurtosis -1.20 to 0.0" in viz.plot_weights({"g": gaussian[0], "u": uniform}).alt


def test_bound_in_words():
    """A single bit per weight at 4.4 dB, its sign: 1.6 dB below the bound."""
    assert "signs 1.6 at 1.0 bits" in viz.plot_bound({"signs": {1.0: -10 * np.log10(1 - 2 / np.pi)}}).alt


# ── a field to type into ───────────────────────────────────────────────────────────────────────────────────


def bits(number="0.1"):
    return viz.bit_table(number)


def test_a_field_takes_what_is_typed():
    explorer = viz.explore(bits, number=viz.Typed(["1/3", "0.1"]))
    field, shown = explorer.children[0].children[0], explorer.children[1]
    assert (field.value, field.options, field.continuous_update) == ("0.1", ("1/3", "0.1"), False)
    assert explorer.stops == [{"number": "1/3"}, {"number": "0.1"}]
    for typed in ("-2.5", "nonsense", "0.1"):
        field.value = typed
        assert shown.value == bits(typed)
    assert repr(explorer) == "Explorer(number: 2 stops)"


def test_a_field_begins_with_one_of_its_examples():
    with pytest.raises(ValueError, match="explore: number can be one of"):
        viz.explore(bits, number=viz.Typed(["1"]))


def test_sqnr_db():
    """Without a scale, of ml_dtypes' own rounding; with one, a row of 2^k times whole numbers loses nothing."""
    x = np.random.default_rng(0).standard_normal((8, 64))
    theirs = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = 10 * np.log10(np.sum(x**2) / np.sum((theirs - x) ** 2))
    assert numbers.sqnr_db(x, "e4m3", scale="none") == pytest.approx(expected)

    rows = np.array([[7.0, -3, 1], [0.07, -0.03, 0.01]])
    assert numbers.sqnr_db(rows, "int4", scale="row") > 200
    assert 10 < numbers.sqnr_db(rows, "int4") < 100
    assert numbers.sqnr_db(x, "int4", scale="row") > numbers.sqnr_db(x, "int4") > numbers.sqnr_db(x, "int4", "none")
