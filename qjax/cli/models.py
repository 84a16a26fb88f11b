"""Commands that run a model."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qjax.cli.app import Json, ModelName, app, show
from qjax.errors import QjaxError

CtxSize = Annotated[int, typer.Option("-c", "--ctx-size", "--n-ctx", help="tokens in a window", min=8)]
Chunks = Annotated[int | None, typer.Option("--chunks", help="windows to evaluate [default: all]", min=1)]
TextFile = Annotated[Path | None, typer.Option("-f", "--file", "--text", help="UTF-8 text to measure on")]
Precision = Annotated[
    str,
    typer.Option(help="float32, bfloat16, int8, or auto: of the first two the fastest within 0.2 % of float32's PPL"),
]
_CACHE_K = "how keys are held: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl"
_CACHE_V = "how values are held: the same types"
CacheK = Annotated[str, typer.Option("-ctk", "--cache-type-k", help=_CACHE_K)]
CacheV = Annotated[str, typer.Option("-ctv", "--cache-type-v", help=_CACHE_V)]
Activations = Annotated[
    str | None,
    typer.Option(
        metavar="ROUNDING",
        help="how inputs of products are rounded: int8-token, ggml (as llama.cpp on a CPU), q8_0, q8_k ...; int8-tensor"
        " and int8-channel need --calibrate; or a JSON file with ranges",
    ),
]
GpuLayers = Annotated[
    int | None,
    typer.Option(
        "-ngl", "--gpu-layers", "--n-gpu-layers", metavar="N", help="layers on the accelerator, the head first; -1: all"
    ),
]

Lora = Annotated[
    str | None, typer.Option("--lora", metavar="FILE", help="LoRA adapter to add: GGUF file, or folder of PEFT's")
]


@app.command()
def perplexity(
    name: ModelName,
    file: TextFile = None,
    n_ctx: CtxSize = 512,
    chunks: Chunks = None,
    precision: Precision = "auto",
    base: Annotated[
        Path | None,
        typer.Option("--kl-divergence-base", "--save-all-logits", metavar="BASE", help="save the predictions here"),
    ] = None,
    kl_divergence: Annotated[
        bool, typer.Option("--kl-divergence", help="compare with the predictions in BASE, on the text it was made of")
    ] = False,
    cache_k: CacheK = "f32",
    cache_v: CacheV = "f32",
    activations: Activations = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="TEXT", help="UTF-8 text that shows the ranges of activations")
    ] = None,
    range_rule: Annotated[
        str, typer.Option("--range", help="of what it shows: minmax, mse, or a percentile such as p99.9")
    ] = "minmax",
    lora: Lora = None,
    n_gpu_layers: GpuLayers = None,
    devices: Annotated[
        int | None, typer.Option(metavar="N", help="share the work among N devices, each with its batches", min=1)
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(metavar="T", help="T of these share each matrix, so that N / T batches run at a time", min=1)
    ] = 1,
    as_json: Json = False,
) -> None:
    """Perplexity as llama-perplexity computes it.  Without a text: the tales the tiny model was never trained on.

    With BASE, a file that llama-perplexity writes and reads too, auto means float32.

    --devices works on a CPU too, which passes for N of them with the environment variable
    XLA_FLAGS=--xla_force_host_platform_device_count=N; that is a rehearsal, not faster.
    """
    from qjax import evaluate, load

    if kl_divergence and (base is None or file is not None):
        raise QjaxError("perplexity: --kl-divergence takes --kl-divergence-base FILE, and the text from that file")
    exact = "float32" if precision == "auto" else precision
    mesh = _mesh(devices, tensor_parallel)
    model = _noted(load(name, n_gpu_layers=n_gpu_layers, mesh=mesh, cache_k=cache_k, cache_v=cache_v, lora=lora))
    model = _rounded(model, activations, calibrate, range_rule, n_ctx)
    if base is None:
        record = evaluate.perplexity(model, _text(file), n_ctx=n_ctx, chunks=chunks, precision=precision)
    elif kl_divergence:
        record = evaluate.kl_divergence_from(base, model, chunks=chunks, precision=exact)
    else:
        record = evaluate.save_base(model, _text(file), base, n_ctx=n_ctx, chunks=chunks, precision=exact)
    show(record, as_json)


@app.command()
def probe(
    name: ModelName,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", "-bf", "--binary-file", help="questions [default: of the tales]")
    ] = None,
    hellaswag: Annotated[bool, typer.Option("--hellaswag", help="six lines each, as HellaSwag for llama.cpp")] = False,
    winogrande: Annotated[bool, typer.Option("--winogrande", help="CSV, as WinoGrande for llama.cpp")] = False,
    multiple_choice: Annotated[bool, typer.Option("--multiple-choice", help="binary, as llama.cpp has them")] = False,
    tasks: Annotated[
        int | None,
        typer.Option(
            "--tasks",
            "--hellaswag-tasks",
            "--winogrande-tasks",
            "--multiple-choice-tasks",
            help="so many, drawn as llama-perplexity draws them; 0: all [default: 400 of HellaSwag, else all]",
            min=0,
        ),
    ] = None,
    cache_k: CacheK = "f32",
    cache_v: CacheV = "f32",
    activations: Activations = None,
    n_gpu_layers: GpuLayers = None,
    as_json: Json = False,
) -> None:
    """Questions with several endings: how often is the right one the likeliest, a token?

    A file without --hellaswag, --winogrande and --multiple-choice has JSON lines {"prompt": ..., "choices": [...],
    "answer": 0}.
    """
    from qjax import evaluate, load
    from qjax.data import tales
    from qjax.io import probes as files

    chosen = [
        kind
        for kind, is_chosen in (
            ("hellaswag", hellaswag),
            ("winogrande", winogrande),
            ("multiple-choice", multiple_choice),
        )
        if is_chosen
    ]
    if len(chosen) > 1:
        raise QjaxError(f"probe: --{' and --'.join(chosen)}: a file is of one kind; give one of them")
    if file is None and (chosen or tasks is not None):
        raise QjaxError("probe: give the file of the questions with -f FILE")
    questions = tales.probes(1, 64) if file is None else files.read(file, (*chosen, "jsonl")[0], tasks)
    model = _noted(load(name, n_gpu_layers=n_gpu_layers, cache_k=cache_k, cache_v=cache_v))
    model = _rounded(model, activations, None, "minmax", 0)
    show(evaluate.probe(model, questions, normalized=file is not None), as_json)


@app.command()
def imatrix(
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="the model, unless files are merged")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", "--text", help="UTF-8 text to run it on")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--output", help="[default: imatrix.gguf or imatrix.dat]")] = None,
    in_files: Annotated[
        list[Path] | None, typer.Option("--in-file", metavar="FILE", help="importance matrix to add; may be repeated")
    ] = None,
    n_ctx: CtxSize = 512,
    chunks: Chunks = None,
    first_chunk: Annotated[int, typer.Option("--chunk", "--from-chunk", help="windows to pass over", min=0)] = 0,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="the head's input too, if it has a tensor of its own")
    ] = False,
    parse_special: Annotated[bool, typer.Option("--parse-special", help="read <|...|> as special tokens")] = False,
    no_ppl: Annotated[bool, typer.Option("--no-ppl", help="without perplexity, which is faster")] = False,
    output_format: Annotated[str, typer.Option(help="gguf or dat")] = "gguf",
    show_statistics: Annotated[
        bool, typer.Option("--show-statistics", help="print what is in it; --in-file alone is then not written")
    ] = False,
    as_json: Json = False,
) -> None:
    """How strongly a text drives each column of the weights, for `qjax quantize --imatrix`, as llama-imatrix does."""
    from qjax import evaluate, load
    from qjax.io import imatrix as files
    from qjax.io.atomic import check_target
    from qjax.methods import imatrix as method

    if output_format not in files.WRITERS:
        raise QjaxError(f"imatrix: output format {output_format!r}, expected {' or '.join(files.WRITERS)}")
    if (name is None) != (file is None) or not (file or in_files):
        raise QjaxError(
            "imatrix: give a MODEL and a text (-f FILE) to run it on, or matrices to merge (--in-file FILE)"
        )
    target = out or (None if show_statistics and not file else Path(f"imatrix.{output_format}"))
    if target:
        check_target(target)
    matrices = [files.read(path, chunk_size=n_ctx) for path in in_files or ()]
    ppl = None
    if name and file:
        collected, ppl = evaluate.imatrix(
            load(name),
            evaluate.read_text(file),
            n_ctx=n_ctx,
            chunks=chunks,
            first_chunk=first_chunk,
            process_output=process_output,
            parse_special=parse_special,
            score=not no_ppl,
            dataset=str(file),
        )
        matrices.append(collected)
    merged = method.merge(matrices, n_ctx)
    statistics = method.statistics(merged) if show_statistics else None
    if target:
        files.WRITERS[output_format](target, merged)
    show(method.ImatrixReport.of(merged, target, ppl, statistics), as_json)


@app.command()
def compare(
    name: ModelName = "tiny",
    file: TextFile = None,
    types: Annotated[str | None, typer.Option(help="formats, separated by commas [default: all]")] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="importance matrix for the formats that can use one")
    ] = None,
    n_ctx: CtxSize = 512,
    chunks: Chunks = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="table as JSON; an interrupted run resumes from it")] = Path(
        "qjax-compare.json"
    ),
    plot: Annotated[Path | None, typer.Option(help="trade-off plot [default: OUT with .png]")] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or int8")] = "float32",
    speed: Annotated[bool, typer.Option("--speed", help="also tokens per second; takes twice as long")] = False,
    as_json: Json = False,
) -> None:
    """What each format costs: size, perplexity, KL divergence, task accuracy.

    Without MODEL and text: the tiny model on tales it was never trained on.
    """
    from qjax import evaluate, load, viz
    from qjax.comparison import compare as run
    from qjax.io.atomic import atomic_write

    if name != "tiny" and file is None:
        raise QjaxError("compare: give the text to measure on with -f FILE (only the tiny model has its own)")
    text = None if file is None else evaluate.read_text(file)
    chosen = None if types is None else [t.strip() for t in types.split(",") if t.strip()]
    options: dict[str, Any] = dict(n_ctx=n_ctx, chunks=chunks, precision=precision, imatrix=imatrix, speed=speed)
    comparison = run(load(name), text, chosen, out=out, **options)
    show(comparison, as_json)
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
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is a message, by the model's chat template")] = False,
    system: Annotated[str | None, typer.Option("-sys", "--system-prompt", help="with --chat, what comes first")] = None,
    cache_k: CacheK = "f16",
    cache_v: CacheV = "f16",
    lora: Lora = None,
    n_gpu_layers: GpuLayers = None,
    devices: Annotated[
        int | None, typer.Option(metavar="N", help="share each matrix among N devices; see perplexity", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Continue a text, or answer a message (--chat)."""
    from qjax import load
    from qjax.io.chat import prompt as chat_prompt

    if system is not None and not chat:
        raise QjaxError("generate: --system-prompt needs --chat")
    mesh = _mesh(devices, devices or 1)
    where: dict[str, Any] = dict(n_gpu_layers=n_gpu_layers, mesh=mesh)
    model = _noted(load(name, **where, cache_k=cache_k, cache_v=cache_v, only_generate=True, lora=lora))
    options: dict[str, Any] = dict(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    options |= dict(min_p=min_p, seed=seed, n_ctx=n_ctx, parse_special=special)
    said = [("system", system)] * (system is not None) + [("user", prompt)]
    messages = [{"role": role, "content": content} for role, content in said]
    begin = chat_prompt(model.tokenizer, messages) if chat else prompt
    if as_json:
        show(model.generate(begin, **options), as_json)
        return
    unseen = "" if chat else prompt
    for text, _ in model.stream(begin, **options):
        print(unseen + text, end="", flush=True)
        unseen = ""
    print()


@app.command()
def tokenize(
    name: ModelName,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="text, as it is [default: stdin]")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="UTF-8 text")] = None,
    only_ids: Annotated[bool, typer.Option("--ids", help="ids alone, as a list")] = False,
    show_count: Annotated[bool, typer.Option("--show-count", help="how many there are, too")] = False,
    no_bos: Annotated[bool, typer.Option("--no-bos", help="nothing added at the ends")] = False,
    no_parse_special: Annotated[bool, typer.Option("--no-parse-special", help="<|...|> is plain text")] = False,
    as_json: Json = False,
) -> None:
    """Cut a text into a model's tokens, as llama-tokenize does; no weights are read."""
    from qjax.evaluate import read_text
    from qjax.io.tokenizer import Tokenizer
    from qjax.source import open_source

    if prompt is not None and file is not None:
        raise QjaxError("tokenize: give a text by -p or by -f, not both")
    tokenizer = Tokenizer.from_gguf(open_source(name).metadata)
    if file is not None:
        text = read_text(file, whole=True)
    else:
        # As bytes, for Python would change the ends of lines.
        text = sys.stdin.buffer.read().decode(errors="replace") if prompt is None else prompt
    ids = tokenizer.encode(text, add_special=not no_bos, parse_special=not no_parse_special)
    pieces = [piece.decode(errors="replace") for piece in tokenizer.pieces(ids)]
    if as_json:
        print(json.dumps({"count": len(ids), "ids": ids, "pieces": pieces}))
        return
    if only_ids:
        print(ids)
    else:
        for id, piece in zip(ids, pieces):
            print(f"{id:6} -> '{piece}'")
    if show_count:
        print(f"Total number of tokens: {len(ids)}")


@app.command()
def bench(
    name: ModelName,
    n_prompt: Annotated[str, typer.Option("-p", "--n-prompt", help="tokens to read, 0 for none")] = "512",
    n_gen: Annotated[str, typer.Option("-n", "--n-gen", help="tokens to make, 0 for none")] = "128",
    n_pg: Annotated[list[str] | None, typer.Option("-pg", metavar="P,N", help="to read, and then to make")] = None,
    n_depth: Annotated[str, typer.Option("-d", "--n-depth", help="tokens in the cache before")] = "0",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="of each test", min=1)] = 5,
    output: Annotated[str, typer.Option("-o", "--output", help="md, csv or json, with llama-bench's names")] = "md",
    cache_k: CacheK = "f16",
    cache_v: CacheV = "f16",
    as_json: Json = False,
) -> None:
    """How fast a model runs, as llama-bench measures it.  Numbers of tokens may be lists: -p 128,512."""
    from qjax import bench as benches

    if output not in ("md", "csv", "json"):
        raise QjaxError(f"bench: output {output!r}, expected md, csv or json")
    pairs = [_numbers("-pg", text) for text in n_pg or ()]
    if any(len(pair) != 2 for pair in pairs):
        raise QjaxError(f"bench: -pg {n_pg}: expected two numbers each time, as in -pg 512,128")
    record = benches.bench(
        name,
        n_prompt=_numbers("-p", n_prompt),
        n_gen=_numbers("-n", n_gen),
        n_pg=[(pair[0], pair[1]) for pair in pairs],
        n_depth=_numbers("-d", n_depth),
        repetitions=repetitions,
        cache_k=cache_k,
        cache_v=cache_v,
    )
    if output == "csv" and not as_json:
        print(record.csv())
    else:
        show(record, as_json or output == "json")


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise QjaxError(f"bench: {option} {text!r}: expected numbers, as in {option} 128,512") from None


def _mesh(devices: int | None, tensor_parallel: int) -> Any:
    from qjax.models.placement import mesh_over

    if devices is None:
        if tensor_parallel > 1:
            raise QjaxError("--tensor-parallel divides the devices of --devices; give both")
        return None
    return mesh_over(devices, tensor_parallel)


def _rounded(model: Any, activations: str | None, text: Path | None, range_rule: str, n_ctx: int) -> Any:
    """The model with its activations rounded as named, the ranges from a text or a file."""
    from qjax import evaluate
    from qjax.methods.activations import Activations

    if activations is None:
        if text is not None or range_rule != "minmax":
            raise QjaxError("--calibrate and --range find ranges for --activations; give that too")
        return model
    if text is not None:
        found = evaluate.calibrate(model, evaluate.read_text(text), activations, range_rule, n_ctx)
    elif range_rule != "minmax":
        raise QjaxError("--range chooses among what --calibrate TEXT shows; give that too")
    else:
        found = Activations.read(activations) if activations.endswith(".json") else Activations.of(activations)
    return dataclasses.replace(model, activations=found)


def _noted(model: Any) -> Any:
    """The model, after a word on what lies where, if it is in several places."""
    if model.placement:
        print(f"{model.name}: {model.placement}", file=sys.stderr)
    return model


def _text(file: Path | None) -> str:
    from qjax import evaluate

    return evaluate.held_out_tales() if file is None else evaluate.read_text(file)
