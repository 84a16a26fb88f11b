"""tokenizer.json and tokenizer_config.json of a Hugging Face folder, to and from GGUF's metadata.

The rules are those of llama.cpp's converter (conversion/base.py get_vocab_base and SpecialVocab in gguf-py's
vocab.py). Only the pre-tokenizer is recognized otherwise: the converter hashes what it does to a fixed text,
here its definition is compared with the table in `vocabulary`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qjax.errors import QjaxError
from qjax.io.atomic import atomic_write
from qjax.io.vocabulary import CONTRACTIONS, GPT2, PRE_TOKENIZERS, PreTokenizer, TokenType

if TYPE_CHECKING:
    from qjax.io.tokenizer import Tokenizer

# The names of special tokens in Hugging Face's files and in GGUF's keys (whose spelling is historical).
_SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}
_FOLDED_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# The Granite and SmolLM vocabulary, whose texts do not begin with BOS (conversion/llama.py).
_NO_BOS_VOCAB_SIZE = 49152
# For these the converter has nothing to say of a space before the text (conversion/llama.py).
_SPACE_PREFIX_UNSAID = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Embeddings have rows without a token, to round their number up; a false vocab_size must not fill the memory.
_MAX_UNUSED = 1 << 17


def read(folder: Path) -> dict[str, Any]:
    """The GGUF metadata that convert_hf_to_gguf.py would write for the tokenizer in ``folder``.

    Raises QjaxError where tokenizer.json is missing, malformed, or not byte-level BPE that llama.cpp knows.
    """
    path = folder / "tokenizer.json"
    tokenizer = load_json(path)
    config = load_json(folder / "tokenizer_config.json", optional=True)
    model_config = load_json(folder / "config.json", optional=True)
    try:
        return _convert(path, tokenizer, config, model_config) | _templates(folder, config)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise QjaxError(f"{path}: not a tokenizer.json of the tokenizers library ({error!r})") from error


def write(folder: Path, tokenizer: "Tokenizer") -> None:
    """Write tokenizer.json and tokenizer_config.json so that `read` finds the same tokenizer.

    Tokens that are UNUSED, UNKNOWN or BYTE lose that type, which these files cannot express.
    """
    special = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    added = [
        {
            "id": id,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special[TokenType(kind)],
        }
        for id, (text, kind) in enumerate(zip(tokenizer.tokens, tokenizer.token_types.tolist()))
        if kind in special
    ]
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in tokenizer.pre.splits
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": _template_processing(tokenizer) or byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": tokenizer.pre.ignore_merges,
            "vocab": {text: id for id, text in enumerate(tokenizer.tokens)},
            "merges": [merge.split(" ") for merge in tokenizer.merges],
        },
    }
    metadata = tokenizer.to_gguf()
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.add_eos,
    }
    config |= {f"{name}_token": tokenizer.tokens[id] for name, id in ids.items() if id is not None}
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    dump_json(folder / "tokenizer.json", content)
    dump_json(folder / "tokenizer_config.json", config)


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


def _convert(
    path: Path, tokenizer: Mapping[str, Any], config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> dict[str, Any]:
    model = tokenizer["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise QjaxError(f"{path}: the model is {model.get('type')!r}, expected byte-level BPE without byte fallback")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise QjaxError(f"{path}: model.{key} is {model[key]!r}, expected null: GGUF cannot express it")
    pre = _recognize(path, tokenizer, bool(model.get("ignore_merges")))

    added = {token["content"]: token for token in tokenizer.get("added_tokens") or ()}
    ids = model["vocab"] | {text: token["id"] for text, token in added.items()}
    size = model_config.get("vocab_size", len(ids))
    text_of = {id: text for text, id in ids.items()}
    if not isinstance(size, int) or size > len(ids) + _MAX_UNUSED:
        raise QjaxError(f"{path}: {len(ids)} tokens do not make the vocab_size {size!r} in config.json")
    if len(text_of) != len(ids) or not all(isinstance(id, int) and 0 <= id < size for id in text_of):
        raise QjaxError(f"{path}: the token ids are not unique numbers from 0 to {size - 1}")

    def kind(id: int) -> TokenType:
        if id not in text_of:
            return TokenType.UNUSED
        if text_of[id] not in added:
            return TokenType.NORMAL
        control = added[text_of[id]].get("special") or _looks_special(text_of[id])
        return TokenType.CONTROL if control else TokenType.USER_DEFINED

    entries: dict[str, Any] = {}
    architecture = (model_config.get("architectures") or [""])[0]
    if isinstance(config.get("add_prefix_space"), bool) and architecture not in _SPACE_PREFIX_UNSAID:
        entries["add_space_prefix"] = config["add_prefix_space"]
    entries |= {
        "model": "gpt2",
        "pre": pre.names[0],
        "tokens": [text_of.get(id, f"[PAD{id}]") for id in range(size)],
        "token_type": [int(kind(id)) for id in range(size)],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    }
    special = {name: _text(config.get(f"{name}_token")) for name in _SPECIAL}
    for name, key in _SPECIAL.items():
        listed = added[special[name]]["id"] if special[name] in added else None
        id = model_config.get(f"{name}_token_id") if listed is None else listed
        if isinstance(id, int):
            entries[f"{key}_token_id"] = id
    adds = _added_by_template(path, tokenizer.get("post_processor"), special)
    adds = adds | {name: config.get(f"add_{name}_token") for name in _SPECIAL if name not in adds}
    if size == _NO_BOS_VOCAB_SIZE:
        adds["bos"] = False
    entries |= {f"add_{name}_token": add for name, add in adds.items() if isinstance(add, bool)}
    return {f"tokenizer.ggml.{name}": value for name, value in entries.items()}


def _recognize(path: Path, tokenizer: Mapping[str, Any], ignore_merges: bool) -> PreTokenizer:
    """The row of the table that the pre-tokenizer's definition amounts to."""
    splits = tuple(_regexes(tokenizer.get("pre_tokenizer") or {}))
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    for pre in PRE_TOKENIZERS:
        normalizers = (None, "NFC") if "qwen2" in pre.names else (None,)
        if (splits, ignore_merges) == (pre.splits, pre.ignore_merges) and normalizer in normalizers:
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
        case {"type": "Digits", "individual_digits": True}:
            yield r"\p{N}"
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": regex}}:
            yield regex.replace(_FOLDED_CONTRACTIONS, CONTRACTIONS)
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


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The chat templates, of which a model may have several by name."""
    beside = folder / "chat_template.jinja"
    found = config.get("chat_template")
    if found is None and beside.exists():
        found = beside.read_text(encoding="utf-8")
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
