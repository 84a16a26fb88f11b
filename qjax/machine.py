"""What this machine is, and how fast products with matrices can be and are on it."""

import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.models.transformer import laid_out
from qjax.ops.linear import matmul
from qjax.tensor import QTensor


def cpu_info() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def gpu_info() -> str:
    """The accelerators that JAX has, "" for none."""
    return ", ".join(device.device_kind for device in jax.devices() if device.platform != "cpu")


def n_threads() -> int:
    """Cores that this process may use; XLA has as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_status(pid: int | str = "self") -> dict[str, int]:
    """Bytes of memory of a process by Linux's names (VmHWM: the most so far, RssAnon: what no file stands behind);
    empty for a process that has ended, and on other systems."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {name: int(kib) * 1024 for name, kib in re.findall(r"(\w+):\s+(\d+) kB", text)}


# ── how long something takes ─────────────────────────────────────────────────────────────────────────


def elapsed_ns(function: Callable[[], Any]) -> tuple[int, Any]:
    """How long ``function`` takes until its arrays are there, and what it returns."""
    start = time.perf_counter_ns()
    result = jax.block_until_ready(function())
    return time.perf_counter_ns() - start, result


def seconds(function: Callable[[], Any], runs: int = 5) -> float:
    """The time of the fastest run after one to warm up, until its arrays are there."""
    return min([elapsed_ns(function)[0] for _ in range(runs + 1)][1:]) / 1e9


# ── products ─────────────────────────────────────────────────────────────────────────────────────────


class Limits(NamedTuple):
    """What XLA reaches here for products of dense matrices."""

    memory_gb_s: float
    """10⁹ bytes a second: one row with a float32 matrix that no cache holds"""
    float32_gflop_s: float
    """10⁹ operations a second: 512 rows with a matrix of 8192 × 2048"""
    bfloat16_gflop_s: float
    """the same with bfloat16 factors, summed in float32"""

    def __str__(self) -> str:
        return (
            f"{self.memory_gb_s:.0f} GB/s, {self.float32_gflop_s:.0f} GFLOP/s in float32, "
            f"{self.bfloat16_gflop_s:.0f} in bfloat16"
        )


def limits() -> Limits:
    """Measures them."""
    key = jax.random.key(0)
    w, x = jax.random.normal(key, (16384, 4096)), jax.random.normal(key, (4096,))
    memory_gb_s = w.nbytes / seconds(_product(w, x)) / 1e9
    products = _dense_products(8192)
    n_operations = 2 * 8192 * 2048 * 512
    return Limits(memory_gb_s, *(n_operations / seconds(products[dtype]) / 1e9 for dtype in ("float32", "bfloat16")))


def bfloat16_speedup() -> float:
    """How many times as fast as products of float32 those of bfloat16 are; measured in turns, for something else may
    run for a moment."""
    products = _dense_products(1024)
    turns = [{dtype: seconds(product, runs=3) for dtype, product in products.items()} for _ in range(3)]
    return min(turn["float32"] for turn in turns) / min(turn["bfloat16"] for turn in turns)


def _dense_products(d_out: int) -> dict[str, Callable[[], Array]]:
    """512 rows with a matrix (d_out, 2048) in each dtype, summed in float32."""
    # Drawn by numpy: a program that draws them would take longer to compile than the product to run.
    draw = np.random.default_rng(0).standard_normal
    factors = [draw(shape, np.float32) for shape in ((d_out, 2048), (2048, 512))]
    return {dtype: _product(*(jnp.asarray(factor, dtype) for factor in factors)) for dtype in ("float32", "bfloat16")}


def _product(w: Array, x: Array) -> Callable[[], Array]:
    multiply = jax.jit(lambda w, x: jnp.matmul(w, x, preferred_element_type=jnp.float32))
    return lambda: multiply(w, x)


class ProductRate(NamedTuple):
    """How fast a product with a matrix ran."""

    n_rows: int
    """of the other factor"""
    intensity: float
    """operations for each byte of the matrix"""
    gflop_s: float
    """10⁹ operations a second: a multiplication and an addition for each weight and row"""


def product_rates(w: Array | QTensor, n_rows: Sequence[int]) -> list[ProductRate]:
    """Times `matmul` of w, (d_out, d_in), with so many rows in float32; a single one as text is made, w laid out for
    it (see `laid_out`)."""
    multiply, for_one_row = jax.jit(matmul), laid_out(w)
    rates = []
    for n in n_rows:
        x, matrix = jax.random.normal(jax.random.key(n), (n, w.shape[-1])), for_one_row if n == 1 else w
        n_operations = 2 * n * w.size
        time_s = seconds(lambda x=x, matrix=matrix: multiply(x, matrix))
        rates.append(ProductRate(n, n_operations / w.nbytes, n_operations / time_s / 1e9))
    return rates
