"""What each format of each matrix costs: the KL divergence from the float model when that one matrix is rounded.

Two ways, of one type.  Measured: the model is run once for each format of each matrix.  Estimated, to second order in
the error δ of the weights:

    KLD(w + δ) ≈ ½ δᵀ F δ,   F = E[∇ log p(y|x) ∇ log p(y|x)ᵀ],   y drawn from the model's own predictions

F, the Fisher information, is the Hessian of the divergence where it is zero.  Its diagonal takes a few gradients,
however many formats there are; HAWQ (Dong et al. 2019, 2020) ranks layers by the eigenvalues or the trace of a Hessian.
What errors of different weights have to do with each other is left out, as it is where costs are added up.  Of the tiny
model's 29 matrices in five formats it gives the measured costs × 0.97 in the mean, with a rank correlation of 0.994.

Both can look from a mixture instead of the float model: what would one matrix more or less save, given what the others
have lost.  The estimate then has a term of first order, the gradient of the mixture's own divergence.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.methods import pipeline, rtn, statistics
from qjax.methods.pipeline import METHODS, Method
from qjax.methods.statistics import Seen, Tensors
from qjax.metrics import Logits, cached
from qjax.metrics import perplexity as ppl
from qjax.models.config import Config
from qjax.models.transformer import Params, forward, stack, unstack
from qjax.progress import progress
from qjax.tensor import QTensor, dense

Mixture = Mapping[str, Format]
"""The format of each matrix that has one, by tensor name; the others are as they were."""

DRAWS = 32
"""Gradients behind the diagonal of F."""

# For models trained with weights of so few values; others they ruin.
_TERNARY = "ternary"

# Packed matrices that are kept rather than rounded anew.
_KEPT_BYTES = 2**31


_NEAREST = METHODS["rtn"]


@dataclass(frozen=True)
class Costs:
    """KLD in nats per token that each format of each matrix adds to ``origin``, by name and format.

    at: the mixture from which it is seen; empty for the float model, whose origin is 0.
    how: "measured" or "estimated".  n_tokens: scored tokens of the calibration text.
    """

    kld: Mapping[str, Mapping[Format, float]]
    origin: float
    at: Mixture
    how: str
    n_tokens: int

    def of(self, mixture: Mixture) -> float:
        """What a mixture is expected to cost, if the costs of its matrices add up."""
        return self.origin + sum(self.kld[name][format] for name, format in mixture.items())


@dataclass(frozen=True, repr=False, eq=False)
class Trial:
    """A float model, calibration text, and a rounder: what mixtures do to the model's predictions.

    floats: all tensors in float32, so that one compiled program serves every mixture.  windows: token ids, worked
    ``size`` at a time; the second half of each is scored, as llama-perplexity does it.  seen: of the matrices' inputs.
    """

    config: Config
    floats: Mapping[str, Array]
    windows: Int[np.ndarray, "chunks n_ctx"]
    size: int
    seen: Mapping[str, Seen]
    rounder: Method
    options: rtn.Options
    _kept: dict[tuple[str, Format], Array | QTensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        config: Config,
        tensors: Tensors,
        windows: Int[np.ndarray, "chunks n_ctx"],
        rounder: Method = _NEAREST,
        options: rtn.Options | None = None,
    ) -> "Trial":
        """rounder: a row of `METHODS` that rounds.  What the text shows of a matrix's input is its importance, unless
        ``options`` have one.  Raises QjaxError naming the tensor whose input is not finite."""
        floats = {name: dense(t) for name, t in tensors.items()}
        size = ppl.batch_size(windows.shape[1], config.vocab)
        seen, _ = statistics.moments(config, floats, windows, size)
        return cls(config, floats, windows, size, seen, rounder, options or rtn.Options())

    @property
    def n_tokens(self) -> int:
        """Tokens scored."""
        return ppl.scored(self.windows, self.windows.shape[1]).size

    def candidates(self, name: str) -> tuple[Format, ...]:
        """All formats that a GGUF file can hold the matrix in, from the smallest: the rounder knows how to make them,
        rows divide into their blocks, and what needs importance has some."""
        method = self._method(name)

        def fits(format: Format) -> bool:
            return (
                format.for_weights
                and format.encodable
                and format.ggml_id is not None
                and format.family != _TERNARY
                and format.name != "F32"
                and self.floats[name].shape[-1] % format.block_size == 0
                and (name in self.seen or not format.needs_importance)
                and method.fits(format)
            )

        return tuple(sorted(filter(fits, map(formats.get, formats.names())), key=lambda format: format.bpw))

    def rounded(self, name: str, format: Format) -> Float32[Array, "*n_mat d_out d_in"]:
        """The numbers that a matrix in a format stands for."""
        found = self._kept.get((name, format))
        if found is None:
            seen, options = self.seen.get(name), self.options
            options = pipeline.weighed(options, name, seen) if seen else options
            method = self._method(name)
            assert method.rounds is not None
            found = method.rounds(name, self.floats[name], format, seen, options)
            if sum(kept.nbytes for kept in self._kept.values()) + found.nbytes <= _KEPT_BYTES:
                self._kept[name, format] = found
        return dense(found)

    def _method(self, name: str) -> Method:
        """What rounds a matrix; to nearest where nothing was seen of its input."""
        return self.rounder if name in self.seen else _NEAREST

    def params(self, mixture: Mixture) -> Params:
        changed = {name: self.rounded(name, format) for name, format in mixture.items()}
        return stack({**self.floats, **changed}, self.config)

    def klds(self, mixture: Mixture) -> Float32[np.ndarray, " chunks"]:
        """Mean KLD of the scored tokens of each window, from the float model to a mixture."""
        params = self.params(mixture)
        parts = [
            np.asarray(_divergence(params, self.config, self._base(tokens[:, :-1], tokens.shape[1] // 2), tokens))[:n]
            for tokens, n in ppl.batches(self.windows, self.size)
        ]
        return np.concatenate(parts)

    def kld(self, mixture: Mixture) -> float:
        """Mean KLD of all scored tokens."""
        return float(self.klds(mixture).mean(dtype=np.float64))

    def slope(self, mixture: Mixture) -> dict[str, Any]:
        """The gradient of `kld` by the weights of each tensor."""
        params, total = self.params(mixture), None
        for tokens, n in ppl.batches(self.windows, self.size):
            base = self._base(tokens[:, :-1], tokens.shape[1] // 2)
            weights = jnp.where(jnp.arange(len(tokens)) < n, 1 / len(self.windows), 0)
            part = _slope(params, self.config, base, tokens, weights)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        assert total is not None
        return unstack(total, self.config)

    @cached_property
    def _base(self) -> Logits:
        params = stack(self.floats, self.config)
        return cached(lambda tokens, first: forward(self.config, params, jnp.asarray(tokens), first=first))

    @cached_property
    def fisher(self) -> dict[str, Float32[Array, "..."]]:
        """The diagonal of F by tensor, per scored token: squared gradients of log p(y), y drawn anew for each window.

        The tokens of a window are drawn independently, so that what their gradients have in common adds up to nothing.
        """
        params = stack(self.floats, self.config)
        total: Any = 0
        for i in progress(range(DRAWS), desc="Fisher information", unit="gradient"):
            window = jnp.asarray(self.windows[i % len(self.windows)][None])
            more = _squared_gradient(params, self.config, window, jax.random.key(i))
            total = jax.tree.map(jnp.add, total, more) if i else more
        n = DRAWS * self.n_tokens / len(self.windows)
        mean = jax.tree.map(lambda a: a / n, total)
        return unstack(mean, self.config)  # pyright: ignore[reportReturnType]


def measured(trial: Trial, candidates: Mapping[str, Sequence[Format]], at: Mixture = MappingProxyType({})) -> Costs:
    """Costs by running the model once for each candidate of each matrix.

    candidates: the formats to look at, by name of the matrix.  at: the mixture in which one matrix at a time changes.
    Raises QjaxError naming the matrix whose cost is not finite.
    """
    origin = trial.kld(at) if at else 0.0
    pairs = [(name, format) for name, of in candidates.items() for format in of]
    found: dict[str, dict[Format, float]] = {name: {} for name in candidates}
    for name, format in progress(pairs, desc="measuring", unit="rounded matrix", label=lambda pair: pair[0]):
        same = at.get(name) == format
        found[name][format] = 0.0 if same else trial.kld({**at, name: format}) - origin
    return _checked(Costs(found, origin, at, "measured", trial.n_tokens))


def estimated(trial: Trial, candidates: Mapping[str, Sequence[Format]], at: Mixture = MappingProxyType({})) -> Costs:
    """Costs to second order, from gradients; the arguments and what is raised are as for `measured`."""
    origin, slope = (trial.kld(at), trial.slope(at)) if at else (0.0, {})
    found: dict[str, dict[Format, float]] = {}
    for name, of in progress(candidates.items(), desc="estimating", unit="matrix", label=operator.itemgetter(0)):
        begin = trial.rounded(name, at[name]) if name in at else trial.floats[name]
        first = slope.get(name, jnp.zeros(()))
        steps = ((format, trial.rounded(name, format) - begin) for format in of)
        found[name] = {format: float(_second_order(step, first, trial.fisher[name])) for format, step in steps}
    return _checked(Costs(found, origin, at, "estimated", trial.n_tokens))


WAYS = {"measured": measured, "estimated": estimated}


def _checked(costs: Costs) -> Costs:
    for name, of in costs.kld.items():
        for format, cost in of.items():
            if not math.isfinite(cost):
                raise QjaxError(
                    f"{name}: in {format.name} its KL divergence is {cost}, expected a finite number. Look for NaN in "
                    "the model with `qjax check`, or leave this format out (formats, --formats)."
                )
    return costs


# ── compiled ─────────────────────────────────────────────────────────────────────────────────────────


def _window_klds(params: Params, config: Config, base: Array, tokens: Array) -> Float32[Array, " batch"]:
    log_p = jax.nn.log_softmax(base)
    log_q = jax.nn.log_softmax(forward(config, params, tokens[:, :-1], first=tokens.shape[1] // 2))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1).mean(-1)


_divergence = jax.jit(_window_klds, static_argnames=("config",))


@partial(jax.jit, static_argnames=("config",))
def _slope(params: Params, config: Config, base: Array, tokens: Array, weights: Array) -> Params:
    """Of the mean KLD, windows weighed."""
    mean = lambda params: jnp.vdot(weights, _window_klds(params, config, base, tokens))  # noqa: E731
    return jax.tree.map(_of_floats, jax.grad(mean, allow_int=True)(params), params)


@partial(jax.jit, static_argnames=("config",))
def _squared_gradient(params: Params, config: Config, tokens: Array, key: Array) -> Params:
    """Of the log-likelihood of scored tokens that the model draws itself."""

    def log_likelihood(params: Params) -> Array:
        log_p = jax.nn.log_softmax(forward(config, params, tokens[:, :-1], first=tokens.shape[1] // 2))
        drawn = jax.random.categorical(key, lax.stop_gradient(log_p))
        return jnp.sum(jnp.take_along_axis(log_p, drawn[..., None], axis=-1))

    gradient = jax.grad(log_likelihood, allow_int=True)(params)
    return jax.tree.map(lambda g, p: jnp.square(_of_floats(g, p)), gradient, params)


def _of_floats(gradient: Array, leaf: Array) -> Array:
    """Zero for the facts of layers, which are no weights."""
    return jnp.zeros(leaf.shape) if gradient.dtype == jax.dtypes.float0 else gradient


@jax.jit
def _second_order(step: Array, slope: Array, fisher: Array) -> Float32[Array, ""]:
    return jnp.sum(step * (slope + fisher * step / 2))
