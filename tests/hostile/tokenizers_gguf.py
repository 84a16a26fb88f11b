"""GGUF files whose tokenizer is not what it says: a vocabulary of a few tokens, BPE over bytes or SentencePiece."""

import math
from pathlib import Path

from hostile.gguf_bytes import ARR, F32, I8, STR, U64, array, build, entry_of, string, u32, u64
from hostile.kind import Kind

from qjax.io import gguf
from qjax.io.tokenizer import Tokenizer
from qjax.io.vocabulary import BYTE_OF

TOKENS = [*list(BYTE_OF)[:8], '!"', "#$", '!"#$', "<s>", "</s>"]
N = len(TOKENS)
BPE = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": TOKENS,
    "token_type": [1] * (N - 2) + [3, 3],
    "merges": ['! "', "# $", '!" #$'],
    "bos_token_id": N - 2,
    "eos_token_id": N - 1,
}
PIECES = ["<unk>", "<s>", "</s>", "<0x41>", "\u2581", "a", "\u2581a"]
SPM = {
    "model": "llama",
    "pre": "default",
    "tokens": PIECES,
    "scores": [0.0] * 3 + [-1000.0, -1.0, -2.0, -3.0],
    "token_type": [2, 3, 3, 6, 1, 1, 1],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
    "add_bos_token": True,
}


def read(path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(gguf.read(path).metadata)


def made(entries: dict, more: dict) -> bytes:
    """``entries`` with others, or without those that are None; bytes are type and value as they are."""
    packed = []
    for name, value in (entries | more).items():
        key = f"tokenizer.{'' if name.startswith('chat') else 'ggml.'}{name}"
        if value is not None:
            packed.append(string(key) + value if isinstance(value, bytes) else entry_of(key, value))
    return build(packed)


def bpe(**more) -> bytes:
    return made(BPE, more)


def spm(**more) -> bytes:
    return made(SPM, more)


def strings(*items: str | bytes) -> bytes:
    return u32(ARR) + array(STR, [string(item) for item in items])


def one(kind: int, packed: bytes) -> bytes:
    return u32(kind) + packed


MANY = 200_000
BAD = {
    # ── of any kind
    "no model": (bpe(model=None), "no tokenizer.ggml.model"),
    "a model of number 3": (bpe(model=3), "tokenizer.ggml.model is UINT32, expected a string"),
    "a model that is not read": (bpe(model="t5"), "'t5' .Unigram..*known: 'gpt2'"),
    "a model that steers": (bpe(model="\x1b[2J"), r"tokenizer.ggml.model is '\\x1b\[2J', which is not read"),
    "a model of a megabyte": (lambda: bpe(model="x" * 10**6), "tokenizer.ggml.model is 'xxx[x.]{70,90}', which is not"),
    "another pre-tokenizer": (bpe(pre="gpt-9"), "'gpt-9'.*known: .*smollm"),
    "a pre-tokenizer of number 3": (bpe(pre=3), "tokenizer.ggml.pre is UINT32, expected a string"),
    "no tokens": (bpe(tokens=None), "no tokenizer.ggml.tokens"),
    "empty tokens": (bpe(tokens=strings()), "tokens is empty"),
    "tokens of numbers": (bpe(tokens=[1, 2]), "tokens is ARRAY.INT32, 2., expected an array of strings"),
    "tokens of one text": (bpe(tokens="a"), "tokens is STRING, expected an array of strings"),
    "tokens of arrays": (
        bpe(tokens=u32(ARR) + array(ARR, [array(STR, [string("a")])])), "ARRAY.ARRAY, 1., expected an array of strings"
    ),
    "a token twice": (bpe(tokens=["a", "b", "a"]), "0 and 2 are both 'a'"),
    "an empty token twice, by its other name": (bpe(tokens=["", "[EMPTY_0]"]), "0 and 1 are both"),
    "a token that is no text": (bpe(tokens=strings("a", b"\xff")), "token 1 .* is not valid UTF-8"),
    "half a surrogate": (bpe(tokens=strings("a", b"\xed\xa0\x80")), "token 1 .* is not valid UTF-8"),
    "a token of a megabyte twice": (
        lambda: bpe(tokens=["x" * 10**6] * 2), r"tokens 0 and 1 are both 'xxx[x.]{70,90}'"
    ),
    "two types": (bpe(token_type=[1, 1]), f"2 entries, expected {N}"),
    "types of text": (bpe(token_type=["a"]), "expected an array of numbers"),
    "types of fractions": (bpe(token_type=[1.5] * N), "token_type: expected integers from 0 to 6"),
    "type 9": (bpe(token_type=[9] * N), "token_type: expected integers from 0 to 6"),
    "type -1": (bpe(token_type=[-1] * N), "token_type: expected integers from 0 to 6"),
    "types of NaN": (bpe(token_type=[math.nan] * N), "token_type: expected integers from 0 to 6"),
    "types of arrays": (
        bpe(token_type=u32(ARR) + array(ARR, [array(I8, [b"\1"])] * N)), "token_type: expected integers from 0 to 6"
    ),
    "BOS 10^6": (bpe(bos_token_id=10**6), "bos_token_id is 1000000, expected 0 to"),
    "BOS 2^64-1": (bpe(bos_token_id=one(U64, u64(-1))), f"bos_token_id is {2**64 - 1}, expected 0 to"),
    "EOS -1": (bpe(eos_token_id=-1), "eos_token_id is -1"),
    "padding 10^6": (bpe(padding_token_id=10**6), "padding_token_id is 1000000"),
    "EOS of text": (bpe(eos_token_id="2"), "eos_token_id is STRING, expected an integer"),
    "EOS of true": (bpe(eos_token_id=True), "eos_token_id is BOOL, expected an integer"),
    "EOS of NaN": (bpe(eos_token_id=math.nan), "eos_token_id is FLOAT32, expected an integer"),
    "EOS of an array": (bpe(eos_token_id=[1]), "eos_token_id is ARRAY.INT32, 1., expected an integer"),
    "whether to add BOS, by number": (bpe(add_bos_token=1), "add_bos_token is UINT32, expected a bool"),
    "BOS that is to be added, and is none": (bpe(add_bos_token=True, bos_token_id=None), "BOS is to be added"),
    "a template of number 3": (bpe(chat_template=3), "tokenizer.chat_template is UINT32, expected a string"),
    # ── BPE
    "no merges": (bpe(merges=None), "no tokenizer.ggml.merges"),
    "merges of numbers": (bpe(merges=[1]), "merges is ARRAY.INT32, 1., expected an array of strings"),
    "a merge of one": (bpe(merges=["ab"]), "entry 0 is 'ab'"),
    "a merge of three": (bpe(merges=["a b c"]), "entry 0 is 'a b c'"),
    "a merge of nothing": (bpe(merges=[" "]), "entry 0 is ' '"),
    "a merge of an unknown token": (bpe(merges=["! ?"]), "'\\?' is not a token"),
    "a merge that makes no token": (bpe(merges=["# \""]), "'#\"' is not a token"),
    "a merge that steers": (bpe(merges=["\x1b[2J \n"]), r"entry 0 is '\\x1b\[2J \\n'"),
    "a merge of a megabyte": (lambda: bpe(merges=["x" * 10**6]), r"entry 0 is 'xxx[x.]{70,90}', expected two tokens"),
    "many tokens, one twice": (
        lambda: bpe(tokens=strings(*(f"t{i}" for i in range(MANY)), "t7")), f"tokens 7 and {MANY} are both 't7'"
    ),
    "many merges, the last of an unknown token": (
        lambda: bpe(merges=strings(*["! \""] * MANY, "? ?")), f"entry {MANY} is '\\? \\?'"
    ),
    # ── SentencePiece
    "no scores": (spm(scores=None), "no tokenizer.ggml.scores"),
    "three scores": (spm(scores=[0.0] * 3), "3 of dtype float32, expected a number for each of the 7"),
    "scores of text": (spm(scores=["a"]), "scores is ARRAY.STRING, 1., expected an array of numbers"),
    "a score of NaN": (spm(scores=[0.0] * 6 + [math.nan]), "expected a number for each"),
    "scores of arrays": (
        spm(scores=u32(ARR) + array(ARR, [array(F32, [bytes(4)])] * 7)), "of dtype object, expected a number for each"
    ),
    "an unknown token of 10^6": (spm(unknown_token_id=10**6), "unknown_token_id is 1000000, expected 0 to 6"),
    "no BOS there": (
        spm(tokens=["<unk>"], token_type=[2], scores=[0.0], bos_token_id=None, eos_token_id=None), "BOS is to be added"
    ),
}  # fmt: skip

KIND = Kind(read, "x.gguf", {"BPE": bpe(), "SentencePiece": spm()}, BAD)
