"""A tokenizer as the files of a Hugging Face folder, which `tokenizer_json` reads, transformers loads, and llama.cpp's
converter converts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qjax.errors import QjaxError
from qjax.io import sentencepiece
from qjax.io.tokenizer_json import ADDED_SCORE, SPECIAL, dump_json
from qjax.io.vocabulary import SPACE, TokenType

if TYPE_CHECKING:
    from qjax.io.tokenizer import Tokenizer


def write(folder: Path, tokenizer: "Tokenizer") -> None:
    """Write tokenizer.json and tokenizer_config.json so that `read` finds the same tokenizer, and tokenizer.model if
    it is SentencePiece's.

    Byte-level tokens that are UNUSED, UNKNOWN or BYTE lose that type, which these files cannot express.
    """
    if tokenizer.model not in _DESCRIBED:
        raise QjaxError(f"a tokenizer of the kind {tokenizer.model!r} can be stored in GGUF files only")
    metadata = tokenizer.to_gguf()
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    special = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
    added = [
        {
            "id": id,
            "content": text,
            "single_word": False,
            "lstrip": id in tokenizer.strips_before,
            "rstrip": id in tokenizer.strips_after,
            "normalized": False,
            "special": special[TokenType(kind)],
        }
        for id, (text, kind) in enumerate(zip(tokenizer.tokens, tokenizer.token_types.tolist()))
        if kind in special
    ]
    described = _DESCRIBED[tokenizer.model](tokenizer)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        **described,
    }
    content["post_processor"] = _template_processing(tokenizer) or content["post_processor"]
    content["model"] = {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "vocab": {text: id for id, text in enumerate(tokenizer.tokens)},
        **described["model"],
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": tokenizer.add_space_prefix,
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.add_eos,
    }
    config |= {f"{name}_token": tokenizer.tokens[id] for name, id in ids.items() if id is not None}
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    if tokenizer.model == "llama":
        config["added_tokens_decoder"] = _write_sentencepiece(folder / "tokenizer.model", tokenizer, added)
    dump_json(folder / "tokenizer.json", content)
    dump_json(folder / "tokenizer_config.json", config)


def _describe_bytes(tokenizer: "Tokenizer") -> dict[str, Any]:
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in tokenizer.pre.splits
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": tokenizer.pre.ignore_merges,
            "merges": [merge.split(" ") for merge in tokenizer.merges],
        },
    }


def _describe_characters(tokenizer: "Tokenizer") -> dict[str, Any]:
    prefix = [{"type": "Prepend", "prepend": SPACE}] if tokenizer.add_space_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        *({"type": name} for name in ("ByteFallback", "Fuse")),
        *({"type": "Strip", "content": " ", "start": 1, "stop": 0} for _ in prefix),
    ]
    unknown = tokenizer.unknown_id
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "unk_token": None if unknown is None else tokenizer.tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "merges": sentencepiece.merges_of(tokenizer.tokens, tokenizer.scores.tolist()),
        },
    }


def _write_sentencepiece(path: Path, tokenizer: "Tokenizer", added: list[dict[str, Any]]) -> dict[str, Any]:
    """Write tokenizer.model, and say which of its tokens were added: those that `_sentencepiece` would not find."""
    types = tokenizer.to_gguf().get("tokenizer.ggml.token_type", tokenizer.token_types).tolist()
    scores = tokenizer.scores.tolist()
    kinds = [TokenType(type) if type else TokenType.UNUSED for type in types]
    unknown = tokenizer.unknown_id
    if unknown is None:
        unknown = kinds.index(TokenType.UNKNOWN) if TokenType.UNKNOWN in kinds else 0
    model = sentencepiece.Model(tokenizer.tokens, scores, kinds, tokenizer.add_space_prefix)
    sentencepiece.write(path, model, unknown, tokenizer.bos_id, tokenizer.eos_id)
    flags = {token["id"]: {key: value for key, value in token.items() if key != "id"} for token in added}
    return {
        str(id): flags[id] | {"special": kind == TokenType.CONTROL}
        for id, (score, kind) in enumerate(zip(scores, kinds))
        if kind == TokenType.USER_DEFINED or (kind == TokenType.CONTROL and score == ADDED_SCORE)
    }


def _template_processing(tokenizer: "Tokenizer") -> dict[str, Any] | None:
    def wrap(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [
            *({"SpecialToken": {"id": tokenizer.tokens[id], "type_id": type_id}} for id in begin),
            {"Sequence": {"id": sequence, "type_id": type_id}},
            *({"SpecialToken": {"id": tokenizer.tokens[id], "type_id": type_id}} for id in end),
        ]

    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    end = [tokenizer.eos_id] if tokenizer.add_eos and tokenizer.eos_id is not None else []
    if not begin and not end:
        return None
    names = {tokenizer.tokens[id]: id for id in (*begin, *end)}
    return {
        "type": "TemplateProcessing",
        "single": wrap("A", 0),
        "pair": wrap("A", 0) + wrap("B", 1),
        "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]} for text, id in names.items()},
    }


_DESCRIBED = {"gpt2": _describe_bytes, "llama": _describe_characters}
