"""Tasks in which the text settles what comes next: does the model find the right continuation likeliest?

HellaSwag (Zellers et al. 2019) and other multiple-choice sets are such tasks, with endings of different lengths, so
that likelihoods are means over tokens (`normalized`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from qjax.data.tales import Probe
from qjax.errors import QjaxError
from qjax.metrics.perplexity import Logits, batches
from qjax.table import Table

# One length for all texts means one compilation, a round one that other probes may share it.
_LENGTH_MULTIPLE = 32
_Z_95 = 1.959964


@dataclass(frozen=True)
class ProbeResult:
    """The share of probes whose right answer got the highest likelihood."""

    accuracy: float
    low: float
    """lower end of the 95 % interval (Wilson 1927)"""
    high: float
    chance: float
    """expected accuracy of a guess"""
    n: int
    by_kind: Mapping[str, float]
    """accuracy of each kind of probe"""
    normalized: bool = False
    """whether likelihoods are means over the tokens of a choice, instead of sums"""

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {accuracy:.1%}" for kind, accuracy in self.by_kind.items())
        return (
            f"accuracy {self.accuracy:.1%} (95 % interval {self.low:.1%} to {self.high:.1%}, chance "
            f"{self.chance:.1%}, {self.n} probes; {kinds}{'; per token' if self.normalized else ''})"
        )

    def _repr_html_(self) -> str:
        rows = [("all", f"{self.accuracy:.1%}"), *((k, f"{a:.1%}") for k, a in self.by_kind.items())]
        interval = f"{self.low:.1%} to {self.high:.1%}"
        caption = f"{self.n} probes; 95 % interval {interval}, chance {self.chance:.1%}"
        return Table({"probe": "<", "accuracy": ">"}, rows, caption)._repr_html_()


def ask(
    logits: Logits,
    encode: Callable[[str], list[int]],
    probes: Sequence[Probe],
    size: int = 8,
    *,
    normalized: bool = False,
    n_ctx: int | None = None,
) -> ProbeResult:
    """Put probes to a model: it chooses the answer or alternative of highest log-likelihood given the prompt.

    The arguments, and what is raised, are those of `likelihoods`.
    """
    scores = likelihoods(logits, encode, probes, size, normalized=normalized, n_ctx=n_ctx)
    right = [of_choices[0] > max(of_choices[1:]) for of_choices in scores]
    by_kind = defaultdict(list)
    for probe, is_right in zip(probes, right):
        by_kind[probe.kind].append(is_right)
    low, high = _wilson(sum(right), len(right))
    return ProbeResult(
        accuracy=float(np.mean(right)),
        low=low,
        high=high,
        chance=float(np.mean([1 / (1 + len(probe.alternatives)) for probe in probes])),
        n=len(probes),
        by_kind={kind: float(np.mean(answers)) for kind, answers in sorted(by_kind.items())},
        normalized=normalized,
    )


def likelihoods(
    logits: Logits,
    encode: Callable[[str], list[int]],
    probes: Sequence[Probe],
    size: int = 8,
    *,
    normalized: bool = False,
    n_ctx: int | None = None,
) -> list[list[float]]:
    """Of each probe the log-likelihoods, in nats, of the answer and the alternatives.

    encode: text to token ids. Choices are compared from the first token in which they differ, so it does not matter
    how the tokenizer treats the place where the prompt ends; where one begins with another, from that one's last on.
    Where there is a tail, what counts is the tail without its last token, or all from that first token on, if that
    is no more than three tokens (as llama.cpp's winogrande_score has it, but for a mistake that its source names: then
    it takes the first token of the second choice from another place).
    size: texts in one call.  normalized: mean of the tokens instead of their sum, as llama.cpp has it for tasks with
    endings of different lengths.
    Raises QjaxError if there are no probes, one has no prompt or twice the same choice, or for a text of more tokens
    than n_ctx.
    """
    if not probes:
        raise QjaxError("there are no probes to ask; give at least one")
    # Choices that differ in their last token only share a text: everything but that token.
    texts: dict[tuple[int, ...], list[_Choice]] = defaultdict(list)
    scores = [[0.0] * (1 + len(probe.alternatives)) for probe in probes]
    for question, probe in enumerate(probes):
        for i, (ids, start, end) in enumerate(_spans(encode, probe)):
            if n_ctx is not None and end - 1 > n_ctx:
                raise QjaxError(f"this probe has {end - 1} tokens, the model takes {n_ctx}: {_shown(probe)}")
            texts[tuple(ids[: end - 1])].append(_Choice(question, i, start, ids[start:end]))
    for choice, log_p in _log_likelihoods(logits, texts, size):
        scores[choice.question][choice.index] = log_p / len(choice.own) if normalized else log_p
    return scores


# Fewer tokens behind a choice say too little (perplexity.cpp, k_min_trailing_ctx).
_MIN_TAIL = 3


def _spans(encode: Callable[[str], list[int]], probe: Probe) -> list[tuple[list[int], int, int]]:
    """Of each choice the tokens of its text, and from which to which of them they count."""
    endings = (probe.answer, *probe.alternatives)
    texts = [encode(probe.prompt + ending + probe.tail) for ending in endings]
    shortest = min(map(len, texts))
    common = min(next((i for i, ids in enumerate(zip(*texts)) if len(set(ids)) > 1), shortest), shortest - 1)
    if common < 1 or len(set(map(tuple, texts))) < len(texts):
        raise QjaxError(f"this probe has no prompt, or twice the same choice: {_shown(probe)}")
    starts = [common] * len(texts)
    if probe.tail and all(len(ids) - common > _MIN_TAIL for ids in texts):
        starts = [len(encode(probe.prompt + ending)) for ending in endings]
    starts = [min(start, len(ids) - 1) for start, ids in zip(starts, texts)]
    ends = [max(start + 1, len(ids) - bool(probe.tail)) for start, ids in zip(starts, texts)]
    return list(zip(texts, starts, ends))


def _shown(probe: Probe) -> str:
    text = repr(probe)
    return text if len(text) < 200 else f"{text[:200]}..."


class _Choice(NamedTuple):
    question: int
    index: int
    start: int
    """which token is the first that counts"""
    own: list[int]
    """the tokens that count"""


def _log_likelihoods(
    logits: Logits, texts: Mapping[tuple[int, ...], list[_Choice]], size: int
) -> Iterator[tuple[_Choice, float]]:
    """The log-likelihood, in nats, of the tokens of each choice that count."""
    length = -(-max(map(len, texts)) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    # What follows a text cannot influence it, so any token will do as padding.
    padded = np.array([[*text, *[0] * (length - len(text))] for text in texts], np.int32)
    start = min(choice.start for choices in texts.values() for choice in choices)
    first = (start - 1) // _LENGTH_MULTIPLE * _LENGTH_MULTIPLE
    groups = iter(texts.values())
    for batch, n in batches(padded, size):
        for of_positions, choices in zip(np.asarray(logits(batch, first))[:n], islice(groups, n)):
            for choice in choices:
                its = of_positions[choice.start - 1 - first :][: len(choice.own)]
                yield choice, float(_log_softmax(its, choice.own).sum())


def _log_softmax(logits: np.ndarray, picked: list[int]) -> np.ndarray:
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1)
    return logits[range(len(picked)), picked] - top - np.log(np.exp(logits - top[:, None]).sum(axis=-1))


def _wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which stays inside 0 to 1."""
    share, z2 = right / n, _Z_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z_95 / (1 + z2 / n) * (share * (1 - share) / n + z2 / (4 * n**2)) ** 0.5
    return max(middle - half, 0.0), min(middle + half, 1.0)
