"""Times loading, and what it leaves in memory, beside llama.cpp, in turns: whole processes up to the first token.

    QJAX_LLAMA_CPP=... python benchmarks/load.py MODEL... [--json FILE]

Files and compiled programs come from the disk's cache.  load: `qjax.load(only_generate=True)` alone, as `qjax
generate` has it, of a process that has imported everything; limit: bytes of the file a second, beside the speed of
reading memory (see benchmarks/decode.py).  memory: what is anonymous, without the pages of mapped files, at most and
after loading, by the size of the file; what Python and its libraries take before is subtracted from ours.  first
token: `qjax generate -n 1` and llama-completion -n 1, from start to end; a ratio above 1 means that qjax is faster.
"""

import json
import sys
from pathlib import Path

import side_by_side
from side_by_side import QJAX, Row, llama_cpp, median, run

from qjax.machine import Limits, n_threads

COLUMNS = {
    "model": ("model", ""),
    "file_mb": ("file, MB", ".0f"),
    "load_s": ("load, s", ".2f"),
    "goal": ("under", ""),
    "limit": ("of the limit", ".0%"),
    "kept": ("memory/file after", ".2f"),
    "peak": ("at most", ".2f"),
    "llama_cpp_peak": ("llama.cpp's", ".2f"),
    "qjax_s": ("qjax to first token, s", ".2f"),
    "llama_cpp_s": ("llama.cpp, s", ".2f"),
    "ratio": ("ratio", ".2f"),
}
GOALS = {"llama-8b": "60 s, 1.3 × file"}
PROMPT = ("-p", "Once upon a time", "-n", "1")
LOAD = """
import json, sys, jax, qjax
from qjax.machine import elapsed_ns, memory_status
jax.numpy.zeros(1).block_until_ready()
qjax.load("tiny")
before = memory_status().get("RssAnon", 0)
models = []
time_ns, _ = elapsed_ns(lambda: models.append(qjax.load(sys.argv[1], only_generate=True)) or models[0].params)
print(json.dumps({"load_s": time_ns / 1e9, "before": before, "after": memory_status().get("RssAnon", 0)}))
"""


def row(path: Path, limits: Limits, *, turns: int) -> Row:
    def load() -> dict[str, float]:
        child = run((sys.executable, "-c", LOAD, path))
        return json.loads(child.output) | {"most": child.anonymous}

    peer = (llama_cpp("llama-completion"), "-m", path, *PROMPT, "-no-cnv", "-t", str(n_threads()))
    loads, ours, theirs = side_by_side.turns(
        turns, load, lambda: run((*QJAX, "generate", path, *PROMPT)), lambda: run(peer)
    )
    size = path.stat().st_size
    load_s = median([one["load_s"] for one in loads])
    qjax_s, llama_cpp_s = (median([one.wall_s for one in side]) for side in (ours, theirs))
    return {
        "model": path.stem,
        "file_mb": size / 1e6,
        "load_s": load_s,
        "goal": GOALS.get(path.stem.rpartition("-")[0], "1.3 × file"),
        "limit": size / load_s / 1e9 / limits.memory_gb_s,
        "kept": max(one["after"] - one["before"] for one in loads) / size,
        "peak": max(one["most"] - one["before"] for one in loads) / size,
        "llama_cpp_peak": max(one.anonymous for one in theirs) / size,
        "qjax_s": qjax_s,
        "llama_cpp_s": llama_cpp_s,
        "ratio": llama_cpp_s / qjax_s,
        "generating_peak": max(one.anonymous for one in ours) / size,
    }


def main() -> int:
    arguments = side_by_side.parser(__doc__).parse_args()
    return side_by_side.measure(arguments, COLUMNS, lambda path, limits: row(path, limits, turns=arguments.turns))


if __name__ == "__main__":
    sys.exit(main())
