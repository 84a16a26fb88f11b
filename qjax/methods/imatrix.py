"""Importance matrices: collected as llama-imatrix does, merged, described.

Where the mean square of an input column is large, an error in that column of the weights costs more.
Source: llama.cpp tools/imatrix/imatrix.cpp.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64, Int

from qjax.errors import QjaxError
from qjax.io.imatrix import Entry, Imatrix
from qjax.metrics.perplexity import Perplexity, batches, nll, scored
from qjax.models.config import Config
from qjax.models.layer import EXPERTS, ROUTED
from qjax.models.parts import observe
from qjax.models.transformer import Params
from qjax.table import Table

# ── collect ──────────────────────────────────────────────────────────────────────────────────────────


def sum_of_squares(h: Float32[Array, "batch seq d_in"]) -> Float32[Array, "batch d_in"]:
    """Σ x² over the tokens of each window: a Statistic."""
    return jnp.sum(h * h, axis=1)


class Seen(NamedTuple):
    """What one batch of windows showed."""

    sums: dict[str, Float64[np.ndarray, "*n_mat d_in"]]
    """Σ x² by the name of the weight"""
    counts: dict[str, Float64[np.ndarray, " n_mat"]]
    """the tokens that each expert of a weight got; other weights get all"""
    nll: Float32[np.ndarray, "batch scored"]
    """of each scored token, in nats; none if not asked for"""


def collect(
    config: Config,
    params: Params,
    windows: Int[np.ndarray, "chunks n_ctx"],
    size: int,
    *,
    process_output: bool = False,
    score: bool = True,
) -> Iterator[Seen]:
    """Run windows through the model, `size` at a time, and watch the inputs of its matrix products.

    process_output: the head's too, if it has a tensor of its own; llama-imatrix leaves out a tied one.
    score: perplexity as well, which takes the head's product.
    Raises QjaxError naming the weight whose input is not finite.
    """
    n_ctx = windows.shape[1]
    for tokens, n in batches(windows, size):
        first = n_ctx // 2 if score else n_ctx
        logits, observed = observe(config, params, tokens, sum_of_squares, first=first)
        sums = {
            name: seen[..., :n, :].sum(axis=-2, dtype=np.float64)
            for name, seen in jax.device_get(observed).unstack(config).items()
            if name.startswith("blk.") or (process_output and name == "output.weight")
        }
        counts = {}
        for layer in [name.removesuffix(ROUTED) for name in sums if name.endswith(ROUTED)]:
            routed = sums.pop(f"{layer}{ROUTED}")[:, 0]
            counts |= {f"{layer}{name}": routed for name in EXPERTS}
        for name, values in sums.items():
            if not np.isfinite(values).all():
                raise QjaxError(f"{name}: its input has NaN or infinite values. The model is damaged; fetch it again.")
        yield Seen(
            sums, counts, np.asarray(_nll(logits, scored(tokens, n_ctx)))[:n] if score else np.empty((n, 0), np.float32)
        )


@jax.jit
def _nll(logits: Float32[Array, "batch seq vocab"], targets: Int[Array, "batch scored"]) -> Array:
    # The token after the last one is not known.
    return nll(logits[:, :-1], targets)


def imatrix_of(
    sums: Mapping[str, Float64[np.ndarray, "*n_mat d_in"]],
    dataset: str,
    chunks: int,
    n_ctx: int,
    counts: Mapping[str, Float64[np.ndarray, " n_mat"]] = MappingProxyType({}),
) -> Imatrix:
    """The Imatrix of `chunks` windows of `n_ctx` tokens; counts: of experts, as in `Seen`."""
    every = np.array([chunks * n_ctx], np.float64)
    entries = {
        name: Entry(np.atleast_2d(values).astype(np.float32), counts.get(name, every).astype(np.float32))
        for name, values in sums.items()
    }
    return Imatrix(entries, (dataset,) if dataset else (), chunks, n_ctx)


# ── merge ────────────────────────────────────────────────────────────────────────────────────────────


def merge(matrices: Sequence[Imatrix], chunk_size: int = 512) -> Imatrix:
    """All that several matrices of one model have seen; chunk_size: the tokens that the result counts as a chunk.

    Raises QjaxError naming an entry whose sizes differ, or whose sums are too large to be added.
    """
    entries: dict[str, Entry] = {}
    for matrix in matrices:
        for name, entry in matrix.entries.items():
            entries[name] = _add(name, entries[name], entry) if name in entries else entry
    most = max((int(entry.counts.max()) for entry in entries.values()), default=0)
    datasets = tuple(dataset for matrix in matrices for dataset in matrix.datasets)
    return Imatrix(entries, datasets, most // chunk_size, chunk_size)


def _add(name: str, a: Entry, b: Entry) -> Entry:
    # Files from before experts were counted one by one have one count for all.
    n_mat = max(len(a.counts), len(b.counts))
    if a.sums.size != b.sums.size or {len(a.counts), len(b.counts)} - {1, n_mat}:
        raise QjaxError(
            f"{name}: sums of shape {a.sums.shape} and {b.sums.shape} cannot be merged; the importance matrices are of "
            "different models"
        )
    with np.errstate(over="ignore"):
        sums, counts = a.sums.ravel() + b.sums.ravel(), a.counts + b.counts
    if not (np.isfinite(sums).all() and np.isfinite(counts).all()):
        raise QjaxError(f"{name}: the importance matrices have sums that float32 cannot add; one of them is damaged")
    return Entry(sums.reshape(n_mat, -1), np.broadcast_to(counts, n_mat))


@dataclass(frozen=True)
class ImatrixReport:
    """What `qjax imatrix` made."""

    path: str | None
    """None if it was not written"""
    n_tensors: int
    chunk_count: int
    chunk_size: int
    datasets: tuple[str, ...]
    perplexity: Perplexity | None
    """of the text, if it was measured"""
    statistics: "ImatrixStatistics | None"

    @classmethod
    def of(
        cls,
        imatrix: Imatrix,
        path: Path | None,
        perplexity: Perplexity | None = None,
        statistics: "ImatrixStatistics | None" = None,
    ) -> "ImatrixReport":
        about = len(imatrix.entries), imatrix.chunk_count, imatrix.chunk_size, imatrix.datasets
        return cls(str(path) if path else None, *about, perplexity, statistics)

    def __str__(self) -> str:
        size = f"{self.n_tensors} tensors, {self.chunk_count} chunks of {self.chunk_size} tokens"
        parts = (self.perplexity, self.statistics, f"{self.path or 'not written'}: {size}")
        return "\n\n".join(str(part) for part in parts if part)


# ── describe ─────────────────────────────────────────────────────────────────────────────────────────

_ACTIVE = 1e-5


@dataclass(frozen=True)
class TensorStatistics:
    """How the mean squares x² of a tensor's input columns are distributed."""

    name: str
    layer: int | None
    """None outside the layers"""
    sum: float
    min: float
    max: float
    mean: float
    sigma: float
    """standard deviation"""
    active: float
    """percent of columns above 1e-5"""
    n: int
    """columns, those of experts never seen left out"""
    entropy: float
    """of x² / Σ x², in bits"""
    entropy_percent: float
    """of log2 n, which equal columns would have"""
    zd: float
    """percent of columns more than one sigma above the mean"""
    cosine: float
    """between the sums of this tensor and of the same one in the layer before; 0 where there is none"""


@dataclass(frozen=True)
class LayerStatistics:
    """Means over the tensors of a layer, weighted by their columns."""

    layer: int
    sum: float
    zd: float
    cosine: float


@dataclass(frozen=True)
class ImatrixStatistics:
    """What llama-imatrix --show-statistics prints; tensors by kind, the strongest first."""

    tensors: tuple[TensorStatistics, ...]
    layers: tuple[LayerStatistics, ...]

    @property
    def tables(self) -> tuple[Table, Table]:
        """By tensor and by layer."""
        return _table(_TENSOR_COLUMNS, self.tensors), _table(_LAYER_COLUMNS, self.layers)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables))

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables)


# Headings as llama-imatrix has them, and what of a row stands below each.
_TENSOR_COLUMNS = {
    "Tensor": "{.name}", "Σ(Act²)": "{.sum:.2f}", "Min": "{.min:.4f}", "Max": "{.max:.4f}", "μ": "{.mean:.2f}",
    "σ": "{.sigma:.2f}", "% Active": "{.active:.2f}%", "N": "{.n}", "Entropy": "{.entropy:.4f}",
    "E (norm)": "{.entropy_percent:.2f}%", "ZD": "{.zd:.2f}%", "CosSim": "{.cosine:.4f}",
}  # fmt: skip
_LAYER_COLUMNS = {
    "Layer": "{.layer}", "μΣ(Act²)": "{.sum:.2f}", "μZD": "{.zd:.4f}%", "μCosSim": "{.cosine:.4f}",
}  # fmt: skip


def _table(columns: Mapping[str, str], records: Sequence[Any]) -> Table:
    rows = [[pattern.format(record) for pattern in columns.values()] for record in records]
    return Table({heading: ">" if i else "<" for i, heading in enumerate(columns)}, rows)


def statistics(imatrix: Imatrix) -> ImatrixStatistics:
    """Describe each tensor and each layer.  Raises QjaxError if nothing was seen."""
    described = [_describe(imatrix, name) for name, entry in imatrix.entries.items() if entry.counts.any()]
    if not described:
        raise QjaxError("the importance matrix has seen nothing, so there is nothing to describe")
    tensors = tuple(sorted(described, key=lambda t: (_kind(t.name), -t.sum)))
    layers = []
    for layer in sorted({t.layer for t in tensors if t.layer is not None}):
        rows = np.array([(t.n, t.sum, t.zd, t.cosine) for t in tensors if t.layer == layer])
        means = np.average(rows[:, 1:], axis=0, weights=rows[:, 0]).tolist()
        layers.append(LayerStatistics(layer, *means))
    return ImatrixStatistics(tensors, tuple(layers))


def _describe(imatrix: Imatrix, name: str) -> TensorStatistics:
    sums, counts = imatrix.entries[name]
    x = (sums[counts > 0].astype(np.float64) / counts[counts > 0, None]).ravel()
    total, mean, sigma = x.sum(), x.mean(), x.std()
    share = x[x > 0] / total if total else x[:0]
    entropy = float(-np.sum(share * np.log2(share)))
    layer = re.search(r"\bblk\.(\d+)\.", name)
    return TensorStatistics(
        name=name,
        layer=int(layer[1]) if layer else None,
        sum=float(total),
        min=float(x.min()),
        max=float(x.max()),
        mean=float(mean),
        sigma=float(sigma),
        active=100 * float(np.mean(x > _ACTIVE)),
        n=x.size,
        entropy=entropy,
        entropy_percent=100 * entropy / math.log2(x.size) if x.size > 1 else 0.0,
        zd=100 * float(np.mean(x > mean + sigma)) if sigma else 0.0,
        cosine=_cosine(imatrix, name, layer),
    )


def _kind(name: str) -> str:
    """attn_q of blk.0.attn_q.weight"""
    return name.removesuffix(".weight").rpartition(".")[2]


def _cosine(imatrix: Imatrix, name: str, layer: re.Match[str] | None) -> float:
    before = f"{name[: layer.start(1)]}{int(layer[1]) - 1}{name[layer.end(1) :]}" if layer else ""
    a, b = (imatrix.entries.get(key) for key in (name, before))
    if not a or not b or a.sums.size != b.sums.size:
        return 0.0
    x, y = (entry.sums.ravel().astype(np.float64) for entry in (a, b))
    norms = math.sqrt(x @ x) * math.sqrt(y @ y)
    return float(x @ y / norms) if norms else 0.0
