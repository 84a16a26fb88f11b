"""Children's tales from a probabilistic program that knows how likely each of them is.

A language model cannot, on average, predict these texts better than the program that wrote them: the mean
negative log-likelihood (NLL) of held-out tales is the entropy floor, and how far a model is from it is known
exactly.

The program is a grammar (`tales.grammar`, its notation stands at its top), told from left to right. Every
random choice shows in the text at once, and the alternatives of a choice are prefix-free: none of them begins
another. So a text has one derivation, and `nll(text)` finds it again without having seen how the text was made.
A tale ends with a blank line; tales are independent of each other.

Seeds below `HELD_OUT` are for evaluation and never trained on; training takes seeds from `TRAINING` upwards.
"""

import contextlib
import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

HELD_OUT = 1_000
TRAINING = 1_000_000

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
NUMBERS += ("seven", "eight", "nine", "ten", "eleven", "twelve")


class Tale(NamedTuple):
    """A text and its exact negative log-likelihood in nats."""

    text: str
    nll: float


class Probe(NamedTuple):
    """A text cut where it is settled what comes next: `answer`, and none of the `alternatives`.

    In tales, `kind` is "sum" (a number that has to be worked out) or "name" (who it was). Answers begin with the
    space before them, if any, so that prompt + answer is tokenized as the two are. Where the text goes on behind
    them, `tail` is what has to be likely.
    """

    kind: str
    prompt: str
    answer: str
    alternatives: tuple[str, ...]
    tail: str = ""


class NotATale(ValueError):
    """The text is not in the language of the grammar."""


class Word(NamedTuple):
    """An entry of a pool."""

    text: str
    pool: str
    attributes: dict[str, str]


# -------------------------------------------------------------------------- the steps a tale is told in


class Telling:
    """One tale being told: what is known so far, what has been said, and who makes the choices."""

    def __init__(self, choose: "Choose", state: dict[str, Word] | None = None):
        self.choose = choose
        self.state = dict(state or {})
        self.said: list[str] = []
        self.asked: list[tuple[int, str, Word]] = []  # index into said, kind of probe, answer

    def follow(self, steps: "list[Step]") -> None:
        for step in steps:
            if isinstance(step, str):
                self.said.append(step)
            else:
                step.tell(self)


class Options(NamedTuple):
    """The alternatives at one choice; `texts(state)`: what each of them would say up to the next choice."""

    items: list[Any]
    cumulative: list[float]
    nats: list[float]
    texts: Callable[[dict[str, Word]], list[str]]

    @classmethod
    def weighted(cls, items: list[Any], weights: list[int], texts: Callable[..., list[str]]) -> "Options":
        total = sum(weights)
        cumulative = [w / total for w in accumulate(weights)]
        return cls(items, cumulative, [math.log(total / w) for w in weights], texts)


Choose = Callable[[Options, Telling], int]


class Say(NamedTuple):
    """{thing} {hero.his} {a thing} {^hero.he} {holder?}: repeats what is known."""

    variable: str
    attribute: str
    article: bool
    capital: bool
    asked: bool

    def render(self, state: dict[str, Word]) -> str:
        word = state[self.variable]
        text = word.attributes[self.attribute] if self.attribute else word.text
        return _dress(text, self.article, self.capital)

    def tell(self, telling: Telling) -> None:
        if self.asked:
            telling.asked.append((len(telling.said), "name", telling.state[self.variable]))
        telling.said.append(self.render(telling.state))


class Sum(NamedTuple):
    """{n+m} {n-m}: works out a number."""

    left: str
    sign: str
    right: str

    def render(self, state: dict[str, Word]) -> str:
        left, right = (NUMBERS.index(state[v].text) for v in (self.left, self.right))
        return NUMBERS[left + right if self.sign == "+" else left - right]

    def tell(self, telling: Telling) -> None:
        text = self.render(telling.state)
        telling.asked.append((len(telling.said), "sum", Word(text, "number", {})))
        telling.said.append(text)


class Note(NamedTuple):
    """{holder:pal}: the state changes, nothing is said (the text before has shown it)."""

    variable: str
    source: str

    def tell(self, telling: Telling) -> None:
        telling.state[self.variable] = telling.state[self.source]


class Pick:
    """{thing=pool} {pal=name!hero} {a =look} {n=2..6}: chooses a word."""

    def __init__(self, pools: dict[str, list[Word]], pool: str, variable: str, other: str, dress: Callable[[str], str]):
        self.pools, self.variable, self.other, self.dress = pools, variable, other, dress
        self.pool, self.key, self.attribute = _split_name(pool)
        self.cache: dict[tuple[str, str], Options] = {}

    def domain(self) -> list[str]:
        """The pools that the word may come from."""
        return [p for p in self.pools if p.startswith(self.pool)] if self.key else [self.pool]

    def options(self, state: dict[str, Word]) -> Options:
        pool = self.pool + state[self.key].attributes[self.attribute] if self.key else self.pool
        without = state[self.other].text if self.other else ""
        if (pool, without) not in self.cache:
            words = [w for w in self.pools[pool] if w.text != without]
            texts = [self.dress(w.text) for w in words]
            items = list(zip(words, texts))
            self.cache[pool, without] = Options.weighted(items, [1] * len(words), lambda state: texts)
        return self.cache[pool, without]

    def tell(self, telling: Telling) -> None:
        options = self.options(telling.state)
        word, text = options.items[telling.choose(options, telling)]
        if self.variable:
            telling.state[self.variable] = word
        telling.said.append(text)


class Alternative(NamedTuple):
    """One line of a rule. `guard`: the variable that must be known (or unknown, with "!")."""

    steps: "list[Step]"
    weight: int
    guard: str
    source: str

    def open(self, state: dict[str, Word]) -> bool:
        return (self.guard.lstrip("!") in state) != self.guard.startswith("!") if self.guard else True

    def opening(self, state: dict[str, Word]) -> str:
        """What is said up to the next choice."""
        telling = Telling(_stop, state)
        with contextlib.suppress(_ChoiceReached):
            telling.follow(self.steps)
        return "".join(telling.said)


class Rule:
    """<rule>: goes on with one of its alternatives."""

    def __init__(self):
        self.alternatives: list[Alternative] = []
        self.cache: dict[tuple[bool, ...], Options] = {}

    def options(self, state: dict[str, Word]) -> Options:
        mask = tuple([a.open(state) for a in self.alternatives if a.guard])
        if mask not in self.cache:
            items = [a for a in self.alternatives if a.open(state)]
            self.cache[mask] = Options.weighted(
                items, [a.weight for a in items], lambda state: [a.opening(state) for a in items]
            )
        return self.cache[mask]


class Call:
    """<rule> or <see/spot.land>."""

    def __init__(self, rules: dict[str, Rule], name: str):
        self.rules = rules
        self.name, self.key, self.attribute = _split_name(name)

    def tell(self, telling: Telling) -> None:
        name = self.name + telling.state[self.key].attributes[self.attribute] if self.key else self.name
        options = self.rules[name].options(telling.state)
        alone = len(options.items) == 1
        telling.follow(options.items[0 if alone else telling.choose(options, telling)].steps)


Step = str | Say | Sum | Note | Pick | Call


class _ChoiceReached(Exception):
    pass


def _stop(options: Options, telling: Telling) -> int:
    raise _ChoiceReached


def _dress(text: str, article: bool, capital: bool) -> str:
    if article:
        text = ("an " if re.match("[aeio]|u(?!s|ni|ku)|hones|hour", text) else "a ") + text
    return text[0].upper() + text[1:] if capital else text


def _split_name(name: str) -> tuple[str, str, str]:
    """Split find/spot.land into "find/", "spot" and "land"; a plain name has no key and no attribute."""
    if "." not in name or ".." in name:
        return name, "", ""
    head, _, attribute = name.rpartition(".")
    folder, _, key = head.rpartition("/")
    return folder + "/", key, attribute


# ------------------------------------------------------------------------------------- the grammar


class Grammar:
    """A grammar in the notation of `tales.grammar`; the tale is what the rule named `tale` tells.

    Raises ValueError, naming the line, if the text of the grammar is not well formed.
    """

    def __init__(self, source: str):
        self.pools: dict[str, list[Word]] = {}
        self.rules: dict[str, Rule] = {}
        rule = None
        for number, line in enumerate(source.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            if pool := re.fullmatch(r"pool (\S+)((?: \w+=\S+)*): (.+)", line):
                attributes = dict(pair.split("=") for pair in pool[2].split())
                words = [Word(text.strip(), pool[1], attributes) for text in pool[3].split(",")]
                self.pools.setdefault(pool[1], []).extend(words)
            elif header := re.fullmatch(r"rule (\S+)", line):
                rule = self.rules.setdefault(header[1], Rule())
            elif rule and (found := re.fullmatch(r"  (?:(\d+)x )?(?:\[(!?\w+)\] )?(.*)", line)):
                rule.alternatives.append(
                    Alternative(self._steps(found[3], number), int(found[1] or 1), found[2] or "", found[3])
                )
            else:
                raise ValueError(f"grammar line {number}: expected a pool, a rule or an alternative: {line!r}")

    def _steps(self, text: str, number: int) -> list[Step]:
        steps: list[Step] = []
        for piece in re.split(r"(\{[^}]*\}|<[^>]*>)", text.replace("\\n", "\n")):
            if piece.startswith("<"):
                steps.append(Call(self.rules, piece[1:-1]))
            elif not piece.startswith("{"):
                steps += [piece] if piece else []
            elif slot := re.fullmatch(r"\{(\^?)(a )?(\w*)=([\w/.]+)(?:!(\w+))?\}", piece):
                if span := re.fullmatch(r"(\d+)\.\.(\d+)", slot[4]):
                    numbers = NUMBERS[int(span[1]) : int(span[2]) + 1]
                    self.pools[slot[4]] = [Word(text, "number", {}) for text in numbers]
                dress = partial(_dress, article=bool(slot[2]), capital=bool(slot[1]))
                steps.append(Pick(self.pools, slot[4], slot[3], slot[5] or "", dress))
            elif slot := re.fullmatch(r"\{(\w+):(\w+)\}", piece):
                steps.append(Note(slot[1], slot[2]))
            elif slot := re.fullmatch(r"\{(\w+)([+-])(\w+)\}", piece):
                steps.append(Sum(slot[1], slot[2], slot[3]))
            elif slot := re.fullmatch(r"\{(\^?)(a )?(\w+)(?:\.(\w+))?(\??)\}", piece):
                steps.append(Say(slot[3], slot[4] or "", bool(slot[2]), bool(slot[1]), bool(slot[5])))
            else:
                raise ValueError(f"grammar line {number}: this slot is in no notation: {piece}")
        return steps

    def tell(self, choose: Choose) -> Telling:
        """Tell one tale; `choose(options, telling)` returns the index of the option to take."""
        telling = Telling(choose)
        telling.follow([Call(self.rules, "tale")])
        return telling

    def _tellings(self, seed: int) -> Iterator[tuple[Telling, float]]:
        rng = random.Random(seed).random
        nats: list[float] = []

        def sample(options: Options, telling: Telling) -> int:
            index = bisect_right(options.cumulative, rng())
            nats.append(options.nats[index])
            return index

        while True:
            nats.clear()
            yield self.tell(sample), math.fsum(nats)

    def generate(self, seed: int, n: int) -> list[Tale]:
        """n independent tales; the first tales of a seed are the same whatever n is."""
        return [Tale("".join(telling.said), nll) for telling, nll in islice(self._tellings(seed), n)]

    def trace(self, text: str) -> list[tuple[int, float]]:
        """Every random choice of a text of whole tales, as (offset of the character where it shows, nats).

        The nats sum to `nll(text)`. Raises NotATale where the text leaves the grammar.
        """
        trace: list[tuple[int, float]] = []
        at = heard = 0

        def listen(telling: Telling) -> None:
            nonlocal at, heard
            for piece in telling.said[heard:]:
                if not text.startswith(piece, at):
                    raise NotATale(_mismatch(text, at, [piece]))
                at += len(piece)
            heard = len(telling.said)

        def match(options: Options, telling: Telling) -> int:
            listen(telling)
            texts = options.texts(telling.state)
            fitting = [i for i, t in enumerate(texts) if text.startswith(t, at)]
            if len(fitting) != 1:
                raise NotATale(_mismatch(text, at, texts))
            trace.append((at, options.nats[fitting[0]]))
            return fitting[0]

        while at < len(text):
            heard = 0
            listen(self.tell(match))
        return trace

    def nll(self, text: str) -> float:
        """The exact negative log-likelihood, in nats, of a text of one or more whole tales."""
        return math.fsum(nats for _, nats in self.trace(text))

    def probes(self, seed: int, n: int) -> list[Probe]:
        """n probes, each from another of the tales of the seed (so that their outcomes are independent)."""
        asking = (telling for telling, _ in self._tellings(seed) if telling.asked)
        return [_probe(telling) for telling in islice(asking, n)]


def _mismatch(text: str, at: int, expected: list[str]) -> str:
    shown = ", ".join(repr(t) for t in expected[:3])
    shown += f" or {len(expected) - 3} others" if len(expected) > 3 else ""
    return f"not a tale: at character {at} expected {shown}, found {text[at : at + 40]!r}"


def _probe(telling: Telling) -> Probe:
    where, kind, answer = telling.asked[0]
    if kind == "sum":
        right = NUMBERS.index(answer.text)
        near = {right + d for d in (-2, -1, 1, 2)} & set(range(1, len(NUMBERS)))
        others = [NUMBERS[i] for i in sorted(near)]
    else:
        others = sorted({w.text for w in telling.state.values() if w.pool == answer.pool} - {answer.text})
    prompt = "".join(telling.said[:where])
    space = " " * prompt.endswith(" ")
    return Probe(kind, prompt.removesuffix(" "), space + answer.text, tuple(space + t for t in others))


# ------------------------------------------------------------------------------- the tales themselves


@cache
def grammar() -> Grammar:
    """The grammar of the tales, `tales.grammar` beside this file."""
    return Grammar(Path(__file__).with_name("tales.grammar").read_text(encoding="utf-8"))


def generate(seed: int, n: int) -> list[Tale]:
    """n independent tales; see `Grammar.generate`."""
    return grammar().generate(seed, n)


def nll(text: str) -> float:
    """Exact negative log-likelihood of a text of whole tales, in nats; see `Grammar.nll`."""
    return grammar().nll(text)


def trace(text: str) -> list[tuple[int, float]]:
    """Every random choice as (character offset, nats); see `Grammar.trace`."""
    return grammar().trace(text)


def probes(seed: int, n: int) -> list[Probe]:
    """n questions whose answer the story determines; see `Grammar.probes`."""
    return grammar().probes(seed, n)
