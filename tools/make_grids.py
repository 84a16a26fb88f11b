"""Makes qjax/formats/grids.npz: the code books of the i-quants, read as numbers from gguf-py.

    python tools/make_grids.py [OUT]

A point of a code book is a tuple of levels (8 of 3, or 4 of 8), packed into 16 bits with the first level lowest; the
points stand in the order in which files number them.  The same input gives the same bytes.
"""

import sys
from pathlib import Path

import numpy as np
from gguf import quants

OUT = Path(__file__).resolve().parents[1] / "qjax" / "formats" / "grids.npz"

# IQ1_M reads the book of IQ1_S.
BOOKS = {
    "IQ1": quants.IQ1_S,
    "IQ2_XXS": quants.IQ2_XXS,
    "IQ2_XS": quants.IQ2_XS,
    "IQ2_S": quants.IQ2_S,
    "IQ3_XXS": quants.IQ3_XXS,
    "IQ3_S": quants.IQ3_S,
}


def packed(book) -> np.ndarray:
    """(n_points,) uint16, the points of one of gguf-py's code books."""
    book.init_grid()
    values = book.grid.reshape(book.grid_shape)
    levels = np.searchsorted(book.grid_map, values)
    bits = 16 // levels.shape[1] if len(book.grid_map) == 3 else 3
    return (levels << bits * np.arange(levels.shape[1])).sum(axis=1).astype(np.uint16)


def make() -> dict[str, np.ndarray]:
    """The arrays of the file by name."""
    return {name: packed(book) for name, book in BOOKS.items()}


if __name__ == "__main__":
    # Not compressed, so that the bytes do not depend on a version of zlib.
    np.savez(sys.argv[1] if len(sys.argv) > 1 else OUT, **make())
