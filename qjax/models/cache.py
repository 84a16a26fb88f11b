"""The keys and values of the tokens seen so far, held in a cache type: f16, q8_0, q4_0 ...

    k ─ rotate ─ encode ─► packed rows ─ decode ─┐
    q ─ rotate ─ round ──────────────────────► attention ─ rotate back ─► y
    v ─ rotate ─ encode ─► packed rows ─ decode ─┘

Keys have channels that are large in every token, and such an outlier sets the scale of its whole block. Before they
are quantized, keys and values therefore go through a Walsh-Hadamard rotation, which spreads each number over its
neighbours: as in llama.cpp (llama-kv-cache.cpp, llama-graph.cpp build_attn), where the type is quantized and 64
divides head_dim. Since the rotation is orthonormal, queries that are rotated like the keys give the same scores, and
the attended values are rotated back after they were summed, instead of every cached value. Queries that meet quantized
keys are rounded to Q8_0, because ggml multiplies codes with codes.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.models.config import Config
from qjax.ops.activations import packed
from qjax.ops.attention import PLAIN, Scoring, attention
from qjax.ops.hadamard import hadamard
from qjax.tensor import QTensor, dequantize

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

# Values are rotated in groups of the least size, keys in the largest that divides a head.
_MIN_ROTATION = 64


@dataclass(frozen=True)
class CacheType:
    """How keys, or values, are held: in `format`, each n_rot of them rotated before (1: as they are)."""

    format: Format
    n_rot: int = 1

    @property
    def name(self) -> str:
        """As llama.cpp spells it, in lower case."""
        return self.format.name.lower()

    @property
    def quantized(self) -> bool:
        return self.format.block_size > 1

    @property
    def queries(self) -> "CacheType":
        """How queries meet keys of this type: rounded as ggml rounds what it multiplies with its format."""
        return replace(self, format=formats.get(self.format.activations or self.format))

    def pack(self, x: Float32[Array, "*rows head_dim"]) -> QTensor:
        """The rows as they are held."""
        return packed(hadamard(x, self.n_rot), self.format)

    def zeros(self, shape: tuple[int, ...]) -> QTensor:
        """Rows with nothing written, of logical `shape`."""
        blocks = (*shape[:-1], shape[-1] // self.format.block_size)
        shapes = (blocks if field.count == 1 else (*blocks, field.count) for field in self.format.layout)
        fields = (jnp.zeros(shape, field.dtype) for shape, field in zip(shapes, self.format.layout))
        return QTensor(self.format.Fields(*fields), self.format)


class CacheTypes(NamedTuple):
    """The type of the keys and that of the values; hashable, so static under jit."""

    k: CacheType
    v: CacheType

    def pack(
        self, k: Float32[Array, "batch seq kv_heads head_dim"], v: Float32[Array, "batch seq kv_heads head_dim"]
    ) -> tuple[QTensor, QTensor]:
        """Keys and values as they are held, (batch, kv_heads, seq, head_dim)."""
        return self.k.pack(k.swapaxes(1, 2)), self.v.pack(v.swapaxes(1, 2))

    def attend(
        self,
        q: Float32[Array, "batch seq heads head_dim"],
        k: QTensor,
        v: QTensor,
        start: int | Int[Array, ""] = 0,
        scoring: Scoring = PLAIN,
    ) -> Float32[Array, "batch seq heads head_dim"]:
        """`attention` of queries to packed keys and values, (batch, kv_heads, keys, head_dim)."""
        q = dequantize(self.k.queries.pack(q))
        return hadamard(attention(q, dequantize(k), dequantize(v), start, scoring), self.v.n_rot)


FLOAT32 = CacheTypes(*2 * [CacheType(formats.get("F32"))])
FLOAT16 = CacheTypes(*2 * [CacheType(formats.get("F16"))])


def cache_types(config: Config, k: str = "f16", v: str = "f16", *, rotate: bool = True) -> CacheTypes:
    """The cache types by name, in any case, for a model.

    rotate: whether quantized keys and values are rotated where llama.cpp does so; False is its environment variable
    LLAMA_ATTN_ROT_DISABLE.
    Raises QjaxError for a name not in TYPES, and where the blocks of a type do not divide head_dim.
    """
    head_dim = config.head_dim
    found = []
    for which, name in (("cache_k", k), ("cache_v", v)):
        if name.lower() not in TYPES:
            raise QjaxError(f"{which} is {name!r}, expected one of {', '.join(TYPES)}")
        held = CacheType(formats.get(name))
        if head_dim % (block := held.format.block_size):
            raise QjaxError(
                f"{which} is {name}, whose blocks of {block} do not divide the model's head size of {head_dim}. "
                "Use f32, f16 or bf16."
            )
        if rotate and held.quantized and head_dim % _MIN_ROTATION == 0:
            # The largest power of two that divides a number is its lowest bit.
            held = replace(held, n_rot=head_dim & -head_dim if which == "cache_k" else _MIN_ROTATION)
        found.append(held)
    return CacheTypes(*found)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "length"], meta_fields=["types"])
@dataclass(frozen=True)
class Cache:
    """Packed keys and values, (n_layers, batch, kv_heads, max_seq, head_dim).

    Rows 0 to length - 1 along max_seq are written; those of one head lie together.
    """

    k: QTensor
    v: QTensor
    length: Any
    """int32 scalar; what stands in its place while JAX traces is no Array"""
    types: CacheTypes

    @property
    def max_seq(self) -> int:
        """Tokens the cache has room for."""
        return self.k.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.k.nbytes + self.v.nbytes

    def write(
        self,
        layer: Int[Array, ""],
        k: Float32[Array, "batch seq kv_heads head_dim"],
        v: Float32[Array, "batch seq kv_heads head_dim"],
    ) -> "Cache":
        """Put the keys and values of seq tokens after `length`, which stays: all layers write at one offset.

        The caller sees to it that length + seq is at most max_seq; XLA would move the rows back silently.
        """

        def put(rows: Array, new: Array) -> Array:
            at = (layer, 0, 0, self.length)
            return lax.dynamic_update_slice(rows, new[None], (*at, *[0] * (rows.ndim - len(at))))

        held_k, held_v = jax.tree.map(put, (self.k, self.v), self.types.pack(k, v))
        return replace(self, k=held_k, v=held_v)

    def read(self, layer: Int[Array, ""]) -> tuple[QTensor, QTensor]:
        """The packed keys and values of one layer, (batch, kv_heads, max_seq, head_dim)."""
        take = functools.partial(lax.dynamic_index_in_dim, index=layer, keepdims=False)
        return jax.tree.map(take, (self.k, self.v))

    def grown(self, n_tokens: Int[Array, ""] | int) -> "Cache":
        """With the next n_tokens rows, which all layers have written, taken for text."""
        return replace(self, length=self.length + n_tokens)


def empty(config: Config, batch: int, max_seq: int, types: CacheTypes = FLOAT16) -> Cache:
    """A cache with room for max_seq tokens of each of `batch` sequences."""
    shape = (config.n_layers, batch, config.n_kv_heads, max_seq, config.head_dim)
    return Cache(types.k.zeros(shape), types.v.zeros(shape), jnp.zeros((), jnp.int32), types)
