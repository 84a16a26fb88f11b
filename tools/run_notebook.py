"""Runs notebooks from top to bottom in fresh kernels and stores what they show:

    python tools/run_notebook.py notebooks/*.ipynb

This is how stored outputs are made.  Two runs of a notebook that shows the same give the same file.
"""

import json
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from qjax.io.atomic import atomic_write

_WIDGETS = "application/vnd.jupyter.widget-state+json"


def run(path: Path) -> None:
    """Executes the notebook at ``path`` and writes it back.  Raises CellExecutionError if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    # The versions of what ran it would make every run look like a change.
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--InteractiveShell.xmode=Minimal"],
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}
    with atomic_write(path) as file:
        file.write((_number_models(notebook) + "\n").encode())


def _number_models(notebook: nbformat.NotebookNode) -> str:
    """The text of ``notebook`` with numbers for the ids of widget models, which are random, in the order in which they
    are shown and refer to each other."""
    # Not \b: a reference to a model is "IPY_MODEL_" and its id.
    pattern = r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])"
    models = notebook.metadata.get("widgets", {}).get(_WIDGETS, {}).get("state", {})
    numbers: dict[str, str] = {}

    def number(part) -> None:
        for old in re.findall(pattern, json.dumps(part, sort_keys=True)):
            if old not in numbers:
                numbers[old] = f"{len(numbers):032x}"
                number(models.get(old))

    number(notebook.cells)
    number(models)
    text = re.sub(pattern, lambda match: numbers[match[0]], nbformat.writes(notebook))
    # Sorts the models anew.
    return nbformat.writes(nbformat.reads(text, as_version=4))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        start = time.perf_counter()
        run(Path(name))
        size = Path(name).stat().st_size
        print(f"{name}: {time.perf_counter() - start:.0f} s, {size / 1e6:.2f} MB", file=sys.stderr)
