"""Where models lie: rules and refusals here; eight devices and two hosts in processes of their own."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, fails, sampled

import qjax
from qjax import QjaxError
from qjax.models import placement
from qjax.models.config import Config
from qjax.ops import sharded


def environment(n_devices):
    """Of a process for which the CPU is n_devices; compiled in haste, because it runs each program once."""
    flags = f"--xla_force_host_platform_device_count={n_devices} --xla_backend_optimization_level=0"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "QJAX_COMPILATION_CACHE": "off"}


@pytest.mark.parametrize(
    "which",
    [
        "not (thorough or exact)",
        pytest.param("thorough", marks=pytest.mark.thorough),
        pytest.param("exact", marks=pytest.mark.exact),
    ],
)
def test_on_eight_devices(which):
    command = [sys.executable, "-m", "pytest", "-n", "0", "--no-header", "-p", "no:cacheprovider", "-m", which]
    result = subprocess.run(
        [*command, ROOT / "tests/on_eight_devices.py"], cwd=ROOT, env=environment(8), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


HOST = """
import sys
import jax, qjax
port, i = sys.argv[1:]
jax.distributed.initialize("localhost:" + port, num_processes=2, process_id=int(i), heartbeat_timeout_seconds=1800)
mesh = jax.make_mesh((2, 2), ("data", "model"))
assert (jax.device_count(), jax.local_device_count()) == (4, 2)
model = qjax.load("tiny", mesh=mesh)
text = "".join(tale.text for tale in qjax.data.tales.generate(0, 10))
try:
    qjax.perplexity(model, text, n_ctx=64)
except qjax.QjaxError as error:
    print("refused:", error)
ppl = qjax.perplexity(model, text, n_ctx=64, chunks=3, precision="float32")
print("measured:", repr(ppl.value), model.generate("A fox", max_tokens=4).text)
"""


@pytest.mark.thorough
def test_on_two_hosts():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, port, str(i)], cwd=ROOT, env=environment(2), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [host.communicate()[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(said)[-6000:]
    model = qjax.load("tiny")
    text = "".join(tale.text for tale in qjax.data.tales.generate(0, 10))
    expected = qjax.perplexity(model, text, n_ctx=64, chunks=3, precision="float32").value
    generated = model.generate("A fox", max_tokens=4).text
    for output in said:
        assert "refused: precision auto goes by time, and hosts could choose differently" in output
        value, text = output.split("measured: ")[1].split(" ", 1)
        assert float(value) == pytest.approx(expected, rel=1e-6)
        assert text.startswith(generated)


# ── pieces of a matrix ───────────────────────────────────────────────────────────────────────────────

FORMATS = [
    "F16", "Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4", "TQ2_0",
    qjax.Affine(bits=3), qjax.Affine(bits=5, symmetric=False), qjax.Affine(block_size="row"),
    qjax.Affine(block_size="tensor"),
]  # fmt: skip


def random_matrix(format, rows=12, columns=1024):
    format = qjax.formats.get(format)
    if format.ggml_id is None:
        return qjax.quantize(jax.random.normal(jax.random.key(0), (rows, columns)), format)
    data = np.random.default_rng(0).integers(0, 256, format.nbytes((rows, columns)), np.uint8)
    return qjax.QTensor.from_bytes(data, format, (rows, columns))


@pytest.mark.parametrize("format", sampled(FORMATS, "F16", "Q4_0", "Q6_K", *FORMATS[-2:]), ids=str)
def test_pieces_decode_to_pieces(format):
    """Along the axes that `logical_axes` names, each field is cut as the weights are: by rows, and between blocks."""
    matrix = random_matrix(format)
    whole = np.asarray(qjax.dequantize(matrix))
    n_blocks = 1024 // matrix.format.block_size
    assert (sharded.n_pieces(matrix, "rows"), sharded.n_pieces(matrix, "columns")) == (12, n_blocks)
    for axis, split in enumerate(("rows", "columns")):
        n = (3, min(n_blocks, 4))[axis]
        axes = [pair[axis] for pair in sharded.logical_axes(matrix)]
        cuts = [
            jnp.split(leaf, n, of_leaf) if leaf.shape[of_leaf] > 1 else [leaf] * n
            for leaf, of_leaf in zip(jax.tree.leaves(matrix), axes, strict=True)
        ]
        pieces = [qjax.QTensor(matrix.fields._make(fields), matrix.format) for fields in zip(*cuts)]
        decoded = np.concatenate([qjax.dequantize(piece) for piece in pieces], axis)
        np.testing.assert_array_equal(decoded, whole, err_msg=split)


def test_rows_that_share_scales_are_not_cut():
    matrix = random_matrix("NF4")
    assert (sharded.n_pieces(matrix, "rows"), sharded.n_pieces(matrix, "columns")) == (1, 1)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def only_cpu(monkeypatch):
    """A machine without an accelerator."""
    cpus = jax.local_devices(backend="cpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: cpus)


def mesh(*axes):
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(axes)), axes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_gpu_layers": 3}, "n_gpu_layers is 3, but JAX has no accelerator here, only cpu"),
        ({"n_gpu_layers": -1}, "n_gpu_layers is -1, but JAX has no accelerator"),
        ({"n_gpu_layers": 3, "mesh": mesh("data")}, "give one of them"),
        ({"mesh": mesh("data", "expert")}, r"the mesh has axes data, expert; expected model .*, data .* or both"),
        ({"mesh": mesh()}, r"the mesh has axes \(none\)"),
    ],
)
def test_load_refuses(only_cpu, options, message):
    with pytest.raises(QjaxError, match=message):
        qjax.load("tiny", **options)


def test_layers_need_the_cpu(monkeypatch):
    """With JAX_PLATFORMS=cuda JAX does without it."""

    def local_devices(backend=None):
        if backend:
            raise RuntimeError("Unknown backend cpu")
        return [type("Device", (), {"platform": "gpu"})]

    monkeypatch.setattr(jax, "local_devices", local_devices)
    config = Config("llama", 4, 64, 96, 4, 2, 16, 80, 128, 1e-5, 1e4, tied=True)
    with pytest.raises(QjaxError, match="Add cpu to the environment variable JAX_PLATFORMS"):
        placement.choose(config, 4)
    placement.choose(config, 5)


def test_no_layers_on_the_accelerator_is_the_cpu():
    model = qjax.load("tiny", n_gpu_layers=0)
    assert model.params.token_embd.committed
    assert model.placement == ""
    assert model.params.token_embd.devices() == {jax.devices("cpu")[0]}
    assert not qjax.load("tiny").params.token_embd.committed


def test_a_mesh_of_one_device_changes_nothing():
    tokens = [[5, 3, 9]]
    alone, meshed = (qjax.load("tiny", mesh=m) for m in (None, mesh("model")))
    np.testing.assert_allclose(meshed.logits(tokens), alone.logits(tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("perplexity", "tiny", "--devices", 4096), "4096 devices are asked for, but JAX has"),
        (("perplexity", "tiny", "--devices", 4096), "XLA_FLAGS=--xla_force_host_platform_device_count=4096"),
        (("generate", "tiny", "-p", "x", "--devices", 4096), "4096 devices are asked for"),
        (("perplexity", "tiny", "--devices", 1, "--tensor-parallel", 2), "1 devices do not divide into groups of 2"),
        (("perplexity", "tiny", "--tensor-parallel", 2), "give both"),
        (("generate", "tiny", "-p", "x", "-ngl", 5), "n_gpu_layers is 5, but JAX has no accelerator"),
    ],
)
def test_the_command_line_refuses(run, only_cpu, arguments, message):
    fails(run(*arguments), message)
