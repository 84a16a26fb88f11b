"""Compares what weights become in every format, by hash, with what ggml's C makes of them, whatever runs this:

    python tools/hashes.py [--formats Q4_0,Q4_K] [--ways slabs,rows] [--slab 8192] [--threads 1]

The weights are the same on every machine.  tests/data/hashes.json has the hashes, which ggml's C gives (libgguf, and
what QJAX_LLAMA_CPP names for the types that it lacks); this writes it:

    python tools/hashes.py --write

Prints a row for each format, without and with importance, and each way to quantize, and where what another device than
a CPU made differs, the share of blocks; exit code 1 if any differs.
"""

import argparse
import functools
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax import formats
from qjax.formats import Format
from qjax.methods import rtn
from qjax.methods.importance import Importance
from qjax.tensor import QTensor, quantize

ROOT = Path(__file__).resolve().parents[1]
HASHES = ROOT / "tests" / "data" / "hashes.json"
ROWS, COLUMNS = 64, 1024


def bits(seed: int, n: int) -> np.ndarray:
    """``n`` random uint64: of the bit generator itself, for distributions may change from version to version."""
    return np.random.Philox(key=seed).random_raw(n)


def weights() -> np.ndarray:
    """Float32 (ROWS, COLUMNS): bell-shaped, in the second half with scales from 2^-8 to 2^7 by blocks of 32, and every
    61st weight an outlier.  Sums and powers of two, so that they are exact."""
    drawn = bits(0, ROWS * COLUMNS).view(np.uint16).reshape(-1, 4).astype(np.int64).sum(axis=1) - 2 * 0xFFFF
    x = np.ldexp(drawn.astype(np.float32), -18).reshape(2, -1, 32)
    scales = (bits(1, x.shape[1]) >> np.uint64(60)).astype(np.int32) - 8
    x[1] = np.ldexp(x[1], scales[:, None])
    x[1].reshape(-1)[::61] *= 16
    return x.reshape(ROWS, COLUMNS)


def importance() -> np.ndarray:
    """Float32 (COLUMNS,): from 2^-16 to 1, and some zeros."""
    x = np.ldexp((bits(2, COLUMNS) >> np.uint64(48)).astype(np.float32) + 1, -16)
    x[::97] = 0
    return x


Quantize = Callable[[Any], QTensor]


def slabs(x: np.ndarray, format: Format, importance: np.ndarray | None) -> Any:
    """As files get them."""
    weighed = Importance({} if importance is None else {"w": importance[None]})
    return rtn.quantize_tensor("w", jnp.asarray(x), format, rtn.Options(weighed))


def sharded(x: np.ndarray, quantize: Quantize) -> QTensor:
    """The rows divided among all devices."""
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    return quantize(jax.device_put(x, NamedSharding(mesh, PartitionSpec("rows"))))


# Beside `slabs`: (weights, quantize) -> QTensors with the rows in their order.
WAYS: dict[str, Callable[[np.ndarray, Quantize], Any]] = {
    "whole": lambda x, quantize: quantize(x),
    "rows": lambda x, quantize: [quantize(row) for row in x],
    "batches": lambda x, quantize: [quantize(x[:1]), quantize(x[1:8]), quantize(x[8:].reshape(7, 8, COLUMNS))],
    "vmap": lambda x, quantize: jax.vmap(quantize)(x.reshape(16, 4, COLUMNS)),
    "sharded": sharded,
}


def ours(name: str, weighted: bool, way: str = "slabs") -> bytes:
    """The bytes that this package gives, here."""
    x, format, by = weights(), formats.get(name), importance() if weighted else None
    of_rows = functools.partial(quantize, format=format, importance=by)
    made = slabs(x, format, by) if way == "slabs" else WAYS[way](x, of_rows)
    tensors = made if isinstance(made, list) else [made]
    return b"".join(np.asarray(t.to_bytes() if isinstance(t, QTensor) else t).tobytes() for t in tensors)


def theirs(name: str, weighted: bool) -> bytes:
    """The bytes that ggml's C gives."""
    sys.path.insert(0, str(ROOT / "tests"))
    from oracles import ggml

    return ggml.reference(name, weights(), importance() if weighted else None).tobytes()


def share(data: bytes, other: bytes, format: Format) -> float:
    """Of the blocks of ``format`` in two tensors of one shape, the part that differs, 0 to 1."""
    blocks = (np.frombuffer(of, np.uint8).reshape(-1, format.type_size) for of in (data, other))
    return float(np.mean(np.any(np.not_equal(*blocks), axis=1)))


def how_it_differs(of: str, data: bytes) -> str:
    """What to print of a case's bytes: "same" by the stored hash, else that it DIFFERS, and how much on no CPU."""
    if sha256(data) == json.loads(HASHES.read_text())[of]:
        return "same"
    if jax.default_backend() == "cpu":
        return "DIFFERS"
    with jax.default_device(jax.devices("cpu")[0]):
        of_cpu = ours(*case(of), "whole")  # not in threads, which this device would not reach
    return f"DIFFERS in {share(data, of_cpu, formats.get(case(of)[0])):.3%} of blocks"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def cases(names: Sequence[str] = ()) -> list[str]:
    """``Q4_0`` and ``Q4_0, importance``, of the formats named or all that have bytes and a quantizer."""
    chosen = [f for f in map(formats.get, names or formats.names()) if f.encodable and f.ggml_id is not None]
    return [
        f.name + (", importance" if weighted else "")
        for f in chosen
        for weighted in (False, True)
        if (f.uses_importance if weighted else not f.needs_importance)
    ]


def case(of: str) -> tuple[str, bool]:
    """(format, weighted)"""
    name, _, weighted = of.partition(", ")
    return name, bool(weighted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="", help="names, separated by commas; default: all")
    parser.add_argument("--ways", default="slabs", help=f"slabs, as for files; {', '.join(WAYS)}")
    parser.add_argument("--slab", type=int, help="weights quantized at a time")
    parser.add_argument("--threads", type=int, help="slabs quantized at a time")
    parser.add_argument("--write", action="store_true", help="write what ggml's C gives")
    arguments = parser.parse_args()
    chosen = cases([*filter(None, arguments.formats.split(","))])
    if arguments.write:
        HASHES.write_text(json.dumps({of: sha256(theirs(*case(of))) for of in chosen}, indent=1) + "\n")
        return 0
    if arguments.slab:
        rtn.SLAB_WEIGHTS = (arguments.slab, arguments.slab)
    rtn.THREADS = arguments.threads or rtn.THREADS
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    print(f"Python {platform.python_version()}, jax {jax.__version__}, numpy {np.__version__}, {devices}")
    ways, differing = arguments.ways.split(","), 0
    for of in chosen:
        for way in ways:
            said = how_it_differs(of, ours(*case(of), way))
            differing += said != "same"
            print(f"{of:20} {way:8} {said}", flush=True)
    print(f"{differing} of {len(chosen) * len(ways)} differ")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
