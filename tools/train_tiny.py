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

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qjax.data import tales
from qjax.io.atomic import atomic_write
from qjax.io.checkpoints import write_folder
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
# From which share of the schedule on how long the windows are: at first hardly more than one tale, so that there is
# little else to look at than what a tale has named before.
WINDOWS = {0.0: 128, 0.7: 256, 0.85: CONFIG.n_ctx}
WARMUP_STEPS = 100
MUON_RATE = 0.02
ADAM_RATE = 0.003
WEIGHT_DECAY = 0.02
EVALUATE_EVERY_S = 240
CHECKPOINT_EVERY_S = 120


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


def windows(tokenizer: Tokenizer, step: int, progress: float) -> Int[np.ndarray, "batch seq"]:
    """The training windows of a step: running text cut anywhere, each window with the token after it."""
    length = max(length for start, length in WINDOWS.items() if start <= progress)
    batch = STEP_TOKENS // length
    needed = batch * (length + 1)
    text = "".join(tale.text for tale in tales.generate(tales.TRAINING + step, needed // 80))
    start = np.random.default_rng(step).integers(256)
    ids = tokenizer.encode(text).ids[start : start + needed]
    return np.array(ids, np.int32).reshape(batch, length + 1)


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
    logits = forward(CONFIG, params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def make_optimizer() -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the layers' matrices, Adam for embedding and norms; both relative to Muon's rate."""

    def axes(params: Params) -> Params:
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)
        runs = tuple({name: None if "norm" in name else matrix for name in run} for run in params.runs)
        return Params(None, runs, None, None)

    return optax.contrib.muon(
        learning_rate=1.0,
        weight_decay=WEIGHT_DECAY,
        adam_learning_rate=ADAM_RATE / MUON_RATE,
        adam_b2=0.95,
        muon_weight_dimension_numbers=axes,
    )


OPTIMIZER = make_optimizer()


@partial(jax.jit, donate_argnums=(0, 1))
def train_step(
    params: Params, state: optax.OptState, tokens: Int[Array, "batch seq"], rate: Float[Array, ""]
) -> tuple[Params, optax.OptState, Float32[Array, ""]]:
    loss, gradient = jax.value_and_grad(lambda p: token_nll(p, tokens).mean())(params)
    updates, state = OPTIMIZER.update(gradient, state, params)
    params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    return params, state, loss


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
    params = stack(init(CONFIG, jax.random.key(SEED)), CONFIG)
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
        rate = MUON_RATE * min((step + 1) / WARMUP_STEPS, 1 - progress)
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
