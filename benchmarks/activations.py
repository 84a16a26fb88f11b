"""What it costs to round the inputs of matrix products, and keys and values: PPL and KLD against the model as it is.

    python benchmarks/activations.py tiny [--json benchmarks/results/activations.json]
    python benchmarks/activations.py MODEL -f wiki.test.raw --chunks 8 --json ...

Ranges come from another text than the one that is measured: of the tiny model from tales of the training seeds; else
from the end of the file, as long as what is measured at its beginning.  With --json, rows of other models stay there.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from side_by_side import Row, table, write

import qjax
from qjax import evaluate
from qjax.data import tales
from qjax.errors import QjaxError
from qjax.methods.activations import Activations
from qjax.metrics import KLDivergence, TokenDivergence, cached, token_divergence
from qjax.metrics.perplexity import batch_size

COLUMNS = {
    "model": ("model", ""),
    "weights": ("weights", ""),
    "activations": ("activations", ""),
    "cache": ("keys, values", ""),
    "ppl": ("PPL", ".4f"),
    "kld": ("KLD", ".6f"),
    "kld_stderr": ("±", ".6f"),
    "same_top": ("same top, %", ".2f"),
}

W8, W4 = "8 bits per row", "Q4_0"
WEIGHTS: dict[str, Any] = {W8: qjax.Affine(bits=8, block_size="row", scale_dtype="float32"), W4: "Q4_0"}
NOT = "as they are"

# Weights, activations, how their range is found, cache types.
RUNS: tuple[tuple[str, str, str, str], ...] = (
    (NOT, NOT, "", "f32"),
    (NOT, "int8-token", "", "f32"),
    (NOT, "q8_0", "", "f32"),
    (NOT, "int8-tensor", "minmax", "f32"),
    (NOT, "int8-tensor", "p99.9", "f32"),
    (NOT, "int8-tensor", "p99.99", "f32"),
    (NOT, "int8-tensor", "mse", "f32"),
    (NOT, "uint8-tensor", "minmax", "f32"),
    (NOT, "int8-channel", "minmax", "f32"),
    (W8, NOT, "", "f32"),
    (W8, "int8-token", "", "f32"),
    (W8, "int8-tensor", "minmax", "f32"),
    (W8, "int8-tensor", "mse", "f32"),
    (W4, NOT, "", "f32"),
    (W4, "q8_0", "", "f32"),
    (W4, "int8-token", "", "f32"),
    (W4, "int8-tensor", "mse", "f32"),
    (NOT, "int4-token", "", "f32"),
    (NOT, "q4_0", "", "f32"),
    (NOT, "int4-tensor", "mse", "f32"),
    (W4, "int4-token", "", "f32"),
    (W4, "q4_0", "", "f32"),
    *((NOT, NOT, "", cache) for cache in ("f16", "q8_0", "q5_0", "q4_0")),
)


def texts(name: str, file: Path | None, model: qjax.Model, n_tokens: int) -> tuple[list[int], list[int]]:
    """What is measured and what shows the ranges, as tokens."""
    if file is None:
        shown = "".join(tale.text for tale in tales.generate(tales.TRAINING, 300))
        return model.tokenizer.encode(evaluate.held_out_tales()), model.tokenizer.encode(shown)
    text = evaluate.read_text(file)
    # More than enough letters for so many tokens, so that the whole text need not be cut into them.
    first, last = (model.tokenizer.encode(part) for part in (text[: 20 * n_tokens], text[-20 * n_tokens :]))
    if len(text) < 40 * n_tokens:
        raise QjaxError(f"{file}: too short for two texts of {n_tokens} tokens; give a longer one or fewer chunks")
    return first[:n_tokens], last[-n_tokens:]


def rows(name: str, file: Path | None, n_ctx: int, chunks: int) -> list[Row]:
    """All runs, each printed as it is done."""
    model = qjax.load(name)
    measured, shown = texts(name, file, model, n_ctx * chunks)
    windows = evaluate.cut(model, measured, n_ctx, chunks)
    size = batch_size(n_ctx, model.config.vocab)
    base, ranges, found = cached(evaluate.logits_of(model), 2**31), {}, []
    models = {NOT: model} | {weights: model.quantize(recipe) for weights, recipe in WEIGHTS.items()}
    for weights, activations, rule, cache in RUNS:
        if rule and (activations, rule) not in ranges:
            # Of the model as it is.
            ranges[activations, rule] = evaluate.calibrate(model, shown, activations, rule, n_ctx, chunks)
        rounded = None if activations == NOT else ranges.get((activations, rule)) or Activations.of(activations)
        run = dataclasses.replace(models[weights], activations=rounded, cache_k=cache, cache_v=cache)
        tokens = token_divergence(base, evaluate.logits_of(run), windows, size)
        divergence = KLDivergence.of(TokenDivergence.concatenate(list(tokens)), n_ctx)
        row = {
            "model": model.name,
            "weights": weights,
            "activations": rounded.name if rounded else NOT,
            "cache": cache,
            "ppl": divergence.ppl,
            "kld": max(divergence.mean, 0.0),
            "kld_stderr": divergence.stderr,
            "same_top": divergence.same_top,
            "n_tokens": divergence.n_tokens,
        }
        found.append(row)
        print("  ".join(format(row[key], how) for key, (_, how) in COLUMNS.items()), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what qjax.load takes")
    parser.add_argument("-f", "--file", type=Path, help="text; default: tales, for the tiny model")
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the rows there, beside those of other models")
    arguments = parser.parse_args()
    try:
        made = rows(arguments.model, arguments.file, arguments.ctx_size, arguments.chunks)
    except QjaxError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{table(made, COLUMNS)}")
    if arguments.json:
        before = json.loads(arguments.json.read_text(encoding="utf-8"))["rows"] if arguments.json.exists() else []
        write(arguments.json, [row for row in before if row["model"] != made[0]["model"]] + made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
