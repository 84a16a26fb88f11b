"""How much memory the commands take that work through a model tensor by tensor, and whether comparing formats grows.

    python benchmarks/memory.py FOLDER [--layers 32] [--json benchmarks/results/memory.json]

In FOLDER, outside the repository, lies a model of Llama-3.1-8B's shape with random bfloat16 weights in shards of 5 GB:
it is made if it is not there, 16 GB; with fewer layers less, but the largest tensors stay.  It is converted, and what
that writes quantized, each by a process that is watched: resident is what Linux calls VmHWM, pages of mapped files
among it; anonymous is what no file stands behind.  The files, up to 21 GB at a time, are removed.  Then one process
compares 20 formats on the tiny model, and says what it holds after each.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import side_by_side
from side_by_side import QJAX, Row, run

from qjax import formats
from qjax.errors import QjaxError
from qjax.io.checkpoint_write import write_folder
from qjax.io.tokenizer import Tokenizer
from qjax.models.transformer import tensor_shapes
from qjax.source import open_source

COLUMNS = {
    "command": ("command", ""),
    "read_gb": ("reads, GB", ".2f"),
    "written_gb": ("writes, GB", ".2f"),
    "time_s": ("time, s", ".0f"),
    "resident_gb": ("resident, GB", ".2f"),
    "anonymous_gb": ("of it anonymous", ".2f"),
    "goal_gb": ("under", ".0f"),
}
GOAL_GB = 3.0
SHARD_BYTES = 5 * 10**9
FORMATS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0",
    "TQ2_0", "MXFP4", "NF4", "F16", "BF16", "IQ3_S", "IQ2_S",
)  # fmt: skip
COMPARE = """
import json, sys
import qjax
from qjax.machine import memory_status
from qjax.progress import observed

held = []
def look(step):
    if step.desc == "comparing" and step.done:
        held.append(memory_status().get("RssAnon", 0))
with observed(look):
    qjax.compare(qjax.load("tiny"), types=sys.argv[1].split(","), chunks=2, say=lambda _: None)
print(json.dumps(held))
"""


def make(folder: Path, n_layers: int) -> Path:
    """The model's folder, made if it is not there."""
    path = folder / f"llama-8b-{n_layers}-bf16"
    if path.exists():
        return path
    config, bf16 = replace(models.SHAPES["llama-8b"], n_layers=n_layers), formats.get("BF16")
    shapes = tensor_shapes(config)
    tensors = {name: models.RandomTensor(shape, bf16, seed) for seed, (name, shape) in enumerate(shapes.items())}
    metadata = models.tokenizer("tiny", config.vocab)
    write_folder(path, config, tensors, Tokenizer(metadata), SHARD_BYTES)
    return path


def row(command: str, source: Path, target: Path, *more: str) -> Row:
    """A command that reads a model and writes another."""
    watched = run((*QJAX, command, source, target, *more))
    read = sum(path.stat().st_size for path in open_source(source).path.glob("*.safetensors")) or source.stat().st_size
    return {
        "command": " ".join((command, "FOLDER" if source.is_dir() else source.name, *more)),
        "read_gb": read / 1e9,
        "written_gb": target.stat().st_size / 1e9,
        "time_s": watched.wall_s,
        "resident_gb": watched.resident / 1e9,
        "anonymous_gb": watched.anonymous / 1e9,
        "goal_gb": GOAL_GB,
    }


def rows(folder: Path, n_layers: int) -> list[Row]:
    model = make(folder, n_layers)
    whole, small = folder / "bf16.gguf", folder / "out.gguf"
    made = []
    try:
        for arguments in (
            ("convert", model, small, "--outtype", "q8_0"),
            ("convert", model, whole, "--outtype", "bf16"),
            ("quantize", whole, small, "Q4_K_M"),
        ):
            made.append(row(*arguments))
            print(f"\n{side_by_side.table(made, COLUMNS)}", flush=True)
            small.unlink(missing_ok=True)
    finally:
        for path in (whole, small):
            path.unlink(missing_ok=True)
    return made


def compare() -> dict[str, Any]:
    """What the process held after the model as it is, then after each format, in MB."""
    held = json.loads(run((sys.executable, "-c", COMPARE, ",".join(FORMATS))).output)
    return dict(zip(("as it is", *FORMATS), [round(n / 1e6) for n in held], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    try:
        made, held = rows(arguments.folder, arguments.layers), compare()
    except QjaxError as error:
        print(error, file=sys.stderr)
        return 2
    some = {n: list(held.values())[n] for n in (0, 1, 5, 10, 15, len(FORMATS))}
    said = ", ".join(f"{mb} MB after {n}" for n, mb in some.items())
    said = f"`compare` on the tiny model, by the number of formats it is done with: {said}."
    print(f"\n{held}\n{said}")
    side_by_side.write(arguments.json, made, layers=arguments.layers, compare_mb=held, conclusion=said)
    return int(any(one["resident_gb"] >= GOAL_GB for one in made))


if __name__ == "__main__":
    sys.exit(main())
