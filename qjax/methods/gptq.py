"""GPTQ: round column by column, and let the columns to come make up for the error of each (Frantar et al. 2022,
arXiv 2210.17323).

The squared error of a layer's output is, summed over the tokens of a text, tr(E H Eᵀ), with E the error of the weights
and H the second moment of the input.  Rows stand alone.  Once column j is rounded, the others are best moved by
-e U[j, k], where e = (w - ŵ) / U[j, j] and H⁻¹ = Uᵀ U; what can no longer be made up for is e².  Here:

    block by block of a format (up to 256 columns):
        the format searches its scales anew, on the weights as the blocks before left them, at several sizes
        for each of these: column by column a code, and its error into the columns to come
        of each row the scales stay that cost least, Σ e²; their errors go into all blocks to come
    then, a few times, group by group: the scale and the offset of least squares, then each code in turn

The last part is coordinate descent on tr(E H Eᵀ) itself, as in QuantEase (Behdin et al. 2023, arXiv 2309.01885), whose
steps can not make it larger.  Columns are worked as they lie, for a format's blocks are of neighbours.  To begin
with the blocks whose input is largest (the "activation order" of the authors' programs) makes tr(E H Eᵀ) 0.8 % smaller
in Q4_0 and 0.4 % in three bits, in the mean over 14 matrices of the tiny model (without the descent 1.6 %), and up to
3 % larger in single ones: it is left out.

Cost: of each row some ten d_in² multiplications and additions, and five of the format's searches; of each matrix the
inverse of H in float64.  Memory: H and U, in float64 on the way.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Float64, UInt8

from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.methods import coding, rtn
from qjax.methods.statistics import Seen
from qjax.tensor import QTensor

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: what the text has not shown, it can not vouch for."""

# What the weights of a block are multiplied with before the format searches for scales.
_SIZES = (0.85, 0.9, 0.95, 1.0, 1.05)
_SWEEPS = 4


def quantize(name: str, w: Array, format: Format, seen: Seen | None, options: rtn.Options) -> Array | QTensor:
    """A Rounder.  Rows in which round-to-nearest leaves the smaller E H Eᵀ begin the descent from it.

    Raises QjaxError naming the tensor if H is not positive definite, and as `coding.rounded` does.
    """
    moments = np.eye(w.shape[-1]) if seen is None else np.asarray(seen.second_moment, np.float64)

    def solver_of(matrix: tuple[int, ...]) -> coding.Solver:
        h = damped(moments[matrix])
        try:
            arrays = jnp.asarray(h, jnp.float32), jnp.asarray(upper(h), jnp.float32)
        except np.linalg.LinAlgError:
            raise QjaxError(
                f"{name}: the second moment of its input is not positive definite, with {DAMPING:.0%} of its mean "
                "diagonal added. Give more calibration text, or round this model with method rtn."
            ) from None
        return lambda w, nearest, format: solve(w, nearest, *arrays, format)

    if seen is not None and seen.with_floats is not None:
        w = _towards_floats(w, moments, np.asarray(seen.with_floats, np.float64))
    return coding.rounded("gptq", name, w, format, options, solver_of, fits=coding.chooses_codes)


def _towards_floats(
    w: Float32[Array, "d_out d_in"], h: Float64[np.ndarray, "d_in d_in"], with_floats: Float64[np.ndarray, "d_in d_in"]
) -> Float32[Array, "d_out d_in"]:
    """The weights that make of the quantized layers' x what is nearest to the float model's output W x'.

    E |Ŵ x - W x'|² is tr((Ŵ - V) H (Ŵ - V)ᵀ) and what no Ŵ changes, with V = W E[x' xᵀ] H⁻¹: so that GPTQ of V is
    what GPTAQ asks for (Li et al. 2025, arXiv 2504.02692).  Both moments are damped alike, towards W.
    """
    ridge = damped(h) - h
    return jnp.asarray(np.linalg.solve(h + ridge, (np.float64(w) @ (with_floats + ridge)).T).T, jnp.float32)


def damped(h: Float64[np.ndarray, "d_in d_in"], damping: float = DAMPING) -> Float64[np.ndarray, "d_in d_in"]:
    """H with ``damping`` times its mean diagonal added to the diagonal; the identity if it is zero.

    A column that is always zero in the text thus gets a little, and no neighbours: it is rounded to nearest.
    """
    mean = np.trace(h) / len(h)
    return h + damping * mean * np.eye(len(h)) if mean > 0 else np.eye(len(h))


def upper(h: Float64[np.ndarray, "d_in d_in"]) -> Float64[np.ndarray, "d_in d_in"]:
    """U, upper triangular, with H⁻¹ = Uᵀ U.  Raises np.linalg.LinAlgError if H is not positive definite."""
    # The Cholesky factor of H from its last column on is U⁻¹.
    return np.linalg.inv(np.linalg.cholesky(h[::-1, ::-1]))[::-1, ::-1]


# ── the solver ───────────────────────────────────────────────────────────────────────────────────────
# Arrays are (columns, rows), as in `coding`.


@functools.partial(jax.jit, static_argnames=("format", "sizes", "sweeps"))
def solve(
    w: Float32[Array, "rows d_in"],
    nearest: Any,
    h: Float32[Array, "d_in d_in"],
    u: Float32[Array, "d_in d_in"],
    format: Format,
    sizes: tuple[float, ...] = _SIZES,
    sweeps: int = _SWEEPS,
) -> tuple[Any, UInt8[Array, "rows n_blocks block_size"]]:
    """The fields of some rows, and their codes.

    nearest: the fields of round-to-nearest.  h: damped.  u: its `upper`.
    """
    n_rows, rounded, w = len(w), format.decode(nearest).reshape(w.shape).T, w.T
    scale, offset = coding.scales_of(format, nearest)
    start, _ = coding.nearest(rounded, *coding.spread_scales(format, nearest, len(w)), format.levels)
    if format.with_scales is None:
        fields, (codes, _) = nearest, round_columns(w, u, scale, offset, format.levels)
    else:
        fields, codes = _greedy(w, u, format, jnp.asarray(sizes))
    greedy = coding.weights(codes, *coding.scales_of(format, fields), format.levels)
    better = _error(greedy - w, h) < _error(rounded - w, h)
    fields = jax.tree.map(functools.partial(coding.of_rows, better), fields, nearest)
    fields, codes = _refine(w, h, fields, jnp.where(better, codes, start), format, sweeps)
    codes = codes.T.reshape(n_rows, -1, format.block_size)
    return format.with_codes(fields, codes), codes


def _error(e: Float32[Array, "d_in rows"], h: Float32[Array, "d_in d_in"]) -> Float32[Array, " rows"]:
    """Of each row, E H Eᵀ."""
    return jnp.sum((h @ e) * e, axis=0)


def _greedy(
    w: Float32[Array, "d_in rows"], u: Float32[Array, "d_in d_in"], format: Format, sizes: Float32[Array, " n_sizes"]
) -> tuple[Any, UInt8[Array, "d_in rows"]]:
    """Block by block: fields, whose codes do not count, and codes."""
    n_rows, block = w.shape[1], format.block_size
    # What an error in a column costs once the columns behind it have made up for what they can.
    importance = 1 / jnp.diagonal(u) ** 2

    def of_block(w, b):
        mine = functools.partial(lax.dynamic_slice_in_dim, start_index=b * block, slice_size=block)
        x, to_all = mine(w), mine(u)

        def search(size):
            weighed = mine(importance)[None] if format.uses_importance else None
            fields = format.encode((size * x.T)[:, None], weighed)
            return fields, *coding.scales_of(format, fields)

        found, *scales = lax.map(search, sizes)
        # The sizes lie side by side, as if they were rows.
        scales = (jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1) for a in scales)
        tried = round_columns(jnp.tile(x, (1, len(sizes))), mine(to_all, axis=1), *scales, format.levels)
        codes, errors = (a.reshape(block, len(sizes), n_rows) for a in tried)
        best = jnp.argmin(jnp.sum(errors**2, axis=0), axis=0)
        codes, errors = (jnp.take_along_axis(a, best[None, None], axis=1)[:, 0] for a in (codes, errors))
        return w - to_all.T @ errors, (jax.tree.map(lambda a: a[best, jnp.arange(n_rows), 0], found), codes)

    _, (fields, codes) = lax.scan(of_block, w, jnp.arange(len(w) // block))
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), fields), codes.reshape(w.shape)


def round_columns(
    x: Float32[Array, "d_in rows"],
    u: Float32[Array, "d_in d_in"],
    scale: Float32[Array, "n_groups rows"],
    offset: Float32[Array, "n_groups rows"],
    levels: Float32[np.ndarray, " n_levels"],
) -> tuple[UInt8[Array, "d_in rows"], Float32[Array, "d_in rows"]]:
    """Column by column: codes, and errors e."""
    group = len(x) // len(scale)
    chunk = math.gcd(group, 32)

    def of_chunk(k, state):
        x, codes, errors = state
        mine = functools.partial(lax.dynamic_slice_in_dim, start_index=k * chunk, slice_size=chunk)
        to_all = mine(u)
        within, s, o = mine(to_all, axis=1), scale[k * chunk // group], offset[k * chunk // group]

        def of_column(j, state):
            x, i, e = state
            code, w = coding.nearest(x[j], s, o, levels)
            error = (x[j] - w) / within[j, j]
            return x - within[j, :, None] * error, i.at[j].set(code), e.at[j].set(error)

        _, i, e = lax.fori_loop(0, chunk, of_column, (mine(x), mine(codes), mine(errors)))
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=k * chunk, axis=0)
        return x - to_all.T @ e, put(codes, i), put(errors, e)

    start = x, jnp.zeros(x.shape, jnp.uint8), jnp.zeros_like(x)
    return lax.fori_loop(0, len(x) // chunk, of_chunk, start)[1:]


def _refine(w, h, fields, codes, format: Format, sweeps: int) -> tuple[Any, UInt8[Array, "d_in rows"]]:
    """Coordinate descent on E H Eᵀ of each row: fields, whose codes do not count, and codes (d_in, rows)."""
    levels = format.levels
    scale, offset = coding.scales_of(format, fields)
    n_groups = len(scale)
    group, per_block = len(w) // n_groups, n_groups // (len(w) // format.block_size)

    def fitted(fields, g, level, gradient, hgg):
        """``fields`` with the scale and offset of group ``g`` that are best for its levels, as they can be stored."""
        block = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, g // per_block, 1, 1), fields)
        before = format.scales(block)
        of_group = functools.partial(lax.dynamic_index_in_dim, index=g % per_block, axis=1, keepdims=False)

        def moved(block, **changes):
            now = format.scales(block)
            put = functools.partial(lax.dynamic_update_index_in_dim, index=g % per_block, axis=1)
            new = {name: put(getattr(now, name), of_group(getattr(before, name)) + by) for name, by in changes.items()}
            return format.with_scales(block, now._replace(**new))

        h_level = hgg @ level
        curvature, slope = jnp.sum(level * h_level, axis=0), jnp.sum(level * gradient, axis=0)
        enough = 1e-6 * curvature
        if before.offset is not None:
            # The offset goes along with each scale as is best for it.
            both, of_offset, slope_of_offset = jnp.sum(h_level, axis=0), jnp.sum(hgg), jnp.sum(gradient, axis=0)
            curvature, slope = curvature - both**2 / of_offset, slope - both / of_offset * slope_of_offset
        fits = curvature > enough
        new = moved(block, scale=jnp.where(fits, -slope / jnp.where(fits, curvature, 1), 0))
        if before.offset is not None:
            step = of_group(format.scales(new).scale) - of_group(before.scale)
            new = moved(new, offset=-(slope_of_offset + both * step) / of_offset)
        (s, o), (s_before, o_before) = (map(of_group, coding.with_offset(format.scales(f))) for f in (new, block))
        change = (s - s_before) * level + (o - o_before)
        better = jnp.sum(change * (2 * gradient + hgg @ change), axis=0) < 0
        chosen = jax.tree.map(functools.partial(coding.of_rows, better), new, block)
        fields = jax.tree.map(lambda a, v: lax.dynamic_update_slice_in_dim(a, v, g // per_block, 1), fields, chosen)
        return fields, jnp.where(better, s, s_before), jnp.where(better, o, o_before)

    def of_group(g, state):
        fields, codes, scale, offset, gradient = state
        mine = functools.partial(lax.dynamic_slice_in_dim, start_index=g * group, slice_size=group)
        own, i, to_all = mine(gradient), mine(codes), mine(h, axis=1)
        hgg, level, s, o = mine(to_all), coding.level(i, levels), scale[g], offset[g]
        before = values = s * level + o
        if format.with_scales is not None:
            fields, s, o = fitted(fields, g, level, own, hgg)
            values = s * level + o
            own += hgg @ (values - before)

        def of_column(j, state):
            values, i, own = state
            code, value = coding.nearest(values[j] - own[j] / hgg[j, j], s, o, levels)
            return values.at[j].set(value), i.at[j].set(code), own + hgg[:, j, None] * (value - values[j])

        values, i, _ = lax.fori_loop(0, group, of_column, (values, i, own))
        codes = lax.dynamic_update_slice_in_dim(codes, i, g * group, 0)
        return fields, codes, scale.at[g].set(s), offset.at[g].set(o), gradient + to_all @ (values - before)

    def sweep(_, state):
        fields, codes, scale, offset = state
        gradient = h @ (coding.weights(codes, scale, offset, levels) - w)
        return lax.fori_loop(0, n_groups, of_group, (fields, codes, scale, offset, gradient))[:4]

    return lax.fori_loop(0, sweeps, sweep, (fields, codes, scale, offset))[:2]
