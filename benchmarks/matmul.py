"""Times the bodies of `qjax.matmul` beside a dense product of the same shape, in turns.

    python benchmarks/matmul.py [--shape 4096,4096] [--rows 1,16,512] [--formats Q4_0,Q4_K] [--json FILE]

Each format with each body that fits this platform (`qjax.explain_matmul`); on a CPU also laid out as columns.  GB/s:
the bytes of the packed matrix by the time of the product, to compare with the speed of reading memory (first line).
Dense: the faster of a float32 and a bfloat16 product.  A ratio above 1 means that ours is faster.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import side_by_side
from side_by_side import Row, table, turns

import qjax
from qjax.machine import limits, seconds
from qjax.ops.kernels.columns import Columns, columns

COLUMNS = {
    "format": ("format", ""),
    "n_rows": ("rows", ""),
    "body": ("body", ""),
    "packed_mb": ("MB", ".1f"),
    "us": ("µs", ".0f"),
    "gb_s": ("GB/s", ".1f"),
    "dense_us": ("dense, µs", ".0f"),
    "dense": ("in", ""),
    "ratio": ("ratio", ".2f"),
}
FORMATS = "Q4_0,Q8_0,Q4_K,Q5_K,Q6_K,IQ4_XS"


def bodies(x: jax.Array, w: qjax.QTensor) -> Iterator[tuple[str, Any]]:
    """(body, the matrix as it takes it), the one that `matmul` chooses first."""
    if jax.default_backend() == "cpu" and x.shape[0] == 1:
        laid_out = jax.jit(columns)(w)
        if isinstance(laid_out, Columns):
            yield "columns", laid_out
    for body in qjax.explain_matmul(x, w).fitting:
        yield body, w


def measured(format: str, shape: tuple[int, int], n_rows: int) -> Iterator[Row]:
    dense = jax.random.normal(jax.random.key(0), shape)
    w, x = qjax.quantize(dense, format), jax.random.normal(jax.random.key(1), (n_rows, shape[1]))
    plain = jax.jit(lambda x, w: qjax.matmul(x, w, body="dense"))
    factors = {name: (x.astype(name), dense.astype(name)) for name in ("float32", "bfloat16")}
    for body, matrix in bodies(x, w):
        product = jax.jit(lambda x, w, body=body: qjax.matmul(x, w, body=body))
        ours, *theirs = turns(
            3,
            lambda product=product, matrix=matrix: seconds(lambda: product(x, matrix)),
            *(lambda pair=pair: seconds(lambda: plain(*pair)) for pair in factors.values()),
        )
        ours_s, (dense_s, name) = min(ours), min((min(times), name) for name, times in zip(factors, theirs))
        yield {
            "format": format,
            "n_rows": n_rows,
            "body": body,
            "packed_mb": w.nbytes / 1e6,
            "us": 1e6 * ours_s,
            "gb_s": w.nbytes / ours_s / 1e9,
            "dense_us": 1e6 * dense_s,
            "dense": name,
            "ratio": dense_s / ours_s,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: tuple(map(int, text.split(",")))  # noqa: E731
    parser.add_argument("--shape", type=numbers, default=(4096, 4096), help="output features, input features")
    parser.add_argument("--rows", type=numbers, default=(1, 16, 512), help="of x")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--json", type=Path, help="write the rows there, with the device's name")
    arguments = parser.parse_args()
    found = limits()
    print(found, flush=True)
    rows: list[Row] = []
    for format in arguments.formats.split(","):
        for n_rows in arguments.rows:
            rows += measured(format, arguments.shape, n_rows)
    print(table(rows, COLUMNS))
    side_by_side.write(arguments.json, rows, limits=found._asdict(), turns=3, conclusion="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
