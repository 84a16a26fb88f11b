"""SentencePiece vocabularies: tokenizer.model, its protobuf file, and the merges that scores amount to.

Source: sentencepiece_model.proto (the numbers of the fields), transformers' convert_slow_tokenizer.py (the merges).
"""

import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qjax.errors import QjaxError
from qjax.io.atomic import atomic_write
from qjax.io.cursor import Cursor, shorten
from qjax.io.vocabulary import TokenType

# Wire types of protobuf.
_WIRE_TYPES = _VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Fields by number: what is read of them, and how it is stored. All others are passed over.
_MODEL = {1: ("piece", _BYTES), 2: ("trainer", _BYTES), 3: ("normalizer", _BYTES)}
_PIECE = {1: ("text", _BYTES), 2: ("score", _FIXED32), 3: ("type", _VARINT)}
_TRAINER = {3: ("model_type", _VARINT)}
_NORMALIZER = {3: ("add_dummy_prefix", _VARINT)}
_TYPES = {int(type): type for type in TokenType if type != TokenType.UNDEFINED}
_MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "word", 4: "char"}
_BPE = 2


class Model(NamedTuple):
    """What tokenizer.model says of a BPE vocabulary."""

    tokens: list[str]
    scores: list[float]
    types: list[TokenType]
    add_dummy_prefix: bool
    """Whether a text begins with a space that is not in it."""


def read(path: Path) -> Model:
    """Read a tokenizer.model.

    Raises QjaxError if it is not a SentencePiece model, cut short, without pieces, or of another kind than BPE.
    """
    try:
        data = memoryview(path.read_bytes())
    except OSError as error:
        raise QjaxError(f"{path}: cannot be read ({error.strerror})") from error
    tokens, scores, types = [], [], []
    trainer, normalizer = {"model_type": 1}, {"add_dummy_prefix": 1}
    for field, value in _message(data, path, _MODEL):
        if field == "trainer":
            trainer |= dict(_message(value, path, _TRAINER))
        elif field == "normalizer":
            normalizer |= dict(_message(value, path, _NORMALIZER))
        else:
            piece = {"text": b"", "score": 0.0, "type": TokenType.NORMAL} | dict(_message(value, path, _PIECE))
            try:
                tokens.append(str(piece["text"], "utf-8"))
                types.append(_TYPES[piece["type"]])
            except (UnicodeDecodeError, KeyError) as error:
                raise QjaxError(
                    f"{path}: piece {len(types)} has a text or a type that none can have: {error}"
                ) from None
            scores.append(piece["score"])
    if not tokens:
        raise QjaxError(f"{path}: there are no pieces in it. It is not a SentencePiece model, or an empty one.")
    if trainer["model_type"] != _BPE:
        found = _MODEL_TYPES.get(trainer["model_type"], trainer["model_type"])
        raise QjaxError(f"{path}: a SentencePiece model of the kind {found}, expected BPE: others are not read here")
    return Model(tokens, scores, types, bool(normalizer["add_dummy_prefix"]))


def write(path: Path, model: Model, unknown: int, bos: int | None, eos: int | None) -> None:
    """Write a tokenizer.model that `read` and the sentencepiece library read; ``unknown`` becomes the one token of
    type UNKNOWN that the library asks for, and others (in old files what fills up the number) become UNUSED."""
    data = bytearray()
    for id, (text, score, type) in enumerate(zip(model.tokens, model.scores, model.types)):
        type = TokenType.UNUSED if type == TokenType.UNKNOWN else type
        type = TokenType.UNKNOWN if id == unknown else type
        text = text.encode()
        data += _bytes(1, _bytes(1, text) + _tag(2, _FIXED32) + struct.pack("<f", score) + _number(3, type))
    ids = {40: unknown, 41: -1 if bos is None else bos, 42: -1 if eos is None else eos, 43: -1}
    texts = {number + 5: model.tokens[id] for number, id in ids.items() if id >= 0}
    byte_fallback = TokenType.BYTE in model.types
    trainer = _number(3, _BPE) + _number(4, len(model.tokens)) + _number(35, byte_fallback)
    trainer += b"".join(_number(number, id) for number, id in ids.items())
    trainer += b"".join(_bytes(number, text.encode()) for number, text in texts.items())
    normalizer = _bytes(1, b"identity") + _number(3, model.add_dummy_prefix) + _number(4, False) + _number(5, True)
    with atomic_write(path) as file:
        file.write(bytes(data + _bytes(2, trainer) + _bytes(3, normalizer)))


def merges_of(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, those with the highest score first.

    Of pairs with equal scores the leftmost should go first. The tokenizers library ranks pairs; here those of the
    token with the lowest id go first, which comes to the same for runs of spaces, which Llama 2 scores alike.
    """
    score_of = dict(zip(tokens, scores))
    halves = _halves(score_of)
    pairs = [
        (-score_of[token], id, len(left), left, right)
        for id, token in enumerate(tokens)
        for left, right in halves(token)
    ]
    return [(left, right) for *_, left, right in sorted(pairs)]


def scores_of(
    path: Path, vocab: Collection[str], merges: Sequence[tuple[str, str]], added: Collection[str]
) -> dict[str, float]:
    """A score for each token of ``vocab`` that lets pairs merge in the order of ``merges``.

    llama.cpp's converter writes -1000 for all of them (gguf-py vocab.py LlamaHfVocab), with which the leftmost pair
    merges first. Raises QjaxError if no scores can say it: pairs that make one token must follow one another, and
    all of them be there, but for pairs of ``added`` tokens.
    """
    score_of: dict[str, float] = {}
    last = None
    for rank, (left, right) in enumerate(merges):
        token = left + right
        if token != last and score_of.setdefault(token, -float(rank)) != -float(rank):
            raise QjaxError(f"{path}: {_NO_SCORES}: the merges that make {shorten(token)} do not follow one another")
        last = token
    halves, listed = _halves(set(vocab) - set(added)), set(merges)
    for token in score_of:
        for pair in halves(token):
            if pair not in listed:
                raise QjaxError(f"{path}: {_NO_SCORES}: {shorten(' '.join(pair))} is not among the merges")
    return dict.fromkeys(vocab, -float(len(merges))) | score_of


_NO_SCORES = "model.merges are not those of a SentencePiece vocabulary, which GGUF could hold"


def _halves(known: Collection[str]) -> Callable[[str], Iterator[tuple[str, str]]]:
    """The ways to cut a token into two of those that are known."""
    lengths = set(map(len, known))

    def halves(token: str) -> Iterator[tuple[str, str]]:
        for at in range(1, len(token)):
            # The lengths first: of a token of a million letters a million halves would have to be copied.
            if at in lengths and len(token) - at in lengths and token[:at] in known and token[at:] in known:
                yield token[:at], token[at:]

    return halves


def _message(data: memoryview, path: Path, fields: Mapping[int, tuple[str, int]]) -> Iterator[tuple[str, Any]]:
    """The names and values of the fields of a message that ``fields`` lists, as often as they occur."""
    cursor = Cursor(np.asarray(data), path)
    while cursor.left:
        start = cursor.at
        number, wire = divmod(_varint(cursor), 8)
        name, expected = fields.get(number, ("", wire))
        if wire != expected or wire not in _WIRE_TYPES or number == 0:
            cursor.fail(f"field {number} of a message is stored as wire type {wire}. {_DAMAGED}", at=start)
        value: Any = None
        if wire == _VARINT:
            value = _varint(cursor)
        elif wire == _FIXED32:
            value = cursor.number("f", "a number")
        else:
            value = cursor.take(_varint(cursor) if wire == _BYTES else 8, f"field {number} of a message")
        if name:
            yield name, value


_DAMAGED = "The file is damaged, or no SentencePiece model."


def _varint(cursor: Cursor) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = cursor.number("B", "a number")
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    cursor.fail(f"a number of more than 10 bytes. {_DAMAGED}")


def _tag(number: int, wire: int) -> bytes:
    return _packed(number << 3 | wire)


def _number(number: int, value: int) -> bytes:
    return _tag(number, _VARINT) + _packed(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _tag(number, _BYTES) + _packed(len(value)) + value


def _packed(value: int) -> bytes:
    value &= (1 << 64) - 1  # Negative ones as two's complement.
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])
