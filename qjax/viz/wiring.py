"""What each bit of a block is for: which weights it feeds, found out by flipping it, and the weights' equations."""

import ast
import functools
import itertools
import operator
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8

from qjax import formats
from qjax.formats import Field, Format
from qjax.tensor import QTensor, dequantize

# Letters for what a field holds, where equations have them.  A scale of the minima is an m.
_LETTERS = {"qs": "q", "ql": "q", "qh": "h", "hmask": "h", "scales": "s", "scales_l": "s", "scales_h": "t"}
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")

# A weight from the wires that feed it, by their symbols, in Python.  v is what the equation leaves open, as an entry of
# a table.  The rules are those of the formats' docstrings.
_EQUATIONS = {
    "Q4_0": "d * (q - 8)",
    "Q4_1": "d * q + m",
    "Q5_0": "d * (q + 16 * h - 16)",
    "Q5_1": "d * (q + 16 * h) + m",
    "Q8_0": "d * q",
    "Q8_1": "d * q",
    "Q2_K": "d * s * q - dmin * m",
    "Q3_K": "d * (s - 32) * (q + 4 * h - 4)",
    "Q4_K": "d * s * q - dmin * m",
    "Q5_K": "d * s * (q + 16 * h) - dmin * m",
    "Q6_K": "d * s * (q + 16 * h - 32)",
    "Q8_K": "d * q",
    "TQ2_0": "d * (q - 1)",
    "Q2_0": "d * (q - 1)",
    "Q1_0": "d * (2 * q - 1)",
    "IQ4_XS": "d * (s + 16 * t - 32) * v",
    "MXFP4": "2 ** (e - 128) * v",
}


class Wire(NamedTuple):
    """Bits of one field that work together, as those of a number do, and the weights that they feed.

    symbol: its letter in the format's equation, or the field's name.
    bits: the least significant first; bit k of a block is bit k % 8 of byte k // 8.
    """

    symbol: str
    field: Field
    bits: tuple[int, ...]
    weights: tuple[int, ...]

    def value(self, block: UInt8[np.ndarray, " type_size"]) -> int | float:
        """The number in ``block``: of the field's type if it is one whole element of it, else its bits."""
        ordered = np.unpackbits(block, bitorder="little")[list(self.bits)]
        dtype = jnp.dtype(self.field.dtype)
        if len(self.bits) == 8 * dtype.itemsize:
            return np.packbits(ordered, bitorder="little").view(dtype)[0].item()
        return sum(int(bit) << i for i, bit in enumerate(ordered))

    @property
    def places(self) -> str:
        """As in ``6 (7–6), 14 (3–0)``: bytes, and in brackets their bits if not all; the most significant first."""
        runs: list[list[int]] = []
        for byte, bit in (divmod(bit, 8) for bit in reversed(self.bits)):
            if runs and runs[-1][0] == byte and runs[-1][2] == bit + 1:
                runs[-1][2] = bit
            else:
                runs.append([byte, bit, bit])
        return ", ".join(
            f"{byte}" if (high, low) == (7, 0) else f"{byte} ({high}–{low})" if high > low else f"{byte} ({low})"
            for byte, high, low in runs
        )


def wires(format: str | Format) -> tuple[Wire, ...]:
    """All wires of a block, in the order of their first bits.

    Two bits of a field are on one wire if at least half of the weights that either feeds are fed by both, and if both
    fall silent when the same field is zero: the scale and the minimum of a sub-block feed the same weights, but one
    through d, the other through dmin.  Raises QjaxError for formats without a GGML id.
    """
    return _wires(formats.get(format))


@functools.cache
def _wires(format: Format) -> tuple[Wire, ...]:
    feeds, effect = _probe(format)
    owner = np.repeat(np.arange(len(format.layout)), [8 * field.nbytes for field in format.layout])
    silent = np.zeros((len(owner), len(format.layout)), bool)
    for i, field in enumerate(format.layout):
        if _is_float(field):
            silent[:, i] = (owner != i) & ~_probe(format, zeroed=field.name)[0].any(axis=1)

    n_fed = feeds.sum(axis=1)
    n_both = feeds.astype(np.float32) @ feeds.T.astype(np.float32)
    alike = 2 * n_both >= n_fed[:, None] + n_fed - n_both  # true of bits that feed none, too
    alike &= (owner[:, None] == owner) & np.all(silent[:, None] == silent, axis=-1)
    first = alike.argmax(axis=1)
    found = []
    for start in np.unique(first):
        bits = np.flatnonzero(first == start)
        field: Field = format.layout[owner[start]]
        scales = [other.name for other, is_silent in zip(format.layout, silent[start]) if is_silent]
        symbol = "m" if scales == ["dmin"] else _LETTERS.get(field.name, field.name)
        weights = np.flatnonzero(feeds[bits].any(axis=0))
        found.append(Wire(symbol, field, _in_order(bits.tolist(), field, effect), tuple(weights.tolist())))
    return _told_apart(found)


def _in_order(bits: list[int], field: Field, effect: Float[np.ndarray, " n_bits"]) -> tuple[int, ...]:
    """By what each bit does, if that grows steadily, as in an integer; else by place, as in a float or an index."""
    ranked = sorted(bits, key=lambda bit: effect[bit])
    grows = all(effect[b] > 1.2 * effect[a] for a, b in itertools.pairwise(ranked))
    return tuple(bits if _is_float(field) or not grows else ranked)


def _told_apart(found: Sequence[Wire]) -> tuple[Wire, ...]:
    """Where wires of one name but of different kinds feed a weight, the name says how many weights each kind feeds."""
    kinds = {
        name: {len(w.weights) for w in found if w.symbol == name and w.weights} for name in {w.symbol for w in found}
    }
    return tuple(
        w._replace(symbol=w.symbol + str(len(w.weights)).translate(_SUBSCRIPTS)) if len(kinds[w.symbol]) > 1 else w
        for w in found
    )


# ── equations ──────────────────────────────────────────────────────────────────────────────────────────────


def equation(format: str | Format) -> str:
    """How a weight is computed, in Python, from the symbols of its `wires`, and from v for what a table adds.

    Empty where all would be left to v.
    """
    format = formats.get(format)
    has_scale = any(field.name == "d" and _is_float(field) for field in format.layout)
    return _EQUATIONS.get(format.name, "d * v" if has_scale else "")


def in_numbers(format: str | Format, block: UInt8[np.ndarray, " type_size"]) -> list[str]:
    """Each weight of a block: its equation with the numbers that stand in the block, and what comes of it."""
    format = formats.get(format)
    rule, weights = equation(format), decoded(format, block[None])[0].tolist()
    values: list[dict[str, float]] = [{"v": 1.0} for _ in weights]
    for wire in wires(format):
        value = wire.value(block)
        for weight in wire.weights:
            values[weight][wire.symbol] = value
    return [_with_numbers(rule, known, weight) for known, weight in zip(values, weights)]


def _with_numbers(rule: str, known: dict[str, float], weight: float) -> str:
    if not rule:
        return number(weight)
    rest = _computed(ast.parse(rule, mode="eval").body, known) if "v" in rule else 0.0
    if rest:
        known["v"] = weight / rest

    def factor(symbol: re.Match) -> str:
        # Where the rest is zero, v can be anything.
        text = number(known[symbol[0]]) if symbol[0] != "v" or rest else "v"
        return f"({text})" if text.startswith("−") and symbol.start() else text

    return re.sub(r"[a-z]\w*", factor, typeset(rule)) + " = " + number(weight)


_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Pow: operator.pow}


def _computed(rule: ast.expr, known: dict[str, float]) -> float:
    """What an equation comes to."""
    match rule:
        case ast.BinOp(left, operation, right):
            return _OPERATIONS[type(operation)](_computed(left, known), _computed(right, known))
        case ast.Name(symbol):
            return known[symbol]
        case ast.Constant(float() | int() as value):
            return float(value)
    raise ValueError(f"no equation has {ast.dump(rule)}")


def typeset(rule: str) -> str:
    """An equation as it is written on paper."""
    return rule.replace(" ** ", "^").replace("*", "×").replace("-", "−")


def number(value: float) -> str:
    """Four digits of it, with a minus that is one; and no negative zero."""
    return f"{value + 0.0:.4g}".replace("-", "−")


def ranges(numbers: Iterable[int]) -> str:
    """As in ``3, 64–95``; ``none`` without any."""
    # Consecutive numbers grow as their places do.
    runs = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(pairs) for _, pairs in runs)]
    return ", ".join(f"{first}–{last}" if last > first else f"{first}" for first, last in ends) or "none"


# ── probing ────────────────────────────────────────────────────────────────────────────────────────────────


def decoded(format: Format, blocks: UInt8[np.ndarray, "n type_size"]) -> Float[np.ndarray, "n block_size"]:
    """The weights of blocks, by `dequantize`."""
    return np.asarray(dequantize(QTensor.from_bytes(blocks, format, (len(blocks), format.block_size))))


def _probe(
    format: Format, zeroed: str | None = None
) -> tuple[Bool[np.ndarray, "n_bits block_size"], Float[np.ndarray, " n_bits"]]:
    """Whether each bit can change each weight, and by how much it changes them all on average.

    A bit may change nothing in one block: where its scale is 0, or where two points of a code book agree.  So it is
    flipped in many blocks, until twice as many bring nothing new, or every byte has had every value.
    zeroed: a field that is 0 in all blocks.
    """
    one_bit = np.packbits(np.eye(8 * format.type_size, dtype=np.uint8), axis=1, bitorder="little")
    feeds = np.zeros((8 * format.type_size, format.block_size), bool)
    effect, known = np.zeros(len(feeds)), -1
    for n, block in enumerate(_blocks(format, zeroed), start=1):
        before, *_ = after = decoded(format, np.vstack([block, block ^ one_bit])).astype(np.float64)
        feeds |= (after[1:] != before) & ~(np.isnan(after[1:]) & np.isnan(before))
        with np.errstate(all="ignore"):
            change = np.abs(after[1:] - before) / np.abs(before).max()
        effect += np.sum(change, axis=1, where=np.isfinite(change))
        if n >= 16 and n.bit_count() == 1:
            if feeds.sum() == known:
                break
            known = feeds.sum()
    return feeds, effect


def _blocks(format: Format, zeroed: str | None) -> UInt8[np.ndarray, "256 type_size"]:
    """Random blocks in which every byte takes every value once, but fields of floats lie between 1 and 2."""
    rng = np.random.default_rng(0)
    every_value = np.tile(np.arange(256, dtype=np.uint8), (format.type_size, 1))
    blocks, start = np.ascontiguousarray(rng.permuted(every_value, axis=1).T), 0
    for field in format.layout:
        if _is_float(field):
            values = rng.uniform(1, 2, (256, field.count)).astype(jnp.dtype(field.dtype)).view(np.uint8)
            blocks[:, start : start + field.nbytes] = 0 if field.name == zeroed else values
        start += field.nbytes
    return blocks


def _is_float(field: Field) -> bool:
    return bool(jnp.issubdtype(jnp.dtype(field.dtype), jnp.floating))
