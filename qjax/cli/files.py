"""Commands about files: what is in them, and files made of files."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qjax.cli.app import DryRun, Json, app, show
from qjax.errors import QjaxError


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
    show(difference, as_json)
    raise typer.Exit(bool(difference))


@app.command()
def check(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="GGUF file, importance matrix, safetensors folder, Hub id, or 'tiny'"),
    ],
    as_json: Json = False,
) -> None:
    """Whether a file is sound: it can be read, and no weight or scale is NaN or infinite.  Exit code 1 if one is."""
    from qjax.soundness import check as look_at

    found = look_at(file)
    show(found, as_json)
    raise typer.Exit(not found.sound)


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
    show(report, as_json)


@app.command()
def merge(
    shard: Annotated[Path, typer.Argument(metavar="SHARD", help="any of the shards; the others lie beside it")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file to write")],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make one GGUF file of shards, as llama-gguf-split does."""
    from qjax.io import splits

    show(splits.merge(shard, target, dry_run=dry_run), as_json)


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
    show(report, as_json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="safetensors folder, GGUF file, Hub id, or 'tiny'")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file to write, or folder if it is no .gguf")],
    outtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="f32, f16, bf16, q8_0, tq1_0, tq2_0, auto (what IN is, in 16 bits), or what llama-quantize calls a "
            "file type, as in q4_k_m; of a folder f32, f16, bf16 or auto [default: auto, of an adapter f32]",
        ),
    ] = None,
    lora: Annotated[str | None, typer.Option(metavar="FILE", help="LoRA adapter to add to the weights")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="what the adapter in IN is for [default: what it says itself]")
    ] = None,
    imatrix: Annotated[str | None, typer.Option(metavar="FILE", help="importance matrix to quantize by")] = None,
    max_tensors: Annotated[
        int | None, typer.Option("--split-max-tensors", metavar="N", help="tensors in a shard", min=1)
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            "--split-max-size",
            "--max-shard-size",
            metavar="N(K|M|G)",
            help="size of a shard's tensors, 1G is 10^9 [default: one GGUF file, but 5G in a folder]",
        ),
    ] = None,
    no_tensor_first_split: Annotated[
        bool, typer.Option("--no-tensor-first-split", help="metadata alone in the first shard")
    ] = False,
    model_name: Annotated[str | None, typer.Option(help="general.name in the metadata")] = None,
    metadata: Annotated[
        Path | None, typer.Option(metavar="FILE", help='JSON with metadata, as in {"general.author": ...}')
    ] = None,
    allow_requantize: Annotated[bool, typer.Option("--allow-requantize", help="from quantized weights too")] = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="NaN and infinities too")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make a GGUF file of a safetensors folder, as llama.cpp's converter does, or a folder of a GGUF file.

    IN may be a LoRA adapter too, as PEFT saves it.  Whatever the type, it takes one pass: nothing is written but OUT.
    """
    from qjax import convert as conversion
    from qjax.io import lora as lora_files
    from qjax.io import splits
    from qjax.io.tokenizer_json import load_json

    max_bytes = None if max_size is None else splits.parse_size(max_size, fine=True)
    general = {**(load_json(metadata) if metadata else {}), **({"general.name": model_name} if model_name else {})}
    is_adapter, is_folder = lora_files.is_folder(source), target.suffix != ".gguf"
    for given, wrong, problem in (
        (base, not is_adapter, f"{source}: is no adapter, and --base is for these alone"),
        (lora, is_adapter, f"{source}: is an adapter, and --lora adds one to a model"),
        (imatrix or max_tensors or no_tensor_first_split, is_adapter, f"{source}: adapters are not quantized or split"),
        (
            imatrix or general or max_tensors or no_tensor_first_split,
            is_folder and not is_adapter,
            f"{target}: a folder is written without such options; the name of a GGUF file ends in .gguf",
        ),
    ):
        if given and wrong:
            raise QjaxError(problem)
    report: Any
    if is_adapter:
        report = conversion.adapter_to_gguf(
            source, target, outtype or "f32", base=base, general=general, dry_run=dry_run
        )
    elif is_folder:
        report = conversion.to_folder(
            source,
            target,
            outtype or "auto",
            lora=lora,
            max_bytes=max_bytes or conversion.MAX_SHARD_BYTES,
            allow_nonfinite=allow_nonfinite,
            dry_run=dry_run,
        )
    else:
        report = conversion.to_gguf(
            source,
            target,
            outtype or "auto",
            general=general,
            lora=lora,
            imatrix=imatrix,
            allow_requantize=allow_requantize,
            allow_nonfinite=allow_nonfinite,
            max_tensors=max_tensors,
            max_bytes=max_bytes,
            no_tensor_first_split=no_tensor_first_split,
            dry_run=dry_run,
        )
    show(report, as_json)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="IN", help="GGUF file, safetensors folder, Hub id, or 'tiny'")],
    rest: Annotated[
        list[str],
        typer.Argument(
            metavar="[OUT] TYPE",
            help="GGUF file to write [default: ggml-model-TYPE.gguf beside IN], and what llama-quantize calls the "
            "file type, or its number: Q4_K_M, IQ4_XS, Q8_0, F16, COPY ...; with a target there is only OUT",
        ),
    ],
    imatrix: Annotated[str | None, typer.Option(metavar="FILE", help="importance matrix to quantize by")] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME[+NAME]", help="how to round, and what to do before: gptq, awq+gptq [default: rtn]"),
    ] = None,
    calibrate: Annotated[Path | None, typer.Option(metavar="TEXT", help="UTF-8 text that methods look at")] = None,
    n_ctx: Annotated[
        int, typer.Option("-c", "--ctx-size", "--n-ctx", help="tokens in a window of that text", min=8)
    ] = 512,
    chunks: Annotated[int | None, typer.Option("--chunks", help="windows of it at most [default: all]", min=1)] = None,
    target_bpw: Annotated[
        float | None, typer.Option(metavar="BITS", help="choose formats that lose least within so many bits per weight")
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(metavar="N[K|M|G]", help="or within a file of this size, as in 2.5M")
    ] = None,
    formats: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME]", help="formats to choose from [default: all]")
    ] = None,
    sensitivity: Annotated[
        str | None, typer.Option(metavar="WAY", help="what a format costs: estimated from gradients, or measured")
    ] = None,
    recipe_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the choice, as a --tensor-type-file or as .json")
    ] = None,
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
    """Write a quantized copy of a model as a GGUF file, as llama-quantize does, or better.

    With --calibrate a text serves as importance matrix, and --method may look at it.  With --target-bpw or
    --target-size it also decides which matrix gets which format.
    """
    from qjax import evaluate
    from qjax.io import splits
    from qjax.methods import recipes, rtn
    from qjax.quantize_file import quantize_file, quantize_file_by, solve

    tensor_types: dict[str, Any] = dict(
        pure=pure,
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        leave_output_tensor=leave_output_tensor,
        tensor_types=recipes.assignments(
            [*(tensor_type or ()), *(evaluate.read_text(tensor_type_file).split() if tensor_type_file else ())]
        ),
    )
    text = None if calibrate is None else evaluate.read_text(calibrate)
    how: dict[str, Any] = dict(
        imatrix=imatrix,
        overrides=dict(map(rtn.override, override_kv or ())),
        rounding=rounding,
        allow_requantize=allow_requantize,
        allow_nonfinite=allow_nonfinite,
    )
    if target_bpw is None and target_size is None:
        if formats or sensitivity or recipe_out:
            raise QjaxError("quantize: --formats, --sensitivity and --recipe-out go with --target-bpw or --target-size")
        *target, file_type = rest
        recipe = recipes.recipe(file_type, **tensor_types)
    else:
        if text is None or len(rest) > 1 or any(tensor_types.values()) or rounding or allow_nonfinite:
            raise QjaxError(
                "quantize: with --target-bpw or --target-size expected IN OUT --calibrate TEXT, and none of TYPE, "
                "--tensor-type and its like, --pure, --rounding and --allow-nonfinite"
            )
        target = rest
        solution = solve(
            source,
            text,
            target_bpw=target_bpw,
            target_size=None if target_size is None else splits.parse_size(target_size, fine=True),
            method=method or "rtn",
            candidates=formats.split(",") if formats else None,
            sensitivity=sensitivity or "estimated",
            n_ctx=n_ctx,
            chunks=chunks,
            imatrix=imatrix,
            overrides=how["overrides"],
            allow_requantize=allow_requantize,
        )
        if recipe_out:
            solution.write(recipe_out)
        if dry_run:
            show(solution, as_json)
            return
        print(solution, file=sys.stderr)
        recipe = solution.recipe()
    if method or calibrate:
        if include_weights or exclude_weights or keep_split or dry_run:
            raise QjaxError(
                "quantize: --method and --calibrate do without --include-weights, --exclude-weights, --keep-split and "
                "--dry-run"
            )
        out = _target(source, target, recipe.name)
        report = quantize_file_by(
            source, out, recipe, method or "rtn", calibrate=text, n_ctx=n_ctx, chunks=chunks, **how
        )
    else:
        report = quantize_file(
            source,
            None if dry_run else _target(source, target, recipe.name),
            recipe,
            include_weights=include_weights or (),
            exclude_weights=exclude_weights or (),
            keep_split=keep_split,
            dry_run=dry_run,
            **how,
        )
    show(report, as_json)


def _target(source: str, given: list[str], file_type: str) -> Path:
    """Where to write: what is given, else beside a source that is a file or folder."""
    if len(given) == 1:
        return Path(given[0])
    if given or not Path(source).exists():
        raise QjaxError("quantize: expected IN OUT TYPE; OUT may be left out if IN is a path")
    return Path(source).parent / f"ggml-model-{file_type}.gguf"
