"""The application that commands register with, and what they share."""

import atexit
import dataclasses
import errno
import json
import signal
import sys
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
    str,
    typer.Argument(
        metavar="MODEL", help="GGUF file, safetensors folder, Hub id (org/repo[@revision][:Q4_0]), or 'tiny'"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Receipt = Annotated[
    bool | None,
    typer.Option(
        "--receipt/--no-receipt",
        help="say in the metadata what OUT was made of, and how [default: if llama.cpp does not write such a file]",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only say what would be written")]

# What another path would help against; what is left, as a full disk, is not in what was asked for.
_BAD_PATH = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


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
        _fail(f"{error.filename or 'system'}: {error.strerror or error}", 2 if error.errno in _BAD_PATH else 1)
    finally:
        # What is done is done: while Python cleans up and ends, Ctrl-C has nothing to stop.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def _fail(message: str, code: int) -> None:
    print("qjax: " + " ".join(message.split("\n")), file=sys.stderr)
    sys.exit(code)


def show(record: Any, as_json: bool = False) -> None:
    """Prints a record to stdout, as text or JSON."""
    if as_json:
        record = json.dumps(record.to_json() if hasattr(record, "to_json") else dataclasses.asdict(record), indent=2)
    print(record)
