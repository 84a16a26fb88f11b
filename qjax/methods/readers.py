"""What rounding would do to the output of a matrix: how transforms choose among candidates."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float32

from qjax.formats.plain import Plain
from qjax.methods import rtn
from qjax.methods.folding import Job
from qjax.methods.importance import Importance
from qjax.methods.plan import Step
from qjax.methods.statistics import Tensors
from qjax.tensor import QTensor, dense

ROWS = 512
"""Of a matrix with more, so many are tried, evenly apart."""


class Readers:
    """The matrices that read some channels, as they are, and the error of their outputs as candidates would have them.

    matrices: float32, some rows of each; those that are rounded at all.
    """

    def __init__(self, tensors: Tensors, job: Job, reads: Iterable[str]):
        steps = {step.name: step for step in job.plan.steps if step.changes and not isinstance(step.format, Plain)}
        self.seen = {name: job.seen[name].second_moment for name in reads if name in steps and name in job.seen}
        self.steps: Mapping[str, Step] = {name: steps[name] for name in self.seen}
        self.matrices = {name: _some(tensors[name]) for name in self.seen}

    def error(self, name: str, w: Float32[Array, "*n_mat rows d_in"], h: Float32[Array, "*n_mat d_in d_in"]) -> float:
        """Mean over the tokens of the squared error of the output, tr(δ H δᵀ), of one matrix rounded to nearest.

        w, h: its rows, and the second moment of what they read, as a candidate has them.
        """
        options = rtn.Options(Importance({name: np.atleast_2d(np.diagonal(h, axis1=-2, axis2=-1))}))
        return float(_error(dense(rtn.quantize_tensor(name, w, self.steps[name].format, options)), w, h))


def _some(w: Array | QTensor) -> Float32[Array, "*n_mat rows d_in"]:
    return dense(w)[..., :: -(-w.shape[-2] // ROWS), :]


@jax.jit
def _error(rounded: Array, w: Array, h: Array) -> Array:
    delta = rounded - w
    return jnp.sum(jnp.matmul(delta, h, precision=lax.Precision.HIGHEST) * delta)
