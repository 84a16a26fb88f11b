"""The whole corpus: ``python tests/hostile/corpus.py FOLDER`` writes it, a folder for each kind and one for each case.

What chat templates may try, which are programs rather than files, is tested in tests/test_chat.py (ATTACKS).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile import (
    adapters,
    configs,
    folders,
    ggml_files,
    gguf_files,
    imatrix_files,
    logits_files,
    models,
    tokenizers_gguf,
    tokenizers_hf,
)
from hostile.kind import Kind

import qjax

CHECKED = Kind(
    qjax.check,
    "x.gguf",
    {"GGUF": gguf_files.SOUND["DATA_SUCCESS"], ".dat": imatrix_files.SOUND[".dat"]},
    {
        "a story": (b"A story about a small red house, and who lives in it.", "not a GGUF file"),
        "cut short": gguf_files.BAD["DATA_NOT_ENOUGH_DATA"],
        "a .dat with a NaN": imatrix_files.BAD["a NaN and a name that steers"],
        "an importance matrix with a NaN": imatrix_files.BAD["a NaN"],
    },
)

KINDS: dict[str, Kind] = {
    "gguf": gguf_files.KIND,
    "shards": gguf_files.SHARDS,
    "ggml": ggml_files.KIND,
    "imatrix": imatrix_files.KIND,
    "logits": logits_files.KIND,
    "safetensors": folders.KIND,
    "config": configs.KIND,
    "tokenizer.gguf": tokenizers_gguf.KIND,
    "tokenizer.json": tokenizers_hf.KIND,
    "model": models.KIND,
    "adapter.gguf": adapters.GGUF,
    "adapter": adapters.PEFT,
    "check": CHECKED,
}
BAD = [(kind, name) for kind, of in KINDS.items() for name in of.bad]
SOUND = [(kind, name) for kind, of in KINDS.items() for name in of.sound]


def write(root: Path) -> dict[tuple[str, str], Path]:
    """Every case, by kind and name: what is to be read."""
    paths = {}
    for kind, of in KINDS.items():
        cases = of.sound | {name: files for name, (files, _) in of.bad.items()}
        for i, (name, files) in enumerate(cases.items()):
            folder = root / kind / f"{i:03}"
            folder.mkdir(parents=True)
            paths[kind, name] = of.write(folder, files)
    return paths


if __name__ == "__main__":
    for (kind, name), path in write(Path(sys.argv[1])).items():
        message = KINDS[kind].bad[name][1] if name in KINDS[kind].bad else "(sound)"
        print(path, name, message, sep="\t")
