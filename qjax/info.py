"""What a model file holds, without loading it."""

import os

from qjax.io.summary import FileSummary, TensorSummary
from qjax.source import Source, open_source


def info(name: str | os.PathLike[str]) -> FileSummary:
    """The summary of a GGUF file (of any architecture) or a safetensors folder, found as `qjax.load` finds it.

    Raises QjaxError if there is none, or it is damaged.
    """
    return summarize(name, open_source(name))


def summarize(name: str | os.PathLike[str], source: Source) -> FileSummary:
    """What `open_source` opened, as a record to print."""
    files = (file for path in source.paths for file in (path.iterdir() if path.is_dir() else (path,)))
    return FileSummary(
        name=os.fspath(name),
        container=source.container,
        paths=tuple(map(str, source.paths)),
        file_bytes=sum(file.stat().st_size for file in files if file.is_file()),
        metadata=source.metadata,
        tensors=tuple(TensorSummary.of(*item) for item in source.tensors.items()),
    )
