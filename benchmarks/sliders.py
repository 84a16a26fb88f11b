"""Times what the notebooks' sliders draw: every stop of every control, in a kernel that has run the notebook.

    python benchmarks/sliders.py notebooks/*.ipynb [--json FILE]

Each stop is drawn `--turns` times after the first; ms: from the call that draws it to the HTML that goes to the
browser, median of the turns, over all stops.  first: the slowest of the first drawings, some of which compile.  An
explorer remembers what it has drawn, so a reader meets these times once for each stop.  Needs `.[notebooks]`.
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import side_by_side
from side_by_side import ROOT, Row

from qjax.machine import Limits

COLUMNS = {
    "model": ("notebook", ""),
    "stops": ("stops", "d"),
    "first_ms": ("first, at most, ms", ".0f"),
    "median_ms": ("ms", ".0f"),
    "worst_ms": ("at most, ms", ".0f"),
    "goal": ("under", ""),
}
WATCH = """
def watch(path, turns):
    import json, time
    from qjax import viz
    from qjax.viz.widgets import to_html

    def ms(explorer, stop):
        start = time.perf_counter()
        to_html(explorer.render(**stop))
        return 1e3 * (time.perf_counter() - start)

    def explore(*args, **controls):
        explorer = made(*args, **controls)
        times = [[ms(explorer, stop) for stop in explorer.stops] for _ in range(turns + 1)]
        with open(path, "a") as file:
            file.write(json.dumps(times) + "\\n")
        return explorer

    made, viz.explore = viz.explore, explore
"""


def row(path: Path, limits: Limits, *, turns: int) -> Row:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "times"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(f"{WATCH}\nwatch({str(found)!r}, {turns})"))
        os.environ["PYTHONPATH"] = str(ROOT)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
        explorers = [json.loads(line) for line in found.read_text().splitlines()]
    first = [ms for times in explorers for ms in times[0]]
    warm = [statistics.median(ms) for times in explorers for ms in zip(*times[1:])]
    return {
        "model": path.stem,
        "stops": len(first),
        "first_ms": max(first),
        "median_ms": side_by_side.median(warm),
        "worst_ms": max(warm),
        "goal": "200 ms",
    }


def main() -> int:
    arguments = side_by_side.parser(__doc__, "NOTEBOOK", "as they lie in notebooks/").parse_args()
    return side_by_side.measure(arguments, COLUMNS, lambda path, limits: row(path, limits, turns=arguments.turns))


if __name__ == "__main__":
    sys.exit(main())
