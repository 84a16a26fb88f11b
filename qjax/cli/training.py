"""The command that trains a model."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qjax.cli.app import Json, ModelName, app, show
from qjax.errors import QjaxError


@app.command()
def train(
    name: ModelName,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file to write: the model, or its adapter")],
    qat: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="train the weights for this file type, as in Q2_K, and write them in it"),
    ] = None,
    only_scales: Annotated[
        bool, typer.Option("--only-scales", help="with --qat: the codes stay, their scales are trained")
    ] = False,
    lora: Annotated[
        bool, typer.Option("--lora", help="train an adapter beside the packed weights, and write it")
    ] = False,
    rank: Annotated[int, typer.Option(help="of the adapter", min=1)] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="of the adapter; its scale is alpha / rank [default: rank]")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="matrices it is for: attn_q,attn_v [default: all of a layer]"),
    ] = None,
    base: Annotated[
        str, typer.Option(metavar="TYPE", help="how float weights are held beside it; none: as they are")
    ] = "NF4",
    file: Annotated[
        str | None,
        typer.Option("-f", "--file", "--text", metavar="FILE", help="UTF-8 text to train on; tales: what 'tiny' is of"),
    ] = None,
    steps: Annotated[int, typer.Option(help="how many", min=1)] = 200,
    batch: Annotated[int, typer.Option("-b", "--batch", help="windows in a step", min=1)] = 8,
    n_ctx: Annotated[int, typer.Option("-c", "--ctx-size", "--n-ctx", help="tokens in a window", min=8)] = 256,
    rate: Annotated[float, typer.Option("--lr", help="the highest learning rate")] = 1e-3,
    decay: Annotated[str, typer.Option(help="of the learning rate: cosine, linear or constant")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="of matrices")] = 0.0,
    distill: Annotated[
        float | None,
        typer.Option(help="share of the loss that is the divergence from MODEL as it is, with --qat [default: 1]"),
    ] = None,
    imatrix: Annotated[str | None, typer.Option(metavar="FILE", help="importance matrix, with --qat")] = None,
    seed: Annotated[int, typer.Option(help="of the order of the text", min=0)] = 0,
    precision: Annotated[str, typer.Option(help="of products: float32 or bfloat16")] = "float32",
    checkpoint: Annotated[Path | None, typer.Option(metavar="DIR", help="save the run here as it goes")] = None,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints", min=1)] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what is in --checkpoint")] = False,
    as_json: Json = False,
) -> None:
    """Train a model for a file type (--qat), or an adapter of a quantized model (--lora), and write a GGUF file.

    With --qat the loss is that of the quantized model, whose bytes are those that are written.  With --lora the weights
    stay as they are, quantized ones too; the file is what --lora takes elsewhere, here and in llama.cpp.
    """
    from qjax import evaluate, load
    from qjax import train as training
    from qjax.io.atomic import check_target
    from qjax.methods.qlora import TARGETS

    if (qat is None) != lora:
        raise QjaxError("train: give either --qat TYPE or --lora")
    for given, option in ((only_scales, "--only-scales"), (imatrix, "--imatrix"), (distill, "--distill")):
        if lora and given:
            raise QjaxError(f"train: {option} goes with --qat, not with --lora")
    if resume and checkpoint is None:
        raise QjaxError("train: --resume goes on with a --checkpoint; name its folder")
    if file is None and name != "tiny":
        raise QjaxError("train: give a text to train on (-f FILE), or -f tales")
    if target.suffix != ".gguf":
        raise QjaxError(f"{target}: trained models and adapters are written as GGUF; give a name that ends in .gguf")
    check_target(target)
    options = replace(
        training.QLORA if lora else training.QAT,
        **{"steps": steps, "batch": batch, "n_ctx": n_ctx, "rate": rate, "decay": decay, "weight_decay": weight_decay},
        **{"seed": seed, "save_every": save_every} | ({} if distill is None else {"distill": distill}),
    )
    text = None if file in (None, "tales") else evaluate.read_text(file)
    shared = {"options": options, "precision": precision, "checkpoint": checkpoint, "resume": resume}
    model = load(name)
    if qat is None:
        chosen = TARGETS if targets is None else tuple(targets.split(","))
        held = None if base.lower() == "none" else base
        trained = training.qlora(model, text, rank=rank, alpha=alpha, targets=chosen, base=held, **shared)
    else:
        trained = training.qat(model, qat, text, only_scales=only_scales, imatrix=imatrix, **shared)
    trained.save(target)
    show(trained.report, as_json)
