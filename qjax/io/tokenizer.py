"""Text to token ids and back, as llama.cpp does it, rebuilt from GGUF metadata.

    text ─ cut out special tokens ─► pieces ─ PreTokenizer.splits ─► words ─ bytes, BPE merges ─► ids

The tokenizers library does the words and the merges. The special tokens are cut out here, because llama.cpp
takes the longest of them first over the whole text, and skips CONTROL tokens unless asked to parse them.
"""

import codecs
import operator
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from qjax.errors import QjaxError
from qjax.io.cursor import shorten
from qjax.io.gguf_metadata import Metadata
from qjax.io.vocabulary import (
    BYTE_OF,
    END_OF_GENERATION,
    FILL_IN_MIDDLE,
    PRE_TOKENIZERS,
    PreTokenizer,
    TokenType,
)

_WRITTEN_AS_IS = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
_ENDS = ("eos", "eot", "eom")


class Tokenizer:
    """Byte-level BPE with the vocabulary, merges, special tokens and rules of a model file.

    Make one with `from_gguf` or `from_folder`.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = Metadata(
            {key: value for key, value in Metadata(metadata).typed.items() if key.startswith("tokenizer.")}
        )
        model = self._get("ggml.model", str)
        if model != "gpt2":
            raise QjaxError(f"tokenizer.ggml.model is {model!r}; known: 'gpt2' (byte-level BPE)")
        self.pre: PreTokenizer = _pre_tokenizer(self._get("ggml.pre", str, None))
        texts = self._get("ggml.tokens", list)
        if not texts:
            raise QjaxError("tokenizer.ggml.tokens is empty: there is no vocabulary")
        # llama.cpp's name for a token without text.
        self.tokens: list[str] = [text or f"[EMPTY_{id}]" for id, text in enumerate(texts)]
        """The text of each token as the file spells it, NORMAL ones in `vocabulary.BYTE_OF`'s characters."""
        self._id_of = _index(self.tokens)
        self.token_types: np.ndarray = self._types()
        """The TokenType of each token, int32 (vocab,)."""

        ids = self._named_ids()
        self.bos_id = ids.get("bos")
        """The token that begins a text, or None."""
        self.eos_id = ids.get("eos")
        """The token that ends a text, or None."""
        self.eog_ids: frozenset[int] = frozenset(
            {self._id_of[text] for text in END_OF_GENERATION if text in self._id_of}
            | {ids[name] for name in _ENDS if name in ids}
        )
        """The tokens that end a generation."""
        self.add_bos: bool = self._get("ggml.add_bos_token", bool, self.pre.add_bos)
        self.add_eos: bool = self._get("ggml.add_eos_token", bool, False)
        for name, add, id in (("bos", self.add_bos, self.bos_id), ("eos", self.add_eos, self.eos_id)):
            if add and id is None:
                raise QjaxError(f"tokenizer: {name.upper()} is to be added, but there is no .ggml.{name}_token_id")
        self.chat_template: str | None = self._get("chat_template", str, None)
        self.missing_bytes = bytes(byte for char, byte in BYTE_OF.items() if char not in self._id_of)
        """Bytes for which the vocabulary has no token; encode leaves them out, as llama.cpp does."""

        self._bpe = self._build_bpe()
        special = np.flatnonzero(np.isin(self.token_types, _WRITTEN_AS_IS)).tolist()
        self._special_ids = sorted(special, key=lambda id: len(self.tokens[id].encode()), reverse=True)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Rebuild the tokenizer from a GGUF file's metadata, the keys that start with ``tokenizer.``.

        Raises QjaxError for an unknown tokenizer.ggml.model or .pre (the known ones are listed), a key that
        is missing or of the wrong type, arrays whose lengths disagree, token ids out of range, repeated
        tokens, and merges that are malformed or make no token. Warns if there is no tokenizer.ggml.pre.
        """
        return cls(metadata)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read tokenizer.json and its companions in a Hugging Face folder.

        Raises QjaxError as `from_gguf` does, and for a tokenizer that GGUF could not describe.
        """
        from qjax.io import tokenizer_json

        return cls(tokenizer_json.read(Path(path)))

    def to_gguf(self) -> Metadata:
        """The entries that describe this tokenizer in a GGUF file, as llama.cpp's converter writes them."""
        return Metadata(self._metadata)

    def to_folder(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `from_folder` reads, into a folder."""
        from qjax.io import tokenizer_json

        tokenizer_json.write(Path(path), self)

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def merges(self) -> list[str]:
        """Pairs of tokens, "left right", in the order in which they are merged."""
        return self._get("ggml.merges", list)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        ``add_special`` adds BOS and EOS where the model asks for them (`add_bos`, `add_eos`).
        ``parse_special`` recognizes CONTROL tokens such as <|im_start|>; without it they are plain text, as
        they must be in text from strangers. Raises QjaxError if ``text`` is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise QjaxError(
                f"text: character {error.start} is a lone surrogate ({text[error.start]!r}). Read the file "
                "as UTF-8 with errors='replace'."
            ) from error
        fragments = self._cut_out_special(text, parse_special)
        texts = [fragment for fragment in fragments if isinstance(fragment, str)]
        encoded = iter(self._bpe.encode_batch_fast(texts, add_special_tokens=False))
        ids: list[int] = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        for fragment in fragments:
            ids += next(encoded).ids if isinstance(fragment, str) else [fragment]
        if self.missing_bytes:
            ids = [id for id in ids if id != self.vocab_size]
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[SupportsIndex], unparse_special: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD. CONTROL tokens are spelled out
        only if ``unparse_special``. Raises QjaxError for ids that are not in the vocabulary."""
        return b"".join(self.pieces(ids, unparse_special)).decode(errors="replace")

    def pieces(self, ids: Iterable[SupportsIndex], unparse_special: bool = True) -> list[bytes]:
        """The bytes that each token stands for, possibly a part of a character; see `decode`."""
        ids = [operator.index(id) for id in ids]
        if wrong := [id for id in ids if not 0 <= id < self.vocab_size]:
            raise QjaxError(f"token id {wrong[0]} is not in the vocabulary, expected 0 to {self.vocab_size - 1}")
        pieces = [self._pieces[id] for id in ids]
        if unparse_special:
            return pieces
        hidden = (TokenType.CONTROL, TokenType.UNKNOWN)
        return [b"" if self.token_types[id] in hidden else piece for id, piece in zip(ids, pieces)]

    def stream(self, unparse_special: bool = True) -> "TextStream":
        """A decoder for ids that arrive one by one."""
        return TextStream(self, unparse_special)

    def __repr__(self) -> str:
        def show(id: int | None) -> str:
            return "none" if id is None else f"{id} {self.tokens[id]!r}"

        bos = f"BOS {show(self.bos_id)}{' added' if self.add_bos else ''}"
        return f"Tokenizer({self.pre.names[0]}, {self.vocab_size} tokens, {bos}, EOS {show(self.eos_id)})"

    def _get(self, name: str, kind: type, *default: Any) -> Any:
        key = f"tokenizer.{name}"
        if key not in self._metadata:
            if default:
                return default[0]
            raise QjaxError(f"tokenizer: the metadata have no {key}")
        value = self._metadata[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found, names = self._metadata.typed[key].type_name, {list: "an array of strings", str: "a string"}
            names |= {np.ndarray: "an array of integers", int: "an integer", bool: "a bool"}
            raise QjaxError(f"{key} is {found}, expected {names[kind]}")
        return value

    def _named_ids(self) -> dict[str, int]:
        """The tokens that the file names: bos, eos, unknown, padding ..."""
        ids = {}
        for key in self._metadata:
            if (match := re.fullmatch(r"tokenizer\.(ggml\.(\w+)_token_id)", key)) is not None:
                ids[match[2]] = id = self._get(match[1], int)
                if not 0 <= id < self.vocab_size:
                    raise QjaxError(f"{key} is {id}, expected 0 to {self.vocab_size - 1} (the vocabulary)")
        return ids

    def _types(self) -> np.ndarray:
        types = self._get("ggml.token_type", np.ndarray, np.full(self.vocab_size, TokenType.NORMAL, np.int32))
        if len(types) != self.vocab_size:
            raise QjaxError(
                f"tokenizer.ggml.token_type has {len(types)} entries, expected {self.vocab_size}, as .tokens"
            )
        if types.dtype.kind not in "iu" or not np.isin(types, list(TokenType)).all():
            raise QjaxError(f"tokenizer.ggml.token_type: expected integers from 0 to {max(TokenType)}")
        types = types.astype(np.int32)
        types[[self._id_of[t] for t in END_OF_GENERATION | FILL_IN_MIDDLE if t in self._id_of]] = TokenType.CONTROL
        return types

    def _build_bpe(self) -> Any:
        import tokenizers
        from tokenizers import models, pre_tokenizers

        vocab, unknown = self._id_of, {}
        if self.missing_bytes:
            # Without a token in its place, the neighbours of a missing byte could merge across it.
            name = "?" * (1 + max(map(len, self.tokens)))
            vocab, unknown = vocab | {name: self.vocab_size}, {"unk_token": name, "fuse_unk": False}
        bpe = models.BPE(vocab, _pairs(self.merges, vocab), ignore_merges=self.pre.ignore_merges, **unknown)
        words = [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated") for regex in self.pre.splits]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer = tokenizers.Tokenizer(bpe)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, to_bytes])
        return tokenizer

    def _cut_out_special(self, text: str, parse_special: bool) -> list[str | int]:
        """The text with its special tokens replaced by their ids (llama-vocab.cpp tokenizer_st_partition)."""
        fragments: list[str | int] = [text] if text else []
        for id in self._special_ids:
            special = self.tokens[id]
            if special not in text or not (parse_special or self.token_types[id] == TokenType.USER_DEFINED):
                continue
            cut: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    cut.append(fragment)
                    continue
                first, *rest = fragment.split(special)
                cut += [first, *(part for after in rest for part in (id, after))]
            fragments = [fragment for fragment in cut if fragment != ""]
        return fragments

    @cached_property
    def _pieces(self) -> list[bytes]:
        return list(map(_piece, self.tokens, self.token_types.tolist()))


class TextStream:
    """Decodes ids as they come and holds a character back until all its bytes are there.

    The strings from `push` and `end` joined are what `Tokenizer.decode` makes of all the ids at once.
    """

    def __init__(self, tokenizer: Tokenizer, unparse_special: bool):
        self._tokenizer = tokenizer
        self._unparse_special = unparse_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """The text that these ids complete. Raises QjaxError for ids that are not in the vocabulary."""
        return self._utf8.decode(b"".join(self._tokenizer.pieces(ids, self._unparse_special)))

    def end(self) -> str:
        """What is left: U+FFFD for a character that never got all its bytes, else nothing."""
        return self._utf8.decode(b"", final=True)


def _pre_tokenizer(name: str | None) -> PreTokenizer:
    if name is None:
        warnings.warn(
            "the file has no tokenizer.ggml.pre; like llama.cpp, using 'default', which may split text "
            "otherwise than the model expects. Convert the model again.",
            stacklevel=4,
        )
        name = "default"
    for pre in PRE_TOKENIZERS:
        if name in pre.names:
            return pre
    known = ", ".join(sorted(name for pre in PRE_TOKENIZERS for name in pre.names))
    raise QjaxError(f"tokenizer.ggml.pre is {shorten(name)}, which is not known here; known: {known}")


def _index(tokens: Sequence[str]) -> dict[str, int]:
    id_of: dict[str, int] = {}
    for id, text in enumerate(tokens):
        first = id_of.setdefault(text, id)
        if first != id:
            raise QjaxError(f"tokenizer.ggml.tokens: tokens {first} and {id} are both {shorten(text)}")
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise QjaxError(f"tokenizer.ggml.tokens: token {id} ({shorten(text)}) is not valid UTF-8")
    return id_of


def _pairs(merges: Sequence[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            unknown = next(text for text in (left, right, left + right) if text not in vocab)
            raise QjaxError(
                f"tokenizer.ggml.merges: entry {rank} is {shorten(merge)}, expected two tokens that make a "
                f"third, with a space between; {shorten(unknown)} is not a token"
            )
        pairs.append((left, right))
    # The first of two equal merges counts, as in llama.cpp.
    return list(dict.fromkeys(pairs))


def _piece(text: str, type: int) -> bytes:
    """The bytes of a token (llama-vocab.cpp token_to_piece)."""
    if type == TokenType.BYTE and (hexadecimal := re.fullmatch("<0x([0-9A-Fa-f]{2})>", text)):
        return bytes.fromhex(hexadecimal[1])
    if type not in (TokenType.NORMAL, *_WRITTEN_AS_IS):
        return b""
    if type == TokenType.NORMAL and all(char in BYTE_OF for char in text):
        return bytes(BYTE_OF[char] for char in text)
    return text.encode()
