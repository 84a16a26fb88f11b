"""byte_map: a block of bytes as a picture to point at, in plain HTML that reads well where scripts do not run, too."""

import html
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float32, UInt8

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.viz.html import Html
from qjax.viz.wiring import Wire, decoded, equation, in_numbers, number, ranges, typeset, wires

BYTES_A_ROW, WEIGHTS_A_ROW = 16, 32

# Okabe and Ito's colours, and that of a text on them.
_COLOURS = (
    ("#0072b2", "#fff"), ("#d55e00", "#000"), ("#009e73", "#000"), ("#cc79a7", "#000"), ("#e69f00", "#000"),
    ("#56b4e9", "#000"),
)  # fmt: skip


def byte_map(
    format: str | Format, block: bytes | UInt8[ArrayLike, " n_bytes"], weight: int = 0, *, height: int = 0
) -> Html:
    """The bytes of a block and the weights that they stand for; pointing at one lights up the others that belong to it.

    Below are listed the numbers that it is about: their value, bits and place, and what they feed; at first those of
    ``weight``.  Which bits feed which weights comes from `wires`, so every format with a GGML id has a map.

    height: the least height in CSS pixels, for maps of several formats to take the same space.
    Raises QjaxError if the block has not as many bytes as the format's blocks, or not that weight.
    """
    format = formats.get(format)
    block = np.frombuffer(block, np.uint8) if isinstance(block, bytes) else np.asarray(block)
    if block.shape != (format.type_size,):
        raise QjaxError(f"a block of {format.name} has {format.type_size} bytes, found {block.size}; give one block")
    if not 0 <= weight < format.block_size:
        raise QjaxError(f"a block of {format.name} has weights 0 to {format.block_size - 1}, asked for {weight}")
    title = f"{format.name}: {format.block_size} weights in {format.type_size} bytes, {format.bpw:g} bits per weight"
    weights = decoded(format, block[None])[0]
    labels = [f"weight {i} = {sum_}" for i, sum_ in enumerate(in_numbers(format, block))]
    rows = [_row(wire, block) for wire in wires(format)]
    lit = [wire for wire in wires(format) if weight in wire.weights]
    unit = _unit(weights)
    attributes = {
        "class": "qjax-map",
        "role": "group",
        "aria-label": title,
        "style": f"min-height:{height}px",
        "data-lm-suppress-shortcuts": "true",  # JupyterLab's, which would take the arrow keys
        "data-wires": ";".join("|".join(row) for row in rows),
        "onpointermove": _SCRIPT,
    } | {f"on{event}": "this.onpointermove(event)" for event in ("click", "keydown", "keyup")}
    page = [
        f"<style>{_STYLE}</style><div",
        *(f' {name}="{html.escape(text)}"' for name, text in attributes.items()),
        f"><p><b>{title}</b></p>{_legend(format)}",
        f"<p>bytes, in hexadecimal</p>{_grid('bytes', BYTES_A_ROW, [*_byte_cells(format, block, lit)])}",
        f"<p>weights, in units of {unit:g}</p>",
        _grid("weights", WEIGHTS_A_ROW, [*_weight_cells(weights / unit, labels, weight)]),
        f'<div class="reading" aria-live="polite" style="min-height:{18 * _most_rows(format) + 60}px">',
        f"<p><b>{labels[weight]}</b></p>",
        _table([_row(wire, block) for wire in lit], head=("", "value", "bits", "byte (bits)", "feeds weights")),
        "</div><p>Where this notebook runs: point at a byte or a weight; click to hold it, Escape to let go; ",
        "or use Tab and the arrow keys.</p></div>",
    ]
    return Html("".join(page), f"map of a block of {title}; {labels[weight]}")


def _row(wire: Wire, block: UInt8[np.ndarray, " type_size"]) -> tuple[str, ...]:
    """Symbol, value, bits, places and weights of a wire, as they are listed.  The script reads the last two as well."""
    if not wire.weights:
        return wire.symbol, "", "", wire.places, "none"
    bits = "".join(str(block[bit // 8] >> bit % 8 & 1) for bit in reversed(wire.bits))
    in_fours = re.sub(r"(?<=.)(?=(....)+$)", " ", bits)
    return wire.symbol, number(wire.value(block)), in_fours, wire.places, ranges(wire.weights)


def _most_rows(format: Format) -> int:
    """Of all lists that pointing at a byte or a weight can bring up, the length of the longest."""
    by_weight = Counter(weight for wire in wires(format) for weight in wire.weights)
    by_byte = Counter(byte for wire in wires(format) for byte in {bit // 8 for bit in wire.bits})
    return max([*by_weight.values(), *by_byte.values()])


def _unit(weights: Float32[np.ndarray, " n"]) -> float:
    """The power of ten in which no weight has more than two digits."""
    largest = float(np.max(np.abs(weights), where=np.isfinite(weights), initial=0))
    return 10.0 ** (math.floor(math.log10(largest / 0.995)) - 1) if largest else 1.0


# ── markup ─────────────────────────────────────────────────────────────────────────────────────────────────


def _legend(format: Format) -> str:
    """The fields, with the share of each in the bits per weight."""
    rows, start = [], 0
    for field in format.layout:
        symbols = dict.fromkeys(wire.symbol for wire in wires(format) if wire.field == field)
        places = ranges(range(start, start + field.nbytes))
        kind = field.dtype if field.count == 1 else f"{field.count} × {field.dtype}"
        rows.append((field.name, ", ".join(symbols), places, kind, f"{8 * field.nbytes / format.block_size:g}"))
        start += field.nbytes
    rule = f"w = {typeset(equation(format))}" if equation(format) else ""
    rows.append(("all", rule, ranges(range(start)), "", f"{format.bpw:g}"))
    colours = [*range(len(format.layout)), None]
    return _table(rows, head=("field", "holds", "bytes", "type", "bits per weight"), colours=colours)


def _table(
    rows: Iterable[Sequence[str]], head: Sequence[str], colours: Iterable[int | None] = itertools.repeat(None)
) -> str:
    heads = "".join(f'<th scope="col">{text}</th>' for text in head)
    lines = (
        f"<tr><td{'' if colour is None else _tint(colour)}>{first}</td>{''.join(f'<td>{text}</td>' for text in rest)}"
        for (first, *rest), colour in zip(rows, colours)
    )
    return f"<table><thead><tr>{heads}<tbody>{''.join(lines)}</table>"


def _tint(field: int, mask: int = 0) -> str:
    """Attributes of a cell of a field; with a style of its own, for pages that take style sheets away."""
    bar = f";background-image:{_bar(mask)}" if mask else ""
    return f' class="f{field}{" on" if mask else ""}" style="background:{_COLOURS[field][0]}40{bar}"'


def _bar(mask: int) -> str:
    """A bar of eight parts, bit 7 left as one writes it, filled where ``mask`` has bits."""
    parts = (
        f"{'currentColor' if mask >> 7 - i & 1 else 'transparent'} {12.5 * i:g}% {12.5 * (i + 1):g}%" for i in range(8)
    )
    return f"linear-gradient(90deg, {', '.join(parts)})"


# Of cells, where style sheets are taken away; `_STYLE` overrules it.
_NARROW = "padding:2px"


def _grid(name: str, columns: int, cells: Sequence[str]) -> str:
    heads = "".join(f'<th scope="col" style="{_NARROW}">{i}' for i in range(columns))
    lines = (f'<tr><th scope="row">{i}{"".join(cells[i : i + columns])}' for i in range(0, len(cells), columns))
    # Where style sheets are taken away, small letters and narrow cells let 32 columns fit.
    attributes = f'class="{name}" role="grid" aria-label="{name}" style="font-size:10px"'
    return f"<table {attributes}><thead><tr><th>{heads}<tbody>{''.join(lines)}</table>"


def _byte_cells(format: Format, block: UInt8[np.ndarray, " type_size"], lit: Iterable[Wire]) -> Iterator[str]:
    fed: list[set[int]] = [set() for _ in block]
    for wire in wires(format):
        for bit in wire.bits:
            fed[bit // 8].update(wire.weights)
    masks = [0] * len(block)
    for bit in (bit for wire in lit for bit in wire.bits):
        masks[bit // 8] |= 1 << bit % 8
    fields = [i for i, field in enumerate(format.layout) for _ in range(field.nbytes)]
    for i, (byte, field) in enumerate(zip(block.tolist(), fields)):
        label = f"byte {i}, {format.layout[field].name}: feeds weights {ranges(fed[i])}"
        yield f'<td{_tint(field, masks[i])} title="{label}"{_stop(i == 0)}>{byte:02x}'


def _weight_cells(scaled: Float32[np.ndarray, " n"], labels: Sequence[str], here: int) -> Iterator[str]:
    for i, (value, label) in enumerate(zip(scaled.tolist(), labels)):
        on = ' class="on here"' if i == here else ""
        # With a hyphen: a minus is as wide as a digit and a half, and cells are narrow.
        shown = round(value) if math.isfinite(value) else value
        yield f'<td{on} style="{_NARROW}" title="{label}"{_stop(i == here)}>{shown}'


def _stop(is_stop: bool) -> str:
    """The Tab key stops once in a grid; from there on the arrow keys go."""
    return ' tabindex="0"' if is_stop else ""


# Colours of text, ground and lines are those of the page, so that it reads in light and dark.
_STYLE = """
.qjax-map { max-width: 860px; font-size: 13px; line-height: 1.35 }
.qjax-map.qjax-map p { margin: 6px 0 2px }
.qjax-map.qjax-map table { border-collapse: collapse; margin: 0 0 6px; font-size: 13px; border: 0; color: inherit }
.qjax-map.qjax-map.qjax-map :is(thead, tr) { background: none; border: 0 }
.qjax-map.qjax-map :is(td, th) { padding: 0 14px 0 0; border: 0; text-align: left; font-weight: normal;
    line-height: 1.35 }
.qjax-map.qjax-map th { opacity: .7 }
.qjax-map.qjax-map td[class^=f] { padding-left: 6px }
.qjax-map.qjax-map [role=grid] { width: 100%; table-layout: fixed }
.qjax-map.qjax-map [role=grid] :is(td, th) { padding: 1px 0; text-align: center; font-size: 12px }
.qjax-map.qjax-map .weights :is(td, th) { padding: 1px 0 !important }
.qjax-map.qjax-map [role=grid] th:first-child { width: 28px }
.qjax-map.qjax-map [role=grid] td { border: 1px solid rgb(128 128 128 / 40%); cursor: pointer }
.qjax-map.qjax-map .bytes td { font-family: monospace; padding-bottom: 5px; background-repeat: no-repeat !important;
    background-position: bottom !important; background-size: 100% 5px !important }
.qjax-map.qjax-map .bytes td.on { font-weight: bold }
.qjax-map.qjax-map .weights td.on { background: var(--c); color: var(--t) }
.qjax-map.qjax-map td:is(.here, :focus) { outline: 2px solid; outline-offset: -1px }
.qjax-map.qjax-map[data-held=yes] td.here { outline-width: 4px }
""" + "".join(f".qjax-map .f{i} {{ --c: {colour}; --t: {text} }}\n" for i, (colour, text) in enumerate(_COLOURS))

# It stands in an attribute, for the widget that shows strings of HTML runs what stands there, but no script elements.
_SCRIPT = r"""
const [bytes, weights] = ['.bytes td', '.weights td'].map(path => [...this.querySelectorAll(path)]);
let cell = event.target.closest('td');
const cells = [bytes, weights].find(cells => cells.includes(cell));
if (event.key == 'Escape') this.dataset.held = '';
if (!cells || event.type == 'pointermove' && (this.dataset.held || cell.matches('.here'))) return;
if (event.type == 'click') this.dataset.held = this.dataset.held && cell.matches('.here') ? '' : 'yes';
if (event.type == 'keydown') {
  const row = cells[0].parentNode.cells.length - 1;
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row}[event.key];
  if (!step) return;
  event.preventDefault();
  cell = cells[cells.indexOf(cell) + step] ?? cell;
}

const spans = text => [...text.matchAll(/(\d+)(?:–(\d+))?(?: \((\d)(?:–(\d))?\))?/g)].map(
  ([, a, b, high, low]) => ({first: +a, last: +(b ?? a), high: +(high ?? 7), low: +(low ?? high ?? 0)}));
const at = cells.indexOf(cell);
const wires = this.dataset.wires.split(';').map(wire => wire.split('|')).filter(wire =>
  spans(wire[cells == bytes ? 3 : 4]).some(span => span.first <= at && at <= span.last));

for (const other of [...bytes, ...weights]) {
  other.classList.remove('on', 'here');
  other.style.backgroundImage = '';
  if (other.title) [other.ariaLabel, other.title] = [other.title, ''];
}
const masks = {};
for (const wire of wires) {
  const places = spans(wire[3]);
  for (const {first, high, low} of places) masks[first] |= (2 << high) - (1 << low);
  const field = bytes[places[0].first].classList[0];
  for (const {first, last} of cells == bytes ? spans(wire[4]) : [])
    for (let i = first; i <= last; i++) weights[i].className = field + ' on';
}
for (const [i, mask] of Object.entries(masks)) {
  const parts = [...Array(8).keys()].map(k =>
    `${mask >> 7 - k & 1 ? 'currentColor' : 'transparent'} ${12.5 * k}% ${12.5 * (k + 1)}%`);
  bytes[i].classList.add('on');
  bytes[i].style.backgroundImage = `linear-gradient(90deg, ${parts})`;
}
cell.classList.add('on', 'here');
cell.tabIndex = 0;
if (event.type == 'keydown') cell.focus();
for (const other of cells) if (other != cell) other.removeAttribute('tabindex');

const reading = this.querySelector('.reading');
reading.querySelector('b').textContent = cell.ariaLabel;
reading.querySelector('tbody').innerHTML = wires.map(wire =>
  '<tr>' + wire.map(text => '<td>' + text + '</td>').join('') + '</tr>').join('');
"""
