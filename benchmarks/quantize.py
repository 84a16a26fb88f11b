"""Times quantization and dequantization beside ggml's C, both warm and on all cores.

    python benchmarks/quantize.py [--weights 4194304] [--formats Q4_K,IQ3_S] [--json benchmarks/results/quantize.json]

Peers: libgguf, and ggml itself where QJAX_LLAMA_CPP names a folder with libggml-base.so; both get a range of rows a
core, as llama-quantize shares them out.  A ratio above 1 means that qjax is faster than the faster of the two.
Dequantization is also compared with gguf's, which is numpy on one core.  Of an importance matrix one row serves all
rows of weights.  With many more weights than the default all of them wait for fresh pages of memory.  Speeds are in
million weights a second, the best of some runs; compilation is of the quantizer alone, without the cache on disk.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
from side_by_side import ROOT

import qjax
from qjax.formats import Format
from qjax.formats.plain import Plain
from qjax.machine import n_threads, seconds
from qjax.methods import rtn
from qjax.methods.importance import Importance

sys.path.insert(0, str(ROOT / "tests"))
from oracles import ggml, weights

LIBGGUF = importlib.util.find_spec("libgguf") is not None
LIBGGML = "QJAX_LLAMA_CPP" in os.environ
# gguf is slow enough to be timed on fewer.
GGUF_WEIGHTS = 2**20
COLUMNS = {
    "format": ("format", ""),
    "imatrix": ("imatrix", ""),
    "mweights_per_s": ("quantizing, M/s", ".1f"),
    "libgguf": ("libgguf", ".1f"),
    "libggml": ("libggml", ".1f"),
    "ratio": ("ratio", ".2f"),
    "compile_s": ("compiled in, s", ".1f"),
    "dequantize": ("decoding, M/s", ".0f"),
    "dequantize_libgguf": ("libgguf's", ".0f"),
    "dequantize_libggml": ("libggml's", ".0f"),
    "dequantize_ratio": ("its ratio", ".2f"),
    "dequantize_gguf": ("gguf", ".0f"),
}


def on_all_cores(function: Callable, rows: np.ndarray) -> Callable[[], Any]:
    """``function`` of ranges of ``rows``, one a core at a time."""
    parts = [part for part in np.array_split(rows, 4 * n_threads()) if len(part)]
    function(parts[0][:1])  # libgguf makes its tables at first use, and two threads at once tread on each other
    pool = ThreadPoolExecutor(n_threads())
    return lambda: list(pool.map(function, parts))


def quantizers(format: Format) -> dict[str, Callable | None]:
    """Of each peer, None where it does not know the format or is not there."""
    return {
        "libgguf": ggml.PEERS["libgguf"] if _libgguf_knows(format) else None,
        "libggml": ggml.libggml_quantize if LIBGGML else None,
    }


def decoders(format: Format) -> dict[str, Callable | None]:
    """Likewise; of floats, which are only copied, there is none but gguf's."""
    known = ggml.decoders(format.name)
    return {
        "libgguf": dequantize_libgguf if _libgguf_knows(format) and not isinstance(format, Plain) else None,
        "libggml": known.get("libggml") if LIBGGML else None,
        "gguf": known.get("gguf"),
    }


def _libgguf_knows(format: Format) -> bool:
    if not LIBGGUF:
        return False
    import libgguf

    return format.name in libgguf.GGMLQuantizationType.__members__


def peer_speed(function: Callable | None, name: str, rows: np.ndarray, n_weights: int, *more: Any) -> float | None:
    """Million weights a second of a peer's ``function(name, rows, *more)`` on all cores, None where there is none."""
    if function is None:
        return None
    return n_weights / seconds(on_all_cores(lambda part: function(name, part, *more), rows)) / 1e6


def ratio(ours: float, *theirs: float | None) -> float | None:
    """How many times as fast as the fastest of them."""
    known = [speed for speed in theirs if speed]
    return ours / max(known) if known else None


def dequantize_libgguf(name: str, data: np.ndarray) -> bytes:
    import libgguf

    format = qjax.formats.get(name)
    n_columns = data.shape[1] // format.type_size * format.block_size
    return libgguf.dequantize_rows_raw(libgguf.GGMLQuantizationType[name], data, len(data), n_columns)


def measure(format: Format, x: np.ndarray, importance: np.ndarray | None) -> dict[str, Any]:
    """A row of the table."""
    name, n_columns = format.name, x.shape[1]
    weighing = Importance() if importance is None else Importance({name: importance[None]})
    options = rtn.Options(weighing)
    array = jnp.asarray(x)  # as a loaded model holds its weights; peers take numpy's

    def quantize() -> Any:
        return jax.block_until_ready(rtn.quantize_tensor(name, array, format, options))

    jax.clear_caches()
    start = time.perf_counter()
    quantize()
    first_s = time.perf_counter() - start
    quantize_s = seconds(quantize)
    row: dict[str, Any] = {
        "format": name,
        "imatrix": None if importance is None else "yes",
        "n_weights": x.size,
        "mweights_per_s": x.size / quantize_s / 1e6,
        "compile_s": first_s - quantize_s,
    }
    t = qjax.quantize(x, format, importance=importance)
    row["dequantize"] = x.size / seconds(lambda: jax.block_until_ready(qjax.dequantize(t))) / 1e6
    if format.ggml_id is None:
        return row

    more = () if importance is None else (importance,)
    for peer, function in quantizers(format).items():
        row[peer] = peer_speed(function, name, x, x.size, *more)
    row["ratio"] = ratio(row["mweights_per_s"], row["libgguf"], row["libggml"])
    data, known = np.asarray(t.to_bytes()).reshape(len(x), -1), decoders(format)
    for peer in ("libgguf", "libggml"):
        row[f"dequantize_{peer}"] = peer_speed(known[peer], name, data, x.size)
    row["dequantize_ratio"] = ratio(row["dequantize"], row["dequantize_libgguf"], row["dequantize_libggml"])
    if slow := known["gguf"]:
        few = data[: max(GGUF_WEIGHTS // n_columns, 1)]
        row["dequantize_gguf"] = len(few) * n_columns / seconds(lambda: slow(name, few), 1) / 1e6
    return row


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

    rows = []
    for format in chosen:
        without, weighed = not format.needs_importance, format.uses_importance
        for weighing in (None,) * without + (importance,) * weighed:
            rows.append(measure(format, x, weighing))
            print(side_by_side.table(rows[-1:], COLUMNS), flush=True)
    print(f"\n{side_by_side.table(rows, COLUMNS)}")
    side_by_side.write(arguments.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
