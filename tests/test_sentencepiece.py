"""SentencePiece vocabularies, and Gemma 4's: BPE over characters.

Oracles: llama.cpp (libllama on the same metadata, its converter), the tokenizers, sentencepiece and transformers
libraries; algebra: the merges done the slow way, decode undoes encode, what is written is read."""

import io
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from hostile.tokenizers_hf import PROTO, field
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.llama_vocab import Vocabulary
from oracles.texts import code, texts
from tokenizers import models, pre_tokenizers, trainers

from qjax import QjaxError, evaluate
from qjax.comparison import tales_floor
from qjax.data import tales
from qjax.io import sentencepiece
from qjax.io.tokenizer import Tokenizer
from qjax.io.vocabulary import SPACE, TokenType

BYTES = {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
FIRST = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL} | BYTES
LAST = {
    "<|user|>": TokenType.CONTROL,
    "<|us": TokenType.CONTROL,
    "<|endoftext|>": TokenType.CONTROL,
    "<tool>": TokenType.USER_DEFINED,
    " sp ace": TokenType.USER_DEFINED,
    "[PAD9]": TokenType.UNUSED,
}
ODD_TEXTS = [
    *("", " ", "  ", "\n", " a", "a ", "aaaaaaa", "a   b     c", "▁", "▁a ▁", "\t\tx", "zzzz zz  z", "qqq", "xqyqéaéb"),
    *("<s>", "<s> <s>a</s>", "a<tool> b  <tool>", "<|user|>\n hi<|us er|>", "<unk>x", "<0x41>", "x sp ace y", "[PAD9]"),
    *("naïve café 東京 🙂👩‍👩‍👧", "\x00\x01\u200b\ufeff\ufffd\U0010ffff", "e\u0301\u0327", "def f(x):\n    return x\n"),
]


@pytest.fixture(scope="session")
def pieces():
    """Tokens of text, and merges, learned by the tokenizers library with ▁ before every word."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, split=True)
    samples = texts(7, 500)
    # Chosen here, as the library breaks ties by chance; and llama.cpp ends a token at NUL.
    chars = [char for char, _ in Counter(sorted("".join(samples))).most_common(150) if char not in " \0"]
    alphabet = {"initial_alphabet": chars, "limit_alphabet": len(chars)}
    bpe.train_from_iterator(samples, trainers.BpeTrainer(vocab_size=1200, show_progress=False, **alphabet))
    model = json.loads(bpe.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def spm(pieces, **changes):
    """GGUF metadata of a SentencePiece vocabulary: scores fall as in a real one, from the first merge on."""
    text = [token for token in pieces[0] if token not in FIRST | LAST]
    runs = [SPACE * n for n in (2, 3, 4, 8) if SPACE * n not in text] + ["z", "zz", "zzz", "qq", "qqq", "éa"]
    text += [token for token in runs if token not in text]
    text = [token for token in text if token not in ("q", "é")]  # Characters that no token is.
    tokens = [*FIRST, *text, *LAST]
    scores = [0.0] * len(FIRST) + [-float(i) for i in range(len(text))] + [-1000.0] * len(LAST)
    types = [*FIRST.values(), *[TokenType.NORMAL] * len(text), *LAST.values()]
    entries = {"model": "llama", "pre": "default", "tokens": tokens, "scores": np.array(scores, np.float32)}
    entries |= {"token_type": list(map(int, types)), "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    entries |= {"add_bos_token": True, "add_eos_token": False}
    entries |= changes
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}


def gemma4(pieces, **changes):
    """GGUF metadata of BPE over characters with ranked merges."""
    newlines = ["\n" * n for n in (1, 2, 3, 5)]
    text = [token for token in pieces[0] if token not in FIRST | LAST and token not in newlines]
    tokens = [*FIRST, *text, *newlines, *LAST]
    merges = [" ".join(pair) for pair in pieces[1] if {*pair, "".join(pair)} <= set(tokens)]
    types = [*FIRST.values(), *[TokenType.NORMAL] * (len(text) + len(newlines)), *LAST.values()]
    entries = {"model": "gemma4", "tokens": tokens, "merges": merges, "token_type": list(map(int, types))}
    entries |= {"bos_token_id": 1, "eos_token_id": 2} | changes
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items()}


@pytest.fixture(scope="session")
def toy(pieces):
    return Tokenizer.from_gguf(spm(pieces))


# ── ids ────────────────────────────────────────────────────────────────────────────────────────────────────


def slowly(entries, text):
    """The ids by the definition: again and again, of the pairs that make a token with the highest score, merge the
    leftmost; then bytes for what is no token."""
    id_of = {token: id for id, token in enumerate(entries["tokenizer.ggml.tokens"])}
    scores = entries["tokenizer.ggml.scores"]
    symbols = list(SPACE + text.replace(" ", SPACE))
    while True:
        pairs = [(-scores[id_of[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in id_of]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids = ([id_of[s]] if s in id_of else [id_of[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols)
    return [id for part in ids for id in part]


@pytest.mark.parametrize("ties", [False, True])
def test_merges_the_slow_way(pieces, ties):
    entries = spm(pieces)
    if ties:
        entries["tokenizer.ggml.scores"] = np.zeros_like(entries["tokenizer.ggml.scores"])
    tokenizer = Tokenizer.from_gguf(entries)
    for text in (text[:120] for text in ODD_TEXTS + texts(4, 60, quoted=code())):
        if text and "<tool>" not in text and " sp ace" not in text:
            assert tokenizer.encode(text, add_special=False) == slowly(entries, text), text


VARIANTS = {
    "llama": {},
    "ties": {"scores": np.float32(0)},
    "no space before": {"add_space_prefix": False},
    "no BOS": {"add_bos_token": False, "add_eos_token": True},
    "default ids": {f"{name}_token_id": None for name in ("bos", "eos", "unknown")},
    "default BOS": {"add_bos_token": None, "add_eos_token": None},
}


def same_as_llama_cpp(tokenizer, peer, samples):
    for text in samples:
        for parse_special in (False, True):
            ids = peer.encode(text, parse_special=parse_special)
            assert tokenizer.encode(text, parse_special=parse_special) == ids, (text, parse_special)
            for unparse_special in (False, True):
                expected = peer.decode(ids, unparse_special).decode(errors="replace")
                assert tokenizer.decode(ids, unparse_special) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_llama_cpp(llama_cpp, pieces, tmp_path, variant):
    entries = spm(pieces, **{name: value for name, value in VARIANTS[variant].items() if name != "scores"})
    if variant == "ties":
        entries["tokenizer.ggml.scores"] = np.zeros_like(entries["tokenizer.ggml.scores"])
    with Vocabulary(llama_cpp, tmp_path / "vocab.gguf", entries) as peer:
        same_as_llama_cpp(Tokenizer.from_gguf(entries), peer, ODD_TEXTS + texts(2, 40, list(LAST), code()))


@pytest.mark.exact
@pytest.mark.parametrize("variant", ["llama", "ties"])
def test_ten_thousand_texts(llama_cpp, pieces, tmp_path, variant):
    entries = spm(pieces)
    if variant == "ties":
        entries["tokenizer.ggml.scores"] = np.zeros_like(entries["tokenizer.ggml.scores"])
    with Vocabulary(llama_cpp, tmp_path / "vocab.gguf", entries) as peer:
        same_as_llama_cpp(Tokenizer.from_gguf(entries), peer, texts(3, 10_000, list(LAST), code()))


@pytest.mark.parametrize("kind", [{}, {"model": "gpt2", "pre": "sarvam-moe"}, {"add_bos_token": False}])
def test_characters_with_ranked_merges_as_llama_cpp(llama_cpp, pieces, tmp_path, kind):
    entries = gemma4(pieces, **kind)
    tokenizer = Tokenizer.from_gguf(entries)
    with Vocabulary(llama_cpp, tmp_path / "vocab.gguf", entries) as peer:
        for text in [*ODD_TEXTS, "a\n\n\n\nb\n\n", *texts(2, 40, list(LAST), code())]:
            for parse_special in (False, True):
                assert tokenizer.encode(text, parse_special=parse_special) == peer.encode(text, True, parse_special)


@pytest.mark.parametrize(
    ("name", "pre", "text"),
    [
        ("Phi-3-mini", "default", "<|user|>\n hi<tool> \t x</s>  y<s>  z"),
        ("My phi3", "default", "<|user|>\n\n<|user|>  "),
        ("Llama", "jina-v2-de", "x <s>"),
    ],
)
def test_blanks_that_special_tokens_take_along(llama_cpp, pieces, tmp_path, name, pre, text):
    entries = spm(pieces, pre=pre) | {"general.name": name}
    if pre != "default":
        entries["tokenizer.ggml.tokens"][-1] = "<mask>"
        entries["tokenizer.ggml.token_type"][-1] = TokenType.CONTROL
        text = "x \t<mask> y"
    tokenizer = Tokenizer.from_gguf(entries)
    plain = Tokenizer.from_gguf({key: value for key, value in entries.items() if not key.endswith((".name", ".pre"))})
    assert tokenizer.encode(text, parse_special=True) != plain.encode(text, parse_special=True)
    with Vocabulary(llama_cpp, tmp_path / "vocab.gguf", entries) as peer:
        same_as_llama_cpp(tokenizer, peer, [text])


def test_tokens_whose_text_llama_cpp_knows(llama_cpp, pieces, tmp_path):
    for extra in (
        ["<|return|>", "<|call|>", "<|end|>", "<|channel|>", "<|start|>"],
        ["<|flush|>", "<|calls|>", "<|end|>"],
        ["<|end|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<PRE>"],
        ["<|tool_response>", "<eos>"],
    ):
        entries = spm(pieces)
        n = len(entries["tokenizer.ggml.tokens"])
        entries["tokenizer.ggml.tokens"] += extra
        entries["tokenizer.ggml.token_type"] += [TokenType.NORMAL] * len(extra)
        entries["tokenizer.ggml.scores"] = np.append(
            entries["tokenizer.ggml.scores"], np.full(len(extra), -9, np.float32)
        )
        for named in ({}, {"tokenizer.ggml.prefix_token_id": n, "tokenizer.ggml.fim_pad_token_id": 300}):
            tokenizer = Tokenizer.from_gguf(entries | named)
            with Vocabulary(llama_cpp, tmp_path / "vocab.gguf", entries | named) as peer:
                assert tokenizer.eog_ids == peer.eog_ids()
                same_as_llama_cpp(tokenizer, peer, [f"a{text} {text}b</s>" for text in extra])


def test_bos_eos_and_the_space_before(toy):
    id_of = {text: id for id, text in enumerate(toy.tokens)}
    assert toy.encode("") == [1]
    assert toy.encode("", add_special=False) == []
    # After a special token there is a space again.
    assert toy.encode("<s>", parse_special=True) == [1, 1]
    spaced = toy.encode("a<tool>a", add_special=False)
    assert spaced[spaced.index(id_of["<tool>"]) + 1 :] == toy.encode("a", add_special=False)
    # A character that is no token merges all the same, and is spelled in bytes where it does not.
    assert toy.encode("éa", add_special=False)[-1:] == [id_of["éa"]]
    assert toy.encode("éx", add_special=False)[-3:-1] == [id_of["<0xC3>"], id_of["<0xA9>"]]


def test_no_token_for_a_byte(pieces):
    entries = spm(pieces)
    entries["tokenizer.ggml.tokens"] = [
        f"[gone {token[3:5]}]" if token in ("<0xC3>", "<0x71>") else token for token in entries["tokenizer.ggml.tokens"]
    ]
    tokenizer = Tokenizer.from_gguf(entries)
    assert tokenizer.missing_bytes == b"q\xc3"
    assert tokenizer.encode("éxq", add_special=False)[-3:] == [0, tokenizer.tokens.index("x"), 0]


# ── text ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_decode_undoes_encode(pieces, toy):
    unprefixed = Tokenizer.from_gguf(spm(pieces, add_space_prefix=False, add_bos_token=False))

    @settings(max_examples=100, deadline=None)
    @given(st.text())
    def check(text):
        text = text.replace(SPACE, "_")  # Which is a space in the end.
        assert unprefixed.decode(unprefixed.encode(text)) == text
        assert toy.decode(toy.encode(text, add_special=False)) == text

    check()


def test_the_space_at_the_start(toy):
    ids = toy.encode("a b", add_special=False)
    assert toy.decode(ids) == "a b"
    assert toy.decode([1, *ids]) == "<s> a b"
    assert toy.decode([1, *ids], unparse_special=False) == " a b"
    # What continues a text keeps it.
    stream = toy.stream()
    assert "".join(stream.push([id]) for id in ids) + stream.end() == " a b"


def test_the_floor_of_tales(pieces):
    """Each choice of the program that told them counts where its first character is, here a token each."""
    text = evaluate.held_out_tales(1)
    chars = sorted({char.replace(" ", SPACE) for char in text})
    types = [int(type) for type in (*FIRST.values(), *[TokenType.NORMAL] * len(chars))]
    scores = np.zeros(len(types), np.float32)
    tokenizer = Tokenizer.from_gguf(spm(pieces, tokens=[*FIRST, *chars], token_type=types, scores=scores))
    ids = tokenizer.encode(text)
    assert len(ids) == 2 + len(text)  # BOS, and the space before.
    cut = np.array(ids[: len(ids) // 64 * 64]).reshape(-1, 64)
    nats = np.zeros(len(ids))
    for offset, cost in tales.trace(text):
        nats[2 + offset] += cost
    scored = nats[: cut.size].reshape(cut.shape)[:, 33:]
    assert tales_floor(text, tokenizer, cut) == pytest.approx(np.exp(scored.mean()))


# ── tokenizer.model; bad ones are in hostile/tokenizers_hf.py ──────────────────────────────────────────────


def test_tokenizer_model_by_hand(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(PROTO + field(3, field(3, 0)) + field(15, 7))
    model = sentencepiece.read(path)
    assert model.tokens == ["<unk>", SPACE, "<0x41>"]
    assert model.scores == [0.0, -1.5, 0.0]
    assert model.types == [TokenType.UNKNOWN, TokenType.NORMAL, TokenType.BYTE]
    assert not model.add_dummy_prefix
    path.write_bytes(PROTO)
    assert sentencepiece.read(path).add_dummy_prefix


def test_cut_short_or_changed(tmp_path):
    path = tmp_path / "tokenizer.model"
    rng = np.random.default_rng(5)
    for _ in range(300):
        data = bytearray(PROTO[: rng.integers(len(PROTO) + 1)])
        for at in rng.integers(0, len(data) + 1, 2):
            data[at : at + 1] = bytes([rng.integers(256)])
        path.write_bytes(data)
        try:
            sentencepiece.read(path)
        except QjaxError as error:
            assert "tokenizer.model" in str(error)  # noqa: PT017


# ── folders ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("changes", [{}, {"add_space_prefix": False, "add_eos_token": True, "chat_template": "x"}])
def test_to_folder_and_back(tmp_path, pieces, changes):
    entries = spm(pieces, **changes)
    entries |= {"tokenizer.chat_template": entries.pop("tokenizer.ggml.chat_template", "y")}
    tokenizer = Tokenizer.from_gguf(entries)
    tokenizer.to_folder(tmp_path)
    again = Tokenizer.from_folder(tmp_path).to_gguf()
    original = tokenizer.to_gguf()
    assert again.typed.items() >= original.typed.items()
    # The template says that nothing stands between two texts.
    assert again.keys() - original.keys() <= {"tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_sep_token"}
    assert not again.get("tokenizer.ggml.add_sep_token")


@pytest.mark.parametrize("prefixed", [True, False])
def test_the_tokenizers_library_has_the_same_ids(tmp_path, pieces, prefixed):
    tokenizer = Tokenizer.from_gguf(spm(pieces, add_space_prefix=prefixed))
    tokenizer.to_folder(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # Without tokenizer.model the scores are found in the merges.
    (tmp_path / "tokenizer.model").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    again = Tokenizer.from_folder(tmp_path)
    for text in ODD_TEXTS + texts(9, 60, list(LAST), code()):
        if text and not {"é", "q"} & set(text) and "<unk>" not in text:
            ids = tokenizer.encode(text, parse_special=True)
            assert again.encode(text, parse_special=True) == ids
            assert library.encode(text).ids == ids, text
            if not set(text) & {SPACE}:
                expected = tokenizer.decode(ids[1:])
                assert library.decode(ids[1:], skip_special_tokens=False) == expected


# Where llama.cpp and the tokenizers library have different ids for the same vocabulary.
DIFFERENCES = [
    (
        "\ue001\ue002\ue003",
        "of pairs with equal scores llama.cpp merges the leftmost, the library that of the lower id",
    ),
    ("xéa", "é is no token: to the library it is two bytes, which merge with nothing"),
    ("a<|user|>\u2003b", "of Phi-3: the library strips all of Unicode's blanks, llama.cpp those of ASCII"),
]


@pytest.mark.parametrize(("text", "reason"), DIFFERENCES)
def test_where_the_peers_differ(tmp_path, pieces, text, reason):
    entries = spm(pieces) | {"general.name": "phi-3"}
    if "\ue001" in text:
        entries["tokenizer.ggml.tokens"] += ["\ue002\ue003", "\ue001\ue002", *text]
        entries["tokenizer.ggml.token_type"] += [TokenType.NORMAL] * 5
        scores = np.full(5, -5000, np.float32)
        entries["tokenizer.ggml.scores"] = np.append(entries["tokenizer.ggml.scores"], scores)
    tokenizer = Tokenizer.from_gguf(entries)
    tokenizer.to_folder(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode(text).ids != tokenizer.encode(text, parse_special=True), reason


def test_gemma_4_is_not_written(tmp_path, pieces):
    with pytest.raises(QjaxError, match="'gemma4' can be stored in GGUF files only"):
        Tokenizer.from_gguf(gemma4(pieces)).to_folder(tmp_path)


TRAINED = {"model_type": "bpe", "vocab_size": 2600, "byte_fallback": True, "character_coverage": 0.98}
TRAINED |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
TRAINED |= {"allow_whitespace_only_pieces": True, "split_digits": True}


def train(folder, **changes):
    """A tokenizer.model of the sentencepiece library."""
    library = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    lines = iter([text for text in texts(5, 800) if text.strip() and "\0" not in text])
    library.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=written, **TRAINED | changes)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return library.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.mark.parametrize("changes", [{}, {"add_dummy_prefix": False}])
def test_the_sentencepiece_library_has_the_same_ids(tmp_path, changes):
    library = train(tmp_path, **changes)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.add_space_prefix == ("add_dummy_prefix" not in changes)
    for text in texts(9, 300, quoted=code()):
        ids = tokenizer.encode(text, add_special=False)
        assert library.encode(text) == ids
        if SPACE not in text:
            assert library.decode(ids) == tokenizer.decode(ids)
    # And of what is written.
    written = tmp_path / "written"
    written.mkdir()
    tokenizer.to_folder(written)
    again = type(library)(str(written / "tokenizer.model"))
    for text in texts(10, 100):
        assert again.encode(text) == tokenizer.encode(text, add_special=False)


def test_other_sentencepiece_models_are_refused(tmp_path):
    train(tmp_path, model_type="unigram")
    with pytest.raises(QjaxError, match="of the kind Unigram"):
        Tokenizer.from_folder(tmp_path)


# The converter's classes and what of them is asked: only the vocabulary, of a folder that holds no model.
CONVERTER = """
import json, sys
from pathlib import Path
source, name, folder = sys.argv[1:]
sys.path[:0] = [source, source + "/gguf-py"]
import gguf
from conversion import get_model_class

model = object.__new__(get_model_class(name))
model.dir_model = Path(folder)
model.hparams = json.loads((Path(folder) / "config.json").read_text())
model.is_mistral_format, model.origin_hf_arch = False, name
model.gguf_writer = gguf.GGUFWriter("unwritten", "llama")
model.set_vocab()
found = {key: entry.value for key, entry in model.gguf_writer.kv_data[0].items() if key.startswith("tokenizer.")}
texts = found["tokenizer.ggml.tokens"]
found["tokenizer.ggml.tokens"] = [text.decode() if isinstance(text, bytes) else text for text in texts]
found["tokenizer.ggml.token_type"] = list(map(int, found["tokenizer.ggml.token_type"]))
print(json.dumps(found))
"""
ADDED = {
    "0": {"content": "<unk>", "special": True},
    "5": {"content": "<renamed>", "special": False},
    "2600": {"content": "<|im_start|>", "special": False},
    "2601": {"content": "<tool>", "special": False},
    "2602": {"content": "▁sp▁ace", "special": False},
    "9999": {"content": "<far>", "special": False},
}


@pytest.mark.parametrize(
    ("architecture", "config", "changes"),
    [
        ("LlamaForCausalLM", {"add_bos_token": True, "unk_token": "<unk>", "chat_template": "{{ x }}"}, {}),
        ("LlamaForCausalLM", {"add_prefix_space": False}, {"user_defined_symbols": ["<x>", "▁▁"]}),
        ("MistralForCausalLM", {"add_prefix_space": None, "add_eos_token": True}, {}),
        ("GemmaForCausalLM", {}, {"add_dummy_prefix": False}),
        ("Gemma2ForCausalLM", {}, {}),
        ("Phi3ForCausalLM", {"tokenizer_class": "LlamaTokenizer"}, {}),
    ],
)
def test_to_gguf_follows_the_converter(llama_cpp_sources, tmp_path, architecture, config, changes):
    pytest.importorskip("sentencepiece")
    train(tmp_path, **changes)
    model_config = {"architectures": [architecture], "vocab_size": 2610, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(model_config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": ADDED}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 2605, "<far>": 5000}))
    if architecture == "Phi3ForCausalLM":
        content = {"model": {"type": "BPE", "byte_fallback": True}}
        content["added_tokens"] = [{"id": 2607, "content": "<|late|>", "special": False}]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        fitting = {id: token for id, token in ADDED.items() if int(id) < 2610}  # It does not look.
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": fitting}))
    command = [sys.executable, "-c", CONVERTER, llama_cpp_sources, architecture, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    written = Tokenizer.from_folder(tmp_path).to_gguf()
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in written.items()}
    assert plain == json.loads(done.stdout)


@pytest.mark.parametrize("prefixed", [True, False])
def test_transformers_has_the_same_ids(tmp_path, pieces, prefixed):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_gguf(spm(pieces, add_space_prefix=prefixed))
    tokenizer.to_folder(tmp_path)
    library = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(9, 60, ["<|user|>", "<tool>"]):
        if not {"é", "q"} & set(text):
            assert library(text)["input_ids"] == tokenizer.encode(text, parse_special=True), text


def write_json(folder, merges, vocab, **changes):
    model = {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "vocab": vocab}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    content = {"added_tokens": [], "normalizer": spaces, "pre_tokenizer": None}
    content |= {"model": model | {"merges": merges}} | changes
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


VOCAB = {text: id for id, text in enumerate(["<unk>", "<s>", "</s>", *BYTES, "a", "b", SPACE, "aa", "aab", "ab"])}
MERGES = ["a a", "a ab", "aa b", "a b"]
METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("changes", "prefixed"),
    [
        ({}, False),
        ({"normalizer": None, "pre_tokenizer": METASPACE}, True),
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "never"}}, False),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"String": " "},
                    "behavior": "MergedWithPrevious",
                    "invert": False,
                }
            },
            False,
        ),
    ],
)
def test_ways_to_write_a_space(tmp_path, changes, prefixed):
    write_json(tmp_path, MERGES, VOCAB, **changes)
    tokenizer = Tokenizer.from_folder(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.add_space_prefix == prefixed
    for text in ("aab ab", "a b", "baab  é"):
        assert tokenizer.encode(text, add_special=False) == library.encode(text).ids


@pytest.mark.parametrize("text", [" a", "<s>a"])
def test_where_metaspace_differs(tmp_path, text):
    # The library puts no ▁ before a text that begins with a space, nor, by its scheme "first", after a special token.
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": 1, "content": "<s>", "special": True} | flags]
    changes = {"normalizer": None, "pre_tokenizer": METASPACE, "added_tokens": added}
    write_json(tmp_path, MERGES, VOCAB, **changes)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer.from_folder(tmp_path).encode(text, add_special=False, parse_special=True)
    assert len(ids) == len(library.encode(text).ids) + 1
