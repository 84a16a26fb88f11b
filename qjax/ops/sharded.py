"""Sharded: a matrix in pieces on the devices of a mesh, and products made of the pieces where they lie.

    split       each device along the mesh axis "model" has      y = x @ w.T
    "rows"      some rows of w (output features)                 makes that part of y
    "columns"   some columns (input features, whole blocks)      multiplies that part of x; the products are summed
    None        all of w                                         makes all of y

Along the axis "data" each device has the same piece, and its part of the batch (Shoeybi et al. 2019, "Megatron-LM").
A compiler left to itself collects the pieces instead, because `matmul` takes tiles of rows in a loop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, singledispatch
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Float32, Int

from qjax.tensor import QTensor

DATA, MODEL = "data", "model"

T = TypeVar("T")
Split = Literal["rows", "columns"]


@singledispatch
def logical_axes(matrix: Any) -> list[tuple[int, int]]:
    """(rows, columns) of each array of a matrix, in the order of `jax.tree.leaves`: which of its axes, counted from
    the last, goes along the rows (output features) and which along the columns or blocks of them (input features).

    This is the answer for an Array; a class that keeps a matrix in another layout registers its own.
    """
    return [(-2, -1)]


@logical_axes.register
def _(matrix: QTensor) -> list[tuple[int, int]]:
    return [(-2, -1) if field.count == 1 else (-3, -2) for field in matrix.format.layout]


def n_pieces(matrix: Any, split: Split) -> int:
    """Into how many pieces of equal size the arrays of a matrix can be cut at most: rows, or blocks of columns.

    1 where rows share scales that cannot be cut with them (NF4).
    """
    axes = [pair[split == "columns"] for pair in logical_axes(matrix)]
    shapes = [leaf.shape for leaf in jax.tree.leaves(matrix)]
    if any(len(shape) < -axis for shape, axis in zip(shapes, axes)):
        return 1
    return max(shape[axis] for shape, axis in zip(shapes, axes))


@partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["mesh", "split"])
@dataclass(frozen=True)
class Sharded:
    """A matrix, or a stack of them, whose arrays are cut along "model" as `split` says; make one with `shard`.

    matrix: Array, QTensor or another layout that `logical_axes` knows; its arrays are whole to who looks from
    outside, and hold one piece inside `product` and `embed`.  mesh: with the axes "data" and "model".
    """

    matrix: Any
    mesh: Mesh
    split: Split | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    def specs(self) -> Any:
        """A PartitionSpec for each array, in the structure of `matrix`."""
        leaves, structure = jax.tree.flatten(self.matrix)
        return structure.unflatten(self._spec(leaf, axes) for leaf, axes in zip(leaves, logical_axes(self.matrix)))

    def _spec(self, leaf: Any, axes: tuple[int, int]) -> PartitionSpec:
        if self.split is None:
            return PartitionSpec()
        axis = axes[self.split == "columns"]
        # An axis of 1 is a scale that all rows share.
        cut = leaf.shape[axis] > 1
        return PartitionSpec(*[MODEL if cut and i == axis else None for i in range(-leaf.ndim, 0)])

    def put(self) -> "Sharded":
        """The same, each array where `specs` wants it."""
        placed = jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(self.mesh, spec)), self.matrix, self.specs()
        )
        return Sharded(placed, self.mesh, self.split)

    def product(
        self, multiply: Callable[[Array, Any], Array], x: Float[Array, "*batch d_in"]
    ) -> Float32[Array, "*batch d_out"]:
        """x @ w.T, where multiply(x, piece) is the product with a piece, on one device."""

        def local(x: Array, piece: Any) -> Array:
            y = multiply(x, piece)
            return lax.psum(y, MODEL) if self.split == "columns" else y

        batch = self._batch(x)
        x_spec = PartitionSpec(*batch, MODEL if self.split == "columns" else None)
        y_spec = PartitionSpec(*batch, MODEL if self.split == "rows" else None)
        return self._map(local, (x_spec, self.specs()), y_spec)(x, self.matrix)

    def embed(self, take: Callable[[Any, Array], Array], ids: Int[Array, "*batch"]) -> Float32[Array, "*batch d_model"]:
        """Rows ids of an embedding that is split by rows or not at all; take(piece, ids) has those of a piece."""

        def local(ids: Array, piece: Any) -> Array:
            if self.split is None:
                return take(piece, ids)
            n = piece.shape[-2]
            ids = ids - n * lax.axis_index(MODEL)
            inside = (ids >= 0) & (ids < n)
            rows = take(piece, jnp.clip(ids, 0, n - 1))
            return lax.psum(jnp.where(inside[..., None], rows, 0), MODEL)

        batch = self._batch(ids[..., None])
        return self._map(local, (PartitionSpec(*batch), self.specs()), PartitionSpec(*batch, None))(ids, self.matrix)

    def _batch(self, x: Array) -> list[str | None]:
        """How the axes of x but the last are cut: the first into one part for each device along "data", if it can."""
        return [DATA if i == 0 and divides(self.mesh, x.shape[0]) else None for i in range(x.ndim - 1)]

    def _map(self, local: Callable[..., Array], in_specs: tuple, out_specs: PartitionSpec) -> Callable[..., Array]:
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def shard(matrix: Any, mesh: Mesh, split: Split | None) -> Sharded:
    """The matrix on the devices of a mesh; its rows or blocks have to divide among those along "model"."""
    return Sharded(matrix, mesh, split).put()


def whole(matrix: Any) -> Any:
    """What a Sharded holds; anything else is itself."""
    return matrix.matrix if isinstance(matrix, Sharded) else matrix


def mesh_of(matrix: Any) -> Mesh | None:
    """The mesh that a matrix lies on, if it is Sharded."""
    return matrix.mesh if isinstance(matrix, Sharded) else None


def cache_spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    """How keys or values (n_layers, batch, kv_heads, ...) are cut: along "data" and "model", where they divide."""
    names = [(1, DATA), (2, MODEL)]
    cut = {axis: name for axis, name in names if len(shape) > axis and shape[axis] % mesh.shape[name] == 0}
    return PartitionSpec(*[cut.get(axis) for axis in range(len(shape))])


def keep_cache(cache: T, mesh: Mesh | None) -> T:
    """The cache, cut as `cache_spec` says. XLA might else choose another way inside a step, and send all of the cache
    to come back from it."""
    if mesh is None:
        return cache
    return jax.tree.map(
        lambda rows: lax.with_sharding_constraint(rows, NamedSharding(mesh, cache_spec(mesh, rows.shape))), cache
    )


def devices(tree: Any) -> frozenset[jax.Device] | None:
    """Where the arrays of a tree lie, all in one place: what the first of them says.  None while they are traced."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return None if sharding is None else frozenset(sharding.device_set)


def divides(mesh: Mesh, batch: int) -> bool:
    """Whether a batch can be cut into equal parts along the axis "data"."""
    return batch % mesh.shape[DATA] == 0
