"""The scale searches that ggml's formats share, each over many blocks at once (see `_lanes`).

Axis 0 of every argument runs over the values of a block, the remaining axes are lanes: blocks that are searched side
by side.  All sums and comparisons are those of ggml-quants.c, in its order; ``w`` is the weight of each squared error.

In all of them a candidate scale is judged after a least-squares fit to the codes that it gives: with codes q, the
scale that minimises sum w (x - d q)^2 is d = sum w x q / sum w q^2, and the smaller error is the larger
(sum w x q)^2 / sum w q^2.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32

from qjax.formats._exact import exact_product, exact_reciprocal, runtime_one
from qjax.formats._lanes import block_sum, block_sums, scan_rows, some_lanes

# Below this a block counts as all zeros.
GROUP_MAX_EPS = 1e-15


def nearest_int(v: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """The integer code nearest to ``v``, ties to the even one; the rule of every K- and I-quant."""
    return lax.round(v, lax.RoundingMethod.TO_NEAREST_EVEN)


def mean_square(x: Float32[Array, "n *lanes"]) -> Float32[Array, "*lanes"]:
    """Of each block."""
    return block_sum(exact_product(x, x, runtime_one(x, axis=0))) * (1 / len(x))


def importance_weights(
    x: Float32[Array, "n *lanes"], importance: Float32[Array, "..."], sigma2: Float32[Array, "..."]
) -> Float32[Array, "n *lanes"]:
    """The weights of the squared errors where an importance matrix is given: importance times sqrt(sigma2 + x^2)."""
    one = runtime_one(x, axis=0)
    return exact_product(importance, jnp.sqrt(sigma2 + exact_product(x, x, one)), one)


def make_qx_quants(
    x: Float32[Array, "n *lanes"], w: Float32[Array, "n *lanes"], nmax: int
) -> tuple[Float32[Array, "*lanes"], Float32[Array, "n *lanes"]]:
    """x = d (q - nmax), 0 <= q < 2 nmax: the best of 19 scales around the one that gives the largest x the code 0.

    w: weights of the squared errors; ggml's ``rmse_type`` 1 is w = x * x.

    Returns d and q, both 0 where all of x is.
    """
    one = runtime_one(x, axis=0)[0]
    largest = first_largest(x)
    zero = jnp.abs(largest) < GROUP_MAX_EPS
    largest = jnp.where(zero, 1, largest)
    wx = w * x * one

    def codes(iscale):
        return jnp.clip(nearest_int(iscale * x), -nmax, nmax - 1)

    def sums(iscale):
        return block_sums(lambda w, wx, q: (wx * q * one, w * q * q * one), w, wx, codes(iscale))

    def better(step, best):
        iscale = -candidates[step] / largest
        sumlx, suml2 = sums(iscale)
        is_better = (suml2 > 0) & (sumlx * sumlx > best[0] * suml2)
        scale = sumlx / jnp.where(is_better, suml2, 1)
        return tuple(jnp.where(is_better, new, old) for new, old in zip((scale * sumlx, scale, iscale), best))

    candidates = jnp.asarray(nmax + np.float32(0.1) * np.delete(np.arange(-9, 10, dtype=np.float32), 9))
    iscale = -nmax / largest
    sumlx, suml2 = sums(iscale)
    scale = jnp.where(suml2 != 0, sumlx / jnp.where(suml2 != 0, suml2, 1), 0)
    _, scale, iscale = lax.fori_loop(0, len(candidates), better, (scale * sumlx, scale, iscale))
    return jnp.where(zero, 0, scale), jnp.where(zero, 0, codes(iscale) + nmax)


def make_qkx2_quants(
    x: Float32[Array, "n *lanes"],
    w: Float32[Array, "n *lanes"],
    nmax: int,
    rmin: float,
    rdelta: float,
    nstep: int,
    use_mad: bool = False,
) -> tuple[Float32[Array, "*lanes"], Float32[Array, "*lanes"], Float32[Array, "n *lanes"]]:
    """x = d q - m with codes 0..nmax and m >= 0: the best of nstep + 2 scales, d and m refitted to each one's codes.

    w: weights of the errors, which are squared, or absolute where ``use_mad``.
    rmin, rdelta: candidate i spans the range of x with nmax + rmin + i rdelta steps.

    Returns d, m and q.  ggml's ``make_qkx3_quants`` is the same search, with w = x * x where it is given no weights.
    """
    one = runtime_one(x, axis=0)[0]
    # In C's order, for the sign of a zero.
    smallest, largest = scan_rows(_smaller_and_larger, (x[0], x[0]), x)
    smallest = jnp.where(smallest > 0, 0, smallest)
    flat = largest == smallest
    sum_w, sum_x = block_sums(lambda x, w: (w, w * x * one), x, w)

    def codes(steps, minimum):
        iscale = steps / jnp.where(flat, 1, largest - minimum)
        return jnp.clip(nearest_int(iscale * (x - minimum)), 0, nmax)

    def error(q, scale, minimum):
        def term(x, w, q):
            diff = scale * q * one + minimum - x
            return (w * (jnp.abs(diff) if use_mad else diff * diff) * one,)

        return block_sums(term, x, w, q)[0]

    def better(step, best):
        # The range that a candidate divides starts at the best minimum so far.
        _, _, start, *_ = best
        q = codes(candidates[step], start)
        sum_l, sum_l2, sum_xl = block_sums(lambda x, w, q: (w * q * one, w * q * q * one, w * q * x * one), x, w, q)
        determinant = sum_w * sum_l2 * one - sum_l * sum_l * one
        solvable = determinant > 0
        determinant = jnp.where(solvable, determinant, 1)
        scale = (sum_w * sum_xl * one - sum_x * sum_l * one) / determinant
        minimum = (sum_l2 * sum_x * one - sum_l * sum_xl * one) / determinant
        scale = jnp.where(minimum > 0, sum_xl / jnp.where(solvable, sum_l2, 1), scale)
        minimum = jnp.where(minimum > 0, 0, minimum)
        err = error(q, scale, minimum)
        is_better = solvable & (err < best[0])
        return tuple(
            jnp.where(is_better, new, old) for new, old in zip((err, scale, minimum, candidates[step], start), best)
        )

    candidates = jnp.asarray(np.float32(rmin) + np.float32(rdelta) * np.arange(nstep + 1, dtype=np.float32) + nmax)
    scale = exact_reciprocal(nmax / jnp.where(flat, 1, largest - smallest))
    steps = jnp.full_like(scale, nmax)
    best = error(codes(steps, smallest), scale, smallest), scale, smallest, steps, smallest
    _, scale, minimum, steps, start = lax.fori_loop(0, len(candidates), better, best)
    return jnp.where(flat, 0, scale), -minimum, codes(steps, start)


def make_qp_quants(
    x: Float32[Array, "n *lanes"], w: Float32[Array, "n *lanes"], nmax: int
) -> tuple[Float32[Array, "*lanes"], Float32[Array, "n *lanes"]]:
    """x = d q for x >= 0 with codes 0..nmax: the best of 9 scales, then up to five rounds of moving one code at a time.

    Where x is negative, which IQ2_XXS has, codes are what becomes of negative ones in C's byte.  Returns d and q.
    """
    one = runtime_one(x, axis=0)[0]
    largest = jnp.max(x, axis=0)
    zero = largest < GROUP_MAX_EPS
    largest = jnp.where(zero, 1, largest)

    def codes(iscale):
        return jnp.minimum(nearest_int(iscale * x), nmax)

    def error(iscale, q):
        scale = exact_reciprocal(iscale)

        def term(x, w, q):
            diff = x - scale * q * one
            return (w * diff * diff * one,)

        return block_sums(term, x, w, q)[0]

    def better(step, best):
        iscale = candidates[step] / largest
        err = error(iscale, codes(iscale))
        return tuple(jnp.where(err < best[0], new, old) for new, old in zip((err, iscale), best))

    candidates = jnp.asarray(np.float32(0.1) * np.delete(np.arange(-4, 5, dtype=np.float32), 4) + nmax)
    iscale = nmax / largest
    _, iscale = lax.fori_loop(0, len(candidates), better, (error(iscale, _as_byte(codes(iscale))), iscale))
    scale, q = _descend(x, w, codes(iscale), -jnp.inf, nmax, stored=_as_byte)
    return jnp.where(zero, 0, scale), jnp.where(zero, 0, q)


def make_q3_quants(
    x: Float32[Array, "n *lanes"], nmax: int
) -> tuple[Float32[Array, "*lanes"], Float32[Array, "n *lanes"]]:
    """x = d (q - nmax), 0 <= q < 2 nmax, errors weighted by x^2: up to five rounds of moving one code at a time.

    Returns d and q, both 0 where all of x is.
    """
    largest = first_largest(x)
    zero = jnp.abs(largest) < GROUP_MAX_EPS
    largest = jnp.where(zero, 1, largest)
    q = jnp.clip(nearest_int(-nmax / largest * x), -nmax, nmax - 1)
    scale, q = _descend(x, x * x, q, -nmax, nmax - 1)
    return jnp.where(zero, 0, scale), jnp.where(zero, 0, q + nmax)


def _descend(x, w, q, lowest: float, highest: int, stored=lambda q: q):
    """Coordinate descent on the codes: each in turn moves to its best value for the scale that the others fit.

    A block that does not change in one of the five rounds would not in the next.  Most change in the first one only.
    """

    def move(sums, row, one):
        sumlx, suml2 = sums
        x, w, q = row
        slx = sumlx - w * x * q * one
        sl2 = suml2 - w * q * q * one
        # make_q3_quants asks for sl2 > 0 after the move only: with w = x^2 it is 0 before if no other code counts.
        movable = (slx > 0) & (sl2 > 0)
        new = jnp.clip(nearest_int(x * sl2 / jnp.where(movable, slx, 1)), lowest, highest)
        slx = slx + w * x * new * one
        sl2 = sl2 + w * new * new * one
        better = movable & (new != q) & (sl2 > 0) & (slx * slx * suml2 > sumlx * sumlx * sl2)
        return (jnp.where(better, slx, sumlx), jnp.where(better, sl2, suml2)), jnp.where(better, stored(new), q)

    def rounds(state, x, w, n):
        """``n`` rounds; the state is the two sums and below them the codes."""
        step = functools.partial(move, one=runtime_one(x, axis=0)[0])

        def sweep(_, state):
            sums, q = lax.scan(step, (state[0], state[1]), (x, w, state[2:]))
            return jnp.stack([*sums, *q])

        return lax.fori_loop(0, n, sweep, state)

    one = runtime_one(x, axis=0)[0]
    sums = block_sums(lambda x, w, q: (w * x * q * one, w * q * q * one), x, w, q)
    before = jnp.stack([*sums, *stored(q)])
    after = rounds(before, x, w, 1)
    changed = jnp.any(after != before, axis=0)
    sumlx, suml2, *q = some_lanes(functools.partial(rounds, n=4), changed, after, x, w)
    return jnp.where(suml2 > 0, sumlx / jnp.where(suml2 > 0, suml2, 1), 0), jnp.stack(q)


def _as_byte(q):
    """An integer as C's uint8_t holds it."""
    return q - 256 * jnp.floor(q / 256)


def _smaller_and_larger(state, row):
    smallest, largest = state
    return jnp.where(row < smallest, row, smallest), jnp.where(row > largest, row, largest)


def first_largest(x: Float32[Array, "n *lanes"]) -> Float32[Array, "*lanes"]:
    """The value of largest magnitude of each block, the first one of several; 0 where there are only zeros."""

    def larger(state, row):
        return (jnp.where(jnp.abs(row) > jnp.abs(state[0]), row, state[0]),)

    return scan_rows(larger, (jnp.zeros_like(x[0]),), x)[0]
