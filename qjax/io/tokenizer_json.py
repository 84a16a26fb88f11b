"""The tokenizer of a Hugging Face folder as GGUF's metadata: tokenizer.json, tokenizer.model and what is beside them.

The rules are those of llama.cpp's converter (conversion/base.py get_vocab_base and _create_vocab_sentencepiece,
SpecialVocab in gguf-py's vocab.py). Two things are found otherwise. The pre-tokenizer: the converter hashes what it
does to a fixed text, here its definition is compared with the table in `vocabulary`. And the scores of a SentencePiece
vocabulary without tokenizer.model: see `sentencepiece.scores_of`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax.errors import QjaxError
from qjax.io import sentencepiece
from qjax.io.atomic import atomic_write
from qjax.io.vocabulary import CONTRACTIONS, GPT2, PRE_TOKENIZERS, PUNCTUATION, SPACE, PreTokenizer, TokenType

SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}
"""The names of special tokens in Hugging Face's files and in GGUF's keys (whose spelling is historical)."""
# Two ways to spell the same in regular expressions: tokenizer.json's and that of `vocabulary`.
_SPELLINGS = {"(?i:'s|'t|'re|'ve|'m|'ll|'d)": CONTRACTIONS, "\r": r"\r", "\n": r"\n"}
# Their tokenizer.json also normalizes to NFC. GGUF has no place for that and llama.cpp does without.
_NORMALIZED = {"qwen2", "qwen35"}
# The Granite and SmolLM vocabulary, whose texts do not begin with BOS (conversion/llama.py).
_NO_BOS_VOCAB_SIZE = 49152
# Of these alone the converter says whether a space comes before the text (conversion/llama.py).
_SAID_TO_BE_PREFIXED = ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "SmolLM3ForCausalLM")
# Embeddings have rows without a token, to round their number up; a false vocab_size must not fill the memory.
_MAX_UNUSED = 1 << 17
ADDED_SCORE = -1000.0
"""What the converter gives tokens that were added to tokenizer.model."""
_UNUSED_SCORE = -10000.0  # And those that stand for nothing.
# The token that ends a turn, where the converter goes by the architecture (conversion/gemma.py) and, for CodeLlama,
# by the size of the vocabulary (conversion/llama.py).
_EOT_OF_ARCHITECTURE = {"GemmaForCausalLM": 107}
_EOT_OF_VOCAB_SIZE = {32016: 32010}
_PHI3 = ("Phi3ForCausalLM", "Phi4ForCausalLMV")
_UNPREFIXED = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")


class _Folder:
    """The files of a folder that describe its tokenizer."""

    def __init__(self, folder: Path):
        self.path = folder / "tokenizer.json"
        self.sentencepiece = folder / "tokenizer.model"
        self.tokenizer = load_json(self.path, optional=self.sentencepiece.exists())
        self.config = load_json(folder / "tokenizer_config.json", optional=True)
        self.added_tokens = load_json(folder / "added_tokens.json", optional=True)
        model_config = load_json(folder / "config.json", optional=True)
        text_config = model_config.get("text_config")
        self.model_config = model_config | (text_config if isinstance(text_config, dict) else {})
        self.architectures: Sequence[str] = model_config.get("architectures") or ()

    @property
    def added(self) -> dict[str, Mapping[str, Any]]:
        """The tokens that tokenizer.json lists apart from its model."""
        return {token["content"]: token for token in self.tokenizer.get("added_tokens") or ()}

    def added_tokens_of_sentencepiece(self, both: bool) -> list[tuple[int, Mapping[str, Any]]]:
        """What was added to tokenizer.model: ids, and their contents and flags. Where there is a tokenizer.model,
        tokenizer.json counts only if ``both``."""
        decoder = self.config.get("added_tokens_decoder") or {}
        decoder = [(int(id), token) for id, token in decoder.items() if id.isdecimal()]
        listed = [(token["id"], token) for token in self.added.values()]
        return decoder + listed if both or not self.sentencepiece.exists() else decoder

    def vocab_size(self, tokens: int) -> int:
        """How many tokens there are, with rows of the embedding that have none."""
        size = self.model_config.get("vocab_size", tokens)
        if not isinstance(size, int) or size > tokens + _MAX_UNUSED:
            raise QjaxError(f"{self.path}: {tokens} tokens do not make the vocab_size {size!r} in config.json")
        return size


def read(folder: Path) -> dict[str, Any]:
    """The GGUF metadata that convert_hf_to_gguf.py would write for the tokenizer in ``folder``.

    Raises QjaxError where tokenizer.json is missing, malformed, or neither byte-level nor SentencePiece BPE that
    llama.cpp knows.
    """
    files = _Folder(folder)
    try:
        entries: dict[str, Any] = {}
        of_llama = not files.architectures or files.architectures[0] in _SAID_TO_BE_PREFIXED
        if of_llama and isinstance(files.config.get("add_prefix_space"), bool):
            entries["add_space_prefix"] = files.config["add_prefix_space"]
        model = files.tokenizer.get("model", {})
        if model.get("type") == "BPE" and not model.get("byte_fallback"):
            entries |= _byte_level(files)
        else:
            entries |= _sentencepiece(files)
        entries |= _special(files, len(entries["tokens"]))
        if entries["model"] == "llama" and "add_space_prefix" in entries:
            entries["add_space_prefix"] = entries.pop("add_space_prefix")  # the last, in the converter's order
        return {f"tokenizer.ggml.{name}": value for name, value in entries.items()} | _templates(folder, files.config)
    except QjaxError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        raise QjaxError(f"{files.path}: not a tokenizer.json of the tokenizers library ({error!r})") from error


def load_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file, empty if an optional file is not there. Raises QjaxError naming the file."""
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QjaxError(f"{path}: there is no such file") from None
    except (ValueError, RecursionError) as error:
        raise QjaxError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise QjaxError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def dump_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _byte_level(files: _Folder) -> dict[str, Any]:
    """The entries of byte-level BPE (conversion/base.py get_vocab_base)."""
    path, model, added = files.path, files.tokenizer["model"], files.added
    _check_model(path, model)
    pre = _recognize(path, files.tokenizer, bool(model.get("ignore_merges")))
    ids = model["vocab"] | {text: token["id"] for text, token in added.items()}
    size = files.vocab_size(len(ids))
    text_of = _by_id(path, ids, size)

    def kind(id: int) -> TokenType:
        if id not in text_of:
            return TokenType.UNUSED
        if text_of[id] not in added:
            return TokenType.NORMAL
        control = added[text_of[id]].get("special") or _looks_special(text_of[id])
        return TokenType.CONTROL if control else TokenType.USER_DEFINED

    return {
        "model": "gpt2",
        "pre": pre.names[0],
        "tokens": [text_of.get(id, f"[PAD{id}]") for id in range(size)],
        "token_type": [int(kind(id)) for id in range(size)],
        "merges": [" ".join(pair) for pair in _merges(model)],
    }


def _sentencepiece(files: _Folder) -> dict[str, Any]:
    """The entries of SentencePiece BPE: tokenizer.model, if it is there, and then the tokens that were added to it
    (conversion/base.py _create_vocab_sentencepiece, conversion/phi.py)."""
    found = sentencepiece.read(files.sentencepiece) if files.sentencepiece.exists() else _pieces(files)
    size = files.vocab_size(len(found.tokens))
    unused = range(len(found.tokens), size)
    tokens = [*found.tokens[:size], *(f"[PAD{id}]" for id in unused)]
    scores = [*found.scores[:size], *(_UNUSED_SCORE for _ in unused)]
    # The library does not tell that a piece is USER_DEFINED, so the converter has it NORMAL.
    types = [TokenType.NORMAL if type == TokenType.USER_DEFINED else type for type in found.types[:size]]
    types += [TokenType.UNUSED] * len(unused)

    def add(id: int, text: str, control: bool) -> None:
        if 0 <= id < size:
            tokens[id], scores[id] = text, ADDED_SCORE
            types[id] = TokenType.CONTROL if control else TokenType.USER_DEFINED

    for text, id in files.added_tokens.items():
        add(id, text, control=False)
    as_spelled = any(name in _PHI3 for name in files.architectures)
    for id, token in files.added_tokens_of_sentencepiece(as_spelled):
        control = bool(token.get("special")) or (not as_spelled and _looks_special(token["content"]))
        add(id, token["content"] if control or as_spelled else token["content"].replace(SPACE, " "), control)

    entries: dict[str, Any] = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores}
    entries["token_type"] = [int(type) for type in types]
    if not found.add_dummy_prefix or any(name in _UNPREFIXED for name in files.architectures):
        entries["add_space_prefix"] = False
    for end in (*map(_EOT_OF_ARCHITECTURE.get, files.architectures), _EOT_OF_VOCAB_SIZE.get(size)):
        if end is not None and end < size:
            entries["eot_token_id"] = end
    return entries


def _pieces(files: _Folder) -> sentencepiece.Model:
    """The pieces of a SentencePiece vocabulary of which there is tokenizer.json only."""
    path, model, added = files.path, files.tokenizer["model"], files.added
    if model.get("type") != "BPE":
        raise QjaxError(f"{path}: the model is {model.get('type')!r}, expected BPE, byte-level or with byte fallback")
    _check_model(path, model)
    prefixed = _spaces(path, files.tokenizer)
    ids = model["vocab"] | {text: token["id"] for text, token in added.items()}
    text_of = _by_id(path, ids, files.vocab_size(len(ids)))
    score_of = sentencepiece.scores_of(path, model["vocab"], _merges(model), list(added))
    tokens = [text_of.get(id, f"[PAD{id}]") for id in range(1 + max(text_of))]
    scores = [score_of.get(text, _UNUSED_SCORE) for text in tokens]

    def kind(id: int, text: str) -> TokenType:
        if id not in text_of:
            return TokenType.UNUSED
        return TokenType.BYTE if re.fullmatch("<0x[0-9A-Fa-f]{2}>", text) else TokenType.NORMAL

    return sentencepiece.Model(tokens, scores, [kind(id, text) for id, text in enumerate(tokens)], prefixed)


def _spaces(path: Path, tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space comes before every text, from the two ways to write ▁ for spaces."""
    prefixed = False
    for part in _parts(tokenizer.get("normalizer"), "normalizers"):
        match part:
            case {"type": "Prepend", "prepend": "▁"}:
                prefixed = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case _:
                raise QjaxError(f"{path}: unknown normalizer {json.dumps(part)} of a SentencePiece vocabulary")
    for part in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        match part:
            case {"type": "Metaspace", "replacement": "▁", "split": False}:
                prefixed |= part.get("prepend_scheme", "always") != "never"
            # Gemma's, after whose normalizer there are no spaces left.
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}:
                pass
            case _:
                raise QjaxError(f"{path}: unknown pre-tokenizer {json.dumps(part)} of a SentencePiece vocabulary")
    return prefixed


def _parts(component: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if component is None:
        return []
    return list(component[name]) if component["type"] == "Sequence" else [component]


def _check_model(path: Path, model: Mapping[str, Any]) -> None:
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise QjaxError(f"{path}: model.{key} is {model[key]!r}, expected null: GGUF cannot express it")


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(pair[0], pair[1]) for pair in pairs]


def _by_id(path: Path, ids: Mapping[str, int], size: int) -> dict[int, str]:
    text_of = {id: text for text, id in ids.items()}
    if len(text_of) != len(ids) or not all(isinstance(id, int) and 0 <= id < size for id in text_of):
        raise QjaxError(f"{path}: the token ids are not unique numbers from 0 to {size - 1}")
    return text_of


def _special(files: _Folder, size: int) -> dict[str, Any]:
    """The tokens that have a name, and which of them are added to a text (gguf-py vocab.py SpecialVocab)."""
    config, added, entries = files.config, files.added, {}
    special = {name: _text(config.get(f"{name}_token")) for name in SPECIAL}
    for name, key in SPECIAL.items():
        listed = added.get(special[name] or "")
        id = files.model_config.get(f"{name}_token_id") if listed is None else listed["id"]
        if isinstance(id, int):
            entries[f"{key}_token_id"] = id
    adds = _added_by_template(files.path, files.tokenizer.get("post_processor"), special)
    adds = adds | {name: config.get(f"add_{name}_token") for name in SPECIAL if name not in adds}
    if size == _NO_BOS_VOCAB_SIZE:
        adds["bos"] = False
    return entries | {f"add_{name}_token": add for name, add in adds.items() if isinstance(add, bool)}


def _recognize(path: Path, tokenizer: Mapping[str, Any], ignore_merges: bool) -> PreTokenizer:
    """The row of the table that the pre-tokenizer's definition amounts to."""
    splits = tuple(_regexes(tokenizer.get("pre_tokenizer") or {}))
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    found = [
        pre
        for pre in PRE_TOKENIZERS
        if pre.byte_level
        and splits in (pre.splits, pre.original)
        and normalizer in ((None, "NFC") if _NORMALIZED & set(pre.names) else (None,))
    ]
    # Some have a row with and a row without; where there is one row only, llama.cpp does as it says.
    for pre in sorted(found, key=lambda pre: pre.ignore_merges != ignore_merges):
        return pre
    known = ", ".join(pre.names[0] for pre in PRE_TOKENIZERS)
    raise QjaxError(
        f"{path}: unknown pre-tokenizer: splits {list(splits)}, ignore_merges {ignore_merges}, normalizer "
        f"{normalizer}. Known are those that llama.cpp calls {known}."
    )


def _regexes(component: Mapping[str, Any]) -> Iterator[str]:
    """A pre-tokenizer of the tokenizers library as the regular expressions it isolates."""
    match component:
        case {"type": "Sequence", "pretokenizers": components}:
            for part in components:
                yield from _regexes(part)
        case {"type": "Digits", "individual_digits": individual}:
            yield r"\p{N}" if individual else r"\p{N}+"
        case {"type": "Punctuation", "behavior": "Contiguous"}:
            yield PUNCTUATION
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": regex}}:
            for spelling, ours in _SPELLINGS.items():
                regex = regex.replace(spelling, ours)
            yield regex
        case {"type": "ByteLevel", "add_prefix_space": False}:
            if component.get("use_regex", True):
                yield GPT2
        case _:
            yield json.dumps(component)


def _added_by_template(
    path: Path, processor: Mapping[str, Any] | None, special: Mapping[str, str | None]
) -> dict[str, bool]:
    """Whether the post-processor adds BOS and EOS."""
    adds: dict[str, bool] = {}
    for part in processor.get("processors", [processor]) if processor else ():
        if part["type"] == "ByteLevel":
            adds = {"bos": False, "eos": False} | adds
        elif part["type"] == "TemplateProcessing":
            template = [item.get("SpecialToken", {}).get("id") for item in part["single"]]
            first, last = (template[0], template[-1]) if len(template) > 1 else (None, None)
            adds |= {name: end == special[name] for name, end in (("bos", first), ("eos", last)) if end is not None}
            if between := _between(part.get("pair") or [], first, last):
                ends_text = [token is not None and token in (special["sep"], special["eos"]) for token in between]
                adds["sep"] = (ends_text[0] and last is None) or (len(between) == 2 and ends_text[1])
        else:
            raise QjaxError(f"{path}: unknown post_processor {part['type']!r}; known: ByteLevel, TemplateProcessing")
    return adds


def _between(pair: Sequence[Mapping[str, Any]], first: str | None, last: str | None) -> list[str | None]:
    """What stands between two texts, A and B, beside what stands around both."""
    tokens = [item.get("SpecialToken", {}).get("id") for item in pair]
    start = int(first is not None and tokens[:1] == [first])
    stop = len(pair) - int(last is not None and tokens[-1:] == [last])
    ends = [item.get("Sequence", {}).get("id") for item in pair][start:stop]
    return tokens[start:stop][1:-1] if ends[:1] + ends[-1:] == ["A", "B"] else []


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The chat templates, of which a model may have several by name."""
    beside = folder / "chat_template.jinja"
    found = config.get("chat_template")
    if found is None and beside.exists():
        try:
            found = beside.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise QjaxError(f"{beside}: not UTF-8 text (byte {error.start}). Convert the file to UTF-8.") from error
    if found is None or isinstance(found, str):
        return {} if found is None else {"tokenizer.chat_template": found}
    named = {choice["name"]: choice["template"] for choice in found}
    default = {"tokenizer.chat_template": named.pop("default")} if "default" in named else {}
    others = {f"tokenizer.chat_template.{name}": template for name, template in named.items()}
    return ({"tokenizer.chat_templates": list(named)} if named else {}) | others | default


def _text(token: str | Mapping[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, Mapping) else token


def _looks_special(text: str) -> bool:
    """Tokens that some models forget to mark as special (conversion/base.py does_token_look_special)."""
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    listed = text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return listed or any(text.startswith(a) and text.endswith(b) for a, b in ends)
