"""Times quantization and dequantization beside ggml's C, both warm and on all cores.

    python benchmarks/quantize.py [--weights 4194304] [--formats Q4_K,IQ3_S] [--json benchmarks/results/quantize.json]

Peers: libgguf, and ggml itself where QJAX_LLAMA_CPP names a folder with libggml-base.so; both get a range of rows a
core, as llama-quantize shares them out.  A ratio above 1 means that qjax is faster than the faster of the two.
Dequantization is also compared with gguf's, which is numpy on one core.  Of an importance matrix ("imatrix" in the
first column) one row serves all rows of weights.  With many more weights than the default all of them wait for fresh
pages of memory.  Speeds are in million weights a second, the best of some runs;
compilation is of the quantizer alone, without the cache on disk.
"""

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import side_by_side
from side_by_side import ROOT, seconds

import qjax
from qjax.bench import n_threads
from qjax.formats import Format
from qjax.methods import rtn
from qjax.methods.importance import Importance

sys.path.insert(0, str(ROOT / "tests"))
from oracles import ggml, weights

# gguf is slow enough to be timed on fewer.
GGUF_WEIGHTS = 2**20
COLUMNS = (
    "mweights_per_s", "libgguf", "libggml", "ratio", "compile_s",
    "dequantize", "dequantize_libgguf", "dequantize_libggml", "dequantize_ratio", "dequantize_gguf",
)  # fmt: skip


def on_all_cores(function: Callable, rows: np.ndarray) -> Callable[[], Any]:
    """``function`` of ranges of ``rows``, one a core at a time."""
    parts = [part for part in np.array_split(rows, 4 * n_threads()) if len(part)]
    pool = ThreadPoolExecutor(n_threads())
    return lambda: list(pool.map(function, parts))


def peer_speed(function: Callable, rows: np.ndarray, n_weights: int) -> float | None:
    """Million weights a second, None where the peer does not know the format or is not there."""
    try:
        function(rows[:1])
    except (AttributeError, KeyError, NotImplementedError, ValueError, pytest.skip.Exception):
        return None
    return n_weights / seconds(on_all_cores(function, rows)) / 1e6


def ratio(ours: float, *theirs: float | None) -> float | None:
    """How many times as fast as the fastest of them."""
    known = [speed for speed in theirs if speed]
    return ours / max(known) if known else None


def dequantize_libgguf(name: str, data: np.ndarray, n_columns: int) -> bytes:
    import libgguf

    return libgguf.dequantize_rows_raw(libgguf.GGMLQuantizationType[name], data, len(data), n_columns)


def measure(format: Format, x: np.ndarray, importance: np.ndarray | None) -> dict[str, Any]:
    """A row of the table."""
    name, n_columns = format.name, x.shape[1]
    weighing = Importance() if importance is None else Importance({name: importance[None]})
    options = rtn.Options(weighing)

    array = jnp.asarray(x)

    def quantize() -> Any:
        return jax.block_until_ready(rtn.quantize_tensor(name, array, format, options))

    jax.clear_caches()
    start = time.perf_counter()
    quantize()
    first_s = time.perf_counter() - start
    quantize_s = seconds(quantize)
    row: dict[str, Any] = {
        "format": name,
        "imatrix": importance is not None,
        "n_weights": x.size,
        "mweights_per_s": x.size / quantize_s / 1e6,
        "compile_s": first_s - quantize_s,
    }
    t = qjax.quantize(x, format, importance=importance)
    row["dequantize"] = x.size / seconds(lambda: jax.block_until_ready(qjax.dequantize(t))) / 1e6
    if format.ggml_id is None:
        return row

    for peer, function in {"libgguf": ggml.PEERS["libgguf"], "libggml": ggml.libggml_quantize}.items():
        arguments = () if importance is None else (importance,)
        row[peer] = peer_speed(lambda part, f=function, a=arguments: f(name, part, *a), x, x.size)
    row["ratio"] = ratio(row["mweights_per_s"], row["libgguf"], row["libggml"])
    data = np.asarray(t.to_bytes())
    blocks, few = data.reshape(-1, format.type_size), data[: max(GGUF_WEIGHTS // n_columns, 1)]
    row["dequantize_libgguf"] = peer_speed(lambda part: dequantize_libgguf(name, part, n_columns), data, x.size)
    row["dequantize_libggml"] = peer_speed(lambda part: ggml.libggml_dequantize(name, part), blocks, x.size)
    row["dequantize_ratio"] = ratio(row["dequantize"], row["dequantize_libgguf"], row["dequantize_libggml"])
    row["dequantize_gguf"] = gguf_speed(name, few, len(few) * n_columns)
    return row


def gguf_speed(name: str, data: np.ndarray, n_weights: int) -> float | None:
    try:
        return n_weights / seconds(lambda: ggml.dequantize(name, data), 1) / 1e6
    except (NotImplementedError, KeyError):
        return None


def shown(row: dict[str, Any]) -> str:
    label = row["format"] + (" imatrix" if row["imatrix"] else "")
    cells = ("–" if row.get(column) is None else f"{row[column]:.3g}" for column in COLUMNS)
    return f"{label:16}" + "".join(f"{cell:>{len(column) + 2}}" for column, cell in zip(COLUMNS, cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=2**22, help="a multiple of 4096")
    parser.add_argument("--formats", help="names, separated by commas; default: all that can be written")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()

    jax.config.update("jax_enable_compilation_cache", False)
    known = [qjax.formats.get(name) for name in qjax.formats.names()]
    chosen = [f for f in known if f.for_weights and f.name != "F32"]
    if arguments.formats:
        chosen = [qjax.formats.get(name) for name in arguments.formats.split(",")]
    x = weights.draw(weights.gaussian, arguments.weights)
    importance = weights.importance(x.shape[1])

    print(f"{'':16}" + "".join(f"{column:>{len(column) + 2}}" for column in COLUMNS))
    rows = []
    for format in chosen:
        without, weighed = not format.needs_importance, format.uses_importance
        for weighing in (None,) * without + (importance,) * weighed:
            rows.append(measure(format, x, weighing))
            print(shown(rows[-1]), flush=True)
    side_by_side.write(arguments.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
