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
DryRun = Annotated[bool, typer.Option("--dry-run", help="only say what would be written")]
CtxSize = Annotated[int, typer.Option("-c", "--ctx-size", "--n-ctx", help="tokens in a window", min=8)]
Chunks = Annotated[int | None, typer.Option("--chunks", help="windows to evaluate [default: all]", min=1)]
TextFile = Annotated[Path | None, typer.Option("-f", "--file", "--text", help="UTF-8 text to measure on")]
Precision = Annotated[str, typer.Option(help="float32, bfloat16, or auto: the fastest within 0.2 % of float32's PPL")]
_CACHE_K = "how keys are held: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl"
_CACHE_V = "how values are held: the same types"
CacheK = Annotated[str, typer.Option("-ctk", "--cache-type-k", help=_CACHE_K)]
CacheV = Annotated[str, typer.Option("-ctv", "--cache-type-v", help=_CACHE_V)]
GpuLayers = Annotated[
    int | None,
    typer.Option(
        "-ngl", "--gpu-layers", "--n-gpu-layers", metavar="N", help="layers on the accelerator, the head first; -1: all"
    ),
]


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
    no_tensors: Annotated[bool, typer.Option("--no-tensors", help="without the list of tensors")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown instead of text")] = False,
    json_array: Annotated[bool, typer.Option("--json-array", help="JSON with the elements of arrays")] = False,
    as_json: Json = False,
) -> None:
    """What a model file holds: metadata, tensors, formats, bits per weight."""
    from qjax.info import info as summarize

    summary, tensors = summarize(file), not no_tensors
    if as_json or json_array:
        print(json.dumps(summary.to_json(tensors=tensors, arrays=json_array), indent=2))
    else:
        print(summary.markdown(tensors) if markdown else summary.text(tensors))


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="GGUF file, safetensors folder, Hub id, or 'tiny'")],
    after: Annotated[str, typer.Argument(metavar="B", help="another")],
    as_json: Json = False,
) -> None:
    """How two model files differ: metadata, types, the error of each tensor.  Exit code 1 if they do."""
    from qjax.diff import diff as compare

    difference = compare(before, after)
    _print(difference, as_json)
    raise typer.Exit(bool(difference))


@app.command()
def split(
    source: Annotated[str, typer.Argument(metavar="IN", help="GGUF file")],
    prefix: Annotated[Path, typer.Argument(metavar="PREFIX", help="what the names of the shards begin with")],
    max_tensors: Annotated[
        int | None, typer.Option("--split-max-tensors", help="tensors in a shard [default: 128]", min=1)
    ] = None,
    max_size: Annotated[
        str | None, typer.Option("--split-max-size", metavar="N(M|G)", help="size of a shard's tensors, 1G is 10^9")
    ] = None,
    no_tensor_first_split: Annotated[
        bool, typer.Option("--no-tensor-first-split", help="metadata alone in the first shard")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Divide a GGUF file into shards, as llama-gguf-split does."""
    from qjax.io import splits

    report = splits.split(
        source,
        prefix,
        max_tensors=max_tensors,
        max_bytes=None if max_size is None else splits.parse_size(max_size),
        no_tensor_first_split=no_tensor_first_split,
        dry_run=dry_run,
    )
    _print(report, as_json)


@app.command()
def merge(
    shard: Annotated[Path, typer.Argument(metavar="SHARD", help="any of the shards; the others lie beside it")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file to write")],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make one GGUF file of shards, as llama-gguf-split does."""
    from qjax.io import splits

    _print(splits.merge(shard, target, dry_run=dry_run), as_json)


@app.command("set")
def set_metadata(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file, changed in place")],
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="an entry to change; its type stays")] = None,
    value: Annotated[str | None, typer.Argument(metavar="VALUE", help="its new value; arrays as JSON")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=TYPE:VALUE", help="add or change an entry, with its type")
    ] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", metavar="KEY", help="remove an entry")] = None,
    rename: Annotated[
        list[str] | None, typer.Option("--rename", metavar="OLD=NEW", help="give an entry another key")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="write here instead")] = None,
    force: Annotated[bool, typer.Option("--force", help="entries that a file is read by, too")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Change the metadata of a GGUF file: rename, remove, set.

    TYPE is UINT8 to FLOAT64, BOOL, STRING, or ARRAY[...] of these.
    """
    from qjax.io import metadata_edit

    values: dict[str, Any] = dict(map(metadata_edit.assignment, assignments or ()))
    if key is not None:
        if value is None:
            raise QjaxError(f"set: give {key} a value: qjax set FILE KEY VALUE")
        values[key] = value
    report = metadata_edit.edit(
        file,
        values,
        remove=remove or (),
        rename=dict(map(metadata_edit.renaming, rename or ())),
        out=out,
        force=force,
        dry_run=dry_run,
    )
    _print(report, as_json)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="IN", help="GGUF file, safetensors folder, Hub id, or 'tiny'")],
    rest: Annotated[
        list[str],
        typer.Argument(
            metavar="[OUT] TYPE",
            help="GGUF file to write [default: ggml-model-TYPE.gguf beside IN], and what llama-quantize calls the "
            "file type, or its number: Q4_K_M, IQ4_XS, Q8_0, F16, COPY ...",
        ),
    ],
    imatrix: Annotated[str | None, typer.Option(metavar="FILE", help="importance matrix to quantize by")] = None,
    include_weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="use the imatrix for names with this part only")
    ] = None,
    exclude_weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="do not use the imatrix for names with this part")
    ] = None,
    pure: Annotated[bool, typer.Option("--pure", help="every matrix in TYPE's default format, no mixture")] = False,
    tensor_type: Annotated[
        list[str] | None, typer.Option(metavar="REGEX=FORMAT", help="format of the tensors whose name it matches")
    ] = None,
    tensor_type_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="more of these, separated by spaces or lines")
    ] = None,
    output_tensor_type: Annotated[str | None, typer.Option(metavar="FORMAT", help="of output.weight")] = None,
    token_embedding_type: Annotated[str | None, typer.Option(metavar="FORMAT", help="of the embeddings")] = None,
    leave_output_tensor: Annotated[
        bool, typer.Option("--leave-output-tensor", help="output.weight stays as it is")
    ] = False,
    override_kv: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=TYPE:VALUE", help="metadata to set; TYPE is int, float, bool or str"),
    ] = None,
    rounding: Annotated[str | None, typer.Option(help="replaces the format's rounding rule")] = None,
    allow_requantize: Annotated[bool, typer.Option("--allow-requantize", help="from quantized weights too")] = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="NaN and infinities too")] = False,
    keep_split: Annotated[bool, typer.Option("--keep-split", help="write as many shards as IN has")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a quantized copy of a model as a GGUF file, as llama-quantize does."""
    from qjax import evaluate, model
    from qjax.methods import recipes, rtn

    *target, file_type = rest
    assignments = [*(tensor_type or ()), *(evaluate.read_text(tensor_type_file).split() if tensor_type_file else ())]
    recipe = recipes.recipe(
        file_type,
        pure=pure,
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        leave_output_tensor=leave_output_tensor,
        tensor_types=recipes.assignments(assignments),
    )
    report = model.quantize_file(
        source,
        None if dry_run else _target(source, target, recipe.name),
        recipe,
        imatrix=imatrix,
        include_weights=include_weights or (),
        exclude_weights=exclude_weights or (),
        overrides=dict(map(rtn.override, override_kv or ())),
        rounding=rounding,
        allow_requantize=allow_requantize,
        allow_nonfinite=allow_nonfinite,
        keep_split=keep_split,
        dry_run=dry_run,
    )
    _print(report, as_json)


def _target(source: str, given: list[str], file_type: str) -> Path:
    """Where to write: what is given, else beside a source that is a file or folder."""
    if len(given) == 1:
        return Path(given[0])
    if given or not Path(source).exists():
        raise QjaxError("quantize: expected IN OUT TYPE; OUT may be left out if IN is a path")
    return Path(source).parent / f"ggml-model-{file_type}.gguf"


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
    model = _noted(load(name, n_gpu_layers=n_gpu_layers, mesh=mesh, cache_k=cache_k, cache_v=cache_v))
    if base is None:
        record = evaluate.perplexity(model, _text(file), n_ctx=n_ctx, chunks=chunks, precision=precision)
    elif kl_divergence:
        record = evaluate.kl_divergence_from(base, model, chunks=chunks, precision=exact)
    else:
        record = evaluate.save_base(model, _text(file), base, n_ctx=n_ctx, chunks=chunks, precision=exact)
    _print(record, as_json)


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
    _print(method.ImatrixReport.of(merged, target, ppl, statistics), as_json)


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
    options: dict[str, Any] = dict(n_ctx=n_ctx, chunks=chunks, precision=precision, imatrix=imatrix, out=out)
    comparison = run(load(name), text, chosen, **options)
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
    n_gpu_layers: GpuLayers = None,
    devices: Annotated[
        int | None, typer.Option(metavar="N", help="share each matrix among N devices; see perplexity", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Continue a text."""
    from qjax import load

    mesh = _mesh(devices, devices or 1)
    model = _noted(load(name, n_gpu_layers=n_gpu_layers, mesh=mesh, cache_k=cache_k, cache_v=cache_v))
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
        _print(record, as_json or output == "json")


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


def _noted(model: Any) -> Any:
    """The model, after a word on what lies where, if it is in several places."""
    if model.placement:
        print(f"{model.name}: {model.placement}", file=sys.stderr)
    return model


def _text(file: Path | None) -> str:
    from qjax import evaluate

    return evaluate.held_out_tales() if file is None else evaluate.read_text(file)


def _print(record: Any, as_json: bool = False) -> None:
    if as_json:
        record = json.dumps(record.to_json() if hasattr(record, "to_json") else dataclasses.asdict(record), indent=2)
    print(record)


if __name__ == "__main__":
    main()
