"""GGML files from before GGUF, which hold LLaMA models; seen as the GGUF files that they would be today.

    magic    GGML "lmgg"   GGMF "fmgg", version u32 1   GGJT "tjgg", version u32 1 to 3
    n_vocab n_embd n_mult n_head n_layer n_rot file_type    u32 each
    n_vocab × (length u32, bytes, score f32)                no scores in GGML
    tensors, to the end of the file:
        n_dims name_length type u32, dims u32 × n_dims, name, in GGJT padding to 32, data

Little-endian; dims begin with the contraction axis, rows of attn_q and attn_k lie as in GGUF.  How many heads keys and
values have is seen from the shape of their matrices.  The epsilon of the norms and the length of the context are in
none of these files: what is taken for them stands in `_UNTOLD`.
Source: llama.cpp convert_llama_ggml_to_gguf.py, which writes the same metadata and tensors (but for the description).
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.io.cursor import Cursor, shorten
from qjax.io.gguf import GGUFFile, TensorInfo
from qjax.io.gguf_metadata import Metadata, Value, ValueType
from qjax.io.mapped import MappedFile
from qjax.io.vocabulary import TokenType
from qjax.models.config import Config
from qjax.models.transformer import tensor_shapes


class _Kind(NamedTuple):
    name: str
    versions: tuple[int, ...]
    """The file says which if it can be more than one, or the first that had numbers."""
    numbered: bool
    scores: bool
    alignment: int


_KINDS = {
    b"lmgg": _Kind("GGML", (1,), numbered=False, scores=False, alignment=1),
    b"fmgg": _Kind("GGMF", (1,), numbered=True, scores=True, alignment=1),
    b"tjgg": _Kind("GGJT", (1, 2, 3), numbered=True, scores=True, alignment=32),
}


class _Sizes(NamedTuple):
    """As they stand in the file."""

    vocab: int
    embd: int
    mult: int
    head: int
    layer: int
    rot: int
    file_type: int


# The version of GGJT since when blocks are laid out as today; numbers always were.
_AS_TODAY_SINCE = dict.fromkeys(("F32", "F16"), 0)
_AS_TODAY_SINCE |= dict.fromkeys(("Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), 2)
_AS_TODAY_SINCE |= dict.fromkeys(("Q4_0", "Q4_1", "Q8_0"), 3)
_REMOVED = {4: "Q4_2", 5: "Q4_3"}

_OUTSIDE = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_IN_LAYERS = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


class _Untold(NamedTuple):
    norm_eps: float
    n_ctx: int


# By whether keys and values have fewer heads.  Only LLaMA 2 (70B) has that; else it is LLaMA 1 (1e-6, 2048) or 2 (1e-5,
# 4096), and these are llama.cpp's compromise.
_UNTOLD = {True: _Untold(1e-5, 4096), False: _Untold(5e-6, 2048)}

# Of three tokens the files have the meaning as text, and of bytes the byte; then come words.
_SPECIAL = (("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL))
_FIRST_WORD = len(_SPECIAL) + 256
MAX_TEXT_BYTES = 4095
"""Of a token and of a tensor's name; what claims more is something else."""

_NOT_LLAMA = (
    "Only LLaMA models are read from files of this kind, whole ones: not the parts of a model (.bin.1), nor Whisper, "
    "GPT-J and others, whose files began alike."
)


def recognizes(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins as one of these."""
    with open(path, "rb") as file:
        return file.read(4) in _KINDS


def read(path: str | os.PathLike[str], *, norm_eps: float | None = None, n_ctx: int | None = None) -> GGUFFile:
    """Open a GGML, GGMF or GGJT file; it is mapped, and a tensor's bytes are read when they are asked for.

    norm_eps, n_ctx: what the file does not say (see `_UNTOLD`); in the metadata, where `qjax quantize --override-kv`
        changes them too, llama.attention.layer_norm_rms_epsilon and llama.context_length.

    Raises QjaxError for a file that is damaged, of another model than LLaMA or a part of one, and for blocks that were
    laid out in another way then: those quantized before GGJT 2, and Q4_0, Q4_1 and Q8_0 of before GGJT 3.
    """
    path = Path(path)
    file = MappedFile(path)
    cursor = Cursor(file.mapped, path)
    kind, version = _read_kind(cursor)
    n = _read_sizes(cursor)
    tokens, scores = _read_vocabulary(cursor, n.vocab, kind)
    tensors: dict[str, TensorInfo] = {}
    while cursor.left:
        start, tensor = cursor.at, _read_tensor(cursor, file, kind, version)
        if tensor.name in tensors:
            cursor.fail(f"{tensor.name} occurs twice, expected once. The file is damaged.", at=start)
        tensors[tensor.name] = tensor
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        described = _describe(n, shapes, norm_eps, n_ctx)
        metadata = Metadata(
            {"general.architecture": "llama", "general.name": path.name}
            | {"general.description": f"read from a {kind.name} {version} file"}
            | described
            | _tokenizer(tokens, scores)
        )
        _check(n, metadata, shapes)
    except QjaxError as error:
        raise QjaxError(f"{path}: {error}. {_NOT_LLAMA}") from None
    return GGUFFile((path,), version, metadata, tensors, file.size, kind.name)


def _read_kind(cursor: Cursor) -> tuple[_Kind, int]:
    magic = bytes(cursor.take(4, "the magic number of a GGML file"))
    if magic not in _KINDS:
        cursor.fail(f"not a GGML file from before GGUF: it begins with {magic!r}", at=0)
    kind = _KINDS[magic]
    version = cursor.number("I", "the version") if kind.numbered else kind.versions[0]
    if version not in kind.versions:
        known = ", ".join(map(str, kind.versions))
        cursor.fail(f"{kind.name} version {version}, expected {known}. The file is damaged.", at=4)
    return kind, version


def _read_sizes(cursor: Cursor) -> _Sizes:
    start = cursor.at
    n = _Sizes(*(cursor.number("I", f"the number {name}") for name in _Sizes._fields))
    if not 0 < n.head * n.rot == n.embd:
        cursor.fail(f"it says {n.embd} columns in {n.head} heads of {n.rot}. {_NOT_LLAMA}", at=start)
    if n.vocab < len(_SPECIAL):
        cursor.fail(f"it says {n.vocab} tokens, expected {len(_SPECIAL)} at least. {_NOT_LLAMA}", at=start)
    return n


def _read_vocabulary(cursor: Cursor, n: int, kind: _Kind) -> tuple[list[bytes], list[float]]:
    """Tokens and their scores, 0 where the file has none."""
    cursor.need(n * (8 if kind.scores else 4), f"a vocabulary of {n} tokens")
    tokens, scores = [], []
    for i in range(n):
        tokens.append(bytes(_take_text(cursor, cursor.number("I", f"the length of token {i}"), f"token {i}")))
        scores.append(cursor.number("f", f"the score of token {i}") if kind.scores else 0.0)
    return tokens, scores


def _take_text(cursor: Cursor, size: int, what: str) -> memoryview:
    """The next ``size`` bytes, a text."""
    if size > MAX_TEXT_BYTES:
        cursor.fail(f"{what} has {size} bytes, expected at most {MAX_TEXT_BYTES}. {_NOT_LLAMA}", at=cursor.at - 4)
    return cursor.take(size, what)


def _tokenizer(tokens: list[bytes], scores: list[float]) -> dict[str, Value]:
    """The metadata of a SentencePiece vocabulary."""
    named = [*_SPECIAL, *map(_token, range(len(_SPECIAL), len(tokens)), tokens[len(_SPECIAL) :])]
    texts, types = map(list, zip(*named))
    return {
        "tokenizer.ggml.model": Value(ValueType.STRING, "llama"),
        "tokenizer.ggml.pre": Value(ValueType.STRING, "default"),
        "tokenizer.ggml.tokens": Value.of(texts),
        "tokenizer.ggml.scores": Value.of(np.array(scores, np.float32)),
        "tokenizer.ggml.token_type": Value.of(np.array(types, np.int32)),
        "tokenizer.ggml.unknown_token_id": Value(ValueType.UINT32, 0),
        "tokenizer.ggml.bos_token_id": Value(ValueType.UINT32, 1),
        "tokenizer.ggml.eos_token_id": Value(ValueType.UINT32, 2),
    }


def _token(i: int, token: bytes) -> tuple[str, int]:
    """Text and type of token number ``i``, as GGUF has them."""
    if not token:
        return "", TokenType.CONTROL
    if i < _FIRST_WORD and len(token) == 1:
        return f"<0x{token[0]:02X}>", TokenType.BYTE
    return str(token, "utf-8", "surrogateescape").replace(" ", "\u2581"), TokenType.NORMAL


def _read_tensor(cursor: Cursor, file: MappedFile, kind: _Kind, version: int) -> TensorInfo:
    start = cursor.at
    n_dims, name_length, ggml_id = (cursor.number("I", "the header of a tensor") for _ in range(3))
    if n_dims not in (1, 2):
        cursor.fail(f"a tensor has {n_dims} dimensions, expected 1 or 2. {_NOT_LLAMA}", at=start)
    dims = [cursor.number("I", "the shape of a tensor") for _ in range(n_dims)]
    name = str(_take_text(cursor, name_length, "the name of a tensor"), "utf-8", "surrogateescape")
    shape = tuple(reversed(dims))
    try:
        format = _format(ggml_id, kind, version)
        nbytes = format.nbytes(shape)
        translated = _translated(name)
    except QjaxError as error:
        cursor.fail(f"tensor {shorten(name)}: {error}", at=start)
    cursor.take(-cursor.at % kind.alignment, f"the padding before {name}")
    offset = cursor.at
    cursor.take(nbytes, f"tensor {shorten(name)}")
    return TensorInfo(translated, shape, format, offset, file)


def _format(ggml_id: int, kind: _Kind, version: int) -> Format:
    """Raises QjaxError for one that was laid out in another way then."""
    if ggml_id in _REMOVED:
        name, since = _REMOVED[ggml_id], "and it was given up"
    else:
        format = formats.by_id(ggml_id)
        name = format.name
        if name not in _AS_TODAY_SINCE:
            raise QjaxError(f"{name} is younger than such files. The file is damaged.")
        if _AS_TODAY_SINCE[name] <= (version if kind.name == "GGJT" else 0):
            return format
        since = f"and today's is that of GGJT {_AS_TODAY_SINCE[name]}"
    raise QjaxError(
        f"{name} blocks of a {kind.name} {version} file have a layout of their time, {since}; only float files "
        "that old are read. Quantize the model again from its float16 weights."
    )


def _translated(name: str) -> str:
    """GGUF's name.  Raises QjaxError if there is none."""
    match = re.fullmatch(r"(?:layers\.(0|[1-9][0-9]*)\.)?([a-z0-9_.]+)\.weight", name)
    layer, inside = match.groups() if match else (None, "")
    known = _OUTSIDE if layer is None else _IN_LAYERS
    if inside not in known:
        raise QjaxError(f"a LLaMA model has no such tensor. {_NOT_LLAMA}")
    return f"{known[inside]}.weight" if layer is None else f"blk.{layer}.{known[inside]}.weight"


def _describe(
    n: _Sizes, shapes: dict[str, tuple[int, ...]], norm_eps: float | None, n_ctx: int | None
) -> dict[str, Value]:
    """The metadata of the model.  Raises QjaxError if the matrices that tell are missing."""
    if n.layer > len(shapes):
        raise QjaxError(f"it says {n.layer} layers, more than there are tensors")
    n_kv_heads, d_ff = (_rows(shapes, f"blk.0.{name}.weight") for name in ("attn_k", "ffn_gate"))
    n_kv_heads //= n.rot
    untold = _UNTOLD[n_kv_heads < n.head]
    sizes = {
        "general.file_type": n.file_type,
        "llama.context_length": n_ctx or untold.n_ctx,
        "llama.embedding_length": n.embd,
        "llama.block_count": n.layer,
        "llama.feed_forward_length": d_ff,
        "llama.rope.dimension_count": n.rot,
        "llama.attention.head_count": n.head,
        "llama.attention.head_count_kv": n_kv_heads,
    }
    epsilon = Value(ValueType.FLOAT32, norm_eps or untold.norm_eps)
    described = {key: Value(ValueType.UINT32, size) for key, size in sizes.items()}
    return described | {"llama.attention.layer_norm_rms_epsilon": epsilon}


def _rows(shapes: dict[str, tuple[int, ...]], name: str) -> int:
    if len(shapes.get(name, ())) != 2:
        raise QjaxError(f"there is no matrix {name}")
    return shapes[name][0]


def _check(n: _Sizes, metadata: Metadata, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises QjaxError unless there are the tensors of such a model, of their shapes."""
    expected = tensor_shapes(Config.from_gguf(metadata, shapes)) | {"token_embd.weight": (n.vocab, n.embd)}
    for name in (*expected, *shapes):
        if shapes.get(name) != expected.get(name):
            found = f"has shape {shapes[name]}" if name in shapes else "is missing"
            wanted = expected.get(name, f"none in {n.layer} layers")
            raise QjaxError(f"{name} {found}, expected {wanted}")
