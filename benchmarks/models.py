"""Makes the models that the other benchmarks run: real shapes and file types, no network, little memory.

    python benchmarks/models.py FOLDER [smollm2-135m-Q4_0 llama-1b-Q8_0 llama-8b-Q4_K_M ...]

FOLDER should lie outside the repository: all of them together take 10 GB.  A name is a model and a file type of
`qjax quantize`; without names those of the table in benchmarks/README.md are made.  A file that is there stays.

smollm2-135m: the cached `smollm2-135m-instruct` (Q4_1), decoded to F16, and from there as llama-quantize would.
llama-1b, llama-8b: the shapes of Llama-3.2-1B (its head is the embedding) and Llama-3.1-8B, with random weights: speed
does not depend on them.  For each format some Gaussian weights are quantized once and runs of them dealt out in random
order.  The tokenizer is SmolLM2's, filled up with unused tokens; the rotary embedding is not scaled as Meta's is, which
qjax does not know and which takes no time.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qjax import QjaxError, QTensor, formats, quantize
from qjax.formats import Format
from qjax.io import gguf
from qjax.io.gguf import Metadata, Value, ValueType
from qjax.io.stored import Stored, piece_bounds
from qjax.io.tokenizer import Tokenizer
from qjax.io.vocabulary import TokenType
from qjax.methods import plan as planning
from qjax.methods import recipes, rtn
from qjax.models.config import Config
from qjax.models.transformer import tensor_shapes
from qjax.quantize_file import quantize_file
from qjax.source import open_source
from qjax.tensor import describe_size

SMOLLM2 = "smollm2-135m-instruct"
# From the config.json of meta-llama's repositories.
_LLAMA: dict[str, Any] = dict(
    architecture="llama", n_kv_heads=8, n_heads=32, vocab=128256, n_ctx=131072, norm_eps=1e-5, rope_theta=500000.0
)
SHAPES = {
    "llama-1b": Config(**_LLAMA, n_layers=16, d_model=2048, d_ff=8192, head_dim=64, tied=True),
    "llama-8b": Config(**_LLAMA, n_layers=32, d_model=4096, d_ff=14336, head_dim=128, tied=False),
}
DEFAULT = (
    *(f"smollm2-135m-{name}" for name in ("F16", "Q4_0", "Q4_1", "Q8_0", "Q4_K_M", "Q6_K")),
    *(f"llama-1b-{name}" for name in ("Q4_0", "Q8_0", "Q4_K_M", "Q6_K")),
    "llama-8b-Q4_K_M",
)  # fmt: skip
# A matrix of an untrained model has this deviation (GPT-2's rule).
DEVIATION = 0.02
SLAB_SHAPE = (512, 4096)
# Weights that stay together: a multiple of all block sizes, and a divisor of all sizes of tensors.
RUN = 256


@dataclass(frozen=True)
class RandomTensor(Stored):
    """The runs of a slab of Gaussian weights in random order, as often as it takes; of a norm, ones."""

    shape: tuple[int, ...]
    format: Format
    seed: int

    def pieces(self) -> Iterator[np.ndarray]:
        slab, rng = _slab(self.format, len(self.shape) == 1), np.random.default_rng(self.seed)
        n_bytes = slab.shape[1]
        for start, stop in piece_bounds(self.format.nbytes(self.shape), n_bytes):
            yield slab[rng.integers(len(slab), size=(stop - start) // n_bytes)].reshape(-1)

    @property
    def data(self) -> np.ndarray:
        return np.concatenate(list(self.pieces()))

    def load(self) -> QTensor:
        return QTensor.from_bytes(self.data, self.format, self.shape)


@functools.cache
def _slab(format: Format, is_norm: bool) -> np.ndarray:
    """(runs, bytes of a run) uint8"""
    gaussian = DEVIATION * np.random.default_rng(0).standard_normal(SLAB_SHAPE, np.float32)
    weights = np.ones(SLAB_SHAPE, np.float32) if is_norm else gaussian
    return np.asarray(quantize(weights, format).to_bytes()).reshape(-1, format.nbytes((RUN,)))


def write_random(path: Path, name: str, config: Config, file_type: str) -> None:
    """A GGUF file of a model with random weights, its tensors in the formats that llama-quantize would choose."""
    recipe = recipes.recipe(file_type)
    metadata = Metadata({key: Value(ValueType[kind.upper()], value) for key, (kind, value) in config.to_gguf().items()})
    metadata["general.name"] = name
    metadata.update(tokenizer(SMOLLM2, config.vocab))
    shapes, float32 = tensor_shapes(config), formats.get("F32")
    tensors = {name: RandomTensor(shape, float32, seed) for seed, (name, shape) in enumerate(shapes.items())}
    steps = planning.plan(tensors, recipe, metadata).steps
    made = {step.name: dataclasses.replace(tensors[step.name], format=step.format) for step in steps}
    gguf.write(path, rtn.metadata(metadata, recipe), made)


def tokenizer(model: str, vocab: int) -> Metadata:
    """That of a model, with so many tokens."""
    metadata = Tokenizer.from_gguf(open_source(model).metadata).to_gguf()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    n_unused = vocab - len(tokens)
    metadata["tokenizer.ggml.tokens"] = tokens + [f"<|unused_{i}|>" for i in range(n_unused)]
    metadata["tokenizer.ggml.token_type"] = np.append(types, np.full(n_unused, TokenType.UNUSED, types.dtype))
    return metadata


def make(folder: Path, name: str) -> Path:
    """The file of this name, made if it is not there.  Raises QjaxError for an unknown model or file type."""
    path, (model, _, file_type) = folder / f"{name}.gguf", name.rpartition("-")
    if path.exists():
        return path
    if model in SHAPES:
        write_random(path, model, SHAPES[model], file_type)
    elif model != "smollm2-135m":
        raise QjaxError(f"{name}: expected MODEL-TYPE, MODEL one of smollm2-135m, {', '.join(SHAPES)}")
    elif file_type == "F16":
        quantize_file(SMOLLM2, path, file_type, allow_requantize=True)
    else:
        quantize_file(make(folder, f"{model}-F16"), path, file_type)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=DEFAULT, metavar="NAME")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        start = time.perf_counter()
        path = make(arguments.folder, name)
        time_s = time.perf_counter() - start
        print(f"{path}  {describe_size(path.stat().st_size)}  {time_s:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
