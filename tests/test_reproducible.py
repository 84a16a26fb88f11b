"""The same bytes from any number of threads, devices and cores, slabs and batches, and from every version of JAX.

Each row is a process of tools/hashes.py, which compares with what ggml's C gave (tests/data/hashes.json).  Of versions
it is run by CI (.github/workflows/ci.yml).
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_house import tool

import qjax

HASHES = ROOT / "tools" / "hashes.py"
EACH_FAMILY = "F16,BF16,Q4_0,Q5_1,Q8_0,Q3_K,Q4_K,Q6_K,IQ4_NL,IQ3_S,IQ2_XS,IQ1_M,TQ1_0,Q1_0,MXFP4,NVFP4"

# name: (cores, XLA_FLAGS, arguments)
SETTINGS = {
    "two cores": (2, "", []),
    "one core": (1, "", []),
    "threads of XLA": (2, "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1", []),
    "one slab at a time": (2, "", ["--threads", 1]),
    "small slabs": (2, "", ["--slab", 4096]),
    "one slab": (2, "", ["--slab", 2**16]),
    "batches": (2, "", ["--ways", "whole,rows,batches,vmap"]),
    "two devices": (2, "--xla_force_host_platform_device_count=2", ["--ways", "slabs,sharded"]),
    "eight devices": (2, "--xla_force_host_platform_device_count=8", ["--ways", "slabs,sharded"]),
}

# A program on so many cores, where the system can say so.
BOUND = """
import os, runpy, sys
_, cores, *sys.argv = sys.argv
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(cores)])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def compared(formats, cores, flags, arguments):
    """What tools/hashes.py prints, in a process of its own."""
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BOUND, cores, HASHES, "--formats", formats, *arguments]
    ran = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    return ran.stdout


def test_all_at_once():
    """One core and thread, eight devices, small slabs: what the process of these tests has not."""
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
    said = compared("Q4_0", 1, flags, ["--ways", "slabs,sharded", "--slab", 8192, "--threads", 1])
    assert said.endswith("0 of 4 differ\n")


@pytest.mark.exact
@pytest.mark.parametrize("setting", SETTINGS)
def test_each_setting(setting):
    compared(EACH_FAMILY, *SETTINGS[setting])


@pytest.mark.exact
def test_the_hashes_are_ggmls(llama_cpp):
    """Those that are stored."""
    hashes = tool("hashes")
    stored = json.loads(hashes.HASHES.read_text())
    assert [*stored] == hashes.cases()
    assert stored == {of: hashes.sha256(hashes.theirs(*hashes.case(of))) for of in stored}


def test_another_byte_is_noticed():
    """And there is a hash of all that there is to quantize to."""
    hashes = tool("hashes")
    assert [*json.loads(hashes.HASHES.read_text())] == hashes.cases()
    data = hashes.ours("F16", False)
    assert hashes.sha256(data) == json.loads(hashes.HASHES.read_text())["F16"]
    another = bytes([data[0] ^ 1]) + data[1:]
    assert hashes.sha256(another) != hashes.sha256(data)
    assert hashes.how_it_differs("F16", data) == "same"
    assert hashes.how_it_differs("F16", another) == "DIFFERS"
    assert hashes.share(data, another, qjax.formats.get("F16")) == 1 / (len(data) / 2)


def test_another_device_says_how_much_differs(monkeypatch):
    """The CPU passing for it: the share of blocks unlike those that the CPU makes."""
    hashes = tool("hashes")
    data = hashes.ours("Q4_0", False)
    monkeypatch.setattr(hashes.jax, "default_backend", lambda: "gpu")
    another = bytearray(data)
    for block in range(0, len(data), 4 * 18):
        another[block] ^= 1
    assert hashes.how_it_differs("Q4_0", bytes(another)) == "DIFFERS in 25.000% of blocks"
