"""A trial: one model, quantized as somebody wishes, beside itself as it was.  Settings in, record out, page of it."""

import html
import itertools
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import ticker

from qjax import evaluate, formats
from qjax.io import imatrix
from qjax.io.imatrix import Imatrix
from qjax.methods import importance, recipes
from qjax.methods import plan as planning
from qjax.methods.plan import Plan
from qjax.metrics import KLDivergence, TokenDivergence, token_divergence
from qjax.model import Generation, Model, load
from qjax.progress import progress
from qjax.table import Table
from qjax.tensor import describe_size
from qjax.viz.figure import Figure, canvas, styled
from qjax.viz.html import Html

BY_GROUP = "by group"
"""Instead of a file type: each group of `GROUPS` has its own format."""

BY_BUDGET = "by budget"
"""Instead of a file type: the largest that fits into so many bits per weight, see `qjax.methods.plan.within`."""

GROUPS = {"attention": r"attn_", "mlp": r"ffn_", "embedding": r"^(token_embd|output)\.weight$"}
"""The matrices of a model by expressions on their names; the head belongs to the embedding, and mostly is the same."""

STAGES = ("loading", "float model writes", "quantizing", "comparing predictions", "quantized model writes")

TRIAL = "trial"
"""What `qjax.progress` calls the loop over `STAGES`."""

_N_CTX = 512
# Colour and marker of the errors of unpaired runs, of ΔPPL, of what is known best.
_LINES = (("#D55E00", "s"), ("#222222", "x"), ("#0072B2", "o"))


@dataclass(frozen=True)
class Settings:
    """What to try.

    model: as `qjax.load` takes it.  recipe: a file type of llama-quantize, or "by group": then attention, mlp and
    embedding name the formats of these matrices, or "by budget": then budget is how many bits per weight the largest
    file type to be tried may take.  imatrix: a file, or "" for none.
    text: a UTF-8 file to measure on, or "" for held-out tales; its first ``windows`` windows of 512 tokens are read.
    prompt: what both models continue, with the likeliest token each time.
    """

    model: str = "tiny"
    recipe: str = BY_GROUP
    attention: str = "Q4_0"
    mlp: str = "Q4_0"
    embedding: str = "Q8_0"
    budget: float = 5.0
    imatrix: str = ""
    text: str = ""
    windows: int = 16
    prompt: str = "Once upon a time there was a little"
    max_tokens: int = 64

    def plan(self, base: Model, matrix: Imatrix | None = None) -> Plan:
        """What is to become of ``base``.  Raises QjaxError for a budget that is too small, and what `plan` refuses."""
        described = {key: value for key, (_, value) in base.config.to_gguf().items()}
        weighed = importance.select(matrix)
        if self.recipe == BY_BUDGET:
            return planning.within(self.budget, base.tensors, described, weighed)
        groups = {pattern: getattr(self, group) for group, pattern in GROUPS.items()}
        recipe = recipes.recipe(groups if self.recipe == BY_GROUP else self.recipe)
        return planning.plan(base.tensors, recipe, described, weighed)

    def __str__(self) -> str:
        chosen = self.recipe
        if chosen == BY_GROUP:
            chosen = f"attention in {self.attention}, MLP in {self.mlp}, embedding and head in {self.embedding}"
        if chosen == BY_BUDGET:
            chosen = f"at most {self.budget:g} bits per weight"
        return f"{self.model}, {chosen}"


def format_names() -> tuple[str, ...]:
    """Formats to offer for a group: those that need no importance, largest first."""
    weights = [f for f in map(formats.get, formats.names()) if f.for_weights and not f.needs_importance]
    return tuple(f.name for f in sorted(weights, key=lambda f: -f.bpw))


@dataclass(frozen=True)
class Side:
    """One of the two models of a trial.

    size_bytes, bpw: of all its tensors.  tokens_per_s: while writing, compilation excluded; None if it wrote too
    little to tell.
    """

    size_bytes: int
    bpw: float
    generation: Generation
    tokens_per_s: float | None


@dataclass(frozen=True)
class Trial:
    """What a trial found.

    plan: which tensor got which format.  base: the model as loaded.  tokens: what is known of each scored token, of
    which `divergence` is the summary.
    """

    settings: Settings
    plan: Plan
    base: Side
    quantized: Side
    tokens: TokenDivergence
    n_ctx: int

    @property
    def is_float(self) -> bool:
        """Whether the model was not quantized before."""
        return all(step.source.family == "plain" for step in self.plan.steps)

    @property
    def notes(self) -> tuple[str, ...]:
        """What else there is to know, a sentence each."""
        plan, notes = self.plan, []
        if self.settings.recipe == BY_BUDGET:
            notes.append(
                f"{plan.recipe.name} is the largest file type within {self.settings.budget:g} bits per weight: it "
                f"takes {plan.bpw:.3f}"
            )
        if not self.is_float:
            notes.append(f"{self.settings.model} was quantized before: what is lost now adds to what it had lost")
        if n := len(plan.fallbacks):
            notes.append(
                f"{n} of {len(plan.steps)} tensors have rows that do not divide into blocks of their format and get "
                f"another; the first is {plan.fallbacks[0].name}, in {plan.fallbacks[0].format.name}"
            )
        return tuple(notes)

    @property
    def divergence(self) -> KLDivergence:
        return self.after(len(self.tokens.kld))

    def after(self, windows: int) -> KLDivergence:
        """What was known after so many windows."""
        return KLDivergence.of(TokenDivergence(*(values[:windows] for values in self.tokens)), self.n_ctx)


def try_out(settings: Settings) -> Trial:
    """Loads, quantizes, compares and lets write, in the order of `STAGES`; `qjax.progress.observed` sees each step.

    Raises QjaxError for settings that do not fit together or a model that cannot be had.
    """
    stages = iter(progress(STAGES, desc=TRIAL, unit="step"))
    next(stages)
    base = load(settings.model)
    matrix = imatrix.read(Path(settings.imatrix).expanduser()) if settings.imatrix else None
    plan = settings.plan(base, matrix)
    plan.check(allow_requantize=True)
    text = evaluate.read_text(Path(settings.text).expanduser()) if settings.text else evaluate.held_out_tales()
    n_ctx = min(_N_CTX, base.config.n_ctx)
    windows = evaluate.cut(base, text, n_ctx, settings.windows)

    was = _write(base, settings, next(stages))
    next(stages)
    model = base.quantize(plan.recipe, imatrix=matrix, allow_requantize=True)
    # One window at a time, for a stop to take effect soon.
    parts = token_divergence(evaluate.logits_of(base), evaluate.logits_of(model), windows, 1)
    parts = list(progress(parts, desc=next(stages), total=len(windows), unit="window"))
    now = _write(model, settings, next(stages))
    next(stages, None)
    return Trial(settings, plan, was, now, TokenDivergence.concatenate(parts), n_ctx)


def _write(model: Model, settings: Settings, stage: str) -> Side:
    """The model's continuation of the prompt, as `Model.generate` makes it."""
    pieces, tokens, finish_reason, times = [], [], "length", []
    stream = model.stream(settings.prompt, max_tokens=settings.max_tokens)
    made = progress(
        stream, desc=stage, total=settings.max_tokens, unit="token", size=lambda piece: len(piece[1].tokens)
    )
    for text, chunk in made:
        pieces.append(text)
        tokens += chunk.tokens
        finish_reason = chunk.finish_reason or finish_reason
        times.append((time.perf_counter(), len(tokens)))
    # The first two chunks compile what the others run.
    (start, before), (end, after) = times[min(1, len(times) - 1)], times[-1]
    speed = (after - before) / (end - start) if after > before else None
    generation = Generation(settings.prompt, "".join(pieces), tuple(tokens), finish_reason)
    return Side(model.nbytes, model.bpw, generation, speed)


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────


_STYLE = "<style>.qjax-trial {line-height: 1.5; max-width: 60em} .qjax-trial :is(th, td) {padding: 2px 10px}</style>"
_CELL = "text-align: left; vertical-align: top; width: 50%"


def trial_page(trial: Trial) -> Html:
    """Sizes, measures, speeds and texts side by side."""
    k, was, now = trial.divergence, trial.base, trial.quantized
    first = "float model" if trial.is_float else "as loaded"
    sizes = [describe_size(side.size_bytes) for side in (was, now)]
    speeds = [f"{side.tokens_per_s:.0f}" if side.tokens_per_s else "–" for side in (was, now)]
    rows = [
        ("size", *sizes, f"{now.size_bytes / was.size_bytes:.0%}"),
        ("bits per weight", f"{was.bpw:.2f}", f"{now.bpw:.2f}", f"{now.bpw - was.bpw:+.2f}"),
        (
            "perplexity (PPL)",
            with_error(k.ppl_base, k.ppl_base_stderr),
            with_error(k.ppl, k.ppl_stderr),
            with_error(k.delta_ppl, k.delta_ppl_stderr, "+"),
        ),
        ("KL divergence, nats per token", "", "", with_error(k.mean, k.stderr)),
        ("same likeliest token, %", "", "", with_error(k.same_top, k.same_top_stderr)),
        ("tokens per second", *speeds, _ratio(now.tokens_per_s, was.tokens_per_s)),
    ]
    text = Path(trial.settings.text).name or "held-out tales"
    caption = f"{trial.settings}: {k.n_tokens:,} tokens scored in {k.chunks} windows of {k.n_ctx}, {text}"
    columns = {"": "<", first: ">", "quantized": ">", "difference": ">"}
    table = Table(columns, rows)._repr_html_()
    notes = "".join(f"<p>{html.escape(note)}.</p>" for note in trial.notes)
    alt = (
        f"{trial.settings}: {sizes[1]}, {now.bpw:.2f} bits per weight, "
        f"KLD {with_error(k.mean, k.stderr)}, PPL {with_error(k.ppl, k.ppl_stderr)} after "
        f"{with_error(k.ppl_base, k.ppl_base_stderr)}"
    )
    # Generated text may hold dollar signs, which are not meant as formulas.
    return Html(
        f'{_STYLE}<div class="qjax-trial tex2jax_ignore mathjax_ignore">'
        f"<p><b>{html.escape(caption)}</b></p>{table}{_texts(trial, first)}{notes}</div>",
        alt,
    )


def _texts(trial: Trial, first: str) -> str:
    """Both continuations, the first word in which they differ underlined."""
    texts = [side.generation.text for side in (trial.base, trial.quantized)]
    same = _same_words(*texts)
    cells = ""
    for text in texts:
        before, word, after = re.fullmatch(r"(\s*)(\S*)(.*)", text[same:], re.DOTALL).groups()  # pyright: ignore
        prompt, before, word, after = map(html.escape, (trial.settings.prompt, text[:same] + before, word, after))
        marked = f"<u><b>{word}</b></u>" if word else ""
        cells += f'<td style="{_CELL}; white-space: pre-wrap"><i>{prompt}</i>{before}{marked}{after}</td>'
    verdict = "Both write the same." if texts[0] == texts[1] else "Underlined: the first word that differs."
    heads = "".join(f'<th style="{_CELL}">{name} writes</th>' for name in (first, "quantized model"))
    return f"<table><thead><tr>{heads}</tr></thead><tbody><tr>{cells}</tr></tbody></table><p>{verdict}</p>"


def _same_words(a: str, b: str) -> int:
    """How many characters at the beginning of both are the same words, each with the space that follows it."""
    words = [re.split(r"(?<=\s)(?=\S)", text) for text in (a, b)]
    return sum(len(x) for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*words)))


def with_error(value: float, error: float, sign: str = "") -> str:
    """``value`` ± ``error``, to the second digit of the error."""
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return f"{value:{sign}.3g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"


def _ratio(a: float | None, b: float | None) -> str:
    return f"× {a / b:.2f}" if a and b else ""


@styled
def plot_certainty(trial: Trial, windows: int) -> Figure:
    """What is known after so many windows: left ΔPPL and its standard error, right KLD ± one standard error.

    Beside the paired error of ΔPPL stands what it would be if the two models had read different texts.
    """
    known = [trial.after(n) for n in range(1, len(trial.tokens.kld) + 1)]
    k, x = known[windows - 1], np.arange(1, len(known) + 1)
    figure = canvas(8.6, 3.8, left=0.85)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(wspace=0.32)

    unpaired = [math.hypot(r.ppl_stderr, r.ppl_base_stderr) for r in known]
    delta, paired = [abs(r.delta_ppl) for r in known], [r.delta_ppl_stderr for r in known]
    shown = {"error, different texts": unpaired, "|ΔPPL|": delta, "error, same text (paired)": paired}
    for (label, y), (colour, marker) in zip(shown.items(), _LINES):
        left.plot(x[:windows], y[:windows], color=colour, marker=marker, markersize=5, linestyle="-", label=label)
    everything = [value for y in shown.values() for value in y if value > 0]
    left.set(yscale="log", ylim=(min(everything) / 2, max(everything) * 12), ylabel="change of PPL")
    left.legend(loc="upper right")

    kld, error = np.array([(r.mean, r.stderr) for r in known]).T
    low, high = kld - error, kld + error
    right.fill_between(x[:windows], low[:windows], high[:windows], color=_LINES[2][0], alpha=0.3, linewidth=0)
    right.plot(x[:windows], kld[:windows], color=_LINES[2][0], marker=_LINES[2][1], markersize=5)
    right.set(ylim=(0, 1.25 * np.max(high)), ylabel="KLD ± standard error, nats per token")

    for ax in (left, right):
        ax.set(xlabel=f"windows of {trial.n_ctx} tokens read", xlim=(0.5, len(known) + 0.5))
        ax.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
    left.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    left.yaxis.set_minor_locator(ticker.NullLocator())
    left.set_title(f"ΔPPL {with_error(k.delta_ppl, k.delta_ppl_stderr, '+')}")
    right.set_title(f"KLD {with_error(k.mean, k.stderr)}")
    figure.alt = (
        f"after {windows} windows: ΔPPL {with_error(k.delta_ppl, k.delta_ppl_stderr, '+')} by the paired error, "
        f"± {unpaired[windows - 1]:.2g} without pairing; KLD {with_error(k.mean, k.stderr)}"
    )
    return figure
