"""Every rounding rule by name.

A rule maps a real number in code space to an integer code, both as float32, and takes the offset, one or one for each,
that makes codes unsigned: ``rule(v, offset)`` rounds ``v`` and adds ``offset``.  Offset and rule belong together
because ggml's ``half_up`` adds both in one step, ``trunc(v + 8.5)``, whose float32 sum rounds otherwise than two steps
would.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from qjax.errors import QjaxError, nearest_names

Rule = Callable[[Float32[Array, "..."], float | Float32[Array, "..."]], Float32[Array, "..."]]


def _half_up(v, offset):
    """Ties toward plus infinity in code space: Q4_0, Q4_1, Q5_0, Q5_1 (ggml-quants.c quantize_row_q4_0_ref)."""
    return jnp.floor(v + (offset + 0.5))


def _nearest_away(v, offset):
    """Ties away from zero, C's roundf: Q8_0 (ggml-quants.c quantize_row_q8_0_ref)."""
    return lax.round(v, lax.RoundingMethod.AWAY_FROM_ZERO) + offset


def _nearest_even(v, offset):
    """Ties to the even code, IEEE's default: ggml's nearest_int."""
    return lax.round(v, lax.RoundingMethod.TO_NEAREST_EVEN) + offset


def _truncate(v, offset):
    """Toward zero: what a C cast does."""
    return jnp.trunc(v) + offset


def _floor(v, offset):
    """Toward minus infinity: what dropping the low bits of a two's complement number does."""
    return jnp.floor(v) + offset


class _Stochastic(NamedTuple):
    """Up with probability equal to the fraction: E[rule(v)] = v + offset."""

    seed: int | Array

    def __call__(self, v, offset):
        # Not floor(v + u), whose float32 sum can round up and move a v that is an integer already.
        below = jnp.floor(v)
        return below + (jax.random.uniform(jax.random.key(self.seed), v.shape) < v - below) + offset


_RULES: dict[str, Callable[[int | Array], Rule]] = {
    "nearest_even": lambda seed: _nearest_even,
    "nearest_away": lambda seed: _nearest_away,
    "half_up": lambda seed: _half_up,
    "truncate": lambda seed: _truncate,
    "floor": lambda seed: _floor,
    "stochastic": _Stochastic,
}


def names() -> tuple[str, ...]:
    """The names of the rounding rules."""
    return tuple(_RULES)


def check(name: str) -> str:
    """``name`` if it is a rounding rule.  Raises QjaxError with the nearest names if not."""
    if name not in _RULES:
        raise QjaxError(f"unknown rounding {name!r}. {nearest_names(name, _RULES)}")
    return name


def rule(name: str, seed: int | Array = 0) -> Rule:
    """The rounding rule called ``name``; ``seed`` matters to ``stochastic`` alone."""
    return _RULES[check(name)](seed)
