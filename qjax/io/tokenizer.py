"""Text to token ids and back, as llama.cpp does it, rebuilt from GGUF metadata.

    text ─ cut out special tokens ─► texts between them ─ an encoder of `bpe` ─► ids

llama.cpp takes the longest special token first over the whole text, and skips CONTROL tokens unless asked to parse
them. What follows differs from one kind of vocabulary to another, and is the encoder's.
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

from qjax.errors import QjaxError, located
from qjax.io.bpe import ByteBPE, CharacterBPE, Encoder
from qjax.io.cursor import shorten
from qjax.io.gguf_metadata import Metadata
from qjax.io.vocabulary import (
    END_OF_GENERATION,
    FILL_IN_MIDDLE,
    HARMONY,
    PRE_TOKENIZERS,
    SENTENCEPIECE,
    PreTokenizer,
    TokenType,
)

_WRITTEN_AS_IS = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_OLD_NAMES = {"prefix": "fim_pre", "suffix": "fim_suf", "middle": "fim_mid"}
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
_MODELS = {
    "gpt2": "byte-level BPE",
    "llama": "SentencePiece BPE",
    "gemma4": "BPE over characters",
}
_NOT_READ = {
    "bert": "WordPiece",
    "t5": "Unigram",
    "rwkv": "RWKV's trie",
    "plamo2": "PLaMo-2's",
    "hybriddna": "BPE and k-mers of DNA",
    "whitespace": "BPE between blanks",
}
_BLANK = " \t\n\v\f\r"


class Tokenizer:
    """The vocabulary, merges or scores, special tokens and rules of a model file.

    Make one with `from_gguf` or `from_folder`.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = Metadata(
            {key: value for key, value in Metadata(metadata).typed.items() if key.startswith("tokenizer.")}
        )
        self.model: str = self._get("ggml.model", str)
        """The kind of vocabulary, in GGUF's words: gpt2, llama or gemma4."""
        if self.model not in _MODELS:
            known = ", ".join(f"{name!r} ({what})" for name, what in _MODELS.items())
            found = f"{shorten(self.model)}" + (f" ({_NOT_READ[self.model]})" if self.model in _NOT_READ else "")
            raise QjaxError(f"tokenizer.ggml.model is {found}, which is not read here; known: {known}")
        self.pre: PreTokenizer = self._pre_tokenizer()
        texts = self._get("ggml.tokens", list)
        if not texts:
            raise QjaxError("tokenizer.ggml.tokens is empty: there is no vocabulary")
        # llama.cpp's name for a token without text.
        self.tokens: list[str] = [text or f"[EMPTY_{id}]" for id, text in enumerate(texts)]
        """The text of each token as the file spells it, NORMAL ones with a space as Ġ (`vocabulary.BYTE_OF`) or ▁."""
        self._id_of = _index(self.tokens)

        ids = self._named_ids()
        self.bos_id = ids.get("bos")
        """The token that begins a text, or None."""
        self.eos_id = ids.get("eos")
        """The token that ends a text, or None."""
        self.unknown_id = ids.get("unknown")
        """What stands for characters that have no token, or None."""
        self.token_types, self.eog_ids = self._types_and_ends(ids)
        self.add_bos: bool = self._get("ggml.add_bos_token", bool, self.pre.add_bos)
        self.add_eos: bool = self._get("ggml.add_eos_token", bool, False)
        if "gemma4" in self.pre.names:
            self.add_bos = True  # Whatever the file says (llama.cpp pull request 21500).
        for name, add, id in (("bos", self.add_bos, self.bos_id), ("eos", self.add_eos, self.eos_id)):
            if add and id is None:
                raise QjaxError(f"tokenizer: {name.upper()} is to be added, but there is no .ggml.{name}_token_id")
        self.add_space_prefix: bool = self._get("ggml.add_space_prefix", bool, self.model == "llama")
        """Whether decode removes a space at the start."""
        self.prefix = " " if self.model == "llama" and self.add_space_prefix else ""
        """What is put before every text between special tokens, and so comes back in `pieces`."""
        self.chat_template: str | None = self._get("chat_template", str, None)

        self._encoder = self._build_encoder()
        special = np.flatnonzero(np.isin(self.token_types, _WRITTEN_AS_IS)).tolist()
        self._special_ids = sorted(special, key=lambda id: len(self.tokens[id].encode()), reverse=True)
        self.strips_before, self.strips_after = self._strips(str(metadata.get("general.name", "")).lower())
        """Special tokens that take the blanks before, and after them along."""

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Rebuild the tokenizer from a GGUF file's metadata, the keys that start with ``tokenizer.``.

        Raises QjaxError for an unknown tokenizer.ggml.model or .pre (the known ones are listed), a key that
        is missing or of the wrong type, arrays whose lengths disagree, token ids out of range, repeated
        tokens, and merges that are malformed or make no token. Warns if byte-level BPE has no tokenizer.ggml.pre.
        """
        return cls(metadata)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read tokenizer.json or tokenizer.model, and their companions, in a Hugging Face folder.

        Raises QjaxError as `from_gguf` does, and for a tokenizer that GGUF could not describe.
        """
        from qjax.io import tokenizer_json

        entries = tokenizer_json.read(Path(path))
        with located(path):
            return cls(entries)

    def to_gguf(self) -> Metadata:
        """The entries that describe this tokenizer in a GGUF file, as llama.cpp's converter writes them."""
        return Metadata(self._metadata)

    def to_folder(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, and tokenizer.model for SentencePiece, into a folder, where
        `from_folder` finds the same tokenizer. Raises QjaxError for kinds that only GGUF can hold (Gemma 4's)."""
        from qjax.io import tokenizer_write

        tokenizer_write.write(Path(path), self)

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def merges(self) -> list[str]:
        """Pairs of tokens, "left right", in the order in which they are merged; SentencePiece has `scores`."""
        return self._get("ggml.merges", list)

    @property
    def scores(self) -> np.ndarray:
        """What SentencePiece merges by, the highest first: a score for each token, float32 (vocab,)."""
        scores = self._get("ggml.scores", np.ndarray)
        if len(scores) != self.vocab_size or scores.dtype.kind not in "iuf" or np.isnan(scores).any():
            raise QjaxError(
                f"tokenizer.ggml.scores: {len(scores)} of dtype {scores.dtype}, expected a number for each of the "
                f"{self.vocab_size} tokens"
            )
        with np.errstate(over="ignore"):
            return scores.astype(np.float32)

    @property
    def missing_bytes(self) -> bytes:
        """Bytes for which the vocabulary has no token. Byte-level BPE leaves them out, as in llama.cpp; in
        SentencePiece the unknown token stands for a character that needs one, where llama.cpp stops."""
        return self._encoder.missing

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
        encoded = self._encoder.encode(texts)
        ids: list[int] = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        for fragment in fragments:
            ids += next(encoded) if isinstance(fragment, str) else [fragment]
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[SupportsIndex], unparse_special: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD. CONTROL tokens are spelled out
        only if ``unparse_special``. If `add_space_prefix`, the first token loses a space at its start, as in
        llama.cpp. Raises QjaxError for ids that are not in the vocabulary."""
        pieces = self.pieces(ids, unparse_special)
        if pieces and self.add_space_prefix:
            pieces[0] = pieces[0].removeprefix(b" ")
        return b"".join(pieces).decode(errors="replace")

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
        """A decoder for ids that arrive one by one and continue a text: it keeps a space at their start."""
        return TextStream(self, unparse_special)

    def __repr__(self) -> str:
        def show(id: int | None) -> str:
            return "none" if id is None else f"{id} {self.tokens[id]!r}"

        bos = f"BOS {show(self.bos_id)}{' added' if self.add_bos else ''}"
        kind = _MODELS[self.model] if self.model == "llama" else self.pre.names[0]
        return f"Tokenizer({kind}, {self.vocab_size} tokens, {bos}, EOS {show(self.eos_id)})"

    def _get(self, name: str, kind: type, *default: Any) -> Any:
        key = f"tokenizer.{name}"
        if key not in self._metadata:
            if default:
                return default[0]
            raise QjaxError(f"tokenizer: the metadata have no {key}")
        value = self._metadata[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found, names = self._metadata.typed[key].type_name, {list: "an array of strings", str: "a string"}
            names |= {np.ndarray: "an array of numbers", int: "an integer", bool: "a bool"}
            raise QjaxError(f"{key} is {found}, expected {names[kind]}")
        return value

    def _pre_tokenizer(self) -> PreTokenizer:
        if self.model == "llama":
            return SENTENCEPIECE
        name = "gemma4" if self.model == "gemma4" else self._get("ggml.pre", str, None)
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

    def _named_ids(self) -> dict[str, int]:
        """The tokens that the file names: bos, eos, unknown, padding ..."""
        defaults = _SENTENCEPIECE_IDS if self.model == "llama" else {}
        ids = {name: id for name, id in defaults.items() if id < self.vocab_size}
        for key in self._metadata:
            if (match := re.fullmatch(r"tokenizer\.(ggml\.(\w+)_token_id)", key)) is not None:
                id = self._get(match[1], int)
                if not 0 <= id < self.vocab_size:
                    raise QjaxError(f"{key} is {id}, expected 0 to {self.vocab_size - 1} (the vocabulary)")
                ids[_OLD_NAMES.get(match[2], match[2])] = id
        return ids

    def _types_and_ends(self, named: Mapping[str, int]) -> tuple[np.ndarray, frozenset[int]]:
        """The TokenType of each token, int32 (vocab,), and the tokens that end a generation.

        llama.cpp corrects what a file says of tokens whose text it knows (llama_vocab::impl::load).
        """
        types = self._get("ggml.token_type", np.ndarray, np.full(self.vocab_size, TokenType.NORMAL, np.int32))
        if len(types) != self.vocab_size:
            raise QjaxError(
                f"tokenizer.ggml.token_type has {len(types)} entries, expected {self.vocab_size}, as .tokens"
            )
        if types.dtype.kind not in "iu" or not np.isin(types, list(TokenType)).all():
            raise QjaxError(f"tokenizer.ggml.token_type: expected integers from 0 to {max(TokenType)}")
        types = types.astype(np.int32)

        ids = {text: id for text, id in self._id_of.items() if text in END_OF_GENERATION}
        ends = {*ids.values(), *(named[name] for name in _ENDS if name in named)}
        types[list(ids.values())] = TokenType.CONTROL
        for name, texts in FILL_IN_MIDDLE.items():
            for id in (self._id_of[text] for text in texts if text in self._id_of and name not in named):
                types[id] = TokenType.CONTROL
                ends |= {id} if name in _ENDS else set()
        types[[self._id_of[text] for text in HARMONY if text in self._id_of]] = TokenType.USER_DEFINED

        # Where others do, <|end|> and </s> end no generation.
        spelled = {self.tokens[id] for id in ends}
        calls = bool(spelled & {"<|call|>", "<|calls|>"})
        if "<|end|>" in spelled and calls and spelled & {"<|return|>", "<|flush|>"}:
            ends.remove(ids["<|end|>"])
            types[ids["<|end|>"]] = TokenType.USER_DEFINED
        if "</s>" in spelled and spelled & {"<|tool_response>", "<|plamo:eos|>"}:
            ends.remove(ids["</s>"])
            types[ids["</s>"]] = TokenType.NORMAL
        return types, frozenset(ends)

    def _strips(self, model_name: str) -> tuple[frozenset[int], frozenset[int]]:
        """Special tokens that take the blanks before and after them along, which GGUF has no key for: llama.cpp
        goes by the names of the model and the pre-tokenizer."""

        def ids(*texts: str) -> frozenset[int]:
            return frozenset(self._id_of[text] for text in texts if text in self._id_of)

        if re.search("jina-v2-(de|es|code)", self._get("ggml.pre", str, "")):
            return ids("<mask>"), frozenset()
        if re.search("phi-?3", model_name):
            return frozenset(), frozenset(self._special_ids) - ids("<unk>", "<s>", "<|endoftext|>")
        return ids("[MASK]") if "modern-bert" in model_name else frozenset(), frozenset()

    def _build_encoder(self) -> Encoder:
        if self.model == "llama":
            score_of = dict(zip(self.tokens, (-self.scores).tolist()))
            return CharacterBPE(
                self._id_of, lambda left, right: score_of.get(left + right), prefix=self.prefix, unknown=self.unknown_id
            )
        merges = _pairs(self.merges, self._id_of)
        if self.pre.byte_level:
            return ByteBPE(self._id_of, merges, self.pre)
        rank_of = {pair: rank for rank, pair in enumerate(merges)}
        return CharacterBPE(
            self._id_of,
            lambda left, right: rank_of.get((left, right)),
            lines=bool(self.pre.splits),
            whole_line_ends="gemma4" in self.pre.names,
        )

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
                parts = fragment.split(special)
                for at, part in enumerate(parts):
                    part = part.lstrip(_BLANK) if at > 0 and id in self.strips_after else part
                    part = part.rstrip(_BLANK) if at + 1 < len(parts) and id in self.strips_before else part
                    cut += [id, part] if at > 0 else [part]
            fragments = [fragment for fragment in cut if fragment != ""]
        return fragments

    @cached_property
    def _pieces(self) -> list[bytes]:
        return [self._spell(text, type) for text, type in zip(self.tokens, self.token_types.tolist())]

    def _spell(self, text: str, type: int) -> bytes:
        """The bytes of a token (llama-vocab.cpp token_to_piece)."""
        if type == TokenType.BYTE and (hexadecimal := re.fullmatch("<0x([0-9A-Fa-f]{2})>", text)):
            return bytes.fromhex(hexadecimal[1])
        if type in _WRITTEN_AS_IS:
            return text.encode()
        return self._encoder.spell(text) if type == TokenType.NORMAL else b""


class TextStream:
    """Decodes ids as they come and holds a character back until all its bytes are there.

    The strings from `push` and `end` joined are what `Tokenizer.pieces` of all the ids joined are as text.
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
