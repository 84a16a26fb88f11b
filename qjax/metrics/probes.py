"""Tasks in which the text settles what comes next: does the model find the right continuation likeliest?"""

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

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {accuracy:.1%}" for kind, accuracy in self.by_kind.items())
        return (
            f"accuracy {self.accuracy:.1%} (95 % interval {self.low:.1%} to {self.high:.1%}, chance "
            f"{self.chance:.1%}, {self.n} probes; {kinds})"
        )

    def _repr_html_(self) -> str:
        rows = [("all", f"{self.accuracy:.1%}"), *((k, f"{a:.1%}") for k, a in self.by_kind.items())]
        interval = f"{self.low:.1%} to {self.high:.1%}"
        caption = f"{self.n} probes; 95 % interval {interval}, chance {self.chance:.1%}"
        return Table({"probe": "<", "accuracy": ">"}, rows, caption)._repr_html_()


def ask(logits: Logits, encode: Callable[[str], list[int]], probes: Sequence[Probe], size: int = 8) -> ProbeResult:
    """Put probes to a model: it chooses the answer or alternative of highest log-likelihood given the prompt.

    encode: text to token ids. Choices are compared from the first token in which they differ, so it does not
    matter how the tokenizer treats the place where the prompt ends.
    size: texts in one call.
    Raises QjaxError if there are no probes.
    """
    if not probes:
        raise QjaxError("there are no probes to ask; give at least one")
    # Choices that differ in their last token only share a text: everything but that token.
    texts: dict[tuple[int, ...], list[_Choice]] = defaultdict(list)
    scores = [[0.0] * (1 + len(probe.alternatives)) for probe in probes]
    for question, probe in enumerate(probes):
        choices = [encode(probe.prompt + end) for end in (probe.answer, *probe.alternatives)]
        shortest = min(map(len, choices))
        common = next((i for i, ids in enumerate(zip(*choices)) if len(set(ids)) > 1), shortest)
        if not 0 < common < shortest:
            raise QjaxError(f"this probe has no prompt, or one choice begins with another: {probe}")
        for i, ids in enumerate(choices):
            texts[tuple(ids[:-1])].append(_Choice(question, i, common, ids))

    for choice, log_p in _log_likelihoods(logits, texts, size):
        scores[choice.question][choice.index] = log_p
    right = [int(np.argmax(of_choices)) == 0 for of_choices in scores]

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
    )


class _Choice(NamedTuple):
    question: int
    index: int
    common: int
    """how many tokens all choices of the question begin with"""
    ids: list[int]


def _log_likelihoods(
    logits: Logits, texts: Mapping[tuple[int, ...], list[_Choice]], size: int
) -> Iterator[tuple[_Choice, float]]:
    """The log-likelihood, in nats, of what each choice has of its own."""
    length = -(-max(map(len, texts)) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    # What follows a text cannot influence it, so any token will do as padding.
    padded = np.array([[*text, *[0] * (length - len(text))] for text in texts], np.int32)
    common = min(choice.common for choices in texts.values() for choice in choices)
    first = (common - 1) // _LENGTH_MULTIPLE * _LENGTH_MULTIPLE
    groups = iter(texts.values())
    for batch, n in batches(padded, size):
        for of_positions, choices in zip(np.asarray(logits(batch, first))[:n], islice(groups, n)):
            for choice in choices:
                own = choice.ids[choice.common :]
                yield choice, float(_log_softmax(of_positions[choice.common - 1 - first :][: len(own)], own).sum())


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
