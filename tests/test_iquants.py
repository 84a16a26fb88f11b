"""The i-quants of 2 and 3 bits, their code books against gguf and the searches in them; see also test_bytes.py."""

import functools
import importlib.util

import jax
import numpy as np
import pytest
from conftest import ROOT, sampled
from oracles import ggml

import qjax
from qjax.formats import _grids, _nearest

NAMES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
BOOKS = ("IQ1", *NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_packed_as_they_are_unpacked(name):
    """The numbers that `_unpack` gives are those that `_pack` takes, for any bytes of a file."""
    format = qjax.formats.get(name)
    data = np.random.default_rng(1).integers(0, 256, (64, format.type_size), np.uint8)

    @jax.jit
    def repacked(data):
        return format.pack(format.Fields(*format._pack(*format._unpack(format.unpack(data)))))

    ggml.assert_same_bytes(format, repacked(data), data)


# The code books, and the points around them.


def test_the_code_books_are_ggufs():
    pytest.importorskip("gguf")
    spec = importlib.util.spec_from_file_location("make_grids", ROOT / "tools" / "make_grids.py")
    make_grids = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_grids)
    with np.load(make_grids.OUT) as stored:
        made = make_grids.make()
        assert list(stored) == list(made) == list(BOOKS)
        for name in BOOKS:
            np.testing.assert_array_equal(stored[name], made[name])


def around(grid, key):
    """The differences of all points to a key's levels, and the points in the nearest shells, one by one."""
    levels = key // grid.n_levels ** np.arange(grid.points.shape[1]) % grid.n_levels
    moves = grid.points.astype(int) - levels
    distance = (moves**2).sum(axis=1)
    shells = np.unique(distance)[: 1 if (distance == 0).any() else grid.n_shells]
    return moves, sorted(np.flatnonzero(distance <= shells[-1]), key=lambda point: (distance[point], point))


@pytest.mark.parametrize("name", BOOKS)
def test_the_lists_of_neighbours(name):
    grid = _grids.grid(name)
    for key in np.random.default_rng(0).integers(0, len(grid.point_of_key), 50):
        moves, near = around(grid, key)

        def obstructed(point, moves=moves, near=near):
            """Some other point's every move is a part of this point's."""
            return any(other != point and (moves[other] * moves[point] >= moves[other] ** 2).all() for other in near)

        for (start, points), expected in (
            (grid.candidates, near),
            (grid.unobstructed, [point for point in near if not obstructed(point)]),
        ):
            assert points[start[key] : start[key + 1]].tolist() == expected


@pytest.mark.parametrize("name", sampled(["IQ2_XS", "IQ3_S"], "IQ3_S"))
def test_the_nearest_points_are_those_of_a_plain_search(name):
    """Weights on a coarse lattice, so that many lie in the middle between two levels."""
    grid, rng, f32 = _grids.grid(name), np.random.default_rng(0), np.float32
    n, lanes, top = grid.points.shape[1], 64, 2 * grid.n_levels - 1
    x = np.round(np.abs(rng.standard_normal((n, 2, lanes))) * 8).astype(f32) / 8
    w = rng.random((n, 2, lanes)).astype(f32)
    inverse = (np.array([[top], [top - 1]], f32) / x.max(axis=(0, 1))).astype(f32)
    scale = 1 / inverse
    found, on_grid = jax.jit(functools.partial(_nearest.nearest_points, grid))(x, w, inverse, scale)
    numbers = _nearest.point_numbers(grid, found)
    for step, group, lane in np.ndindex(*numbers.shape):
        xs, ws = x[:, group, lane], w[:, group, lane]
        levels = np.clip(np.rint((inverse[step, lane] * xs - f32(1)) / 2), 0, grid.n_levels - 1).astype(int)
        _, near = around(grid, int(levels @ grid.n_levels ** np.arange(n)))
        errors = np.zeros(len(near), f32)
        for i in range(n):
            diff = scale[step, lane] * (2 * grid.points[near, i].astype(f32) + 1) - xs[i]
            errors = errors + ws[i] * diff * diff
        assert numbers[step, group, lane] == near[int(np.argmin(errors))]
        assert on_grid[step, group, lane] == (len(near) == 1 and (grid.points[near[0]] == levels).all())
