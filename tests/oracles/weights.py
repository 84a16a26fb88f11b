"""Weights that a block quantizer can get wrong: one function a kind, (rng, number of weights) to weights."""

from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np

import qjax

Draw = Callable[[np.random.Generator, int], np.ndarray]


def gaussian(rng, n):
    return rng.standard_normal(n, np.float32) * np.float32(0.02)


def student_t(rng, n):
    """Two degrees of freedom: an outlier of ten sigma in every few blocks."""
    return rng.standard_t(2, n)


def cauchy(rng, n):
    return np.clip(rng.standard_cauchy(n), -1e30, 1e30)


def magnitudes(rng, low: int, high: int, shape):
    """From 2^low to 2^high, all octaves alike.  Not by a power, whose last bit is another on another processor."""
    return np.ldexp(rng.uniform(1, 2, shape), rng.integers(low, high, shape))


def log_uniform(rng, n):
    """1e-30 to 1e30 with signs, all magnitudes in every block."""
    return magnitudes(rng, -100, 100, n) * rng.choice([-1, 1], n)


def log_uniform_blocks(rng, n):
    """Gaussian blocks whose scales run from 1e-30 to 1e30, far beyond both ends of float16."""
    return rng.standard_normal((n // 32, 32)) * magnitudes(rng, -100, 100, (n // 32, 1))


def zero_and_one_hot(rng, n):
    """Blocks of zeros, and blocks with a single weight that is not."""
    blocks = np.zeros((n // 32, 32))
    hot = np.flatnonzero(rng.random(n // 32) < 0.7)
    blocks[hot, rng.integers(0, 32, len(hot))] = rng.standard_normal(len(hot))
    return blocks


def ties(rng, n):
    """Multiples of half a code of every block format, most blocks with both signs of their largest value.

    The scales are powers of two, so the ties are exact in float32 and each rounding rule gives its own code.
    """
    levels = rng.choice([8, 15, 16, 31, 127], (n // 32, 1))
    halves = np.rint(rng.uniform(-1, 1, (n // 32, 32)) * 2 * levels)
    halves[:, :2] = levels * [-2, 2]
    one_sided = rng.random(n // 32) < 0.3
    halves[one_sided] = np.abs(halves[one_sided]) * rng.choice([-1, 1], (one_sided.sum(), 1))
    return rng.permuted(halves, axis=1) * np.ldexp(1, rng.integers(-12, 4, (n // 32, 1)))


def constant(rng, n):
    """Blocks of one repeated value: no range at all."""
    return np.repeat(rng.standard_normal(n // 32), 32)


def bfloat16(rng, n):
    """Gaussian weights as most models store them: 8 bits of mantissa, so that ties abound."""
    return gaussian(rng, n).astype(ml_dtypes.bfloat16)


def float16_denormal_scale(rng, n):
    """Blocks whose scale is denormal or zero in float16, while the weights are normal numbers in float32."""
    return rng.uniform(-1, 1, (n // 32, 32)) * magnitudes(rng, -32, -10, (n // 32, 1))


def some_denormal(rng, n):
    """Normal blocks in which every fourth weight is denormal in float32."""
    blocks = rng.standard_normal((n // 32, 32))
    blocks[:, ::4] *= 2.0**-140
    return blocks


KINDS: dict[str, Draw] = {
    kind.__name__: kind
    for kind in (
        gaussian,
        student_t,
        cauchy,
        log_uniform,
        log_uniform_blocks,
        zero_and_one_hot,
        ties,
        constant,
        bfloat16,
        float16_denormal_scale,
        some_denormal,
    )
}


def laplace_with_outliers(rng, n):
    """Laplace weights, one in a thousand fifty times as large."""
    return rng.laplace(0, 0.02, n) * np.where(rng.random(n) < 1e-3, 50, 1)


def zeros_mixed_in(rng, n):
    """Gaussian weights of which a third are zeros, and some whole blocks and rows."""
    weights = gaussian(rng, n) * (rng.random(n) < 2 / 3)
    weights = (weights.reshape(-1, 32) * (rng.random((n // 32, 1)) < 0.9)).reshape(-1, 4096)
    weights[::5] = 0
    return weights


def tiny_model(rng, n):
    """The matrices of the model in the package, from the first again after the last."""
    params = qjax.load("tiny").params
    matrices = [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(params) if np.ndim(leaf) >= 2]
    return np.resize(np.concatenate(matrices), n)


# As the weights of models are distributed.
MODEL_LIKE: dict[str, Draw] = {
    kind.__name__: kind for kind in (gaussian, student_t, laplace_with_outliers, zeros_mixed_in)
}


def negative_zero(rng, n):
    """Blocks of zeros and of positive or negative weights among zeros, where half the zeros are negative.

    Not in KINDS: gguf-py takes another zero than ggml does.
    """
    blocks = np.where(rng.random((n // 32, 32)) < 0.5, 0.0, -0.0)
    weights = rng.standard_normal((n // 32, 32)) * rng.choice([0, 1], (n // 32, 32), p=[0.9, 0.1])
    return np.where((weights != 0) & (rng.random((n // 32, 1)) < 0.7), weights, blocks)


def all_denormal(rng, n):
    """Blocks whose scale, or all of whose weights, are denormal in float32."""
    return rng.uniform(-1, 1, (n // 32, 32)) * 2.0 ** rng.uniform(-149, -100, (n // 32, 1))


def draw(kind: Draw, n: int, seed: int = 0) -> np.ndarray:
    """``n`` float32 weights of a kind, in rows of 4096."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(kind(np.random.default_rng(seed), n)).astype(np.float32).reshape(-1, 4096)


def importance(columns: int, seed: int = 1) -> np.ndarray:
    """A row of an importance matrix: mean squares of activations over three decades, a few of them zero."""
    rng = np.random.default_rng(seed)
    values = 10 ** rng.uniform(-3, 0, columns)
    values[rng.integers(0, columns, columns // 50)] = 0
    return values.astype(np.float32)


def gguf_model(path, n: int) -> np.ndarray:
    """``n`` weights of a model's feed-forward matrices, dequantized, in rows of 4096."""
    matrices, size = [], 0
    for name, tensor in qjax.gguf.read(path).tensors.items():
        if "ffn" in name and len(tensor.shape) == 2 and size < n:
            stored = qjax.QTensor.from_bytes(tensor.data, tensor.format, tensor.shape)
            matrices.append(np.asarray(qjax.dequantize(stored)).ravel())
            size += matrices[-1].size
    return np.concatenate(matrices)[:n].reshape(-1, 4096)
