"""Times `qjax perplexity` beside llama-perplexity, in turns: whole processes, loading and compiled programs from disk.

    QJAX_LLAMA_CPP=... python benchmarks/perplexity.py MODEL... -f wiki.test.raw [--json FILE]

A ratio above 1 means that qjax is faster.  tok/s: of the evaluation alone, as either reports it.  limit: the
operations of our products with weights, for each second of our evaluation, beside XLA's product of dense bfloat16 or
float32 matrices, whichever is faster here; attention, the rest of the layers and the choice of a precision take time
too, and do not count as operations.
"""

import json
import re
import sys
from pathlib import Path

import side_by_side
from side_by_side import QJAX, Row, llama_cpp, median, run

from qjax.machine import Limits, n_threads
from qjax.source import open_source

COLUMNS = {
    "model": ("model", ""),
    "qjax_s": ("qjax, s", ".1f"),
    "llama_cpp_s": ("llama.cpp, s", ".1f"),
    "ratio": ("ratio", ".2f"),
    "goal": ("at least, goal", ""),
    "qjax_ts": ("qjax, tok/s", ".0f"),
    "llama_cpp_ts": ("llama.cpp, tok/s", ".0f"),
    "limit": ("of the limit", ".0%"),
    "precision": ("precision", ""),
    "qjax_ppl": ("PPL", ".4f"),
    "llama_cpp_ppl": ("llama.cpp's", ".4f"),
}
GOALS = {"Q4_0": "1×, 1.5×"}


def row(path: Path, limits: Limits, *, text: Path, n_ctx: int, chunks: int, turns: int) -> Row:
    common = ("-f", text, "-c", str(n_ctx), "--chunks", str(chunks))
    peer = (llama_cpp("llama-perplexity"), "-m", path, *common, "-t", str(n_threads()))
    ours, theirs = side_by_side.turns(
        turns, lambda: run((*QJAX, "perplexity", path, *common, "--json")), lambda: run(peer)
    )
    qjax_s, llama_cpp_s = (median([one.wall_s for one in side]) for side in (ours, theirs))
    record = json.loads(ours[-1].output)
    time_s = median([json.loads(one.output)["time_s"] for one in ours])
    n_tokens = record["chunks"] * n_ctx
    logs = [one.output + one.log for one in theirs]
    spans = [stop - start for log in logs for start, stop in zip(clock(log, "calculating"), clock(log, "Final"))]
    estimate = re.search(r"Final estimate: PPL = ([\d.]+)", "".join(logs))
    fastest = max(limits.bfloat16_gflop_s, limits.float32_gflop_s)
    return {
        "model": path.stem,
        "qjax_s": qjax_s,
        "llama_cpp_s": llama_cpp_s,
        "ratio": llama_cpp_s / qjax_s,
        "goal": GOALS.get(path.stem.rpartition("-")[2], "1.5×"),
        "qjax_ts": n_tokens / time_s,
        # Its log is written by a thread that it does not always wait for.
        "llama_cpp_ts": n_tokens / median(spans) if spans else None,
        "limit": record["chunks"] * operations(path, n_ctx) / time_s / 1e9 / fastest,
        "precision": record["precision"],
        "qjax_ppl": record["value"],
        "llama_cpp_ppl": float(estimate[1]) if estimate else None,
        "n_ctx": n_ctx,
        "chunks": record["chunks"],
    }


def clock(log: str, word: str) -> list[float]:
    """Seconds since the program began, of its log's line with this word."""
    found = re.search(rf"(\d+)\.(\d+)\.(\d+)\.(\d+) I (?:perplexity: )?{word}", log)
    return [60 * int(found[1]) + int(found[2]) + int(found[3]) / 1e3 + int(found[4]) / 1e6] if found else []


def operations(path: Path, n_ctx: int) -> float:
    """Of the products of a window's activations with the weights: those of the head for the scored half only."""
    source = open_source(path)
    per_row = {name: 2 * tensor.shape[0] * tensor.shape[-1] for name, tensor in source.tensors.items()}
    layers = sum(n for name, n in per_row.items() if len(source.tensors[name].shape) == 2 and name.startswith("blk."))
    head = per_row["token_embd.weight" if source.config.tied else "output.weight"]
    return n_ctx * layers + (n_ctx - n_ctx // 2) * head


def main() -> int:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("-f", "--file", type=Path, required=True, help="text, such as wiki.test.raw")
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=32)
    arguments = parser.parse_args()
    options = dict(text=arguments.file, n_ctx=arguments.ctx_size, chunks=arguments.chunks, turns=arguments.turns)
    return side_by_side.measure(arguments, COLUMNS, lambda path, limits: row(path, limits, **options))


if __name__ == "__main__":
    sys.exit(main())
