"""Texts that tokenizers may get wrong, drawn from a seed: scripts, emoji, blanks, control characters, quotations."""

import functools
import random
import sysconfig
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

# First and last code point of scripts that split, mark, join or case their letters in different ways.
_SCRIPTS = (
    *((0x41, 0x7A), (0xC0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x531, 0x587), (0x5D0, 0x5EA)),
    *((0x600, 0x6FF), (0x900, 0x97F), (0x980, 0x9FF), (0xC00, 0xC7F), (0xE00, 0xE7F), (0xF00, 0xFBC)),
    *((0x1000, 0x109F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x13A0, 0x13FD), (0x1780, 0x17E9), (0x1E00, 0x1FFE)),
    *((0x2000, 0x206F), (0x2070, 0x20BF), (0x2100, 0x218F), (0x2190, 0x23FF), (0x2460, 0x24FF), (0x2E80, 0x2FD5)),
    *((0x3000, 0x303F), (0x3040, 0x30FF), (0x3131, 0x318E), (0x3400, 0x3500), (0x4E00, 0x9FFF), (0xA000, 0xA48C)),
    *((0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0xFE30, 0xFE6B), (0xFF01, 0xFFEE), (0x10400, 0x1044F)),
    *((0x10D40, 0x10D85), (0x1D400, 0x1D7FF), (0x1E900, 0x1E943), (0x1F000, 0x1FAFF), (0x20000, 0x20100)),
)
_EMOJI = (
    *("👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷🇯🇵", "☝🏿", "❤️", "1️⃣", "🧑🏻‍🚀", "🏴\U000e0067\U000e0062\U000e007f"),
    *("😀", "🫩", "👋🏻👋🏿", "🙂\u200d", "\ufe0f", "🇩"),
)
_BLANKS = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"
_CONTROL = (
    "".join(map(chr, range(32))) + "\x7f\x80\x9f\xad\u200b\u200d\u200e\u2060\ufeff\ufffd\ue000\U000f0000\U0010ffff"
)
_WORDS = (
    *("don't", "WE'LL", "it'ſ", "I've'D", "'S", "x_1", "HTTPServer", "camelCase", "ÀÉÎ", "straße", "ǅ", "1234567"),
    *(
        "٣٤٥٦",
        "½²Ⅷ",
        "3.14e-10",
        "0xDEADBEEF",
        "a" * 40,
        "-" * 30,
        "....",
        "!?!",
        "//",
        "/*",
        "\\n",
        "<0x41>",
        "▁",
        "▁▁the",
    ),
    *("IMGIMGABCZ", "<sentinel:12>", "「東京」", "한국어", "ﾊﾝｶｸ", "กำ", "नमस्ते", "e\u0301\u0301", "ﬁ", "Ω", "İi"),
)


@functools.cache
def code() -> tuple[str, ...]:
    """Of Python's standard library, and so not the same in all its versions."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = ("heapq.py", "textwrap.py", "json/decoder.py", "html/entities.py", "locale.py", "ast.py", "this.py")
    return tuple(text for name in names if len(text := (folder / name).read_text(encoding="utf-8")) > 300)


def texts(seed: int, count: int, special: Sequence[str] = (), quoted: Sequence[str] = ()) -> list[str]:
    """Texts of 1 to some 300 characters; ``special`` are strung in, ``quoted`` is what to quote from."""
    rng = random.Random(seed)

    def quote() -> str:
        source = rng.choice(quoted)
        start = rng.randrange(len(source))
        return source[start : start + rng.randint(1, 250)]

    def script() -> str:
        first, last = rng.choice(_SCRIPTS)
        text = "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 12)))
        return unicodedata.normalize(rng.choice(("NFC", "NFD")), text) if rng.random() < 0.2 else text

    def run() -> str:
        return rng.choice((*_BLANKS, "a", "1", "'", "!", "=", "東", "é", "▁")) * rng.randint(1, 24)

    makers: list[Callable[[], str]] = [
        *(script, script, run),
        lambda: rng.choice(_EMOJI) * rng.randint(1, 3),
        lambda: "".join(rng.choices(_BLANKS, k=rng.randint(1, 8))),
        lambda: "".join(rng.choices(_CONTROL, k=rng.randint(1, 4))),
        lambda: rng.choice(_WORDS),
        lambda: str(rng.randrange(10 ** rng.randint(1, 15))),
        lambda: rng.choice(("", " ", "\n")).join(rng.choices(_WORDS, k=rng.randint(1, 6))),
        lambda: bytes(rng.randrange(256) for _ in range(rng.randint(1, 20))).decode(errors="replace"),
    ]
    makers += [quote] * 5 if quoted else []
    makers += [lambda: rng.choice(special)] * 2 if special else []
    return [rng.choice(("", " ")).join(rng.choice(makers)() for _ in range(rng.randint(1, 5))) for _ in range(count)]
