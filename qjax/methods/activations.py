"""Activations: how a model rounds the inputs of its matrix products, and the ranges of static roundings.

Ranges come from a text that the model reads.  A range may be the extremes, or narrower, which cuts outliers off and
makes steps smaller: a percentile, or what makes the mean squared error least (Nagel et al. 2021, "A White Paper on
Neural Network Quantization", 3.1).  Both take a histogram, whose bins are floats cut to 4 bits of mantissa:

    | sign | exponent 8 | mantissa 4 |     a bin is at most 1/16 as wide as its values are large
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from qjax.errors import QjaxError
from qjax.io.atomic import atomic_write
from qjax.methods.statistics import Kind, Tensors, through_layers
from qjax.models.config import Config
from qjax.models.layer import EXPERTS, ROUTER, layer_shapes
from qjax.models.transformer import Params, n_layers
from qjax.ops.activations import Range, Rounded, Rounding, Uniform, as_range, rounding

# ── what a model does ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Activations:
    """How the inputs of all matrix products of a model are rounded, the head's included and a router's left out.

    range_rule: how ranges were chosen, "" where the rounding takes none.  ranges: by the GGUF name of the matrix; of a
    matrix of experts with a leading axis for them.
    """

    rounding: Rounding
    range_rule: str = ""
    ranges: Mapping[str, Range] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, name: str) -> "Activations":
        """A rounding without ranges by name: int8-token, q8_0, ggml ...

        Raises QjaxError for an unknown one, and for one that takes ranges, which `qjax.evaluate.calibrate` finds.
        """
        found = rounding(name)
        if found.static:
            raise QjaxError(
                f"activations {name}: it takes ranges from a text; give one (qjax.evaluate.calibrate, --calibrate)"
            )
        return cls(found)

    @property
    def name(self) -> str:
        return f"{self.rounding.name}-{self.range_rule}" if self.range_rule else self.rounding.name

    def attach(self, params: Params, config: Config) -> Params:
        """The params with each matrix Rounded.  Raises QjaxError where ranges are missing, or of another model."""
        shapes = matrices(config)
        if self.rounding.static and self.ranges.keys() != shapes.keys():
            name = min(self.ranges.keys() ^ shapes.keys())
            raise QjaxError(f"{name}: in the model or among the ranges of its activations, but not in both")
        first, runs = 0, []
        for run in params.runs:
            layers = range(first, first + n_layers(run))
            rounded = {
                name: self._rounded(run[name], [f"blk.{i}.{name}" for i in layers], shapes, run["attn_norm.weight"])
                for name in matrices_of_layer(config)
                if name in run
            }
            runs.append(run | rounded)
            first = layers.stop
        head = params.token_embd if params.output is None else params.output
        name = "token_embd.weight" if config.tied else "output.weight"
        head = self._rounded(head, [name], shapes, params.output_norm)
        head = dataclasses.replace(head, range=jax.tree.map(lambda a: a[0], head.range))
        return params._replace(runs=tuple(runs), output=head)

    def _rounded(self, weight: Any, names: list[str], shapes: Mapping[str, tuple[int, ...]], beside: Any) -> Rounded:
        """beside: an array of the same layers, that lies where the ranges have to lie."""
        if not self.rounding.static:
            return Rounded(weight, self.rounding)
        for name in names:
            *n_experts, _, d_in = shapes[name]
            expected = (*n_experts, d_in) if self._per_channel else tuple(n_experts)
            found = [np.shape(end) for end in self.ranges[name]]
            if found != [expected] * 2:
                raise QjaxError(f"{name}: ranges of shape {found[0]} for its input, expected {expected}")
        ranges = jax.tree.map(lambda *of_layers: np.stack(of_layers), *(self.ranges[name] for name in names))
        return Rounded(weight, self.rounding, jax.device_put(ranges, beside.sharding))

    @property
    def _per_channel(self) -> bool:
        return isinstance(self.rounding, Uniform) and self.rounding.per == "channel"

    def write(self, path: str | os.PathLike[str]) -> None:
        """As JSON, whole or not at all."""
        ranges = {name: {end: value.tolist() for end, value in r._asdict().items()} for name, r in self.ranges.items()}
        record = {"activations": self.rounding.name, "range_rule": self.range_rule, "ranges": ranges}
        with atomic_write(path) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Activations":
        """The inverse of write.  Raises QjaxError if the file is none, or damaged."""
        try:
            record = json.loads(Path(path).read_bytes())
            found = {name: as_range(ends["low"], ends["high"]) for name, ends in record["ranges"].items()}
            made = cls(rounding(record["activations"]), str(record["range_rule"]), found)
        except OSError as error:
            raise QjaxError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise QjaxError(f"{path}: not a file of activations that this version of qjax wrote ({error})") from error
        for name, (low, high) in found.items():
            if low.shape != high.shape or not np.isfinite([low, high]).all() or (low > high).any():
                raise QjaxError(f"{path}: {name}: ranges from low to high are expected, all finite")
        return made

    def __repr__(self) -> str:
        return f"Activations({self.name}, {len(self.ranges)} ranges)"


def matrices_of_layer(config: Config) -> dict[str, tuple[int, ...]]:
    """The matrices of a layer whose inputs are rounded, and their shapes."""
    return {name: shape for name, shape in layer_shapes(config).items() if len(shape) > 1 and name != ROUTER}


def matrices(config: Config) -> dict[str, tuple[int, ...]]:
    """The same of the model, the head's last."""
    layer = matrices_of_layer(config)
    of_layers = {f"blk.{i}.{name}": shape for i in range(config.n_layers) for name, shape in layer.items()}
    return of_layers | {"token_embd.weight" if config.tied else "output.weight": (config.vocab, config.d_model)}


# ── what a text shows ────────────────────────────────────────────────────────────────────────────────

_MANTISSA_BITS = 4
_SHIFT = 23 - _MANTISSA_BITS
N_BINS = 2 ** (32 - _SHIFT)
# Those of infinities and NaN, under either sign: an exponent of ones.
_INFINITE = np.arange(N_BINS) % (N_BINS // 2) >= 255 << _MANTISSA_BITS


def extremes(h: Float32[Array, "batch seq d_in"]) -> Range:
    """The least and the largest value of each column: a Statistic."""
    return Range(jnp.min(h, axis=(0, 1)), jnp.max(h, axis=(0, 1)))


def histogram(h: Float32[Array, "batch seq d_in"]) -> Int[Array, " n_bins"]:
    """How many values are in each bin: a Statistic.  Bins of zero hold denormal numbers too."""
    return jnp.zeros(N_BINS, jnp.int32).at[lax.bitcast_convert_type(h, jnp.uint32).ravel() >> _SHIFT].add(1)


EXTREMES = Kind(extremes, lambda a, b: Range(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high)))
HISTOGRAM = Kind(histogram, jnp.add)


class Histogram(NamedTuple):
    """Bins (low, high) in ascending order, and what is in each.  Zeros are left out: every grid has them, and so are
    stand-ins for the tokens that an expert does not get."""

    low: Float[np.ndarray, " n"]
    high: Float[np.ndarray, " n"]
    counts: Float[np.ndarray, " n"]

    @classmethod
    def of(cls, counts: Int[np.ndarray, " n_bins"]) -> "Histogram":
        """From the counts of `histogram`."""
        half = N_BINS // 2
        edges = (
            (np.arange(1, (255 << _MANTISSA_BITS) + 1, dtype=np.uint32) << _SHIFT).view(np.float32).astype(np.float64)
        )
        found = np.nonzero(counts)[0]
        found = found[found % half > 0]
        inner, outer, negative = edges[found % half - 1], edges[found % half], found >= half
        low, high = np.where(negative, -outer, inner), np.where(negative, -inner, outer)
        order = np.argsort(low)
        return cls(low[order], high[order], counts[found][order].astype(np.float64))

    def percentile(self, percent: float) -> float:
        """Below which this share of the values lies, as if each bin were filled evenly."""
        if not len(self.counts):
            return 0.0
        passed = np.concatenate([[0], np.cumsum(self.counts)])
        ends = np.concatenate([self.low[:1], self.high])
        i = min(int(np.searchsorted(passed, percent / 100 * passed[-1])), len(self.counts))
        if not i:
            return float(ends[0])
        share = (percent / 100 * passed[-1] - passed[i - 1]) / self.counts[i - 1]
        return float(self.low[i - 1] + share * (self.high[i - 1] - self.low[i - 1]))

    def magnitudes(self) -> "Histogram":
        """Of |x|."""
        low, high = np.where(self.low < 0, -self.high, self.low), np.where(self.low < 0, -self.low, self.high)
        order = np.argsort(low, kind="stable")
        return Histogram(low[order], high[order], self.counts[order])

    def error(self, rounding: Uniform, range: Range) -> float:
        """Σ (x - x̂)² over the values, as if each bin were filled evenly.

        With step 1, r = x - round(x) and whole numbers n = round(x), ∫ r² dx = n / 12 + r³ / 3: continuous where r
        jumps from 1/2 to -1/2.  Beyond the grid's ends the integral of the squared distance to them comes to it.
        """
        step, zero, least, most = rounding.grid(range, np)
        if not step:
            return float(np.sum(self.counts * (self.high**3 - self.low**3) / (3 * (self.high - self.low))))

        def integral(x: np.ndarray) -> np.ndarray:
            inside = np.clip(x, step * (least - zero), step * (most - zero))
            n = np.round(inside / step)
            return step**3 * (n / 12 + (inside / step - n) ** 3 / 3) + (x - inside) ** 3 / 3

        return float(np.sum(self.counts * (integral(self.high) - integral(self.low)) / (self.high - self.low)))


# ── which range ──────────────────────────────────────────────────────────────────────────────────────

# Ranges are tried that are smaller by an eighth of an octave each, down to 2^-12 of the extremes.
_SHRINKING = 2.0 ** (-np.arange(12 * 8 + 1) / 8)


def _percentile(percent: float, histogram: Histogram, rounding: Uniform) -> Range:
    if rounding.symmetric:
        end = histogram.magnitudes().percentile(percent)
        return Range(-end, end)
    return Range(histogram.percentile((100 - percent) / 2), histogram.percentile((100 + percent) / 2))


def _least_error(histogram: Histogram, rounding: Uniform) -> Range:
    """The range of least squared error among those that have the proportions of the extremes."""
    if not len(histogram.counts):
        return Range(0.0, 0.0)
    low, high = histogram.low[0], histogram.high[-1]
    return min(
        (Range(low * s, high * s) for s in _SHRINKING), key=lambda candidate: histogram.error(rounding, candidate)
    )


def _extreme(seen: Range, rounding: Uniform) -> Range:
    return seen if rounding.per == "channel" else Range(seen.low.min(), seen.high.max())


def _chooser(rule: str) -> Callable[[Int[np.ndarray, " n_bins"], Uniform], Range]:
    if rule == "mse":
        return lambda counts, rounding: _least_error(Histogram.of(counts), rounding)
    if (found := re.fullmatch(r"p(\d+(?:\.\d+)?)", rule)) and 0 < float(found[1]) <= 100:
        return lambda counts, rounding: _percentile(float(found[1]), Histogram.of(counts), rounding)
    raise QjaxError(f"range {rule!r}: expected minmax, mse, or a percentile such as p99.9")


def calibrate(
    config: Config,
    tensors: Tensors,
    windows: Int[np.ndarray, "chunks n_ctx"],
    size: int,
    rounding: Rounding,
    rule: str = "minmax",
) -> Activations:
    """The rounding with ranges of what windows, `size` at a time, show of the input of each matrix.

    rule: "minmax", the extremes, of which a symmetric grid takes the larger; "mse"; or a percentile: "p99.9" leaves out
    a thousandth, of the magnitudes or at both ends together.
    Raises QjaxError for an unknown rule, for a rounding that takes no ranges, for other rules than minmax where each
    channel has its own range, and naming the matrix whose input is not finite.
    """
    if not isinstance(rounding, Uniform) or not rounding.static:
        raise QjaxError(f"activations {rounding.name}: they are rounded as they come; there are no ranges to find")
    if rule != "minmax" and rounding.per == "channel":
        raise QjaxError(f"range {rule!r}: that of a channel is its extremes; give minmax")
    if rule == "minmax":
        kind, choose = EXTREMES, _extreme
    else:
        kind, choose = HISTOGRAM, _chooser(rule)
    found: dict[str, Range] = {}
    for _, seen in through_layers(config, dict(tensors), windows, size, kind):
        for name in seen.keys() & matrices(config).keys():
            kept = jax.device_get(seen[name])
            if not _finite(kept):
                raise QjaxError(f"{name}: its input has NaN or infinite values. The model is damaged; fetch it again.")
            if name.endswith(EXPERTS):
                found[name] = as_range(*zip(*(choose(of_expert, rounding) for of_expert in _experts(kept, kind))))
            else:
                found[name] = as_range(*choose(kept, rounding))
    return Activations(rounding, rule, {name: found[name] for name in matrices(config)})


def _finite(kept: Range | np.ndarray) -> bool:
    return not kept[..., _INFINITE].any() if isinstance(kept, np.ndarray) else bool(np.isfinite(kept).all())


def _experts(kept: Any, kind: Kind) -> list[Any]:
    """What was kept of each expert; of one that no token reached, what was kept of all."""
    experts = [jax.tree.map(lambda a, e=e: a[e], kept) for e in range(len(jax.tree.leaves(kept)[0]))]
    together = jax.device_get(functools.reduce(kind.merge, experts))
    reached = (len(Histogram.of(own).counts) if kind is HISTOGRAM else np.any(own) for own in experts)
    return [own if some else together for own, some in zip(experts, reached)]
