"""Byte pair encoding, which takes a text apart and merges the parts two by two: what llama.cpp has of it.

    bytes       text ─ words ─ bytes as BYTE_OF's characters ─ merges by rank within each word ─► ids
    characters  text ─ ▁ for spaces ─ characters ─ merges by score or rank, also across words ─► ids

An encoder takes texts without special tokens to ids, and knows the bytes that a NORMAL token stands for.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any

from qjax.io.vocabulary import BYTE_OF, LATER_CHARACTERS, SPACE, PreTokenizer

Rank = Callable[[str, str], float | None]
"""How early two neighbours merge, the lowest first; None if never."""

_REMEMBERED = 32  # Characters of the longest stretch that is not merged anew each time.


class Encoder(ABC):
    """Takes texts to ids and tokens to bytes."""

    missing: bytes
    """The bytes for which there is no token."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The ids of each text."""

    @abstractmethod
    def spell(self, token: str) -> bytes:
        """The bytes that a NORMAL token stands for."""


class ByteBPE(Encoder):
    """Byte-level BPE (GPT-2's), by the tokenizers library (llama-vocab.cpp llm_tokenizer_bpe)."""

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], pre: PreTokenizer):
        import tokenizers
        from tokenizers import models, pre_tokenizers

        self.missing = bytes(byte for char, byte in BYTE_OF.items() if char not in vocab)
        self._none, unknown = len(vocab), {}
        if self.missing:
            # Without a token in its place, the neighbours of a missing byte could merge across it.
            name = "?" * (1 + max(map(len, vocab)))
            vocab, unknown = {**vocab, name: self._none}, {"unk_token": name, "fuse_unk": False}
        bpe = models.BPE(dict(vocab), list(merges), ignore_merges=pre.ignore_merges, **unknown)
        words = [pre_tokenizers.Split(tokenizers.Regex(_of_llama_cpp(regex)), "isolated") for regex in pre.splits]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._library: Any = tokenizers.Tokenizer(bpe)
        self._library.pre_tokenizer = pre_tokenizers.Sequence([*words, to_bytes])

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        for encoding in self._library.encode_batch_fast(list(texts), add_special_tokens=False):
            yield [id for id in encoding.ids if id != self._none] if self.missing else encoding.ids

    def spell(self, token: str) -> bytes:
        if all(char in BYTE_OF for char in token):
            return bytes(BYTE_OF[char] for char in token)
        return token.encode()


class CharacterBPE(Encoder):
    """BPE over characters, with bytes for those that are no token: SentencePiece's, and Gemma 4's.

    The merges are made here. The tokenizers library ranks pairs, so it cannot let the leftmost of two pairs with
    equal scores go first, nor merge a character that is not itself a token (llm_tokenizer_spm_session).
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        rank: Rank,
        *,
        prefix: str = "",
        lines: bool = False,
        whole_line_ends: bool = False,
        unknown: int | None = None,
    ):
        """``prefix`` is put before every text. ``lines``: no merge crosses the end of a line, and with
        ``whole_line_ends`` a run of them that is a token stays whole. ``unknown`` stands for a character whose bytes
        have no tokens."""
        self._vocab = vocab
        self._rank = rank
        self._prefix = prefix
        self._lines = lines
        self._whole = {token for token in vocab if not token.strip("\n")} if whole_line_ends else frozenset()
        self._unknown = [] if unknown is None else [unknown]
        bytes_of = [vocab.get(f"<0x{byte:02X}>") for byte in range(256)]
        self.missing = bytes(byte for byte, id in enumerate(bytes_of) if id is None)
        self._byte_ids = bytes_of
        # No merge crosses a place between two characters that are neighbours in no token.
        self._neighbours = {left + right for token in vocab for left, right in pairwise(token)}
        self._remembered = lru_cache(maxsize=1 << 16)(self._merge)

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        for text in texts:
            text = (self._prefix + text).replace(" ", SPACE)
            ids: list[int] = []
            for line in re.findall(r"[^\n]+|\n+", text) if self._lines else [text]:
                if line in self._whole:
                    ids.append(self._vocab[line])
                    continue
                for stretch in self._stretches(line):
                    ids += (self._remembered if len(stretch) <= _REMEMBERED else self._merge)(stretch)
            yield ids

    def spell(self, token: str) -> bytes:
        return token.replace(SPACE, " ").encode()

    def _stretches(self, text: str) -> Iterator[str]:
        start = 0
        for at, pair in enumerate(map(str.__add__, text, text[1:]), start=1):
            if pair not in self._neighbours:
                yield text[start:at]
                start = at
        yield text[start:]

    def _merge(self, text: str) -> list[int]:
        symbols = list(text)
        # A symbol that merged into the one before it is empty; these are the places of its neighbours.
        before, after = list(range(-1, len(text) - 1)), [*range(1, len(text)), -1]
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0 and (rank := self._rank(symbols[left], symbols[right])) is not None:
                heappush(queue, (rank, left, right, len(symbols[left]) + len(symbols[right])))

        for right in range(1, len(symbols)):
            offer(right - 1, right)
        while queue:
            _, left, right, size = heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != size:
                continue  # One of them has merged with another since.
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [id for symbol in symbols if symbol for id in self._ids(symbol)]

    def _ids(self, symbol: str) -> list[int]:
        if symbol in self._vocab:
            return [self._vocab[symbol]]
        ids = [self._byte_ids[byte] for byte in symbol.encode()]
        return self._unknown if None in ids and self._unknown else [id for id in ids if id is not None]


def _of_llama_cpp(regex: str) -> str:
    """The regular expression with \\p{L} and the like as llama.cpp's Unicode version has them, not the library's."""
    later = "".join("-".join(rf"\x{{{code}}}" for code in part.split("-")) for part in LATER_CHARACTERS.split())
    return re.sub(r"\\p\{([LMNPS])\}", lambda match: f"[{match[0]}&&[^{later}]]", regex)
