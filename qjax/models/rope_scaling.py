"""How rotary embedding is stretched for longer texts, as config.json says it: each kind gives some fields of Config."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qjax.errors import QjaxError
from qjax.models.architectures import entry

# How Llama 3.1 to 3.3 do it, but for the factor: their config.json all say so.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Yarn(NamedTuple):
    """YaRN's way (Peng et al. 2023): waves that go round less than beta_slow times in the original context are
    stretched by the factor, those that do more than beta_fast times are left alone, and those between by something
    between, in equal steps."""

    factor: float
    n_ctx: int
    """the original context"""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float | None = None
    """What is turned is multiplied by it, too; None: 1 + ln(factor) / 10, so that attention to many keys does not
    blur."""

    @property
    def scale(self) -> float:
        """The magnitude that counts."""
        if self.magnitude is not None:
            return self.magnitude
        return 1 + math.log(self.factor) / 10 if self.factor > 1 else 1.0

    def factors(self, n_rot: int, theta: float) -> tuple[float, ...]:
        """What each frequency is divided by."""
        # Of the first and the last pair that is partly stretched: where a wave goes round beta times.
        pair = (
            n_rot * math.log(self.n_ctx / (beta * 2 * math.pi)) / (2 * math.log(theta))
            for beta in (self.beta_fast, self.beta_slow)
        )
        low, high = max(math.floor(next(pair)), 0), min(math.ceil(next(pair)), n_rot - 1)
        ramp = np.clip((np.arange(n_rot // 2) - low) / max(high - low, 0.001), 0, 1)
        return tuple((1 / (ramp / self.factor + 1 - ramp)).tolist())


def read(scaling: Mapping[str, Any], n_rot: int, theta: float, n_ctx: int, *, long: bool = False) -> dict[str, Any]:
    """The fields of Config that a rope_scaling of config.json settles.

    n_rot: how many channels of a head are turned.  theta: the base.  n_ctx: max_position_embeddings.
    long: whether the architecture has longrope.
    Raises QjaxError for a kind that is not known, and for numbers that make no sense.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    # Some of Phi-3's first files say su, the name of its author.
    kind = "longrope" if long and kind == "su" else kind
    if kind == "default":
        return {}
    if kind == "longrope" and long:
        return _longrope(scaling, n_ctx)
    if kind == "yarn":
        return {"yarn": _yarn(scaling, n_ctx)}
    if kind not in ("linear", "llama3"):
        raise unknown(f"rope_type {kind}")
    factor = entry(scaling, "factor", of=float)
    if not factor > 0:
        raise QjaxError(f"config.json: rope_scaling, {kind}, has factor {factor}; expected a positive number")
    return {"rope_scale": 1 / factor} if kind == "linear" else {"rope_factors": _llama3(scaling, factor, n_rot, theta)}


def unknown(found: str) -> QjaxError:
    """The error for a kind that is not known."""
    return QjaxError(
        f"model config: rotary embedding scaled in this way ({found}) is not supported, and leaving it out would give "
        "wrong results. Known: linear, llama3, yarn; for phi3 longrope."
    )


def _llama3(scaling: Mapping[str, Any], factor: float, n_rot: int, theta: float) -> tuple[float, ...]:
    """Llama 3's (Grattafiori et al. 2024): waves longer than the original context / low_freq_factor are stretched by
    the factor, those shorter than it / high_freq_factor are left alone, those between by something between.

    Each step in float32, as llama.cpp's converter does it (conversion/llama.py).
    """
    low, high = (entry(scaling, key, of=float) for key in ("low_freq_factor", "high_freq_factor"))
    n_ctx = entry(scaling, "original_max_position_embeddings", of=float)
    if not 0 < low < high:
        raise QjaxError(f"config.json: rope_scaling makes no sense: {dict(scaling)}")
    f32 = np.float32
    with np.errstate(all="ignore"):
        waves = f32(2 * np.pi) / (1 / f32(theta) ** (np.arange(0, n_rot, 2, dtype=f32) / f32(n_rot)))
        # How often each goes round in the original context, between the two factors from 0 to 1.
        smooth = (f32(n_ctx) / waves - f32(low)) / f32(high - low)
        between = 1 / ((1 - smooth) / f32(factor) + smooth)
        factors = np.where(waves < n_ctx / high, f32(1), np.where(waves > n_ctx / low, f32(factor), between))
    return _float32(factors)


def _longrope(scaling: Mapping[str, Any], n_ctx: int) -> dict[str, Any]:
    """LongRoPE's (Ding et al. 2024): factors found by search, for texts within the original context and for longer
    ones, and queries and keys a little larger, so that attention to many keys does not blur."""
    original = entry(scaling, "original_max_position_embeddings", of=float)
    factor = entry(scaling, "factor", 0.0, of=float) or n_ctx / original
    magnitude = entry(scaling, "attention_factor", None, of=float)
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    lists = {}
    for key in ("short_factor", "long_factor"):
        if not isinstance(lists.setdefault(key, scaling.get(key)), list) or not lists[key]:
            raise QjaxError(f"config.json: rope_scaling, longrope, has {key} {lists[key]}; expected a list of numbers")
    return {
        "rope_factors": _float32(lists["short_factor"]),
        "long_factors": _float32(lists["long_factor"]),
        "rope_magnitude": _float32([magnitude])[0],
    }


def _yarn(scaling: Mapping[str, Any], n_ctx: int) -> Yarn:
    if scaling.get("truncate") is False:
        raise unknown("rope_type yarn, truncate false")
    original = entry(scaling, "original_max_position_embeddings", 0, of=int) or n_ctx
    factor = entry(scaling, "factor", 0.0, of=float) or n_ctx / original
    fast, slow = (entry(scaling, key, 0.0, of=float) for key in ("beta_fast", "beta_slow"))
    made = Yarn(factor, original, fast or 32.0, slow or 1.0)
    keys = ("attention_factor", "mscale", "mscale_all_dim")
    magnitude, above, below = (entry(scaling, key, None, of=float) for key in keys)
    if magnitude is None and above and below and factor > 1:
        magnitude = (1 + above * math.log(factor) / 10) / (1 + below * math.log(factor) / 10)
    return made if magnitude is None else made._replace(magnitude=_float32([magnitude])[0])


def _float32(values: Any) -> tuple[float, ...]:
    try:
        with np.errstate(over="ignore"):
            rounded = np.asarray(values, np.float64).astype(np.float32)
    except (TypeError, ValueError):
        raise QjaxError(f"config.json: rope_scaling has factors that are no numbers: {values}") from None
    if not np.isfinite(rounded).all():
        raise QjaxError(f"config.json: rope_scaling has, or leads to, factors that float32 cannot hold: {rounded}")
    return tuple(map(float, rounded))
