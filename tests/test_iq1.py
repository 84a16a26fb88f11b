"""IQ1_S and IQ1_M: what test_bytes.py does not see."""

import numpy as np
import pytest
from test_bytes import weights_for

import qjax
from qjax.formats._grids import grid


@pytest.mark.thorough  # as is what test_bytes.py compiles, the same programs
@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M"])
def test_representable_weights_come_near(name):
    """Grid points times a scale are what the search looks for; only the stretch of d stands between."""
    rng = np.random.default_rng(0)
    n_rows = len(weights_for(name))  # a shape that test_bytes.py compiles too
    points = grid("IQ1").points[rng.integers(0, 2048, (n_rows, 512))].astype(np.float32) - 0.875
    x = points.reshape(n_rows, 4096)
    decoded = np.asarray(qjax.dequantize(qjax.quantize(x, name, importance=np.ones(4096, np.float32))))
    assert (np.sign(decoded) == np.sign(x)).mean() > 0.999
