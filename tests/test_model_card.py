"""general.*, against gguf-py, which llama.cpp's converter takes them from."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest

from qjax import QjaxError
from qjax.io import gguf, model_card

pytestmark = pytest.mark.in_haste

peer = pytest.importorskip("gguf")

WORDS = [
    "Llama", "llama", "3", "3.1", "7B", "8x7B", "135M", "small", "mini", "XL", "instruct", "Chat", "vision", "v0.1",
    "V2", "A3B", "128k", "1m", "7b1", "0_5B", "0.5b1", "hf", "Q4_K_M", "fp16", "BF16", "iq2_xs", "lora", "LoRA", "tiny",
    "R1", "4bit", "iter3", ".x", "_a", "é", "2024", "base", "1.5T",
]  # fmt: skip
PREFIXES = ("", "org/", "./", "../", "Org-a/", "/", "a/b/", "a name ")
N_WEIGHTS = (0, 5_000, 135_000_000, 7_000_000_000, -1_000_000, -1_000_000_000)

# From the Hub, with what gguf-py makes of them.
KNOWN = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("SmolLM2", "Instruct", None, "135M"),
    "meta-llama/Llama-3.2-1B-Instruct": ("Llama-3.2", "Instruct", None, "1B"),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("Mixtral", "Instruct", "v0.1", "8x7B"),
    "Qwen/Qwen2.5-7B-Instruct-1M": ("Qwen2.5", "Instruct-1m", None, "7B"),
    "Qwen/Qwen3-30B-A3B": ("Qwen3", None, None, "30B-A3B"),
    "google/gemma-2-2b-it": ("gemma-2", "it", None, "2B"),
    "microsoft/Phi-3-mini-4k-instruct": ("Phi-3", "4k-instruct", None, "mini"),
    "openai-community/gpt2": (None, None, None, None),
    "tiny": (None, None, None, None),
}
WEIGHTS_OF_KNOWN = {"Qwen/Qwen2.5-7B-Instruct-1M": 7_600_000_000, "microsoft/Phi-3-mini-4k-instruct": 3_800_000_000}


@pytest.mark.parametrize("model_id", KNOWN)
def test_names_from_the_hub(model_id):
    parts = model_card.name_parts(model_id, WEIGHTS_OF_KNOWN.get(model_id, 0))
    assert parts[2:] == KNOWN[model_id]
    assert (parts.organization or parts.name) == model_id.split("/")[0]


def test_parts_of_names_are_gguf_pys():
    choose = random.Random(0)
    names = [
        choose.choice(PREFIXES)
        + "".join(choose.choice(WORDS) + choose.choice("---_") for _ in range(choose.randint(0, 6)))
        for _ in range(1000)
    ]
    for name, n in itertools.product(names, N_WEIGHTS):
        theirs = peer.Metadata.get_model_id_components(name, n)
        assert tuple(model_card.name_parts(name, n)) == theirs, (name, n)
    for name in names:
        assert model_card.title(name) == peer.Metadata.id_to_title(name)


def test_size_labels_are_gguf_pys():
    choose = random.Random(0)
    for n in [1, 999, 1000, 10**6, 10**9, 10**12, *(int(10 ** choose.uniform(0, 14)) for _ in range(2000))]:
        assert model_card.size_label({"a": (n,)}) == peer.size_label(n, n, 0, 0), n
    shapes = {"token_embd.weight": (100, 64)} | {
        f"blk.{i}.ffn_{kind}_exps.weight": (8, 64, 96) for i in range(3) for kind in "ab"
    }
    shared, experts = 6400, 6 * 64 * 96
    assert model_card.size_label(shapes) == peer.size_label(shared + 8 * experts, shared, experts, 8) == "8x43K"
    assert model_card.size_label({}) is None


# ── whole folders ────────────────────────────────────────────────────────────────────────────────────

SHAPES = {"token_embd.weight": (1000, 7000), "output_norm.weight": (64,)}

CARDS = {
    "none": None,
    "no front matter": "# A model\n---\nlicense: mit\n---\n",
    "empty": "---\n---\n# A model",
    "a list": "---\n- a\n- b\n---\n",
    "unfinished": "---\nlicense: mit\n",
    "usual": """---
license: apache-2.0
language:
- en
- no
library_name: transformers
tags:
- text
- chat
pipeline_tag: text-generation
base_model: Org/Base-7B-v2
datasets:
- someone/tales-v1
- https://huggingface.co/datasets-org/words
---
# A model
""",
    "all": """---
model_name: "My model: 2"
model_creator: Someone
model_version: v9
organization: The org
model_description: |
  Two
  lines
finetune: chatty
model_type: llama
size_label: 9B
url: https://example.com/a
doi: 10.1/2
uuid: 1-2
repo_url: https://example.com/b
license:
\t- mit
\t- other
license_name: mine
license_link: LICENSE
language: no
tags: one
base_models:
- https://huggingface.co/Org/Base-7B
- https://example.com/Base-7B
- name: Given
  author: Someone
  organization: Org
  version: v3
  description: told
  url: u
  doi: d
  uuid: i
  repo_url: r
- Base-8B-Instruct
dataset: someone/tales
---
""",
    "null": "---\nbase_model:\ntags:\nlicense:\nlanguages: [de]\nlanguage: [en, fr]\ndatasets: []\n---\n",
}
CONFIGS = {
    "none": {},
    "an id": {"_name_or_path": "Other-org/Thing-3B-chat"},
    "a path": {"_name_or_path": "a/b/c"},
}
GENERATION = {
    "none": None,
    "not JSON": "{",
    "some": json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "penalty_repeat": 1.1, "bos_token_id": 1}),
    "all": json.dumps(
        {"sequence": "kp", "min_p": 0, "xtc_probability": 0.1, "xtc_threshold": 0.2, "penalty_last_n": 64}
        | {"penalty_repeat": 1.3, "repetition_penalty": 1.2, "mirostat": 2, "mirostat_tau": 5.0, "mirostat_eta": 0.1}
        | {"temperature": None}
    ),
}
# One after the other, so that each is seen; all of them with the cards that say much.
CASES = [("none", config, generation) for config in CONFIGS for generation in GENERATION]
CASES += [(card, config, "some") for card in CARDS for config in ("none", "an id")]


def write(folder: Path, card, config, generation):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[config]))
    if CARDS[card] is not None:
        (folder / "README.md").write_text(CARDS[card])
    if GENERATION[generation] is not None:
        (folder / "generation_config.json").write_text(GENERATION[generation])


def theirs(folder: Path, overrides=None, name=None):
    """What gguf-py writes, read back; without what its writer puts before and after."""
    metadata = peer.Metadata.load(overrides, folder, name, sum(map(math.prod, SHAPES.values())))
    metadata.size_label = metadata.size_label or "7.0M"
    writer = peer.GGUFWriter(None, "llama")
    metadata.set_gguf_meta_model(writer)
    path = folder.with_suffix(".gguf")
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.Metadata({k: v for k, v in gguf.read(path).metadata.typed.items() if k != "general.architecture"})


def same(ours, theirs):
    assert [*ours.typed.items()] == [*theirs.typed.items()]


@pytest.mark.filterwarnings("ignore:.*generation_config.json. not a JSON file")
@pytest.mark.parametrize("name", ["Tiny-llama-7M-Instruct-v0.1", "model"])
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_entries_are_gguf_pys(tmp_path, case, name):
    write(tmp_path / name, *case)
    same(model_card.general(tmp_path / name, SHAPES, name), theirs(tmp_path / name))


def test_overrides_are_gguf_pys(tmp_path):
    write(tmp_path / "model", "usual", "an id", "some")
    given = {
        "general.name": "Given",
        "general.quantized_by": "me",
        "general.url": "u",
        "general.source.repo_url": "s",
        "general.sampling.top_k": 3,
        "general.base_models": [{"name": "B"}],
        "general.tags": ["t"],
        "general.languages": [],
    }
    (tmp_path / "given.json").write_text(json.dumps(given))
    same(
        model_card.general(tmp_path / "model", SHAPES, "model", given),
        theirs(tmp_path / "model", tmp_path / "given.json"),
    )
    named = model_card.general(tmp_path / "model", SHAPES, "model", {"general.name": "N"})
    same(named, theirs(tmp_path / "model", None, "N"))
    with pytest.raises(QjaxError, match=r"metadata 'general.nmae': no such key; known: .*license.name"):
        model_card.general(tmp_path / "model", SHAPES, "model", {"general.nmae": "N"})


def test_the_penalty_by_transformers_name(tmp_path):
    """gguf-py 0.19 does not know it yet."""
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.5}')
    assert model_card.general(tmp_path, SHAPES, "model")["general.sampling.penalty_repeat"] == 1.5


@pytest.mark.parametrize(
    ("card", "generation", "message"),
    [
        ("---\na: [\n---\n", "{}", "README.md: the front matter is no YAML"),
        ("---\na: !!python/object/apply:os.getcwd []\n---\n", "{}", "README.md: the front matter is no YAML"),
        ("---\na: &a {b: 1}\nc: {<<: *a}\n---\n", "{}", "README.md: the front matter is no YAML"),
        ("", "{", "generation_config.json: not a JSON file"),
        ("", '{"top_k": "many"}', "generation_config.json: top_k: 'many' is of type str, expected int for INT32"),
        ("", '{"top_k": 1e30}', "generation_config.json: top_k: .* expected int for INT32"),
    ],
)
def test_what_cannot_be_read_is_left_out_and_said(tmp_path, card, generation, message):
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "generation_config.json").write_text(generation)
    with pytest.warns(UserWarning, match=message):
        entries = model_card.general(tmp_path, SHAPES, "model")
    assert dict(entries) == {"general.name": "Model", "general.size_label": "7.0M"}


def test_a_card_cannot_fill_the_memory(tmp_path):
    """Each list holds the one before ten times."""
    lists = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))]
    card = "\n".join(["---", *lists, "name: *a11", "tags: *a11", "license: *a11", "base_model: *a11", "---", ""])
    (tmp_path / "README.md").write_text(card)
    entries = model_card.general(tmp_path, SHAPES, "model")
    assert {key: entries[key] for key in ("general.name", "general.base_model.count")} == {
        "general.name": "Model",
        "general.base_model.count": 10,
    }
    assert "general.tags" not in entries
