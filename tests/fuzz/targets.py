"""What is fuzzed: a table of everything that reads files of strangers, each row a reader as a user would call it."""

import ast
import functools
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qjax.io import (
    chat,
    checkpoints,
    ggml_legacy,
    gguf,
    imatrix,
    logits,
    lora,
    metadata_edit,
    model_card,
    prequantized,
    probes,
    sentencepiece,
    splits,
)
from qjax.io.stored import Held, Stored
from qjax.io.tokenizer import Tokenizer
from qjax.io.tokenizer_json import load_json
from qjax.methods import imatrix as statistics
from qjax.methods import recipes, rtn
from qjax.models.config import Config
from qjax.models.transformer import tensor_shapes
from qjax.source import open_source

from . import seeds
from .packing import Tree


class Target(NamedTuple):
    """Something that reads files."""

    read: Callable[[Path], Any]
    """Reads the files in a folder, and looks at all that they hold.  May raise QjaxError and nothing else."""
    seeds: list[Tree]
    """files that it takes"""
    modules: str
    """of the package, whose code reads them"""
    share: float
    """of the executions of a long run, relative to the others'"""


# ── looking at what was read ─────────────────────────────────────────────────────────────────────────


def _look(file: gguf.GGUFFile) -> None:
    for tensor in file.tensors.values():
        assert repr(tensor)
        assert tensor.data.nbytes == tensor.nbytes == sum(piece.nbytes for piece in tensor.pieces())
    # One way to print it or none, for each takes a while.
    match file.size_bytes // 32 % 8:
        case 0:
            assert str(file.summary())
        case 1:
            assert file.summary().markdown()
        case 2:
            assert file._repr_html_()
        case 3:
            assert json.dumps(file.summary().to_json(arrays=True), allow_nan=False)
        case 4:
            assert repr(file)
            assert file.n_weights == sum(tensor.size for tensor in file.tensors.values())
        case 5:
            assert repr(file.metadata)


_TEXT = "The cat, ab abc\n\n  a 12345 Ünï▁ <|x|></s>\0"


def _speak(tokenizer: Tokenizer, text: str = _TEXT) -> None:
    assert repr(tokenizer)
    assert len(tokenizer.missing_bytes) <= 256
    ids = tokenizer.encode(text)
    marked = tokenizer.encode(text, parse_special=True)
    assert max([*ids, *marked], default=0) < tokenizer.vocab_size
    assert isinstance(tokenizer.decode(ids) + tokenizer.decode(marked, unparse_special=False), str)
    assert len(tokenizer.pieces(range(tokenizer.vocab_size))) == tokenizer.vocab_size
    stream = tokenizer.stream()
    assert stream.push(ids) + stream.end() == b"".join(tokenizer.pieces(ids)).decode(errors="replace")
    tokenizer.to_gguf().pack()
    if tokenizer.chat_template is not None:
        chat.prompt(tokenizer, [{"role": "user", "content": text}])


def _load(tensors: Mapping[str, Stored]) -> None:
    for tensor in tensors.values():
        assert tensor.load().shape == tensor.shape
        if tensor.format.ggml_id is not None:
            assert sum(piece.nbytes for piece in tensor.pieces()) == tensor.format.nbytes(tensor.shape)


def _describe(config: Config) -> None:
    assert isinstance(hash(config), int)
    assert repr(config)
    config.to_gguf()
    if config.n_layers < 1000:  # Folders have to have as many tensors at least, before this is called.
        assert tensor_shapes(config)


# ── readers ──────────────────────────────────────────────────────────────────────────────────────────


def _gguf(folder: Path) -> None:
    _look(gguf.read(folder / "model.gguf"))


def _splits(folder: Path) -> None:
    for path in sorted(folder.glob("*.gguf"))[:1]:
        _look(gguf.read(path))
        assert str(splits.split(path, folder / "out", max_tensors=1, dry_run=True))
        splits.split(path, folder / "out", max_bytes=1, no_tensor_first_split=True, dry_run=True)
        if gguf.read_shard(path).metadata.get("split.count"):
            splits.merge(path, folder / "out.gguf", dry_run=True)


def _ggml(folder: Path) -> None:
    path = folder / "model.ggml"
    if path.is_file() and ggml_legacy.recognizes(path):
        file = ggml_legacy.read(path)
        _look(file)
        Tokenizer.from_gguf(file.metadata)


def _imatrix(name: str, folder: Path) -> None:
    matrix = imatrix.read(folder / name)
    assert repr(matrix)
    for tensor in matrix.entries:
        importance = matrix.importance(tensor)
        assert importance is not None
        assert (importance >= 0).all()
    assert str(statistics.statistics(matrix))
    assert statistics.merge([matrix, matrix]).entries.keys() == matrix.entries.keys()


def _logits(folder: Path) -> None:
    base = logits.read(folder / "base.logits")
    predictions = base.of(base.tokens)
    for window in base.tokens:
        assert predictions(window[None, :-1], base.tokens.shape[1] // 2).codes.shape[-1] == base.vocab


def _tokenizer(folder: Path) -> None:
    tokenizer, text = Tokenizer.from_gguf(gguf.read(folder / "model.gguf").metadata), folder / "text.txt"
    _speak(tokenizer, text.read_text(encoding="utf-8", errors="surrogateescape") if text.exists() else _TEXT)


def _tokenizer_folder(folder: Path) -> None:
    _speak(Tokenizer.from_folder(folder))


def _sentencepiece(folder: Path) -> None:
    model = sentencepiece.read(folder / "tokenizer.model")
    assert len(model.tokens) == len(model.scores) == len(model.types)


def _chat(folder: Path) -> None:
    template = "".join(path.read_bytes().decode(errors="replace") for path in folder.glob("*.jinja"))
    given = load_json(folder / "messages.json", optional=True).get("messages", seeds.MESSAGES)
    messages = [message for message in given if isinstance(message, dict)] if isinstance(given, list) else []
    chat.render(template, messages, bos_token="<s>", eos_token="</s>", tools=[{"name": "f"}])


def _config_json(folder: Path) -> None:
    described = load_json(folder / "config.json")
    prequantized.read_scheme(folder, described)
    _describe(Config.from_hf(described))


def _config_gguf(folder: Path) -> None:
    _describe(open_source(folder / "model.gguf").config)


def _safetensors(folder: Path) -> None:
    checkpoint = checkpoints.read_folder(folder)
    assert checkpoint.container.startswith("safetensors")
    _load(checkpoint.tensors)


def _card(folder: Path) -> None:
    model_card.general(folder, {"token_embd.weight": (10, 8), "blk.0.ffn_up_exps.weight": (2, 8, 8)}, "Tiny-1B").pack()
    model_card.general(folder, {"blk.0.attn_q.weight": (8, 8)}, "Tiny-LoRA-1B", adapter=True).pack()


def _probes(folder: Path) -> None:
    for path in folder.glob("questions.*"):
        for n_tasks in (None, 1):
            for probe in probes.read(
                path, {"choices": "multiple-choice"}.get(path.suffix[1:], path.suffix[1:]), n_tasks
            ):
                assert probe.answer not in probe.alternatives


@functools.cache
def _llama() -> tuple[Config, dict[str, Stored]]:
    """The model that adapters are for."""
    config = Config.from_hf(seeds.HF_LLAMA)
    return config, {name: Held(np.zeros(shape, np.float32)) for name, shape in tensor_shapes(config).items()}


def _lora(folder: Path) -> None:
    config, base = _llama()
    adapter = lora.read(folder if lora.is_folder(folder) else folder / "adapter.gguf", config)
    _load({name: tensor for name, tensor in adapter.apply(base, "llama").items() if name in adapter.pairs})


def _arguments(folder: Path) -> None:
    """What stands in small files, or on a command line because somebody said so."""
    for path in folder.glob("*.txt"):
        text, edit = path.read_bytes().decode(errors="replace"), functools.partial(_edit, folder / "model.gguf")
        match path.stem:
            case "types":
                recipes.recipe("Q4_K_M", tensor_types=recipes.assignments(text.split()))
                recipes.recipe(recipes.assignments(text.split()))
            case "file_type":
                recipes.outtype(text)
            case "size":
                splits.parse_size(text, fine=True)
            case "override":
                rtn.override(text)
            case "set":
                edit(dict([metadata_edit.assignment(text)]))
            case "rename":
                edit({}, rename=dict([metadata_edit.renaming(text)]))
            case "remove":
                edit({}, remove=text.split())
            case "value":
                key, _, value = text.partition("=")
                edit({key: value})


def _edit(path: Path, values: Mapping[str, Any], **how: Any) -> None:
    edited = metadata_edit.edit(path, values, dry_run=True, **how)
    assert str(edited)
    assert json.dumps(edited.to_json(), allow_nan=False)


_GGUF_MODULES = "io.gguf io.gguf_metadata io.cursor"
_TOKENIZER_MODULES = "io.tokenizer io.bpe io.vocabulary"
_CONFIG_MODULES = "models.config models.config_json models.rope_scaling models.architectures"


def _named(name: str, trees: list[Tree]) -> list[Tree]:
    return [{name: tree} for tree in trees]


TARGETS: dict[str, Target] = {
    "gguf": Target(_gguf, _named("model.gguf", seeds.GGUF), f"{_GGUF_MODULES} io.summary", 20),
    "splits": Target(_splits, seeds.SPLITS, f"{_GGUF_MODULES} io.splits", 4),
    "ggml": Target(_ggml, _named("model.ggml", seeds.GGML), "io.ggml_legacy io.cursor", 5),
    "imatrix": Target(
        functools.partial(_imatrix, "imatrix.gguf"), _named("imatrix.gguf", seeds.IMATRIX), "io.imatrix", 5
    ),
    "imatrix_dat": Target(
        functools.partial(_imatrix, "imatrix.dat"), _named("imatrix.dat", seeds.DAT), "io.imatrix", 15
    ),
    "logits": Target(_logits, _named("base.logits", seeds.LOGITS), "io.logits io.cursor", 25),
    "sentencepiece": Target(_sentencepiece, _named("tokenizer.model", seeds.SENTENCEPIECE), "io.sentencepiece", 15),
    "probes": Target(_probes, seeds.PROBES, "io.probes io.cursor", 20),
    "tokenizer": Target(
        _tokenizer,
        [{"model.gguf": {"metadata": entries}, "text.txt": _TEXT} for entries in seeds.TOKENIZERS.values()],
        f"{_TOKENIZER_MODULES} {_GGUF_MODULES}",
        1,
    ),
    "tokenizer_folder": Target(
        _tokenizer_folder, seeds.TOKENIZER_FOLDERS, f"{_TOKENIZER_MODULES} io.tokenizer_json io.sentencepiece", 1
    ),
    "chat": Target(_chat, seeds.CHATS, "io.chat io.sandbox", 1),
    "config_json": Target(
        _config_json, _named("config.json", seeds.CONFIG_JSON), f"{_CONFIG_MODULES} io.prequantized", 20
    ),
    "config_gguf": Target(_config_gguf, _named("model.gguf", seeds.CONFIG_GGUF), f"{_CONFIG_MODULES} source", 3),
    "safetensors": Target(
        _safetensors, seeds.SAFETENSORS, f"{_CONFIG_MODULES} io.checkpoints io.raw_tensor io.names", 1
    ),
    "prequantized": Target(
        _safetensors,
        seeds.PREQUANTIZED,
        "io.checkpoints io.raw_tensor io.prequantized io.gptq io.fp8 io.bitsandbytes",
        1,
    ),
    "lora": Target(_lora, seeds.LORA, "io.lora io.names", 1),
    "card": Target(_card, seeds.CARDS, "io.model_card", 1),
    "arguments": Target(_arguments, seeds.ARGUMENTS, "io.metadata_edit methods.recipes io.splits", 4),
}


def words(modules: str) -> list[str]:
    """The short texts in the source of these modules of the package: what their code compares with what it reads."""
    found = set()
    for module in modules.split():
        spec = importlib.util.find_spec(f"qjax.{module}")
        assert spec is not None
        for node in ast.walk(ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) <= 48:
                found.add(node.value)
    return sorted(found)
