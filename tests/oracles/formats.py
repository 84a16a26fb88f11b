"""What tests of all formats share: names short enough for ids, and weights for which no quantizer is compiled."""

import jax.numpy as jnp
import numpy as np

import qjax


def label(format) -> str:
    return getattr(format, "name", str(format)).replace(" ", "")


# The size of d for weights of about one: one by the largest code, and in super-blocks by the largest scale of a part.
LARGEST = {
    "Q4_0": 8, "Q4_1": 16, "Q5_0": 16, "Q5_1": 32, "Q8_0": 128, "Q2_K": 15 * 4, "Q3_K": 32 * 4, "Q4_K": 63 * 16,
    "Q5_K": 63 * 32, "Q6_K": 128 * 32, "IQ4_NL": 128, "IQ4_XS": 32 * 128, "TQ2_0": 1,
}  # fmt: skip
LARGEST_SCALE = {"Q2_K": 15, "Q4_K": 63, "Q5_K": 63}


def drawn(format, *shape, size=1.0, seed=0) -> qjax.QTensor:
    """Blocks at random, each value that a field of codes can hold among them, and weights of up to about ``size``.

    For what takes quantized weights of any kind: a search is compiled for each shape, and takes longer than the test.
    """
    format, rng = qjax.formats.get(format).resolve(shape), np.random.default_rng(seed)
    *rows, n_columns = shape

    def values(field):
        of_field = (*rows, n_columns // format.block_size, *((field.count,) if field.count > 1 else ()))
        dtype = np.dtype(jnp.dtype(field.dtype))
        if np.issubdtype(dtype, np.integer):
            return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, of_field, dtype, endpoint=True)
        if field.name == "d":
            largest = 2**format.bits if isinstance(format, qjax.Affine) else LARGEST[format.name]
        else:
            largest = LARGEST_SCALE.get(format.name, 1)
        return (rng.choice([-1, 1], of_field) * rng.uniform(0.5, 1, of_field) * size / largest).astype(dtype)

    return qjax.QTensor(format.Fields(*(jnp.asarray(values(field)) for field in format.layout)), format)
