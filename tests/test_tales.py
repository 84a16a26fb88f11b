"""The tales: their probabilities against sampling and against a grammar small enough to list; their promises."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from itertools import combinations
from pathlib import Path

import pytest

from qjax.data import tales
from qjax.data.tales import Call, Grammar, NotATale, Note, Pick, Say, Sum, Word

TOKENIZER = Path(tales.__file__).parent / "tiny" / "tokenizer.json"

SMALL = """
pool name he=he: Ben, Tom
pool name he=she: Mia
pool pet size=big: dog
pool pet size=small: cat
pool noise/big: Woof, Grr, Ouch
pool noise/small: Meow
rule tale
  Once {hero=name} {a pet=pet} met. <middle>\\n\\n
rule middle
  3x {^pet} and {hero} saw {pal=name!hero}.{friend:pal} <end>
  {=noise/pet.size}, said the {pet}. <end>
  Then {n=2..3} birds and {m=1..2} birds, {n+m} birds, came. <end>
rule end
  [friend] So {friend} {=noise/pet.size}ed.
  [!friend] And {hero.he} was alone.
  2x The end.
""".replace("  {=noise", "  Listen, {=noise")


@pytest.fixture(scope="module")
def thousand() -> list[tales.Tale]:
    return tales.generate(7, 1000)


# ── probabilities ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", [0, 1, 999, tales.TRAINING])
def test_nll_of_the_text_is_that_of_its_making(seed: int):
    told = tales.generate(seed, 40)
    assert [tales.nll(tale.text) for tale in told] == [tale.nll for tale in told]
    assert tales.nll("".join(tale.text for tale in told)) == pytest.approx(sum(tale.nll for tale in told))


def test_trace_places_every_choice(thousand: list[tales.Tale]):
    for tale in thousand[:50]:
        offsets, nats = zip(*tales.trace(tale.text))
        assert math.fsum(nats) == tale.nll
        assert list(offsets) == sorted(set(offsets))
        assert offsets[0] >= 0
        assert offsets[-1] < len(tale.text.rstrip())


def test_small_grammar_sums_to_one_and_is_sampled_as_it_says():
    grammar = Grammar(SMALL)
    counts = Counter(tale.text for tale in grammar.generate(3, 12_000))
    # By hand: 3 names; for the dog 2 · (3 + 1) + 3 · 2 + 4 · 2 ways on, for the cat 2 · (1 + 1) + 1 · 2 + 4 · 2.
    assert len(counts) == 3 * (22 + 14)
    probabilities = {text: math.exp(-grammar.nll(text)) for text in counts}
    assert math.fsum(probabilities.values()) == pytest.approx(1, abs=1e-12)
    by_hand = "Once Tom a cat met. Cat and Tom saw Mia. So Mia Meowed.\n\n"
    assert probabilities[by_hand] == pytest.approx(1 / 3 * 1 / 2 * 3 / 5 * 1 / 2 * 1 / 3)
    assert chi_square_z(counts, probabilities) < 4


def test_openings_and_names_are_as_likely_as_the_grammar_says():
    told = [tale.text for tale in tales.generate(11, 3000)]
    source = Path(tales.__file__).with_name("tales.grammar").read_text(encoding="utf-8")
    lines = source.split("rule opening\n")[1].split("\n\n")[0].splitlines()
    patterns = [".+?".join(map(re.escape, re.split(r"\{.*?\}", line.strip()))) for line in lines]
    openings = Counter(next(i for i, p in enumerate(patterns) if re.match(p, text)) for text in told)
    assert chi_square_z(openings, {i: 1 / len(lines) for i in range(len(lines))}) < 4

    names = [word.text for word in tales.grammar().pools["name"]]
    heroes = Counter(re.findall(rf"\b(?:{'|'.join(names)})\b", text)[0] for text in told)
    assert chi_square_z(heroes, {name: 1 / len(names) for name in names}) < 4


def chi_square_z(counts: Counter, probabilities: dict) -> float:
    """By how many deviations the chi-square statistic exceeds its mean; infinite if the impossible came."""
    if counts.keys() - probabilities.keys():
        return math.inf
    n = counts.total()
    terms = [(counts[key] - n * p) ** 2 / (n * p) for key, p in probabilities.items()]
    freedom = len(terms) - 1
    return (sum(terms) - freedom) / math.sqrt(2 * freedom)


# ── one derivation ───────────────────────────────────────────────────────────────────────────────────


def test_alternatives_are_prefix_free():
    assert list(ambiguities(tales.grammar())) == []


@pytest.mark.parametrize(
    "grammar",
    [
        "pool a: cat, caterpillar\nrule tale\n  The {=a}.",
        "pool a: Ben, Tom\nrule tale\n  {x=a} <next>\nrule next\n  {x} ran.\n  Ben ran.",
        "pool a: Ben\npool b: dog, cow\nrule tale\n  {x=a} <next>\nrule next\n  He saw {=b}.\n  He saw a {=b}.",
        "pool a: Ben, Tom\nrule tale\n  {x=a} met {y=a}. <next>\nrule next\n  {x} ran.\n  {y} ran.",
        "pool a: Ben, Tom\nrule tale\n  {x=a}<next>\nrule next\n  .\n  . Then {x} ran.",
    ],
)
def test_ambiguous_grammars_are_found_out(grammar: str):
    assert list(ambiguities(Grammar(grammar)))


def ambiguities(grammar: Grammar) -> Iterator[str]:
    """Every choice whose alternatives are not prefix-free.

    Alternatives are compared symbolically, up to their next choice, over all words that a variable can ever
    stand for: a proof for every state that a tale can be in.
    """
    steps = [step for r in grammar.rules.values() for a in r.alternatives for step in a.steps]
    picks = [step for step in steps if isinstance(step, Pick)]
    domains: dict[str, dict[str, Word]] = {}
    for pick in picks:
        pools = [p for p in grammar.pools if p.startswith(pick.pool)] if pick.key else [pick.pool]
        for pool in pools:
            domains.setdefault(pick.variable, {}).update({w.text: w for w in grammar.pools[pool]})
            for a, b in combinations([pick.dress(w.text) for w in grammar.pools[pool]], 2):
                if a.startswith(b) or b.startswith(a):
                    yield f"pool {pool}: {a!r} and {b!r}"
    for note in (step for step in steps if isinstance(step, Note)):
        domains.setdefault(note.variable, {}).update(domains[note.source])
    # Pairs of variables that never hold the same word, because every choice of the one excludes the other.
    distinct = {(p.variable, p.other) for p in picks if p.variable and p.other}
    distinct = {(v, o) for v, o in distinct if all(p.other == o for p in picks if p.variable == v)}

    def clash(a: list, b: list, known: dict[str, Word]) -> bool:
        """Whether one of two texts of literals and variables can be the beginning of the other."""
        a, b = list(a), list(b)
        while a and b:
            x, y = a[0], b[0]
            if isinstance(x, str) and isinstance(y, str):
                n = min(len(x), len(y))
                if x[:n] != y[:n]:
                    return False
                a[:1], b[:1] = [x[n:]] * (len(x) > n), [y[n:]] * (len(y) > n)
            elif x == y:
                del a[0], b[0]
            else:
                side, step = (b, y) if isinstance(x, str) else (a, x)
                variables = [step.variable] if isinstance(step, Say) else [step.left, step.right]
                if free := [v for v in variables if v not in known]:
                    trials = [{**known, free[0]: word} for word in domains[free[0]].values()]
                    held = [t for t in trials if not any(u in t and t[u] == t.get(v) for u, v in distinct)]
                    return any(clash(a, b, trial) for trial in held)
                side[0] = step.render(known)
        return True

    for name, rule in grammar.rules.items():
        for a, b in combinations(rule.alternatives, 2):
            exclusive = a.guard != b.guard and a.guard.lstrip("!") == b.guard.lstrip("!")
            if not exclusive and clash(fixed(a.steps), fixed(b.steps), {}):
                yield f"rule {name}: {a.source!r} and {b.source!r}"


def fixed(steps: list) -> list[str | Say | Sum]:
    """The steps up to the next choice."""
    end = next((i for i, step in enumerate(steps) if isinstance(step, Pick | Call)), len(steps))
    said = [step for step in steps[:end] if not isinstance(step, Note)]
    return [step._replace(asked=False) if isinstance(step, Say) else step for step in said]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Once upon a midnight dreary",
            r"at character 0 expected 'Once upon a time there was ', .* 15 others",
        ),
        ("The quick brown fox", r"at character 0 expected 'Once upon a time there was ', .*found 'The quick"),
    ],
)
def test_other_texts_are_refused(text: str, message: str):
    with pytest.raises(NotATale, match=message):
        tales.nll(text)


def test_every_damage_is_noticed(thousand: list[tales.Tale]):
    text = thousand[0].text
    for cut in range(1, len(text), 7):
        with pytest.raises(NotATale):
            tales.nll(text[:cut])
        with pytest.raises(NotATale):
            tales.nll(text[:cut] + "#" + text[cut + 1 :])


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("rule tale\n  {a b c}", r"line 2.*\{a b c\}"),
        ("rule tale\nHello", "line 2.*'Hello'"),
        ("pool x", "line 1"),
    ],
)
def test_a_malformed_grammar_names_its_line(grammar: str, message: str):
    with pytest.raises(ValueError, match=message):
        Grammar(grammar)


# ── what the tales promise ───────────────────────────────────────────────────────────────────────────


def test_tales_are_deterministic_and_seeds_differ():
    assert tales.generate(5, 3) == tales.generate(5, 9)[:3]
    assert len({tale.text for seed in range(20) for tale in tales.generate(seed, 20)}) == 400
    # Neither Python's version nor an edit may change the held-out texts, which the model's figures are about.
    text = "".join(tale.text for tale in tales.generate(0, 100))
    digest = sha256(text.encode()).hexdigest()
    assert digest == "c3f4a7a7cf16c332401ce4d0bed04f48e40eae3e7f5aebdfea64c48019b95e28"


def test_tales_are_varied(thousand: list[tales.Tale]):
    sources = [a.source for rule in tales.grammar().rules.values() for a in rule.alternatives]
    assert sum(bool(re.search(r"[a-z{}][.!?]", source)) for source in sources) >= 300
    assert len({word for tale in thousand for word in re.findall(r"[a-z]+", tale.text.lower())}) >= 1000
    assert all(tale.text.endswith("\n\n") and "\n" not in tale.text[:-2] for tale in thousand)


def test_tales_are_short_and_their_entropy_is_in_range():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    told = tales.generate(tales.TRAINING, 1000)
    lengths = [len(tokenizer.encode(tale.text).ids) for tale in told]
    # A blank line is one token more in running text than at the end of it.
    assert max(lengths) + 1 <= 220
    assert 0.8 < sum(tale.nll for tale in told) / sum(lengths) < 1.6


def test_sums_come_out_right(thousand: list[tales.Tale]):
    text = " ".join(tale.text.lower() for tale in thousand)
    value = {name: i for i, name in enumerate(tales.NUMBERS)}
    sums = re.findall(r"(\w+)(?: \w+)? and (\w+)(?: \w+)? make (\w+)", text)
    differences = re.findall(r"(\w+) take away (\w+) (?:leaves|is) (\w+)", text)
    assert len(sums) > 30
    assert len(differences) > 10
    assert all(value[a] + value[b] == value[c] for a, b, c in sums)
    assert all(value[a] - value[b] == value[c] for a, b, c in differences)


def test_pronouns_agree_with_the_name(thousand: list[tales.Tale]):
    gender = {word.text: word.attributes["he"] for word in tales.grammar().pools["name"]}
    second = rf"^[^.?]*?\b({'|'.join(gender)})\b[^.?]*[.?] (He|She) "
    found = [match for tale in thousand if (match := re.search(second, tale.text))]
    assert len(found) > 100
    assert all(gender[match[1]] == match[2].lower() for match in found)


def test_probes_have_one_right_answer():
    told = [tale.text for tale in tales.generate(2, 400)]
    probes = tales.probes(2, 60)
    assert {probe.kind for probe in probes} == {"sum", "name"}
    for probe in probes:
        assert probe.answer not in probe.alternatives
        right = probe.prompt + probe.answer
        [tale] = [text for text in told if text.startswith(right)]
        for wrong in probe.alternatives:
            with pytest.raises(NotATale):
                tales.nll(probe.prompt + wrong + tale.removeprefix(right))


def test_training_never_sees_the_held_out_seeds():
    assert tales.HELD_OUT < tales.TRAINING
    held_out = {tale.text for seed in range(10) for tale in tales.generate(seed, 10)}
    trained = {tale.text for step in range(50) for tale in tales.generate(tales.TRAINING + step, 20)}
    assert not held_out & trained
