"""The command line: a thin door over the same functions.

Data go to stdout, progress and messages to stderr.  Bad input ends with one line and exit code 2.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qjax.errors import QjaxError

app = typer.Typer(
    name="qjax",
    help="Learn, measure and do weight quantization of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="GGUF file, safetensors folder, Hub id (org/repo[:Q4_0]), or 'tiny'")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
CtxSize = Annotated[int, typer.Option("-c", "--ctx-size", "--n-ctx", help="tokens in a window", min=8)]
Chunks = Annotated[int | None, typer.Option("--chunks", help="windows to evaluate [default: all]", min=1)]
TextFile = Annotated[Path | None, typer.Option("-f", "--file", "--text", help="UTF-8 text to measure on")]
Precision = Annotated[str, typer.Option(help="float32, bfloat16, or auto: the fastest within 0.2 % of float32's PPL")]
CacheK = Annotated[str, typer.Option("-ctk", "--cache-type-k", help="how keys are kept: f32, f16 or bf16")]
CacheV = Annotated[str, typer.Option("-ctv", "--cache-type-v", help="how values are kept: f32, f16 or bf16")]


def main() -> None:
    """Runs the command line; the exit code is 0, 1 (the system failed), 2 (bad input) or 130 (interrupted)."""
    try:
        app()
    except QjaxError as error:
        _fail(str(error), 2)
    except SystemExit as stopped:
        # typer ends so on Ctrl-C, without a word.
        if stopped.code == 130:
            _fail("interrupted", 130)
        raise
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing may be written to it while Python closes it.
        sys.stdout = None
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'system'}: {error.strerror or error}", 2)


def _fail(message: str, code: int) -> None:
    print("qjax: " + " ".join(message.split("\n")), file=sys.stderr)
    sys.exit(code)


@app.command()
def info(
    file: Annotated[str, typer.Argument(metavar="FILE", help="GGUF file, safetensors folder, Hub id, or 'tiny'")],
    as_json: Json = False,
) -> None:
    """What a model file holds: metadata, tensors, formats, bits per weight."""
    from qjax.info import info as summarize

    _print(summarize(file), as_json)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="IN", help="GGUF file, safetensors folder, Hub id, or 'tiny'")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file to write")],
    file_type: Annotated[str, typer.Argument(metavar="TYPE", help="F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0")],
    pure: Annotated[bool, typer.Option("--pure", help="every matrix in TYPE, the head too")] = False,
    rounding: Annotated[str | None, typer.Option(help="replaces the format's rounding rule")] = None,
    allow_requantize: Annotated[bool, typer.Option("--allow-requantize", help="from quantized weights too")] = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="NaN and infinities too")] = False,
    as_json: Json = False,
) -> None:
    """Write a quantized copy of a model as a GGUF file."""
    from qjax import model

    report = model.quantize_file(
        source,
        target,
        file_type,
        pure=pure,
        rounding=rounding,
        allow_requantize=allow_requantize,
        allow_nonfinite=allow_nonfinite,
    )
    _print(report, as_json)


@app.command()
def perplexity(
    name: ModelName,
    file: TextFile = None,
    n_ctx: CtxSize = 512,
    chunks: Chunks = None,
    precision: Precision = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity as llama-perplexity computes it.  Without a text: the tales the tiny model was never trained on."""
    from qjax import evaluate, load

    model = load(name)
    _print(evaluate.perplexity(model, _text(file), n_ctx=n_ctx, chunks=chunks, precision=precision), as_json)


@app.command()
def compare(
    name: ModelName = "tiny",
    file: TextFile = None,
    types: Annotated[str | None, typer.Option(help="formats, separated by commas [default: all]")] = None,
    n_ctx: CtxSize = 512,
    chunks: Chunks = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="table as JSON; an interrupted run resumes from it")] = Path(
        "qjax-compare.json"
    ),
    plot: Annotated[Path | None, typer.Option(help="trade-off plot [default: OUT with .png]")] = None,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    as_json: Json = False,
) -> None:
    """What each format costs: size, perplexity, KL divergence, task accuracy, speed.

    Without MODEL and text: the tiny model on tales it was never trained on.
    """
    from qjax import evaluate, load, viz
    from qjax.comparison import compare as run
    from qjax.io.atomic import atomic_write

    if name != "tiny" and file is None:
        raise QjaxError("compare: give the text to measure on with -f FILE (only the tiny model has its own)")
    text = None if file is None else evaluate.read_text(file)
    chosen = None if types is None else [t.strip() for t in types.split(",") if t.strip()]
    comparison = run(load(name), text, chosen, n_ctx=n_ctx, chunks=chunks, precision=precision, out=out)
    _print(comparison, as_json)
    png = plot or out.with_suffix(".png")
    with atomic_write(png) as opened:
        viz.plot_tradeoff(comparison).savefig(opened, format="png")
    print(f"table in {out}, plot in {png}", file=sys.stderr)


@app.command()
def generate(
    name: ModelName,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="the text to continue")],
    max_tokens: Annotated[int, typer.Option("-n", "--n-predict", help="tokens to make at most", min=0)] = 128,
    temperature: Annotated[float, typer.Option("--temp", help="0 takes the likeliest token each time")] = 0.0,
    top_k: Annotated[int, typer.Option(help="draw from the k likeliest tokens, 0 from all")] = 40,
    top_p: Annotated[float, typer.Option(help="of those the fewest that reach this probability")] = 0.95,
    min_p: Annotated[float, typer.Option(help="of those the ones this likely beside the likeliest")] = 0.05,
    seed: Annotated[int, typer.Option("-s", "--seed", help="the same seed gives the same text")] = 0,
    n_ctx: Annotated[int | None, typer.Option("-c", "--ctx-size", "--n-ctx", help="room for prompt and text")] = None,
    special: Annotated[bool, typer.Option("--special", help="read <|...|> in the prompt as special tokens")] = False,
    cache_k: CacheK = "f16",
    cache_v: CacheV = "f16",
    as_json: Json = False,
) -> None:
    """Continue a text."""
    from qjax import load

    model = load(name, cache_k=cache_k, cache_v=cache_v)
    options: dict[str, Any] = dict(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    options |= dict(min_p=min_p, seed=seed, n_ctx=n_ctx, parse_special=special)
    if as_json:
        _print(model.generate(prompt, **options), as_json)
        return
    unseen = prompt
    for text, _ in model.stream(prompt, **options):
        print(unseen + text, end="", flush=True)
        unseen = ""
    print()


def _text(file: Path | None) -> str:
    from qjax import evaluate

    return evaluate.held_out_tales() if file is None else evaluate.read_text(file)


def _print(record: Any, as_json: bool = False) -> None:
    print(json.dumps(dataclasses.asdict(record), indent=2) if as_json else record)


if __name__ == "__main__":
    main()
