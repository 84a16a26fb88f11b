"""Where a model can be changed without changing what it computes, and what is written stays a standard file.

    what makes a channel ─► the channel ─► what reads it         norm, attn_v, ffn_up ─► h ─► the columns of a matrix
          row / s                                column · s

If a channel is made s times smaller and the columns that read it are s times larger, nothing that follows changes;
neither does it if the residual stream is turned as a whole.  `channels` and `stream` say of each architecture which
rows and columns these are.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32, Int

from qjax.methods.plan import Plan
from qjax.methods.statistics import Seen, Tensors
from qjax.models.architectures import QKV
from qjax.models.config import Config
from qjax.models.layer import layer_shapes
from qjax.models.transformer import tensor_shapes


class Job(NamedTuple):
    """What a Transform may look at beside the weights: the formats to come, and what text shows of the inputs."""

    plan: Plan
    seen: Mapping[str, Seen]


Transform = Callable[[Config, Tensors, Job], tuple[Config, Tensors]]
"""(config, float tensors, job) -> a model that computes the same but for rounding in float32"""


class Rows(NamedTuple):
    """Rows of a matrix, or numbers of a vector, one for each channel, from ``start`` on."""

    name: str
    start: int = 0


class Channels(NamedTuple):
    """``n`` numbers on their way through a layer.

    makes: what each is proportional to.  reads: the matrices whose columns they meet.
    head, shared: they are heads of so many; each is read by so many heads of columns, one behind another.
    """

    n: int
    makes: tuple[Rows, ...]
    reads: tuple[str, ...]
    head: int
    shared: int = 1

    @property
    def columns(self) -> Int[np.ndarray, " d_in"]:
        """The channel that each column meets."""
        heads = np.arange(self.n).reshape(-1, 1, self.head)
        return np.repeat(heads, self.shared, axis=1).reshape(-1)

    def reduced(
        self, numbers: Float32[Array, "*n_mat d_in"], reduce: Callable[..., Array]
    ) -> Float32[Array, "*n_mat n"]:
        """Of each channel, from a number of each column."""
        heads = numbers.reshape(*numbers.shape[:-1], -1, self.shared, self.head)
        return reduce(heads, axis=-2).reshape(*numbers.shape[:-1], self.n)


def channels(config: Config) -> list[Channels]:
    """All of a model, from the first layer to the head."""
    d, d_ff, traits = config.d_model, config.d_ff, config.traits
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = layer_shapes(config)

    def part(name: str, start: int = 0) -> tuple[Rows, ...]:
        """The matrix or norm of this name with its bias, as far as there are."""
        return tuple(Rows(f"{name}.{kind}", start) for kind in ("weight", "bias") if f"{name}.{kind}" in shapes)

    def there(*names: str) -> tuple[str, ...]:
        return tuple(f"{name}.weight" for name in names if f"{name}.weight" in shapes)

    v = part("attn_qkv", q_rows + kv_rows) if traits.fused else part("attn_v")
    layer = [
        Channels(d, part("attn_norm"), there(*QKV, "attn_qkv"), d),
        Channels(kv_rows, v, there("attn_output"), config.head_dim, config.n_heads // config.n_kv_heads),
        Channels(d, part("ffn_norm"), there("ffn_gate_inp", "ffn_gate", "ffn_up", "ffn_gate_exps", "ffn_up_exps"), d),
    ]
    if config.n_experts:
        d_ff = config.d_expert or d_ff
        layer.append(Channels(d_ff, part("ffn_up_exps"), there("ffn_down_exps"), d_ff))
    elif traits.gated:
        # What is behind an activation is proportional to nothing.
        layer.append(Channels(d_ff, part("ffn_up", d_ff if traits.fused else 0), there("ffn_down"), d_ff))
    found = [_of_layer(each, f"blk.{i}.") for i in range(config.n_layers) for each in layer]
    if not config.tied:
        names = ("output_norm.weight", "output_norm.bias")[: 2 if traits.layer_norms else 1]
        found.append(Channels(d, tuple(map(Rows, names)), ("output.weight",), d))
    return found


def _of_layer(found: Channels, prefix: str) -> Channels:
    makes = tuple(rows._replace(name=prefix + rows.name) for rows in found.makes)
    return found._replace(makes=makes, reads=tuple(prefix + name for name in found.reads))


class Stream(NamedTuple):
    """The matrices that meet the residual stream with their columns, and those that do with their rows, as they add to
    it, with their biases."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]


def stream(config: Config) -> Stream:
    """Of the whole model."""
    shapes = tensor_shapes(config)
    rows = [name for name in shapes if name.split(".")[-2] in ("attn_output", "ffn_down", "ffn_down_exps")]
    return Stream(tuple(n for n, shape in shapes.items() if len(shape) > 1 and n not in rows), tuple(rows))


# ── changes ──────────────────────────────────────────────────────────────────────────────────────────


def floats(tensors: Tensors, *names: str) -> dict[str, Float32[Array, "..."]]:
    """Some of them in float32, in which everything here is computed."""
    return {name: jnp.asarray(tensors[name], jnp.float32) for name in names}  # type: ignore[arg-type]


def scaled(tensors: Tensors, which: Channels, s: Float32[Array, "*n_mat n"]) -> dict[str, Array]:
    """The tensors that change if channels are made s times smaller, and read s times larger."""
    made = floats(tensors, *(rows.name for rows in which.makes), *which.reads)
    for name, start in which.makes:
        w, factor = made[name], 1 / s
        if made[name].ndim > 1:
            made[name] = w.at[..., start : start + which.n, :].multiply(factor[..., None])
        else:
            made[name] = w.at[start : start + which.n].multiply(factor)
    return made | {name: made[name] * of_columns(s, which) for name in which.reads}


def of_columns(s: Float32[Array, "*n_mat n"], which: Channels) -> Float32[Array, "*n_mat 1 d_in"]:
    """s as it meets the columns of the matrices that read."""
    return s[..., None, which.columns]
