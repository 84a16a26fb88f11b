"""What the machine is and how fast: figures against arithmetic, and a clock that is told the time."""

import numpy as np
import pytest

import qjax
from qjax import machine
from qjax.machine import memory_status


def test_memory_status():
    if not memory_status():
        pytest.skip("no /proc/self/status on this system")
    before = memory_status()["RssAnon"]
    held = np.ones(2**26, np.uint8)
    assert 0.9 * held.nbytes < memory_status()["RssAnon"] - before < 1.5 * held.nbytes
    assert memory_status(pid=2**31 - 1) == {}


def test_seconds_are_those_of_the_fastest_run_but_the_first(monkeypatch):
    clock = iter(np.cumsum([0, 1, 0, 9, 0, 4, 0, 7]).tolist())
    monkeypatch.setattr(machine.time, "perf_counter_ns", lambda: int(next(clock) * 1e9))
    assert machine.seconds(lambda: None, runs=3) == 4


def test_product_rates(monkeypatch):
    """In a second: two operations for each weight and row.  Q4_0 has 18 bytes for 32 weights."""
    products = []
    monkeypatch.setattr(machine, "seconds", lambda product: products.append(product()) or 1.0)
    w = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    dense, packed = (machine.product_rates(m, (1, 16)) for m in (qjax.quantize(w, "F32"), qjax.quantize(w, "Q4_0")))
    for rates, n_bytes in ((dense, 96 * 64 * 4), (packed, 96 * 64 * 18 / 32)):
        assert [rate.n_rows for rate in rates] == [1, 16]
        assert [rate.intensity for rate in rates] == pytest.approx([2 * n * 96 * 64 / n_bytes for n in (1, 16)])
        assert [rate.gflop_s for rate in rates] == pytest.approx([2 * n * 96 * 64 / 1e9 for n in (1, 16)])
    assert [product.shape for product in products] == 2 * [(1, 96), (16, 96)]
