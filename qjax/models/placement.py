"""Where the tensors of a model go: layers on an accelerator and the rest on the CPU, or everything over a mesh.

A Place is a function that puts a tensor where it belongs. From then on the arrays themselves say where they are;
parts.py runs a model by that.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from qjax.errors import QjaxError
from qjax.models import transformer
from qjax.models.config import Config
from qjax.models.memory import give_back_memory
from qjax.models.transformer import Params
from qjax.ops.sharded import DATA, MODEL, Sharded, Split, devices, n_pieces, shard, whole
from qjax.tensor import QTensor

Place = Callable[[str, Array | QTensor], Array | QTensor | Sharded]
"""(GGUF name, tensor) -> the tensor, in its place"""

_EMBEDDINGS = ("token_embd.weight", "position_embd.weight")


def anywhere(name: str, tensor: Array | QTensor) -> Array | QTensor:
    """The Place of what may lie where JAX puts it."""
    return tensor


def to_generate(config: Config) -> Place:
    """Leaves tensors where they are, matrices laid out as text is generated with them (`transformer.laid_out`)."""

    def laid_out(name: str, tensor: Array | QTensor) -> Any:
        embedding = name in _EMBEDDINGS and not (config.tied and name == "token_embd.weight")
        multiplied = tensor.ndim > 1 and not embedding
        if not multiplied:
            return tensor
        # What it is made from is gone before the next one comes.
        matrix = jax.block_until_ready(transformer.laid_out(tensor))
        give_back_memory()
        return matrix

    return laid_out


def choose(config: Config, n_gpu_layers: int | None = None, mesh: Mesh | None = None) -> Place:
    """The Place that `load` means: `by_layers` of this host's CPU and accelerators, `over_mesh`, or JAX's default.

    Raises QjaxError if both are given, if layers are meant for an accelerator and JAX has none, and as `over_mesh`.
    """
    if mesh is not None:
        if n_gpu_layers is not None:
            raise QjaxError("load: n_gpu_layers and mesh both say where the weights go; give one of them")
        return over_mesh(config, mesh)
    if n_gpu_layers is None:
        return anywhere
    found = jax.local_devices()
    accelerators = [device for device in found if device.platform != "cpu"]
    if n_gpu_layers and not accelerators:
        raise QjaxError(
            f"n_gpu_layers is {n_gpu_layers}, but JAX has no accelerator here, only {found[0].platform}. Install "
            "JAX for yours (jax[cuda12] for an NVIDIA GPU), or give 0 or nothing."
        )
    if not 0 <= n_gpu_layers <= config.n_layers:
        return by_layers(config, n_gpu_layers, None, accelerators)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise QjaxError(
            f"n_gpu_layers is {n_gpu_layers}, which leaves layers to the CPU, but JAX was told to do without it. Add "
            "cpu to the environment variable JAX_PLATFORMS, as in cuda,cpu."
        ) from error
    return by_layers(config, n_gpu_layers, cpu, accelerators)


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────


def by_layers(config: Config, n_gpu_layers: int, cpu: Any, accelerators: Sequence[Any]) -> Place:
    """The last n_gpu_layers layers on the accelerators, in equal shares, the others on the CPU.

    As llama.cpp counts them (llama-model.cpp, load_tensors): the head is the last layer, so 1 moves the head alone
    and n_layers + 1 everything; a larger number means the same, and so does a negative one. The embedding stays on
    the CPU with the layers there; once none is left it moves too, for a model in one place is one compiled program
    (llama.cpp keeps it on the CPU even then). The devices are JAX's; without layers for it the CPU may be None.
    """
    n_all = config.n_layers + 1
    n = min(n_gpu_layers, n_all) if n_gpu_layers >= 0 else n_all

    def device(layer: int) -> Any:
        at = layer - (n_all - n)
        return cpu if at < 0 else accelerators[at * len(accelerators) // n]

    def place(name: str, tensor: Array | QTensor) -> Array | QTensor:
        found = re.match(r"blk\.(\d+)\.", name)
        layer = int(found[1]) if found else 0 if name in _EMBEDDINGS else config.n_layers
        return jax.device_put(tensor, device(layer))

    return place


# ── mesh ─────────────────────────────────────────────────────────────────────────────────────────────

# How matrices are cut, and the number that has to divide: heads stay whole, with the rows of attn_q, attn_k, attn_v
# that make them and the columns of attn_output that read them. What one matrix makes in parts the next one takes in
# parts (Shoeybi et al. 2019).  The heads of attn_qkv, and gate and up in one matrix, are sent where they are needed.
_SPLITS: dict[str, tuple[Split, str]] = {
    "token_embd": ("rows", "vocab"),
    "attn_q": ("rows", "n_heads"),
    "attn_k": ("rows", "n_kv_heads"),
    "attn_v": ("rows", "n_kv_heads"),
    "attn_qkv": ("rows", "n_kv_heads"),
    "attn_output": ("columns", "n_heads"),
    "ffn_gate": ("rows", "d_ff"),
    "ffn_up": ("rows", "d_ff"),
    "ffn_down": ("columns", "d_ff"),
    "ffn_gate_exps": ("rows", "d_expert"),
    "ffn_up_exps": ("rows", "d_expert"),
    "ffn_down_exps": ("columns", "d_expert"),
    "output": ("rows", "vocab"),
}


def over_mesh(config: Config, mesh: Mesh) -> Place:
    """Matrices cut along the mesh axis "model", whole along "data", where batches are cut instead.

    A matrix is whole on every device where heads, rows or blocks of its format do not divide among those along
    "model", and where its rows share scales (NF4). Raises QjaxError for a mesh with other axes.
    """
    if not mesh.axis_names or not {*mesh.axis_names} <= {DATA, MODEL}:
        raise QjaxError(
            f"the mesh has axes {', '.join(map(str, mesh.axis_names)) or '(none)'}; expected {MODEL} (matrices are "
            f'cut), {DATA} (batches are cut) or both, as in jax.make_mesh((2, 4), ("{DATA}", "{MODEL}"))'
        )
    mesh = _both_axes(mesh)

    def place(name: str, tensor: Array | QTensor) -> Array | QTensor | Sharded:
        kind = name.removesuffix(".weight").split(".")[-1]
        if kind not in _SPLITS:
            return jax.device_put(tensor, jax.NamedSharding(mesh, jax.P()))
        split, count = _SPLITS[kind]
        n = mesh.shape[MODEL]
        fits = n > 1 and (getattr(config, count) or config.d_ff) % n == 0 and n_pieces(tensor, split) % n == 0
        return shard(tensor, mesh, split if fits else None)

    return place


def _both_axes(mesh: Mesh) -> Mesh:
    """The same devices along ("data", "model"). The axes that jax.make_mesh makes want the sharding of each step
    written out; along these XLA finds it."""
    along = mesh.devices.T if mesh.axis_names[0] == MODEL else mesh.devices
    return Mesh(along.reshape(-1, mesh.shape.get(MODEL, 1)), (DATA, MODEL))


def mesh_over(n_devices: int, tensor_parallel: int = 1) -> Mesh:
    """A mesh of the first n_devices, of which tensor_parallel at a time share one copy of the weights.

    Raises QjaxError if there are fewer, or they do not divide.
    """
    found = jax.devices()
    if len(found) < n_devices:
        raise QjaxError(
            f"{n_devices} devices are asked for, but JAX has {len(found)} ({found[0].platform}). To try it on a "
            f"CPU, set the environment variable XLA_FLAGS=--xla_force_host_platform_device_count={n_devices}."
        )
    if n_devices % tensor_parallel:
        raise QjaxError(f"{n_devices} devices do not divide into groups of {tensor_parallel}")
    return Mesh(np.array(found[:n_devices]).reshape(-1, tensor_parallel), (DATA, MODEL))


# ── params ───────────────────────────────────────────────────────────────────────────────────────────


def stack(tensors: Iterable[tuple[str, Array | QTensor]], config: Config, place: Place) -> Params:
    """`transformer.stack` of named tensors, each put in its place as it comes. Where the head of a tied model lies
    elsewhere than the embedding, it has a copy of that, as in llama.cpp."""
    params = transformer.stack(((name, place(name, tensor)) for name, tensor in tensors), config)
    if config.tied and devices(params.token_embd) != devices(params.output_norm):
        params = params._replace(output=place("output.weight", whole(params.token_embd)))
    return params
