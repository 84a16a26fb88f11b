"""How fast a model runs here: the tests of llama-bench, on the programs that `qjax generate` runs.

Which tests there are, what is timed, and the names of the figures: llama.cpp tools/llama-bench/llama-bench.cpp.
"""

import csv
import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError
from qjax.machine import cpu_info, elapsed_ns, gpu_info, memory_status, n_threads
from qjax.methods import recipes
from qjax.model import Model, load
from qjax.models import generate
from qjax.models.generate import GREEDY, MAX_CHUNK, State
from qjax.models.parts import empty_cache
from qjax.progress import progress
from qjax.source import Source, open_source
from qjax.table import Table

_NO_STOP = np.empty(0, np.int32)


@dataclass(frozen=True)
class Test:
    """One row: n_prompt tokens read at once, then n_gen made one by one, with n_depth tokens in the cache before.

    samples_ns: of each repetition, for all n_prompt + n_gen tokens.
    compile_ns: what the first call took beyond the fastest later one; from the cache on disk where it knows them.
    test_time: when it began, UTC.
    """

    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    samples_ns: tuple[int, ...]
    compile_ns: int

    @property
    def label(self) -> str:
        """As llama-bench calls it: pp512, tg128, pp512+tg128 @ d1024."""
        parts = [f"pp{self.n_prompt}"] * (self.n_prompt > 0) + [f"tg{self.n_gen}"] * (self.n_gen > 0)
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def samples_ts(self) -> tuple[float, ...]:
        """Tokens per second of each repetition."""
        return tuple((self.n_prompt + self.n_gen) * 1e9 / ns for ns in self.samples_ns)

    @property
    def avg_ns(self) -> int:
        return int(np.mean(self.samples_ns))

    @property
    def stddev_ns(self) -> int:
        return int(_deviation(self.samples_ns))

    @property
    def avg_ts(self) -> float:
        return float(np.mean(self.samples_ts))

    @property
    def stddev_ts(self) -> float:
        return _deviation(self.samples_ts)


def _deviation(samples: Sequence[float]) -> float:
    """Of the sample (n - 1), 0 for a single one, as llama-bench has it."""
    return float(np.std(samples, ddof=1)) if len(samples) > 1 else 0.0


@dataclass(frozen=True)
class Bench:
    """What `bench` measured.

    model_type: architecture, weights, file type.  model_size: bytes of all tensors in the file.
    backends: the platform of the device, as JAX calls it.  n_threads: cores that the process may use.
    load_ns: from a name to a Model.  peak_rss, anonymous_rss: bytes of the process, at most, and in the end without
    the pages of mapped files; None where the system (not Linux) does not tell.
    """

    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    backends: str
    cpu_info: str
    gpu_info: str
    n_threads: int
    type_k: str
    type_v: str
    tests: tuple[Test, ...]
    load_ns: int
    peak_rss: int | None
    anonymous_rss: int | None

    @property
    def first_token_ns(self) -> int | None:
        """From a prompt to the first token behind it, on average in the first test of prompts: reading one ends with
        the choice of a token.  None without such a test."""
        return next((test.avg_ns for test in self.tests if not test.n_gen), None)

    def to_json(self) -> list[dict[str, Any]]:
        """An object for each test under llama-bench's names, and under our own what it does not measure."""
        whole = {name: value for name, value in vars(self).items() if name != "tests"}
        whole["first_token_ns"] = self.first_token_ns
        return [
            {**whole, **vars(test)}
            | {"avg_ns": test.avg_ns, "stddev_ns": test.stddev_ns, "avg_ts": test.avg_ts, "stddev_ts": test.stddev_ts}
            | {"samples_ns": list(test.samples_ns), "samples_ts": list(test.samples_ts)}
            for test in self.tests
        ]

    def csv(self) -> str:
        """`to_json` without the samples, as llama-bench writes it: everything in quotes but the names."""
        rows = [{k: v for k, v in row.items() if not k.startswith("samples_")} for row in self.to_json()]
        text = io.StringIO()
        text.write(",".join(rows[0]) + "\n")
        csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(row.values() for row in rows)
        return text.getvalue().rstrip("\n")

    def __str__(self) -> str:
        """llama-bench's table in Markdown, and below it what llama-bench does not measure."""
        size, n = self.model_size / 2**20, self.model_n_params
        model = (
            self.model_type,
            f"{size:.2f} MiB" if size < 1024 else f"{size / 1024:.2f} GiB",
            f"{n / 1e6:.2f} M" if n < 1e9 else f"{n / 1e9:.2f} B",
            self.backends,
            str(self.n_threads),
        )
        sides = dict(model="<", size=">", params=">", backend="<", threads=">", test=">") | {"t/s": ">"}
        rows = [(*model, test.label, f"{test.avg_ts:.2f} ± {test.stddev_ts:.2f}") for test in self.tests]
        return f"{Table(sides, rows).markdown(aligned=True)}\n\n{self._below()}"

    def _below(self) -> str:
        parts = [f"load {self.load_ns / 1e9:.2f} s"]
        if self.first_token_ns is not None:
            parts.append(f"first token {self.first_token_ns / 1e9:.3f} s")
        parts.append(f"compilation {sum(test.compile_ns for test in self.tests) / 1e9:.1f} s")
        if self.peak_rss is not None and self.anonymous_rss is not None:
            parts.append(f"memory {self.peak_rss / 2**20:.0f} MiB at most, {self.anonymous_rss / 2**20:.0f} anonymous")
        return " · ".join(parts)


def bench(
    name: str | os.PathLike[str],
    *,
    n_prompt: Sequence[int] = (512,),
    n_gen: Sequence[int] = (128,),
    n_pg: Sequence[tuple[int, int]] = (),
    n_depth: Sequence[int] = (0,),
    repetitions: int = 5,
    cache_k: str = "f16",
    cache_v: str = "f16",
) -> Bench:
    """Loads a model and times, behind each of ``n_depth`` tokens: reading ``n_prompt`` tokens, making ``n_gen``, and
    reading and making as many as ``n_pg`` says.  Zeros are left out.

    The tokens are random; those made are the likeliest, and not turned into text.
    Raises QjaxError as `load` does, for negative numbers, and if there is nothing to measure.
    """
    both = [(p, 0) for p in n_prompt] + [(0, n) for n in n_gen] + list(n_pg)
    plan = [(p, n, depth) for depth in n_depth for p, n in both if p or n]
    if not plan or repetitions < 1:
        raise QjaxError("bench: nothing to measure; give n_prompt or n_gen, and at least one repetition")
    if smallest := min(0, *(number for test in plan for number in test)):
        raise QjaxError(f"bench: a number of tokens is {smallest}, expected 0 or more")
    source, start = open_source(name), time.perf_counter_ns()
    model = load(name, cache_k=cache_k, cache_v=cache_v, only_generate=True)
    jax.block_until_ready(model.params)
    load_ns = time.perf_counter_ns() - start

    rows = progress(plan, desc=f"timing {model.name}", unit="test")
    tests = tuple(_test(model, *row, repetitions) for row in rows)
    memory = memory_status()
    n_params = sum(int(np.prod(tensor.shape)) for tensor in source.tensors.values())
    return Bench(
        model_filename=os.fspath(name),
        model_type=_model_type(source, n_params),
        model_size=sum(tensor.format.nbytes(tensor.shape) for tensor in source.tensors.values()),
        model_n_params=n_params,
        backends=jax.devices()[0].platform.upper(),
        cpu_info=cpu_info(),
        gpu_info=gpu_info(),
        n_threads=n_threads(),
        type_k=cache_k,
        type_v=cache_v,
        tests=tests,
        load_ns=load_ns,
        peak_rss=memory.get("VmHWM"),
        anonymous_rss=memory.get("RssAnon"),
    )


def _test(model: Model, n_prompt: int, n_gen: int, n_depth: int, repetitions: int) -> Test:
    config, params = model.config, model.params
    before, prompt = (np.random.default_rng(0).integers(config.vocab, size=n) for n in (n_depth, n_prompt))
    test_time = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def read(state: State, tokens: np.ndarray) -> State:
        return generate.read(config, params, tokens, state.cache, state.key, GREEDY, _NO_STOP, dtype=model.dtype)

    def filled() -> State:
        cache = empty_cache(config, params, 1, generate.cache_room(n_prompt, n_gen, n_depth), model.cache_types("f16"))
        state = State(cache, jnp.zeros(1, jnp.int32), jnp.zeros(1, bool), jax.random.key(0))
        return read(state, before) if n_depth else state

    def timed(state: State) -> State:
        state = read(state, prompt) if n_prompt else state
        for done in range(0, n_gen, MAX_CHUNK):
            n = min(MAX_CHUNK, n_gen - done)
            out, _, state = generate.decode(config, model.one_row, state, n, GREEDY, _NO_STOP, dtype=model.dtype)
            # Who streams the text looks at each chunk.
            jax.block_until_ready(out)
        return state

    first_ns = elapsed_ns(lambda: timed(filled()))[0]
    fill_ns, state = elapsed_ns(filled)
    # The programs take the memory of what they are given, so each repetition gets a copy.
    copies = (jax.block_until_ready(jax.tree.map(jnp.copy, state)) for _ in range(repetitions))
    samples_ns = tuple(elapsed_ns(lambda copy=copy: timed(copy))[0] for copy in copies)
    compile_ns = max(first_ns - fill_ns - min(samples_ns), 0)
    return Test(n_prompt, n_gen, n_depth, test_time, samples_ns, compile_ns)


def _model_type(source: Source, n_params: int) -> str:
    names = {str(row.id): name for name, row in recipes.FILE_TYPES.items()}
    file_type = names.get(str(source.metadata.get("general.file_type")), "of no file type")
    size = f"{n_params / 1e6:.0f}M" if n_params < 999.5e6 else f"{n_params / 1e9:.1f}B"
    return f"{source.config.architecture} {size} {file_type}"
