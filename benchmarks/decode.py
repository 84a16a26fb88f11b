"""Times decoding beside llama-bench, in turns: 64 tokens, one by one, behind a prompt of 128.

    QJAX_LLAMA_CPP=... python benchmarks/decode.py MODEL... [--json FILE]

A ratio above 1 means that qjax is faster.  A token takes all weights but an embedding that is not the head, and the
cache so far; limit: the bytes of these a second, beside a float32 product of one row and a matrix that no cache
holds.  Last comes the straight line through the models' times, by bytes: its slope is the speed of reading, and what
it begins with is the time that is lost however small the model.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import side_by_side
from side_by_side import QJAX, Row, llama_cpp, median, run

from qjax.machine import Limits, n_threads
from qjax.source import open_source

COLUMNS = {
    "model": ("model", ""),
    "qjax_ts": ("qjax, tok/s", ".1f"),
    "llama_cpp_ts": ("llama.cpp, tok/s", ".1f"),
    "ratio": ("ratio", ".2f"),
    "goal": ("at least, goal", ""),
    "token_mb": ("MB a token", ".0f"),
    "qjax_gb_s": ("qjax, GB/s", ".1f"),
    "llama_cpp_gb_s": ("llama.cpp, GB/s", ".1f"),
    "limit": ("of the limit", ".0%"),
    "compile_s": ("compiled in, s", ".1f"),
}
GOALS = {"smollm2-135m": "0.4×, 1×", "llama-1b": "0.6×, 1×", "llama-8b": "0.6×, 1×"}
CACHE_BYTES = 2


def row(path: Path, limits: Limits, *, n_gen: int, n_depth: int, repetitions: int, turns: int) -> Row:
    common = ("-p", "0", "-n", str(n_gen), "-d", str(n_depth), "-r", str(repetitions), "-o", "json")
    peer = (llama_cpp("llama-bench"), "-m", path, *common, "-t", str(n_threads()))

    def rate(command: tuple) -> dict:
        return json.loads(run(command).output)[0]

    ours, theirs = side_by_side.turns(turns, lambda: rate((*QJAX, "bench", path, *common)), lambda: rate(peer))
    qjax_ts, llama_cpp_ts = (median([one["avg_ts"] for one in side]) for side in (ours, theirs))
    token_bytes = bytes_per_token(path, n_depth + n_gen // 2)
    return {
        "model": path.stem,
        "qjax_ts": qjax_ts,
        "llama_cpp_ts": llama_cpp_ts,
        "ratio": qjax_ts / llama_cpp_ts,
        "goal": GOALS.get(path.stem.rpartition("-")[0]),
        "token_mb": token_bytes / 1e6,
        "qjax_gb_s": qjax_ts * token_bytes / 1e9,
        "llama_cpp_gb_s": llama_cpp_ts * token_bytes / 1e9,
        "limit": qjax_ts * token_bytes / 1e9 / limits.memory_gb_s,
        "compile_s": median([one["compile_ns"] for one in ours]) / 1e9,
        "anonymous_rss": max(one["anonymous_rss"] for one in ours),
        "n_gen": n_gen,
        "n_depth": n_depth,
        "qjax_stddev_ts": median([one["stddev_ts"] for one in ours]),
        "llama_cpp_stddev_ts": median([one["stddev_ts"] for one in theirs]),
    }


def bytes_per_token(path: Path, n_cached: int) -> int:
    """Read to make one token: the weights, and the keys and values of so many tokens in float16."""
    source = open_source(path)
    skipped = () if source.config.tied else ("token_embd.weight",)
    weights = sum(t.format.nbytes(t.shape) for name, t in source.tensors.items() if name not in skipped)
    c = source.config
    return weights + 2 * c.n_layers * c.n_kv_heads * c.head_dim * CACHE_BYTES * n_cached


def line(rows: Sequence[Row]) -> str:
    """The least squares of time per token by bytes per token, weighted so that errors count in per cent."""
    gb, ms = (np.array(values) for values in zip(*((row["token_mb"] / 1e3, 1e3 / row["qjax_ts"]) for row in rows)))
    slope, start = np.polyfit(gb, ms, 1, w=1 / ms)
    off = np.abs(slope * gb + start - ms) / ms
    return f"{start:.1f} ms + {slope:.1f} ms a GB ({1e3 / slope:.1f} GB/s); the models lie up to {off.max():.0%} off it"


def main() -> int:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("-n", "--n-gen", type=int, default=64)
    parser.add_argument("-d", "--n-depth", type=int, default=128)
    parser.add_argument("-r", "--repetitions", type=int, default=3, help="in each run")
    arguments = parser.parse_args()
    options = dict(
        n_gen=arguments.n_gen, n_depth=arguments.n_depth, repetitions=arguments.repetitions, turns=arguments.turns
    )
    return side_by_side.measure(arguments, COLUMNS, lambda path, limits: row(path, limits, **options), line)


if __name__ == "__main__":
    sys.exit(main())
