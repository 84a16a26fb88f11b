"""Which lines of the readers are reached, by coverage.py."""

import ast
import json
import random
from collections.abc import Iterator
from pathlib import Path

from . import guided
from .mutation import Input, Mutator

MIN_PERCENT = 95

READERS = {
    "io.bitsandbytes": "config to_parts",
    "io.bpe": "",
    "io.chat": "",
    "io.checkpoints": "",
    "io.cursor": "",
    "io.fp8": "",
    "io.ggml_legacy": "",
    "io.gguf": "write size_bytes _pack_header _pack_tensor_header _format_of pieces _pad _refuse_mapped",
    "io.gguf_metadata": "",
    "io.gptq": "",
    "io.imatrix": "write write_legacy _sorted_entries _write_name",
    "io.logits": "encode decode writer",
    "io.lora": "",
    "io.metadata_edit": "",
    "io.model_card": "",
    "io.names": "to_hf deinterleave",
    "io.prequantized": "",
    "io.probes": "",
    "io.raw_tensor": "",
    "io.sandbox": "",
    "io.sentencepiece": "write merges_of _tag _number _bytes _packed",
    "io.splits": "_write_all",
    "io.summary": "layer_groups",
    "io.tokenizer": "to_folder",
    "io.tokenizer_json": "dump_json",
    "io.vocabulary": "",
    "methods.recipes": "_more_bits holds rules is_mixture",
    "models.architectures": "",
    "models.config": "to_hf",
    "models.config_json": "write _rope_scaling",
    "models.rope_scaling": "scale factors",
}
"""Modules, and which of their functions no reader calls: they write, or compute with what was read."""


def report(executions: int, folder: Path, summary: Path | None) -> int:
    """Runs the seeds, the kept cases, the corpus in ``folder``, and random inputs of each target; prints the share of
    lines that were reached, of each module, and writes it to the summary.  1 if all have less than `MIN_PERCENT`."""
    import coverage

    paths = {name: guided.ROOT / "qjax" / f"{name.replace('.', '/')}.py" for name in READERS}
    measured = coverage.Coverage(include=[str(path) for path in paths.values()], data_file=None)
    measured.start()
    from . import running, targets  # which import the readers

    for name, target in targets.TARGETS.items():
        with running.runner(target) as run:
            for given in _inputs(name, target, folder, executions):
                run(given)
    measured.stop()

    percents, n_lines, n_reached = {}, 0, 0
    print(f"{'module':20} {'lines':>5} {'reached':>7} {'%':>6}  not reached")
    for name, path in paths.items():
        _, statements, _, missing, _ = measured.analysis2(str(path))
        lines = set(statements) - lines_of(path, READERS[name].split())
        missed = sorted(lines & set(missing))
        percents[name] = round(100 * (1 - len(missed) / len(lines)), 1)
        n_lines, n_reached = n_lines + len(lines), n_reached + len(lines) - len(missed)
        shown = " ".join(map(str, missed))
        print(f"{name:20} {len(lines):5} {len(lines) - len(missed):7} {percents[name]:6.1f}  {shown}")
    print(f"{'all':20} {n_lines:5} {n_reached:7} {100 * n_reached / n_lines:6.1f}")
    if summary is not None:
        record = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
        record["line_coverage"] = {"all": round(100 * n_reached / n_lines, 1)} | percents
        summary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(100 * n_reached < MIN_PERCENT * n_lines)


def _inputs(name: str, target, folder: Path, executions: int) -> Iterator[Input]:
    from .cases import CASES
    from .targets import words

    yield from (Input(tree, []) for tree in target.seeds)
    yield from (case.input for case in CASES.values() if case.target == name)
    for path in sorted((folder / name / "corpus").glob("*")):
        # A run that goes on meanwhile replaces inputs by shorter ones.
        given = guided.decode(path.read_bytes()) if path.exists() else None
        if given is not None:
            yield given
    mutate, chance = Mutator(target.seeds, words(target.modules)), random.Random(0)
    for _ in range(executions):
        given = Input(chance.choice(target.seeds), [])
        for _ in range(chance.randrange(1, 6)):
            given = mutate(given, chance)
        yield given


def lines_of(path: Path, functions: list[str]) -> set[int]:
    """The lines of the functions of these names."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name in functions]
    assert {node.name for node in found} == set(functions), path
    return {line for node in found for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
