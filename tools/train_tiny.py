"""Train the small model of qjax/data/tiny on the tales of qjax.data.tales, and export it.

    python tools/train_tiny.py RUN --minutes 100    # train, or go on from the checkpoint in RUN
    python tools/train_tiny.py RUN --export         # write the newest checkpoint to qjax/data/tiny

RUN is a folder for the checkpoint and log.jsonl. The data of step i are tales from seed TRAINING + i and nothing
else, so a resumed run goes on with the same stream, and the held-out seeds are never touched.
The learning rate decays over time, not steps: it reaches zero at the deadline however fast the machine is.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qjax.data import tales
from qjax.io.atomic import atomic_write
from qjax.io.checkpoint_write import write_folder
from qjax.models.config import Config
from qjax.models.transformer import Params, forward, init, stack, unstack

CONFIG = Config(
    architecture="llama",
    n_layers=4,
    d_model=256,
    d_ff=768,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    vocab=2048,
    n_ctx=512,
    norm_eps=1e-5,
    rope_theta=10000.0,
    tied=True,
)
TINY = Path(__file__).parent.parent / "qjax" / "data" / "tiny"
EOS = "<|endoftext|>"

SEED = 0
STEP_TOKENS = 4096
# From which share of the schedule on ...
WINDOWS = {0.0: 128, 0.2: 256, 0.6: CONFIG.n_ctx}  # ... how long the windows are,
DRILLS = {0.0: 10 / 32, 0.25: 4 / 32, 0.5: 0.0}  # ... what share of them are drills (see `drill`), and
CHOICE_WEIGHT = {0.0: 0.3, 0.6: 1.0}  # ... how much a token counts at which the program has a choice.
WARMUP_STEPS = 20
RATE = 0.003
DECAY_FROM = 0.3
NORM_RATE = 0.1
WEIGHT_DECAY = 0.05
EVALUATE_EVERY_S = 300
CHECKPOINT_EVERY_S = 180


# ── tokenizer ────────────────────────────────────────────────────────────────────────────────────────


def train_tokenizer(folder: Path) -> None:
    """Byte-level BPE with llama.cpp's `smollm` pre-tokenizer: digits alone, then GPT-2's pattern; no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # One long text, because a blank line before a letter is split into two tokens, and at the end it is not.
    text = "".join(tale.text for tale in tales.generate(tales.TRAINING, 20_000)).strip()
    tokenizer.train_from_iterator([text], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": EOS,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG.n_ctx,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────


def at(schedule: dict[float, Any], progress: float) -> Any:
    """What a schedule says at a share of the run."""
    return schedule[max(start for start in schedule if start <= progress)]


def drill(tokenizer: Tokenizer, rng: np.random.Generator, length: int) -> list[int]:
    """A few words of one pool over and over in random order, more often than not names.

    Nothing helps to predict it but looking back. In the tales themselves few tokens reward that, and attention that
    repeats what it sees is found late, or, once the layers have settled without it, not at all.
    """
    pools = tales.grammar().pools
    pool = pools["name" if rng.random() < 0.6 else rng.choice(sorted(pools))]
    words = rng.choice([word.text for word in pool], min(rng.integers(2, 7), len(pool)), replace=False)
    text = "".join(f" {word}" for word in rng.choice(words, length))
    return tokenizer.encode(text).ids[:length]


class Batch(NamedTuple):
    tokens: Int[Array, "batch seq"]
    weights: Float32[Array, "batch seq"]


def windows(tokenizer: Tokenizer, step: int, progress: float) -> Batch:
    """The training windows of a step, each with the token after it: running text cut anywhere, and drills."""
    length, rng = at(WINDOWS, progress), np.random.default_rng(step)
    batch = STEP_TOKENS // length
    needed = batch * (length + 1)
    text = "".join(tale.text for tale in tales.generate(tales.TRAINING + step, needed // 80))
    encoding = tokenizer.encode(text)
    starts = [span[0] for span in encoding.offsets]
    chosen = np.searchsorted(starts, [offset for offset, _ in tales.trace(text)], side="right") - 1
    weights = np.ones(len(starts), np.float32)
    weights[chosen] = at(CHOICE_WEIGHT, progress)
    first = rng.integers(256)
    ids, weights = (
        np.array(x[first : first + needed], dtype).reshape(batch, -1)
        for x, dtype in ((encoding.ids, np.int32), (weights, np.float32))
    )
    for row in range(round(at(DRILLS, progress) * batch)):
        ids[row], weights[row] = drill(tokenizer, rng, length + 1), 1
    return Batch(ids, weights)


def held_out(tokenizer: Tokenizer, n: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Held-out tales, each after another one: token ids (n, n_ctx), which of them to score, floor in nats."""
    ids, scored, floor = np.zeros((n, CONFIG.n_ctx), np.int32), np.zeros((n, CONFIG.n_ctx), bool), 0.0
    texts = tales.generate(0, 2 * n + 1)
    for row, (before, tale, after) in enumerate(zip(texts[0::2], texts[1::2], texts[2::2])):
        # The beginning of the next tale makes the blank line split as it does in running text.
        encoding = tokenizer.encode(before.text + tale.text + after.text[:1])
        start, end = len(before.text), len(before.text) + len(tale.text)
        inside = [start <= span[0] < end for span in encoding.offsets]
        ids[row, : len(inside)], scored[row, : len(inside)] = encoding.ids, inside
        floor += tale.nll
    return ids, scored, floor


# ── optimization ─────────────────────────────────────────────────────────────────────────────────────


def token_nll(params: Params, tokens: Int[Array, "batch seq"]) -> Float32[Array, "batch seq-1"]:
    """Negative log-likelihood in nats of every token but the first."""
    dtype = params.token_embd.dtype
    logits = forward(CONFIG, params, tokens[:, :-1], dtype=dtype)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def start() -> Params:
    """Random weights. The embedding is large, so that the layers' results do not drown which token it was; what
    the head would make of that is taken back by the last norm."""
    params = stack(init(CONFIG, jax.random.key(SEED)), CONFIG)
    runs = tuple({name: x if "norm" in name else 3 * x for name, x in run.items()} for run in params.runs)
    return params._replace(token_embd=25 * params.token_embd, runs=runs, output_norm=params.output_norm / 8)


def is_norm(params: Params) -> Params:
    return jax.tree.map_with_path(lambda path, x: "norm" in jax.tree_util.keystr(path), params)


OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b1=0.9, b2=0.95),
    optax.masked(optax.scale(NORM_RATE), is_norm),
    optax.masked(optax.add_decayed_weights(WEIGHT_DECAY), lambda params: jax.tree.map(lambda x: x.ndim == 3, params)),
    optax.scale(-1.0),
)


@partial(jax.jit, donate_argnums=(0, 1))
def train_step(
    params: Params, state: optax.OptState, batch: Batch, rate: Float[Array, ""]
) -> tuple[Params, optax.OptState, Float32[Array, ""]]:
    """One step of AdamW on float32 weights; the products are made in bfloat16."""

    def loss(params: Params) -> Float32[Array, ""]:
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, params)
        weights = batch.weights[:, 1:]
        return jnp.sum(token_nll(rounded, batch.tokens) * weights) / jnp.sum(weights)

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = OPTIMIZER.update(gradient, state, params)
    params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    return params, state, value


def evaluate(params: Params, tokenizer: Tokenizer, n: int = 64) -> dict[str, float]:
    """Nats per token of whole held-out tales, given the tale before, beside the exact floor."""
    ids, scored, floor = held_out(tokenizer, n)
    score = jax.jit(token_nll)
    nll = np.concatenate([score(params, ids[i : i + 8]) for i in range(0, n, 8)])
    n_tokens = int(scored.sum())
    loss = float(nll[scored[:, 1:]].sum()) / n_tokens
    floor /= n_tokens
    return {"held_out": loss, "floor": floor, "gap": loss / floor - 1, "n_tokens": n_tokens}


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────


def save(path: Path, training: tuple, step: int, progress: float) -> None:
    leaves = {f"leaf{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(training))}
    with atomic_write(path) as file:
        np.savez(file, step=step, progress=progress, **leaves)


def restore(path: Path) -> tuple[tuple, int, float]:
    """(params, optimizer state), steps done and the share of the schedule that is behind: saved or fresh."""
    params = start()
    training = (params, OPTIMIZER.init(params))
    if not path.exists():
        return training, 0, 0.0
    saved = np.load(path)
    leaves, structure = jax.tree.flatten(training)
    leaves = [jnp.asarray(saved[f"leaf{i}"], x.dtype) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, leaves), int(saved["step"]), float(saved["progress"])


def train(run: Path, tokenizer: Tokenizer, minutes: float) -> None:
    checkpoint = run / "checkpoint.npz"
    (params, state), step, progress = restore(checkpoint)

    def log(**record: float) -> None:
        with open(run / "log.jsonl", "a") as file:
            rounded = {key: round(value, 5) for key, value in record.items()}
            print(json.dumps({"time": time.strftime("%H:%M:%S"), "step": step} | rounded), file=file)

    now = time.monotonic()
    deadline, evaluated, saved = now + 60 * minutes, now - EVALUATE_EVERY_S + 180, now
    losses: list[float] = []
    while progress < 1:
        rate = RATE * min((step + 1) / WARMUP_STEPS, 1, (1 - progress) / (1 - DECAY_FROM))
        params, state, loss = train_step(params, state, windows(tokenizer, step, progress), rate)
        losses.append(float(loss))
        step += 1
        took, now = time.monotonic() - now, time.monotonic()
        # A share of what is left, so that the schedule ends at the deadline; a pause counts for little.
        progress += (1 - progress) * min(0.05, took / max(deadline - now, took))
        if now >= deadline:
            progress = 1.0
        if len(losses) == 20 or progress == 1:
            log(progress=progress, rate=rate, loss=float(np.mean(losses)), step_s=took)
            losses.clear()
        if now - evaluated > EVALUATE_EVERY_S:
            log(**evaluate(params, tokenizer))
            evaluated = time.monotonic()
        if now - saved > CHECKPOINT_EVERY_S:
            save(checkpoint, (params, state), step, progress)
            saved = time.monotonic()
    save(checkpoint, (params, state), step, progress)
    log(**evaluate(params, tokenizer, 200))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or export the small model of qjax/data/tiny.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--export", action="store_true")
    arguments = parser.parse_args()
    arguments.run.mkdir(parents=True, exist_ok=True)
    if not (TINY / "tokenizer.json").exists():
        train_tokenizer(TINY)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    if arguments.export:
        (params, _), step, _ = restore(arguments.run / "checkpoint.npz")
        tensors = {name: x.astype(jnp.bfloat16) for name, x in unstack(params, CONFIG).items()}
        write_folder(TINY, CONFIG, tensors)
        rounded = stack({name: x.astype(jnp.float32) for name, x in tensors.items()}, CONFIG)
        done = {"step": step, "tokens": step * STEP_TOKENS}
        print(json.dumps(done | evaluate(rounded, tokenizer, 200)))
    else:
        train(arguments.run, tokenizer, arguments.minutes)


if __name__ == "__main__":
    main()
