"""matmul and embed: where a weight meets an activation, dense or quantized alike."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int

from qjax.errors import QjaxError
from qjax.ops.activations import Rounded
from qjax.ops.adapted import Adapted
from qjax.ops.kernels import columns, packed, tiles
from qjax.ops.kernels.columns import Columns
from qjax.ops.sharded import Sharded, devices
from qjax.tensor import QTensor, dense

Matrix = Array | QTensor | Columns | Sharded | Rounded | Adapted


def matmul(
    x: Float[Array, "*batch d_in"], w: Matrix, dtype: DTypeLike | None = None, body: str | None = None
) -> Float32[Array, "*batch d_out"]:
    """``x @ w.T`` for ``w`` of logical shape (d_out, d_in), dense or quantized.

    dtype: of both factors, float32 or bfloat16; products are summed in float32.  int8: both are rounded as they are
        met, each row with a scale of its own, and summed as integers.  Default: that of ``x``.
    body: how it is done; by default the first of these that fits, which `explain_matmul` names.  No body
        keeps a quantized ``w`` dense.  The error is that against float64, n being d_in:

        ========  ===============================================  =============================================
        body      what it does                                     error, at most
        ========  ===============================================  =============================================
        rounded   rounds ``x`` (see `Rounded`), and then as one  that of this body for the rounded ``x``
                  of the others; int8: sums its codes
        sharded   each device multiplies its piece of ``w``        that of the pieces' body
        adapted   adds an adapter's product to the base's          that of the bodies of both
        columns   a CPU's layout for few rows (see `Columns`)      scales to 2^-11 of themselves, and up to 8 rows
                                                                   x to 1/254 of the largest of its group of 16 or 32
        dense     one product of dense factors                     n 2^-24 Σ|x w| of the rounded factors
        pallas    a GPU's kernel for up to 16 rows, which decodes  (n + 2) 2^-24 Σ|x| (|scale code| + |offset|);
                  where it multiplies                              weights are not rounded to ``dtype``
        tiles     decodes some rows of ``w`` after others, or      n 2^-24 Σ|x w| of the rounded factors; int8:
                  all where ``x`` has many                         Σ(|x| step_w + |w| step_x + step_x step_w / 2) / 2
        ========  ===============================================  =============================================

    Raises QjaxError for a body that is unknown or does not fit, naming those that do, and for another dtype.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    return _BODIES[_choose(x, w, dtype, body).body].multiply(x, w, dtype)


def explain_matmul(
    x: Float[Array, "*batch d_in"] | jax.ShapeDtypeStruct,
    w: Matrix | jax.ShapeDtypeStruct,
    dtype: DTypeLike | None = None,
    body: str | None = None,
) -> "Choice":
    """Which body ``matmul(x, w, dtype, body)`` runs, and why, for ``w`` of logical shape (d_out, d_in); its arguments
    may be shapes (`jax.eval_shape`).

    Where ``w`` is a tracer, what counts is the platform that JAX compiles for by default; matrices that turn out to
    be elsewhere are multiplied by tiles.  Raises QjaxError as `matmul`.
    """
    return _choose(x, w, jnp.dtype(dtype or x.dtype), body)


@dataclass(frozen=True, repr=False)
class Choice:
    """A body of `matmul`, and why it is the one."""

    body: str
    why: str
    fitting: tuple[str, ...]
    """All that could be named, the first of them by default."""

    def __repr__(self) -> str:
        return f"{self.body}: {self.why}"


def embed(w: Matrix, ids: Int[Array, "*batch"]) -> Float32[Array, "*batch d_model"]:
    """Rows ``ids`` of an embedding matrix (vocab, d_model); only these rows are decoded."""
    if isinstance(w, Sharded):
        return w.embed(embed, ids)
    # Without the barrier XLA moves the conversion of a dense table out of the loop over tokens.
    table, ids = lax.optimization_barrier((w, ids))
    if isinstance(table, Columns):
        return columns.embed(table, ids)
    return dense(table[ids])


# ── which body ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Call:
    """What the choice depends on."""

    w: Any
    n_rows: int
    dtype: Any
    platform: str

    @property
    def kind(self) -> str:
        return self.w.format.name if isinstance(self.w, QTensor) else str(getattr(self.w, "dtype", type(self.w)))


@dataclass(frozen=True)
class _Body:
    fits: Callable[[_Call], tuple[bool, str]]
    """Whether it can, and why, or why not."""
    multiply: Callable[[Array, Any, Any], Array]


def _choose(x: Any, w: Any, dtype: Any, body: str | None) -> Choice:
    if not jnp.issubdtype(dtype, jnp.floating) and dtype != jnp.int8:
        raise QjaxError(f"matmul: dtype is {dtype.name}, expected float32, bfloat16 or int8")
    call = _Call(w, math.prod(x.shape[:-1]), dtype, _platform(w))
    found = {name: candidate.fits(call) for name, candidate in _BODIES.items()}
    fitting = tuple(name for name, (fits, _) in found.items() if fits)
    if not fitting:
        raise QjaxError(f"matmul: {'; '.join(why for _, why in found.values())}")
    chosen = fitting[0] if body is None else body
    if chosen not in fitting:
        reason = f"does not fit: {found[chosen][1]}" if chosen in found else "is unknown"
        others = "; ".join(f"{name} ({found[name][1]})" for name in fitting)
        raise QjaxError(f"matmul: body {chosen!r} {reason}. What fits: {others}.")
    return Choice(chosen, found[chosen][1], fitting)


def _platform(w: Any) -> str:
    where = devices(w)
    platform = jax.default_backend() if where is None else next(iter(where)).platform
    return "gpu" if platform == "cuda" else platform


def _fits_rounded(call: _Call) -> tuple[bool, str]:
    if not isinstance(call.w, Rounded):
        return False, "w does not say how to round x"
    name = call.w.rounding.name
    if call.dtype == jnp.int8 and not (call.w.integer_step and isinstance(call.w.weight, Array | QTensor)):
        return False, f"x rounded as {name} has no codes that can be summed: take float32, which has the same values"
    return True, f"x is rounded first ({name})"


def _multiply_rounded(x: Array, w: Rounded, dtype: Any) -> Array:
    if dtype == jnp.int8:
        return tiles.multiply(w.round(x), w.weight, dtype, w.step(x))
    return matmul(w.round(x), w.weight, dtype)


def _fits_sharded(call: _Call) -> tuple[bool, str]:
    if not isinstance(call.w, Sharded):
        return False, "w is not Sharded"
    return True, f"w lies on {call.w.mesh.size} devices"


def _fits_adapted(call: _Call) -> tuple[bool, str]:
    if not isinstance(call.w, Adapted):
        return False, "w has no adapter"
    return True, f"w has an adapter of rank {call.w.a.shape[-2]}"


def _fits_columns(call: _Call) -> tuple[bool, str]:
    if not isinstance(call.w, Columns):
        return False, "w is not laid out as Columns"
    return True, "w is laid out with its rows last"


def _fits_dense(call: _Call) -> tuple[bool, str]:
    if not _is_dense(call.w) or call.w.dtype != call.dtype or not jnp.issubdtype(call.dtype, jnp.floating):
        return False, f"w is {call.kind}, not dense {call.dtype.name}"
    return True, f"w is dense {call.dtype.name} as it is multiplied"


def _fits_packed(call: _Call) -> tuple[bool, str]:
    if not isinstance(call.w, QTensor):
        return False, f"w is {call.kind}, not packed"
    if call.platform != "gpu":
        return False, f"it needs a GPU, w is on {call.platform}"
    if not jnp.issubdtype(call.dtype, jnp.floating):
        return False, f"the kernel multiplies floats, not {call.dtype.name}"
    if not 0 < call.n_rows <= packed.MAX_ROWS:
        return False, f"{call.n_rows} rows of x, not 1 to {packed.MAX_ROWS}"
    if not packed.readable(call.w):
        return False, f"the kernel does not decode {call.kind}"
    return True, f"{call.kind} on a GPU, {call.n_rows} rows of x (up to {packed.MAX_ROWS})"


def _fits_tiles(call: _Call) -> tuple[bool, str]:
    if not isinstance(call.w, QTensor) and not _is_dense(call.w):
        return False, f"w is {type(call.w).__name__}"
    return True, f"{call.kind} on {call.platform}, {call.n_rows} rows of x: decoded as {call.dtype.name} where used"


def _is_dense(w: Any) -> bool:
    return isinstance(w, (Array, np.ndarray, jax.ShapeDtypeStruct))


@jax.custom_vjp
def _packed(x: Float[Array, "*batch d_in"], w: QTensor) -> Float32[Array, "*batch d_out"]:
    """The kernel where this is compiled for an NVIDIA GPU; layers that stay on the CPU beside one take tiles."""
    return lax.platform_dependent(x, w, cuda=packed.multiply, default=partial(tiles.multiply, dtype=x.dtype))


def _packed_forward(x, w):
    return _packed(x, w), (x, w)


def _packed_backward(factors, gradient):
    x, w = factors
    return *jax.vjp(lambda x: tiles.multiply(x, w, x.dtype), x)[1](gradient), None


_packed.defvjp(_packed_forward, _packed_backward)

# The first that fits is taken.
_BODIES = {
    "rounded": _Body(_fits_rounded, _multiply_rounded),
    "sharded": _Body(_fits_sharded, lambda x, w, dtype: w.product(partial(matmul, dtype=dtype), x)),
    "adapted": _Body(_fits_adapted, lambda x, w, dtype: w.product(partial(matmul, dtype=dtype), x)),
    "columns": _Body(_fits_columns, columns.multiply),
    "dense": _Body(_fits_dense, lambda x, w, dtype: tiles.product(x.astype(dtype), w, dtype)),
    "pallas": _Body(_fits_packed, lambda x, w, dtype: _packed(x.astype(dtype), w)),
    "tiles": _Body(_fits_tiles, tiles.multiply),
}
