"""What a text shows of the inputs of a model's matrix products: layer by layer, one layer's statistics in memory.

    windows ─ embed ─► x of all windows ─ layer 0 ─► x ─ layer 1 ─► x ... ─ head
                                             └► statistics of its inputs ─► (its matrices may be replaced) ─► on

Every layer of a model has the same shapes, so one compiled program serves all of them.  The inputs of a layer are those
that the layers before it give as they have been replaced: what one layer does wrong the next one is fitted to.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int

from qjax.errors import QjaxError
from qjax.models.config import Config
from qjax.models.layer import EXPERTS, ROUTED, Statistic
from qjax.models.transformer import Params, forward, layer_part, observe
from qjax.progress import progress
from qjax.tensor import QTensor

Tensors = Mapping[str, Array | QTensor]
"""The tensors of a model by GGUF name."""


class Kind(NamedTuple):
    """A statistic of a batch of windows, and how those of two batches become one."""

    of: Statistic
    merge: Callable[[Any, Any], Any]


def second_moment(h: Float32[Array, "batch seq d_in"]) -> Float32[Array, "d_in d_in"]:
    """Σ x xᵀ over all tokens: half the Hessian of the squared error of each row's output (Frantar et al. 2022, GPTQ).
    Its diagonal is the importance matrix."""
    rows = h.reshape(-1, h.shape[-1])
    return lax.dot_general(rows, rows, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def largest(h: Float32[Array, "batch seq d_in"]) -> Float32[Array, " d_in"]:
    """The largest |x| of each column."""
    return jnp.max(jnp.abs(h), axis=(0, 1))


class Moments(NamedTuple):
    """What the methods of this package look at: sums and largest values over the tokens of a text."""

    products: Any
    largest: Any
    """of |x|, by column"""
    with_floats: Any = None
    """products of the float model's x with these, if it is there to be compared with"""


MOMENTS = Kind(
    lambda h: Moments(second_moment(h), largest(h)),
    lambda a, b: Moments(a.products + b.products, jnp.maximum(a.largest, b.largest)),
)


def _moments_of_both(h: Float32[Array, "both seq d_in"]) -> Moments:
    ours, floats = jnp.split(h, 2)
    rows, of_floats = (a.reshape(-1, a.shape[-1]) for a in (ours, floats))
    products = lax.dot_general(of_floats, rows, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    return Moments(second_moment(ours), largest(ours), products)


MOMENTS_OF_BOTH = Kind(
    _moments_of_both,
    lambda a, b: Moments(a.products + b.products, jnp.maximum(a.largest, b.largest), a.with_floats + b.with_floats),
)
"""Of windows that lie twice in a batch: as the quantized layers made them, and behind these as the float model did."""


@dataclass(frozen=True, repr=False, eq=False)
class Seen:
    """What the input x of one tensor's products was like.  Experts have a leading axis, (n_experts, ...).

    second_moment: mean of x xᵀ over the tokens; zeros for an expert that got none.
    largest: the largest |x| of each column.
    n_tokens: how many tokens that is; of experts the tokens of each.
    with_floats: mean of x' xᵀ, x' being the same token's input in the float model.  None if that did not run beside,
        for experts, to which the float model gives other tokens, and for a head whose rows are embeddings, too.
    """

    second_moment: Float32[Array, "*n_mat d_in d_in"]
    largest: Float32[Array, "*n_mat d_in"]
    n_tokens: Any
    with_floats: Float32[Array, "d_in d_in"] | None = None

    @functools.cached_property
    def importance(self) -> Float32[np.ndarray, "*n_mat d_in"]:
        """Mean x² of each column, as in an importance matrix."""
        return np.asarray(jnp.diagonal(self.second_moment, axis1=-2, axis2=-1))


Change = Callable[[Mapping[str, Array | QTensor], Mapping[str, Seen]], Tensors]
"""(the matrices of a layer that read the inputs seen, what was seen) -> tensors to go on with in their place"""


def moments(
    config: Config,
    tensors: Tensors,
    windows: Int[np.ndarray, "chunks n_ctx"],
    size: int,
    *,
    change: Change | None = None,
    beside_floats: bool = False,
    head: bool = True,
    desc: str = "calibrating",
) -> tuple[dict[str, Seen], dict[str, Array | QTensor]]:
    """What each matrix sees, by GGUF name, and the tensors as ``change`` left them.

    windows: token ids; they are worked `size` at a time.
    change: is given each layer in turn, and last the head if ``head``; then what was seen is let go, and the result
        holds nothing of it.  The head of a tied model goes by its token_embd.weight.
    beside_floats: whether the text goes through the layers as they were, too, for `Seen.with_floats`.
    Raises QjaxError naming the tensor whose input is not finite.
    """
    result, kept = dict(tensors), {}
    kind = MOMENTS_OF_BOTH if beside_floats else MOMENTS
    for names, sums in through_layers(
        config, result, windows, size, kind, beside_floats=beside_floats, head=head, desc=desc
    ):
        seen = {name: _seen(name, found, sums, windows.size) for name, found in sums.items() if name in tensors}
        if change is None:
            kept |= seen
        else:
            result |= change({name: result[name] for name in names if name in seen}, seen)
    return kept, result


def _seen(name: str, found: Moments, sums: Mapping[str, Any], n_windows_tokens: int) -> Seen:
    layer, _, rest = name.rpartition("blk.")[2].partition(".")
    n: Any = n_windows_tokens
    if rest in EXPERTS:
        n = sums[f"blk.{layer}.{ROUTED}"].products[:, 0, 0]
    if not bool(jnp.isfinite(found.products).all()):
        raise QjaxError(f"{name}: its input has NaN or infinite values. The model is damaged; fetch it again.")
    scale = 1 / jnp.maximum(jnp.asarray(n, jnp.float32), 1)
    with_floats = found.with_floats
    if with_floats is not None:
        with_floats = None if rest in EXPERTS or name == "token_embd.weight" else with_floats * scale
    return Seen(found.products * scale[..., None, None], found.largest, n, with_floats)


def through_layers(
    config: Config,
    tensors: dict[str, Array | QTensor],
    windows: Int[np.ndarray, "chunks n_ctx"],
    size: int,
    kind: Kind,
    *,
    beside_floats: bool = False,
    head: bool = True,
    desc: str = "calibrating",
) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Layer by layer, and last the head: the names of its tensors, and by name what ``kind`` keeps of their inputs.

    Whoever iterates may put other weights into ``tensors`` before the next step: the text goes on through them.
    beside_floats: a batch has every window twice, and the second half goes on through the weights as they were.
    """
    nothing = Params(None, (), None, None)
    begin = nothing._replace(token_embd=tensors["token_embd.weight"], position_embd=tensors.get("position_embd.weight"))
    batches = [windows[i : i + size] for i in range(0, len(windows), size)]
    xs = [np.asarray(forward(config, begin, jnp.asarray(batch))) for batch in batches]
    if beside_floats:
        xs = [np.concatenate([x, x]) for x in xs]
    for i in progress(range(config.n_layers), desc=desc, unit="layer"):
        before, part = dict(tensors), layer_part(config, tensors, i)
        names = [name for name in tensors if name.startswith(f"blk.{i}.")]
        seen, passed = None, []
        for x in xs:
            out, observed = observe(config, part, jnp.asarray(x), kind.of)
            found = {f"blk.{i}.{name}": jax.tree.map(lambda a: a[0], kept) for name, kept in observed.runs[0].items()}
            seen = found if seen is None else {name: kind.merge(seen[name], found[name]) for name in found}
            passed.append(np.array(out))
        assert seen is not None
        yield names, seen
        if any(tensors[name] is not before[name] for name in names):
            part = layer_part(config, tensors, i)
            for x, out in zip(xs, passed):
                n = len(x) // 2 if beside_floats else len(x)
                out[:n] = forward(config, part, jnp.asarray(x[:n]))
        xs = passed
    if head:
        name = "token_embd.weight" if config.tied else "output.weight"
        end = nothing._replace(
            output_norm=tensors["output_norm.weight"],
            output=tensors[name],
            output_norm_bias=tensors.get("output_norm.bias"),
        )
        n_ctx = windows.shape[1]
        found = [observe(config, end, jnp.asarray(x), kind.of, first=n_ctx)[1].head for x in xs]
        yield [name], {name: functools.reduce(kind.merge, found)}
