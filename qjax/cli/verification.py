"""The command that proves where a file is from."""

from pathlib import Path
from typing import Annotated

import typer

from qjax.cli.app import Json, app, show


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file")],
    source: Annotated[
        str, typer.Option("--from", metavar="SOURCE", help="GGUF file, safetensors folder, Hub id, or 'tiny'")
    ],
    imatrix: Annotated[str | None, typer.Option(metavar="FILE", help="importance matrix it was made with")] = None,
    calibrate: Annotated[Path | None, typer.Option(metavar="TEXT", help="text that its method looked at")] = None,
    lora: Annotated[str | None, typer.Option(metavar="FILE", help="LoRA adapter that was added to SOURCE")] = None,
    file_type: Annotated[
        str | None,
        typer.Option("--type", metavar="TYPE", help="without a receipt: its file type [default: the formats it has]"),
    ] = None,
    method: Annotated[str, typer.Option(metavar="NAME[+NAME]", help="without a receipt: how it was rounded")] = "rtn",
    n_ctx: Annotated[
        int, typer.Option("-c", "--ctx-size", "--n-ctx", help="without a receipt: tokens in a window", min=8)
    ] = 512,
    chunks: Annotated[int | None, typer.Option("--chunks", help="without a receipt: windows at most", min=1)] = None,
    rounding: Annotated[str | None, typer.Option(help="without a receipt: what replaced the rounding rule")] = None,
    as_json: Json = False,
) -> None:
    """Prove that FILE follows from SOURCE: quantize it again, as FILE's receipt says, and compare all bytes.

    A file without a receipt, whoever wrote it, is compared with what rounding to the formats that it has gives.  Exit
    code 1 if it does not follow.
    """
    from qjax import evaluate
    from qjax.verification import verify as check

    verification = check(
        file,
        source,
        file_type,
        method=method,
        calibrate=None if calibrate is None else evaluate.read_text(calibrate),
        n_ctx=n_ctx,
        chunks=chunks,
        imatrix=imatrix,
        rounding=rounding,
        lora=lora,
    )
    show(verification, as_json)
    raise typer.Exit(not verification)
