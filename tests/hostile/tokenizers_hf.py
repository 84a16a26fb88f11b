"""Hugging Face folders whose tokenizer is not what it says: tokenizer.json, tokenizer.model and what is beside them."""

import json
import struct

from hostile.kind import Kind

from qjax.io.tokenizer import Tokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
TOKENS = ["!", '"', "#", "$", '!"', "#$", '!"#$']
MERGES = ['! "', "# $", '!" #$']
SMOLLM = {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}
MODEL = {"type": "BPE", "vocab": {token: id for id, token in enumerate(TOKENS)}, "merges": MERGES}
ADDED = [{"id": 7, "content": "<s>", "special": True}, {"id": 8, "content": "</s>", "special": True}]
BPE = {"added_tokens": ADDED, "normalizer": None, "pre_tokenizer": SMOLLM, "post_processor": None, "model": MODEL}

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "\u2581", "aa", "aab", "ab"]
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
SPM_MODEL = {
    "type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>",
    "vocab": {text: id for id, text in enumerate(PIECES)}, "merges": ["a a", "a ab", "aa b", "a b"],
}  # fmt: skip
SPM = {"added_tokens": [], "normalizer": SPACES, "pre_tokenizer": None, "model": SPM_MODEL}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}


def folder(content, config=None, beside: dict | None = None) -> dict[str, bytes]:
    """content: of tokenizer.json, an object or bytes; config: of tokenizer_config.json; beside: of other files, by the
    names that they have before .json."""
    files = {"tokenizer": content, "tokenizer_config": CONFIG if config is None else config} | (beside or {})
    packed = {name: data if isinstance(data, bytes) else json.dumps(data).encode() for name, data in files.items()}
    return {f"{name}.json": data for name, data in packed.items()}


def bpe(config=None, beside: dict | None = None, **changes) -> dict[str, bytes]:
    return folder(BPE | changes, config, beside)


def bpe_model(**changes) -> dict[str, bytes]:
    return bpe(model=MODEL | changes)


def spm(**changes) -> dict[str, bytes]:
    return folder(SPM | changes)


def spm_model(**changes) -> dict[str, bytes]:
    return spm(model=SPM_MODEL | changes)


# ── tokenizer.model, after sentencepiece_model.proto ─────────────────────────────────────────────────


def field(number: int, value: bytes | float | int) -> bytes:
    """A field of a protobuf message, of bytes or a small number."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


PROTO_PIECES = [
    field(1, b"<unk>") + field(3, 2),
    field(1, "\u2581".encode()) + field(2, -1.5) + field(9, b"unknown field"),
    field(1, b"<0x41>") + field(2, 0.0) + field(3, 6),
]
PROTO = b"".join(field(1, piece) for piece in PROTO_PIECES) + field(2, field(3, 2))


def proto(data: bytes, config=None) -> dict[str, bytes]:
    special = {"unk_token": "<unk>", "add_bos_token": False}
    return {
        "tokenizer.model": data,
        "tokenizer_config.json": json.dumps(special if config is None else config).encode(),
    }


DEEP = b"[" * 10**5
NOT_ONE = "not a tokenizer.json"
UNKNOWN_PRE = "unknown pre-tokenizer"
BAD = {
    # ── tokenizer.json
    "none": ({"config.json": b"{}"}, "tokenizer.json: there is no such file"),
    "nothing": (folder(b""), "tokenizer.json: not a JSON file"),
    "no JSON": (folder(b"{"), "tokenizer.json: not a JSON file"),
    "no text": (folder(b"\xff"), "tokenizer.json: not a JSON file"),
    "a list": (folder([]), "expected a JSON object, found a list"),
    "a hundred thousand deep": (lambda: folder(DEEP), "tokenizer.json: not a JSON file"),
    "deep in the model": (lambda: folder(b'{"model":' * 10**5), "tokenizer.json: not a JSON file"),
    "a pre-tokenizer that is deep": (
        lambda: folder(json.dumps(BPE | {"pre_tokenizer": 0}).encode().replace(
            b'"pre_tokenizer": 0',
            b'"pre_tokenizer": ' + b'{"type":"Sequence","pretokenizers":[' * 800 + b"]}" * 800)),
        f"{UNKNOWN_PRE}|{NOT_ONE}|not a JSON file",
    ),
    "no model": (folder({}), "the model is None|not a tokenizer.json"),
    "a model of number 3": (bpe(model=3), NOT_ONE),
    "another model": (bpe(model={"type": "WordPiece"}), "'WordPiece', expected BPE, byte-level"),
    "a suffix": (bpe_model(end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>', expected null"),
    "a suffix of a megabyte": (lambda: bpe_model(end_of_word_suffix="x" * 10**6), "end_of_word_suffix is 'xxx"),
    "no vocabulary": (bpe(model={"type": "BPE"}), NOT_ONE),
    "a vocabulary of a list": (bpe_model(vocab=TOKENS), NOT_ONE),
    "an id of text": (bpe_model(vocab=MODEL["vocab"] | {"#": "x"}), "not unique numbers from 0 to"),
    "an id of 1.5": (bpe_model(vocab=MODEL["vocab"] | {"#": 1.5}), "not unique numbers from 0 to"),
    "an id of a list": (bpe_model(vocab=MODEL["vocab"] | {"#": [1]}), NOT_ONE),
    "an id of true": (bpe_model(vocab=MODEL["vocab"] | {"#": True}), "not unique numbers from 0 to"),
    "id -1": (bpe_model(vocab=MODEL["vocab"] | {"#": -1}), "not unique numbers from 0 to"),
    "id 2^62": (bpe_model(vocab=MODEL["vocab"] | {"#": 2**62}), "not unique numbers from 0 to"),
    "an id twice": (bpe(added_tokens=[{"id": 0, "content": "<x>"}]), "not unique numbers from 0 to"),
    "merges of text": (bpe_model(merges="ab"), NOT_ONE),
    "merges of numbers": (bpe_model(merges=[1]), NOT_ONE),
    "a merge of one": (bpe_model(merges=["ab"]), NOT_ONE),
    "a merge of an unknown token": (bpe_model(merges=["! ?"]), "'\\?' is not a token"),
    "a merge of numbers": (bpe_model(merges=[[1, 2]]), f"{NOT_ONE}|entry 0"),
    "added tokens of text": (bpe(added_tokens="ab"), NOT_ONE),
    "an added token of no content": (bpe(added_tokens=[{"id": 7}]), NOT_ONE),
    "an added token that is a list": (bpe(added_tokens=[{"id": 7, "content": ["a"]}]), NOT_ONE),
    "an added token of number 3": (bpe(added_tokens=[{"id": 7, "content": 3}]), f"{NOT_ONE}|token"),
    "an added token of id 2^62": (bpe(added_tokens=[{"id": 2**62, "content": "x"}]), "not unique numbers from 0 to"),
    "half a surrogate": (bpe(added_tokens=[{"id": 7, "content": "\udcff"}]), "not valid UTF-8|token 7"),
    "another pre-tokenizer": (bpe(pre_tokenizer={"type": "Whitespace"}), f"{UNKNOWN_PRE}.*Whitespace.*smollm"),
    "a space before": (bpe(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), UNKNOWN_PRE),
    "no pre-tokenizer": (bpe(pre_tokenizer=None), UNKNOWN_PRE),
    "a pre-tokenizer of number 3": (bpe(pre_tokenizer=3), f"{UNKNOWN_PRE}|{NOT_ONE}"),
    "pre-tokenizers of number 3": (bpe(pre_tokenizer={"type": "Sequence", "pretokenizers": 3}), NOT_ONE),
    "a pre-tokenizer that steers": (bpe(pre_tokenizer={"type": "\x1b[2J"}), UNKNOWN_PRE),
    "a normalizer": (bpe(normalizer={"type": "NFC"}), "normalizer NFC"),
    "a normalizer of number 3": (bpe(normalizer=3), NOT_ONE),
    "another post-processor": (bpe(post_processor={"type": "RobertaProcessing"}), "post_processor 'RobertaProcessing'"),
    "a post-processor of number 3": (bpe(post_processor=3), NOT_ONE),
    "a template of number 3": (bpe(post_processor={"type": "TemplateProcessing", "single": 3}), NOT_ONE),
    "post-processors of number 3": (bpe(post_processor={"type": "Sequence", "processors": 3}), NOT_ONE),
    # ── beside it
    "a config that is a list": (bpe([]), "tokenizer_config.json: expected a JSON object, found a list"),
    "a config that is deep": (lambda: bpe(DEEP), "tokenizer_config.json: not a JSON file"),
    "BOS of a list": (bpe({"bos_token": ["<s>"]}), NOT_ONE),
    "BOS that is to be added, and is none": (bpe({"add_bos_token": True}), "BOS is to be added"),
    "BOS -1": (bpe({}, {"config": {"bos_token_id": -1}}), "bos_token_id is -1, expected 0 to"),
    "BOS 2^70": (bpe({}, {"config": {"bos_token_id": 2**70}}), "bos_token_id.*does not fit 64 bits|bos_token_id is"),
    "templates of number 3": (bpe({"chat_template": 3}), NOT_ONE),
    "templates of no name": (bpe({"chat_template": [{"template": "x"}]}), NOT_ONE),
    "a template of number 3 by name": (
        bpe({"chat_template": [{"name": "default", "template": 3}]}), "chat_template is UINT32, expected a string"
    ),
    "a vocabulary of 10^15": (bpe(beside={"config": {"vocab_size": 10**15}}), "do not make the vocab_size 1000000000"),
    "a vocabulary of text": (bpe(beside={"config": {"vocab_size": "9"}}), "do not make the vocab_size '9'"),
    "a vocabulary of -1": (bpe(beside={"config": {"vocab_size": -1}}), "vocab_size -1|not unique"),
    "architectures of number 3": (bpe(beside={"config": {"architectures": 3}}), NOT_ONE),
    # ── SentencePiece in tokenizer.json
    "a SentencePiece normalizer": (spm(normalizer={"type": "NFKC"}), "unknown normalizer .*NFKC"),
    "a SentencePiece pre-tokenizer": (spm(pre_tokenizer=METASPACE | {"split": True}), f"{UNKNOWN_PRE} .*Metaspace"),
    "Unigram": (spm(model={"type": "Unigram", "vocab": []}), "the model is 'Unigram', expected BPE"),
    "no pieces": (spm(model={"type": "BPE", "byte_fallback": True}), NOT_ONE),
    "empty pieces": (spm_model(vocab={}, merges=[]), f"{NOT_ONE}|empty|no "),
    "a pair that is no merge": (spm_model(merges=["a a", "a b", "aa b"]), "'a ab' is not among the merges"),
    "merges apart": (
        spm_model(merges=["a ab", "a a", "aa b", "a b"]), "the merges that make 'aab' do not follow one another"
    ),
    "a piece of a million letters": (
        lambda: spm_model(
            vocab=SPM_MODEL["vocab"] | {"a" * 10**6: 265}, merges=[["a" * 500_000] * 2, ["b", "a"], ["a" * 500_000] * 2]
        ),
        "the merges that make 'aaa[a.]{70,90}' do not follow one another",
    ),
    # ── tokenizer.model
    "an empty tokenizer.model": (proto(b""), "there are no pieces"),
    "a Git LFS pointer": (proto(b"version https://git-lfs.github.com/spec/v1\n"), "tokenizer.model: byte"),
    "Unigram in protobuf": (proto(field(1, PROTO_PIECES[0])), "of the kind Unigram, expected BPE"),
    "characters": (proto(field(1, PROTO_PIECES[0]) + field(2, field(3, 4))), "of the kind char"),
    "a piece that is no text": (proto(field(1, field(1, b"\xff")) + field(2, field(3, 2))), "piece 0 has a text"),
    "type 9": (proto(field(1, field(3, 9)) + field(2, field(3, 2))), "piece 0 .*9"),
    "a piece of a number": (proto(field(1, field(1, 5))), "wire type 0"),
    "a length of 2^63": (proto(b"\x0a" + 9 * b"\xff" + b"\x01"), "needs .* bytes, the file has 0 left"),
    "a number without end": (proto(b"\x0a" + 10 * b"\xff"), "more than 10 bytes"),
    "field 0": (proto(b"\x00\x00"), "field 0 of a message"),
    "a group": (proto(b"\x0b"), "wire type 3"),
    "cut in a piece": (proto(PROTO[:5]), "needs .* bytes, the file has"),
    "a piece twice": (proto(field(1, PROTO_PIECES[0]) * 2 + field(2, field(3, 2))), "tokens 0 and 1 are both '<unk>'"),
    "added tokens of no number": (
        proto(PROTO, {"added_tokens_decoder": {"1": {"content": 3}}, "add_bos_token": False}), NOT_ONE
    ),
    "added tokens of a list": (proto(PROTO, {"added_tokens_decoder": [1], "add_bos_token": False}), NOT_ONE),
    "an added token of 10,000 digits": (
        proto(PROTO, {"added_tokens_decoder": {"1" * 10_000: {"content": "x"}}, "add_bos_token": False}),
        f"{NOT_ONE}|added_tokens_decoder",
    ),
}  # fmt: skip

KIND = Kind(Tokenizer.from_folder, "", {"BPE": bpe(), "SentencePiece": spm(), "tokenizer.model": proto(PROTO)}, BAD)
