"""The code books of the i-quants: grid points, and for every tuple of levels the points that may stand for it.

A tuple of levels has a key, level 0 + level 1 n_levels + level 2 n_levels² + ..., so that tables by key are dense.
Source of the rule of the neighbours: ggml-quants.c, iq2xs_init_impl and iq3xs_init_impl.
"""

import functools
from dataclasses import dataclass
from importlib import resources

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt16, UInt32

# Coordinates of a point, levels of each, and how many shells of equal distance are searched around a tuple that is
# no grid point.
_BOOKS = {
    "IQ1": (8, 3, 3),
    "IQ2_XXS": (8, 3, 2),
    "IQ2_XS": (8, 3, 2),
    "IQ2_S": (8, 3, 1),
    "IQ3_XXS": (4, 8, 2),
    "IQ3_S": (4, 8, 3),
}


@dataclass(frozen=True, eq=False)
class Grid:
    """A code book: ``points`` are tuples of levels 0 .. n_levels - 1, numbered as in files."""

    points: UInt8[np.ndarray, "n_points n"]
    n_levels: int
    n_shells: int

    @functools.cached_property
    def key_of_point(self) -> UInt16[np.ndarray, " n_points"]:
        """The key of each point."""
        return (self.points @ self.n_levels ** np.arange(self.points.shape[1])).astype(np.uint16)

    @functools.cached_property
    def point_of_key(self) -> Int[np.ndarray, " n_keys"]:
        """The point with each key, int16, -1 where there is none."""
        table = np.full(self.n_levels ** self.points.shape[1], -1, np.int16)
        table[self.key_of_point] = np.arange(len(self.points))
        return table

    @functools.cached_property
    def packed_levels(self) -> UInt32[np.ndarray, " n_points"]:
        """The levels of each point, a nibble each, the first one lowest."""
        nibbles = self.points.astype(np.uint32) << 4 * np.arange(self.points.shape[1], dtype=np.uint32)
        return nibbles.sum(axis=1, dtype=np.uint32)

    @functools.cached_property
    def candidates(self) -> tuple[Int[np.ndarray, " n_keys_and_1"], UInt16[np.ndarray, " n_candidates"]]:
        """(start, points): for key k the points[start[k] : start[k + 1]], nearest first and among equals by number.

        For the key of a grid point that is the point alone, else all points of the nearest ``n_shells`` shells.
        """
        distance = self._distance()
        return _listed(distance, self._near(distance))

    @functools.cached_property
    def unobstructed(self) -> tuple[Int[np.ndarray, " n_keys_and_1"], UInt16[np.ndarray, " n_candidates"]]:
        """`candidates` less those that have another grid point between them and the key, level by level.

        Where no coordinate gains by leaving the key's level, that other point is a candidate too, is at least as good
        and stands earlier.  A quarter to all of the candidates remain.
        """
        distance, n = self._distance(), self.points.shape[1]
        other = (self.point_of_key >= 0)[:, None] & (distance > 0)
        # By coordinates, the last one first; then an OR over the box between key and point, one axis after another.
        box = other.reshape(*[self.n_levels] * n, len(self.points))
        for axis in range(n):
            levels, along = self.points[:, n - 1 - axis], np.moveaxis(box, axis, 0)
            for level in range(self.n_levels - 2, -1, -1):
                along[level] |= along[level + 1] & (levels > level)
            for level in range(1, self.n_levels):
                along[level] |= along[level - 1] & (levels < level)
        return _listed(distance, self._near(distance) & ~box.reshape(other.shape))

    def _distance(self) -> UInt8[np.ndarray, "n_keys n_points"]:
        """Squared, in levels; by the binomial theorem, for float32 holds these small integers exactly."""
        keys = np.arange(len(self.point_of_key))
        levels = keys[:, None] // self.n_levels ** np.arange(self.points.shape[1]) % self.n_levels
        p, q = levels.astype(np.float32), self.points.astype(np.float32)
        return ((p**2).sum(1)[:, None] + (q**2).sum(1) - 2 * (p @ q.T)).astype(np.uint8)

    def _near(self, distance) -> Bool[np.ndarray, "n_keys n_points"]:
        radius = distance.min(axis=1)
        for _ in range(self.n_shells - 1):
            further = np.where(distance > radius[:, None], distance, 255).min(axis=1)
            radius = np.where(self.point_of_key < 0, further, radius)
        return distance <= radius[:, None]


def _listed(distance, mask):
    """The points of each key's row of ``mask``, as in `Grid.candidates`."""
    key, point = np.nonzero(mask)
    order = np.lexsort((point, distance[key, point], key))
    start = np.concatenate([[0], np.cumsum(np.bincount(key, minlength=len(mask)))])
    return start.astype(np.int32), point[order].astype(np.uint16)


@functools.cache
def grid(name: str) -> Grid:
    """The code book ``name``: IQ1 (levels 0, 1, 2 are -1, 0, 1), IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS or IQ3_S."""
    n, n_levels, n_shells = _BOOKS[name]
    with resources.files("qjax.formats").joinpath("grids.npz").open("rb") as file, np.load(file) as books:
        packed = books[name]
    bits = (n_levels - 1).bit_length()
    points = packed[:, None] >> bits * np.arange(n) & (1 << bits) - 1
    return Grid(points.astype(np.uint8), n_levels, n_shells)
