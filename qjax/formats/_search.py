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

from qjax.formats._apart import apart
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
    scale, q = _descend(x, w, codes(iscale), -64, nmax, stored=_as_byte)
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


def _descend(x, w, q, lowest: int, highest: int, stored=lambda q: q):
    """Coordinate descent on the codes: up to five times each in turn moves to its best value for the scale that the
    others fit.

    lowest, highest: of the codes, within -64..63.  stored: what becomes of a code when it is stored.

    Four weights at a time are one program of one result, their new codes, which XLA keeps in registers; the sums are
    then followed from these.  With several results it would compute all of it for each of them.
    """

    def without(sums, x, w, q, one):
        return sums[0] - w * x * q * one, sums[1] - w * q * q * one

    def plus(sums, x, w, q, one):
        return sums[0] + w * x * q * one, sums[1] + w * q * q * one

    def rows(x, w, word):
        """What the codes of a word stand for, each with its weight."""
        take = functools.partial(lax.dynamic_index_in_dim, keepdims=False)
        return [(take(x, at := _CODES_PER_WORD * word + i), take(w, at)) for i in range(_CODES_PER_WORD)]

    def move(x, w, word, codes, one, *sums):
        """The new ``codes`` of a word, in which a bit says that they moved."""
        result = jnp.uint32(0)
        for i, row in enumerate(rows(x, w, word)):
            q = stored(_code(codes, i))
            slx, sl2 = without(sums, *row, q, one)
            new = jnp.clip(_nearest_int_of_quotient(row[0] * sl2, slx), lowest, highest)
            after = plus((slx, sl2), *row, new.astype(jnp.float32), one)
            # make_q3_quants asks for sl2 > 0 after the move only: with w = x^2 it is 0 before if no other code counts.
            better = after[0] * after[0] * sums[1] > sums[0] * sums[0] * after[1]
            better &= (slx > 0) & (sl2 > 0) & (new.astype(jnp.float32) != q) & (after[1] > 0)
            sums = tuple(jnp.where(better, new, old) for new, old in zip(after, sums))
            result |= jnp.where(better, _coded(new, i, moved=1), codes & _coded(-1, i))
        return result

    def follow(x, w, word, codes, one, moved, *sums):
        """The sums after the moves."""
        for i, row in enumerate(rows(x, w, word)):
            after = plus(without(sums, *row, stored(_code(codes, i)), one), *row, _code(moved, i), one)
            sums = tuple(jnp.where(_moved(moved, i), new, old) for new, old in zip(after, sums))
        return sums

    def rounds(n, state, x, w):
        """``n`` rounds; the state is the two sums and below them the codes, in words."""
        one = runtime_one(x, axis=0)[0]

        def step(sums, word_and_codes):
            word, codes = word_and_codes
            moved = apart(move, x, w, word, codes, one, *sums)
            return follow(x, w, word, codes, one, moved, *sums), moved

        def round_of_all(_, state):
            *sums, words = state
            sums, words = lax.scan(step, tuple(sums), (jnp.arange(len(words)), words))
            return *sums, words

        return lax.fori_loop(0, n, round_of_all, state)

    one = runtime_one(x, axis=0)[0]
    sums = block_sums(lambda x, w, q: (w * x * q * one, w * q * q * one), x, w, q)
    by_words = q.reshape(-1, _CODES_PER_WORD, *q.shape[1:])
    words = functools.reduce(jnp.bitwise_or, [_coded(by_words[:, i], i) for i in range(_CODES_PER_WORD)])
    *sums, words = rounds(1, (*sums, words), x, w)
    changed = functools.reduce(jnp.bitwise_or, words) & _ANY_MOVED != 0
    sumlx, suml2, words = some_lanes(functools.partial(rounds, 4), changed, (*sums, words), x, w)
    q = jnp.stack([stored(_code(words, i)) for i in range(_CODES_PER_WORD)], axis=1).reshape(q.shape)
    return jnp.where(suml2 > 0, sumlx / jnp.where(suml2 > 0, suml2, 1), 0), q


def _nearest_int_of_quotient(a, b):
    """`nearest_int` of ``a / b`` as an int32, as C computes it: what is added to a float below 2**22 leaves the
    integer in its low bits.  (Of a product XLA would make a fused multiply-add of that.)"""
    bits = lax.bitcast_convert_type(a / b + jnp.float32(3 * 2**22), jnp.int32)
    return (bits & (2**23 - 1)) - 2**22


# Four codes in a word, a byte each: seven bits of the code, and one that says whether it has just moved.
_CODES_PER_WORD = 4
_ANY_MOVED = np.uint32(0x80808080)


def _coded(code, i: int, moved: int = 0):
    """``code`` as byte ``i`` of a word."""
    return ((jnp.asarray(code).astype(jnp.int32).astype(jnp.uint32) & 127) | (moved << 7)) << (8 * i)


def _code(word, i: int):
    """The code in byte ``i``."""
    return (word.astype(jnp.int32) << (25 - 8 * i) >> 25).astype(jnp.float32)


def _moved(word, i: int):
    return (word >> (8 * i + 7)) & 1 == 1


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
