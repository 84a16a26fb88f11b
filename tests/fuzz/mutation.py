"""Random changes to trees and to the bytes that they become.  All chance comes from the Random that is passed in."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from .packing import Tree

_INTEGERS = [0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 4096]
_INTEGERS += [sign * (2**bits + d) for bits in (15, 16, 31, 32, 62, 63, 64) for d in (-1, 0, 1) for sign in (1, -1)]
_INTEGERS += [-1, -2, 10**12, 10**100]
_FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-300, 3.4e38, 1e39, 1e308, float("inf"), float("-inf"), float("nan")]
_TEXTS = [
    "",
    " ",
    "\0",
    "\n",
    "\r\n",
    "\t",
    "\x1b[2J",
    "\u2028",
    "é",
    "▁",
    "Ġ",
    "🙂",
    "\ud800",
    "\udcff",
    "\\",
    '"',
    "'",
]
_TEXTS += [
    "/",
    "..",
    "../x",
    "C:\\x",
    "%s",
    "%n",
    "{}",
    "{{",
    "0",
    "-1",
    "1e999",
    "nan",
    "true",
    "null",
    "[]",
    "a" * 64,
]
_BYTES = [b"", b"\0", b"\xff", b"\x80", b"\xff\xff\xff\xff", b"\xff" * 8, b"\0" * 8, b"\0\0\0\x80", b"[", b'{"":', b"]"]
_OTHERS = [None, True, False, [], {}, [[]], {"": {}}]
_SIZES = (1, 2, 4, 8)
MAX_REPEAT = 1 << 14


class Input(NamedTuple):
    """What is run: a tree of files, and what is done to their bytes once they are packed."""

    files: Tree
    patches: list
    """[which file, where, kind of `_PATCHES`, value]; places count modulo the sizes that there are"""


class Mutator:
    """Changes inputs of one target.

    words: texts that mean something to its reader.  seeds: valid trees, whose parts are put in the place of others.
    havoc: another's mutation of bytes, such as a fuzzer's that knows what they were compared with.
    """

    def __init__(self, seeds: Sequence[Tree], words: Sequence[str] = (), havoc: Callable[[bytes], bytes] | None = None):
        self._parts = [part for seed in seeds for part in _parts_of(seed)]
        found = {part for part in self._parts if isinstance(part, str) and len(part) < 64}
        self._words = sorted({*words, *found})
        self._havoc = havoc

    def __call__(self, given: Input, random: Random) -> Input:
        """A changed copy; trees share parts that did not change."""
        files, patches = given
        for _ in range(1 + int(random.expovariate(1.0))):
            if random.random() < 0.12:
                patches = self._patched(patches, random)
            else:
                files = self._changed(files, random, 0)
        return Input(files if isinstance(files, dict) else {}, patches)

    # ── trees ────────────────────────────────────────────────────────────────────────────────────────

    def _changed(self, tree: Tree, random: Random, depth: int) -> Tree:
        # Down to a part, each child as likely; deeper parts are many, so few changes stop on the way.
        if isinstance(tree, list) and tree and random.random() < 0.85:
            i = random.randrange(len(tree))
            return [*tree[:i], self._changed(tree[i], random, depth + 1), *tree[i + 1 :]]
        if isinstance(tree, dict) and tree and (depth == 0 or random.random() < 0.85):
            key = random.choice(list(tree))
            if depth == 0 and random.random() < 0.05:
                return self._change_dict(tree, random)
            return {**tree, key: self._changed(tree[key], random, depth + 1)}
        if random.random() < 0.1:
            return random.choice(self._parts)
        if random.random() < 0.06:
            return random.choice((*_INTEGERS, *_FLOATS, *_TEXTS, *_BYTES, *_OTHERS))
        match tree:
            case bool() | None:
                return random.choice((not tree, None, 0, 1, "", []))
            case int():
                return self._change_int(tree, random)
            case float():
                return random.choice(
                    (random.choice(_FLOATS), -tree, tree * 2, tree / 3, int(tree) if abs(tree) < 2**64 else 0)
                )
            case str():
                return self._change_text(tree, random)
            case bytes():
                return self._change_bytes(tree, random)
            case list():
                return self._change_list(tree, random)
            case dict():
                return self._change_dict(tree, random)
        raise AssertionError(f"a tree has no {type(tree).__name__}")

    def _change_int(self, n: int, random: Random) -> Any:
        near = (n + 1, n - 1, n * 2, n // 2, -n, n + random.randrange(-16, 17), n ^ 1 << random.randrange(32))
        return random.choice((random.choice(_INTEGERS), random.choice(near), random.choice(near), float(n % 2**53)))

    def _change_text(self, s: str, random: Random) -> str:
        start, stop = sorted(random.randrange(len(s) + 1) for _ in range(2))
        if self._words and random.random() < 0.35:
            word = random.choice(self._words)
            return word if random.random() < 0.3 else s[:start] + word + s[stop if random.random() < 0.5 else start :]
        match random.randrange(7):
            case 0:
                return s[:start] + s[stop:]
            case 1:
                return s[:stop] + s[start:]
            case 2:
                return s[:start] + random.choice(_TEXTS) + s[start:]
            case 3:
                return (
                    s[:start] + chr(random.choice((random.randrange(128), random.randrange(0x11000)))) + s[start + 1 :]
                )
            case 4:
                return s[:start] + s[start:stop] * self._times(stop - start, random) + s[stop:]
            case 5:
                other = random.choice(self._words) if self._words else ""
                return s[:start] + other[random.randrange(len(other) + 1) :]
        data = s.encode("utf-8", "surrogatepass")
        return self._change_bytes(data, random).decode("utf-8", "surrogateescape")

    def _change_bytes(self, data: bytes, random: Random) -> bytes:
        if self._havoc and random.random() < 0.5:
            return self._havoc(data)
        start, stop = sorted(random.randrange(len(data) + 1) for _ in range(2))
        size = random.choice(_SIZES)
        number = (random.choice(_INTEGERS) & (1 << 8 * size) - 1).to_bytes(size, "little")
        match random.randrange(6):
            case 0:
                return data[:start] + data[stop:]
            case 1:
                return data[:start] + random.choice(_BYTES) + data[start:]
            case 2:
                return data[:start] + number + data[start + size :]
            case 3:
                return data[:start] + bytes([random.randrange(256)]) + data[start + 1 :]
            case 4:
                return data[:start] + data[start:stop] * self._times(stop - start, random) + data[stop:]
        return data[:start] + random.randbytes(random.randrange(1, 9)) + data[start:]

    def _change_list(self, x: list, random: Random) -> Tree:
        start, stop = sorted(random.randrange(len(x) + 1) for _ in range(2))
        match random.randrange(7):
            case 0 | 1:
                return x[:start] + x[start + 1 :]
            case 2:
                return x[:start] + x[stop:]
            case 3:
                return [*x[:start], random.choice(x) if x else random.choice(self._parts), *x[start:]]
            case 4:
                return [*x[:start], random.choice(self._parts), *x[start:]]
            case 5:
                return x[:start] + x[start:stop] * min(self._times(stop - start, random), 256) + x[stop:]
        if random.random() < 0.1:
            for _ in range(random.choice((1, 2, 5, 200))):
                x = [x]
            return x
        return random.sample(x, len(x))

    def _change_dict(self, x: dict, random: Random) -> Tree:
        key = random.choice(list(x)) if x else ""
        match random.randrange(4):
            case 0:
                return {name: value for name, value in x.items() if name != key}
            case 1:
                new = self._change_text(key, random)
                return {new if name == key else name: value for name, value in x.items()}
            case 2:
                name = random.choice(self._words) if self._words else ""
                return {**x, name: random.choice((*self._parts[:64], random.choice(self._parts), x.get(key)))}
        # The same in another order.
        return {name: x[name] for name in random.sample(list(x), len(x))}

    def _times(self, size: int, random: Random) -> int:
        return random.choice((2, 2, 3, 8, MAX_REPEAT // max(size, 1)))

    # ── bytes ────────────────────────────────────────────────────────────────────────────────────────

    def _patched(self, patches: list, random: Random) -> list:
        if patches and random.random() < 0.5:
            i = random.randrange(len(patches))
            return [*patches[:i], *patches[i + 1 :]]
        kind = random.choice(list(_PATCHES))
        at = random.choice((random.randrange(64), random.randrange(1024), random.randrange(2**20)))
        value = random.choice((random.choice(_INTEGERS) % 2**64, random.randrange(256)))
        return [*patches[-3:], [random.randrange(8), at, kind, value]]


def patch(files: dict[str, bytes], patches: list) -> dict[str, bytes]:
    """``files`` with ``patches`` made to them."""
    if not files or not patches:
        return files
    names, patched = list(files), dict(files)
    for which, at, kind, value in patches:
        name = names[which % len(names)]
        data = patched[name]
        patched[name] = _PATCHES[kind](data, at % (len(data) + 1), value)
    return patched


def _overwrite(size: int) -> Callable[[bytes, int, int], bytes]:
    def overwrite(data: bytes, at: int, value: int) -> bytes:
        return data[:at] + (value % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]

    return overwrite


_PATCHES: dict[str, Callable[[bytes, int, int], bytes]] = {
    **{f"u{8 * size}": _overwrite(size) for size in _SIZES},
    "cut": lambda data, at, value: data[:at],
    "delete": lambda data, at, value: data[:at] + data[at + value % 64 + 1 :],
    "insert": lambda data, at, value: data[:at] + bytes([value % 256]) * (1 + value // 256 % 4096) + data[at:],
    "token": lambda data, at, value: data[:at] + _BYTES[value % len(_BYTES)] * (1, 2, 3000)[value % 3] + data[at:],
    "append": lambda data, at, value: data + data[at : at + value % 4096],
}


def _parts_of(tree: Tree) -> list[Tree]:
    children = list(tree.values()) if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return [tree, *(part for child in children for part in _parts_of(child))]
