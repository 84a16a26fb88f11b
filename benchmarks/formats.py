"""Quantizes many weights of each kind to each format: compares the bytes with libgguf's and times both.

    python benchmarks/formats.py [--weights 16777216] [--json benchmarks/results/formats.json]

Prints a row for each format and kind of weights, last "0 differing bytes of N"; exit code 1 if any differ.
The kinds are those of tests/oracles/weights.py.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

import qjax

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from oracles import ggml, weights  # noqa: E402

FORMATS = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
KINDS = {**weights.KINDS, "negative_zero": weights.negative_zero}


def timed(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=2**24, help="of each kind, a multiple of 4096")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()

    rows = []
    print(f"{'format':6} {'weights':22} {'bytes':>10} {'differing':>9} {'Mweights/s':>10} {'libgguf':>8}")
    for kind in KINDS:
        x = weights.draw(KINDS[kind], arguments.weights)
        on_device = jax.device_put(x)
        for name in FORMATS:
            jax.block_until_ready(qjax.quantize(on_device, name))  # compiles
            tensor, time_s = timed(lambda name=name, x=on_device: jax.block_until_ready(qjax.quantize(x, name)))
            theirs, peer_time_s = timed(lambda name=name, x=x: ggml.PEERS["libgguf"](name, x))
            row = {
                "format": name,
                "weights": kind,
                "n_bytes": theirs.size,
                "n_differing": int(np.count_nonzero(np.asarray(tensor.to_bytes()) != theirs)),
                "mweights_per_s": x.size / time_s / 1e6,
                "libgguf_mweights_per_s": x.size / peer_time_s / 1e6,
            }
            rows.append(row)
            print(
                f"{name:6} {kind:22} {row['n_bytes']:10} {row['n_differing']:9} "
                f"{row['mweights_per_s']:10.0f} {row['libgguf_mweights_per_s']:8.0f}"
            )
    differing = sum(row["n_differing"] for row in rows)
    print(f"{differing} differing bytes of {sum(row['n_bytes'] for row in rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
