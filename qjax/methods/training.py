"""The loop in which weights are trained: AdamW (Loshchilov and Hutter 2019), checkpoints, the same bytes every time.

    weights ─ loss ─ gradient ─ clipped ─ AdamW ─► weights      step i = 0, 1, ... with the windows of step i

What is trained is a dict of float32 arrays by name; what the names mean is known to the loss alone.  Step i depends on
nothing but the weights, the optimizer's state and i, so that a run that was interrupted ends as if it had not been.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float32, Int, Int32

from qjax.errors import QjaxError
from qjax.io.atomic import atomic_write
from qjax.metrics.perplexity import MIN_CTX, nll, with_bos
from qjax.progress import progress

Weights = dict[str, Array]
Loss = Callable[[Weights, Any, Array], Array]
"""(weights, what is not trained, tokens (batch, n_ctx + 1)) -> a number"""
Batches = Callable[[int], Int[np.ndarray, "batch seq"]]
"""The windows of a step, which depend on nothing but its number."""

# Of the learning rate, by the share of the steps that is left.
_DECAYS: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda left: (1 - jnp.cos(jnp.pi * left)) / 2,
    "linear": lambda left: left,
    "constant": lambda left: jnp.ones_like(left),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to train.

    batch, n_ctx: windows of a step, and the tokens that are predicted in each.
    rate: the highest learning rate, reached after ``warmup`` of the steps (a share); then it decays to zero, as
    ``decay`` says: cosine, linear or (not at all) constant.
    clip: the gradient's norm over all weights is at most this.  weight_decay: of matrices.
    distill: share of the loss that is the divergence from the teacher's predictions; the rest is the text's.
    seed: of the order of the windows and whatever else is drawn.
    save_every: steps between checkpoints.
    Raises QjaxError for values outside their range.
    """

    steps: int = 200
    batch: int = 8
    n_ctx: int = 256
    rate: float = 1e-3
    warmup: float = 0.05
    decay: str = "cosine"
    clip: float = 1.0
    weight_decay: float = 0.0
    distill: float = 0.0
    seed: int = 0
    save_every: int = 50

    def __post_init__(self):
        at_least = {"steps": 1, "batch": 1, "n_ctx": MIN_CTX, "weight_decay": 0, "seed": 0, "save_every": 1}
        for name, least in at_least.items():
            if not least <= getattr(self, name) < math.inf:
                raise QjaxError(f"train: {name} is {getattr(self, name)}, expected at least {least}")
        for name in ("rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise QjaxError(f"train: {name} is {getattr(self, name)}, expected a positive number")
        for name in ("warmup", "distill"):
            if not 0 <= getattr(self, name) <= 1:
                raise QjaxError(f"train: {name} is {getattr(self, name)}, expected a share from 0 to 1")
        if self.decay not in _DECAYS:
            raise QjaxError(f"train: decay is {self.decay!r}, expected one of {', '.join(_DECAYS)}")

    def rate_at(self, step: Any) -> Array:
        """The learning rate of a step, counted from 0."""
        warm = self.warmup * self.steps
        left = jnp.clip((self.steps - step) / max(self.steps - warm, 1), 0, 1)
        return self.rate * jnp.minimum(1, (step + 1) / max(warm, 1)) * _DECAYS[self.decay](left)


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────


def windows_of(tokens: Int[np.ndarray, " n"], options: Options, bos_id: int | None = None) -> Batches:
    """Windows of n_ctx + 1 tokens that begin anywhere in a text; bos_id takes the place of the first token of each.

    Raises QjaxError for a text with fewer tokens than one step has.
    """
    length = options.n_ctx + 1
    if len(tokens) < options.batch * length:
        raise QjaxError(
            f"the text has {len(tokens)} tokens; a step takes {options.batch} windows of {length}, "
            f"{options.batch * length} in all. Give a longer text, or a smaller batch or context."
        )

    def windows(step: int) -> Int32[np.ndarray, "batch length"]:
        draw = np.random.default_rng([options.seed, step])
        starts = draw.integers(len(tokens) - length + 1, size=options.batch)
        return with_bos(np.stack([tokens[start : start + length] for start in starts]), bos_id)

    return windows


# ── loss ─────────────────────────────────────────────────────────────────────────────────────────────


def text_loss(
    logits: Float32[Array, "batch seq vocab"],
    targets: Int[Array | np.ndarray, "batch seq"],
    teacher: Float32[Array, "batch seq vocab"] | None = None,
    distill: float = 0.0,
) -> Float32[Array, ""]:
    """(1 - distill) · cross entropy + distill · KL(teacher ‖ model), the mean over all predictions, in nats.

    teacher: its logits.  They say more of what its weights know than the one token that follows does (Hinton et al.
    2015, "Distilling the Knowledge in a Neural Network").
    """
    loss = jnp.float32(0)
    if distill < 1:
        loss += (1 - distill) * jnp.mean(nll(logits, targets))
    if distill:
        assert teacher is not None
        target = jax.nn.log_softmax(lax.stop_gradient(teacher))
        loss += distill * jnp.mean(jnp.sum(jnp.exp(target) * (target - jax.nn.log_softmax(logits)), axis=-1))
    return loss


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────────


class Fitted(NamedTuple):
    """What `fit` made."""

    weights: Weights
    losses: tuple[float, ...]
    """of each step, those before a resumption too"""
    first_step: int
    """where this run began; 0 unless it was resumed"""


def fit(
    loss: Loss,
    weights: Weights,
    fixed: Any,
    batches: Batches,
    options: Options,
    *,
    desc: str = "training",
    checkpoint: "Checkpoint | None" = None,
) -> Fitted:
    """``weights`` after ``options.steps`` steps down the gradient of ``loss``.

    Raises QjaxError naming step and tensor if the loss or a gradient is NaN or infinite, which leaves the last
    checkpoint as it was; if optax is missing; and as `Checkpoint.restore` does.
    """
    optimizer = _optimizer(options)
    weights = {name: jnp.array(x, jnp.float32) for name, x in sorted(weights.items())}
    state, losses = optimizer.init(weights), []
    if checkpoint is not None and (saved := checkpoint.restore(weights, state)):
        weights, state, losses = saved
    first, update = len(losses), update_of(loss, options)
    for step in progress(range(first, options.steps), desc=desc, unit="step"):
        weights, state, value, finite = update(weights, state, fixed, batches(step))
        _check(step, float(value), dict(zip(weights, finite.tolist())), checkpoint)
        losses.append(float(value))
        if checkpoint is not None and ((step + 1) % options.save_every == 0 or step + 1 == options.steps):
            checkpoint.save(weights, state, losses)
    return Fitted(weights, tuple(losses), first)


def update_of(loss: Loss, options: Options) -> Any:
    """One step as a compiled function: (weights, optimizer's state, fixed, tokens) -> (weights, state, loss, whether
    the gradient of each tensor is finite).  The first two are used up."""
    optimizer = _optimizer(options)

    def update(weights: Weights, state: Any, fixed: Any, tokens: Array) -> tuple[Weights, Any, Array, Array]:
        value, gradient = jax.value_and_grad(loss)(weights, fixed, tokens)
        finite = jnp.stack([jnp.isfinite(g).all() for g in gradient.values()])
        updates, state = optimizer.update(gradient, state, weights)
        return jax.tree.map(jnp.add, weights, updates), state, value, finite

    return jax.jit(update, donate_argnums=(0, 1))


def _optimizer(options: Options) -> Any:
    try:
        import optax
    except ImportError:
        raise QjaxError("training needs optax: pip install 'qjax[train]'") from None
    return optax.chain(
        optax.clip_by_global_norm(options.clip),
        optax.adamw(options.rate_at, b1=0.9, b2=0.95, weight_decay=options.weight_decay, mask=_are_matrices),
    )


def _are_matrices(weights: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, weights)


def _check(step: int, loss: float, finite: Mapping[str, bool], checkpoint: "Checkpoint | None") -> None:
    bad = [name for name, is_finite in finite.items() if not is_finite]
    if math.isfinite(loss) and not bad:
        return
    where = f"the gradient of {bad[0]} has NaN or infinite values" if bad else "its gradient is finite"
    others = f", and that of {len(bad) - 1} more of {len(finite)} tensors" if len(bad) > 1 else ""
    kept = f" The checkpoint in {checkpoint.folder} is of an earlier step." if checkpoint and checkpoint.exists else ""
    raise QjaxError(f"step {step}: the loss is {loss:g}, {where}{others}. Train with a smaller learning rate.{kept}")


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run in ``folder``, a safetensors file: weights, the optimizer's moments, losses.

    about: what the run is of; one that says something else is not gone on with.  resume: whether to go on with one
    that is there.
    """

    folder: Path
    about: Mapping[str, Any]
    resume: bool = False

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def exists(self) -> bool:
        return self.path.exists()

    def save(self, weights: Weights, state: Any, losses: Sequence[float]) -> None:
        """Whole or not at all, in place of the one before.  Raises OSError if the disk is full."""
        from safetensors.numpy import save

        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.asarray(x) for name, x in _named(weights, state).items()}
        arrays["losses"] = np.asarray(losses, np.float64)
        with atomic_write(self.path) as file:
            file.write(save(arrays, {"about": json.dumps(dict(self.about))}))

    def restore(self, weights: Weights, state: Any) -> tuple[Weights, Any, list[float]] | None:
        """What was saved, in the form of ``weights`` and ``state``; None if there is nothing.

        Raises QjaxError for a damaged file, one of another run, and one that is there though nobody asked to resume.
        """
        if not self.exists:
            return None
        if not self.resume:
            raise QjaxError(f"{self.path}: is there already. Resume it (--resume), or give another folder.")
        from safetensors import SafetensorError, safe_open

        expected = _named(weights, state)
        try:
            with safe_open(self.path, framework="numpy") as file:
                self._check_about(json.loads((file.metadata() or {}).get("about", "{}")))
                names = [*expected, "losses"]
                if {*file.keys()} != {*names}:
                    raise QjaxError(f"{self.path}: has other tensors than this run. Give another folder.")
                for name, x in expected.items():
                    part = file.get_slice(name)
                    if tuple(part.get_shape()) != x.shape or part.get_dtype() != _DTYPES[x.dtype.name]:
                        raise QjaxError(f"{self.path}: {name} has another shape or type. Give another folder.")
                losses = file.get_slice("losses")
                if len(losses.get_shape()) != 1 or losses.get_dtype() != "F64":
                    raise QjaxError(f"{self.path}: its losses are no list of numbers. Give another folder.")
                arrays = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, QjaxError):
                raise
            raise QjaxError(f"{self.path}: no checkpoint, or a damaged one ({error}). Remove it.") from None
        leaves = [jnp.asarray(arrays[name]) for name in expected]
        weights, state = jax.tree.unflatten(jax.tree.structure((weights, state)), leaves)
        return weights, state, arrays["losses"].tolist()

    def _check_about(self, found: Any) -> None:
        about = json.loads(json.dumps(dict(self.about)))
        for key, value in about.items():
            if not isinstance(found, dict) or found.get(key) != value:
                was = found.get(key) if isinstance(found, dict) else None
                raise QjaxError(
                    f"{self.path}: of another run, whose {key} is {was!r} and not {value!r}. Give another folder."
                )


_DTYPES = {"float32": "F32", "int32": "I32"}


def _named(weights: Weights, state: Any) -> dict[str, Any]:
    """The leaves of both by name, in their order."""
    leaves = jax.tree.leaves_with_path((weights, state))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def about(options: Options, **more: Any) -> dict[str, Any]:
    """What a checkpoint says of its run: the options, but for how often it is saved, and more."""
    return {key: value for key, value in asdict(options).items() if key != "save_every"} | more


def sha256(arrays: Sequence[Array | np.ndarray]) -> str:
    """Of the shapes, types and bytes of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
