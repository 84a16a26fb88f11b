"""The notebooks' form; nbval compares what the cells show, and `every_stop.py` draws all that the controls offer."""

import base64
import os
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from every_stop import MAX_PNG_BYTES

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_CELLS, MAX_LINES, MAX_UNCOMPARED = 30, 8, 3
# What JupyterLab shows of a line in a window 900 pixels wide is 88 characters; a longer one scrolls sideways.
MAX_CHARACTERS = 85
MAX_NOTEBOOK_BYTES = 1_000_000

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [(cell, output) for cell in code_cells(notebook) for output in cell.outputs]


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


@each_notebook
def test_was_run_from_top_to_bottom(notebook):
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata.keys() <= {"kernelspec", "language_info", "widgets"}, "what an editor left"
    assert {key for cell in notebook.cells for key in cell.metadata} <= {"tags"}
    assert "version" not in notebook.metadata.language_info, "of the Python that happened to run it"


@each_notebook
def test_is_small(path, notebook):
    assert len(notebook.cells) <= MAX_CELLS
    assert max(len(re.findall(r"^.*\S", cell.source, re.M)) for cell in code_cells(notebook)) <= MAX_LINES
    assert path.stat().st_size < MAX_NOTEBOOK_BYTES
    uncompared = [c for c in code_cells(notebook) if "nbval-ignore-output" in c.metadata.get("tags", [])]
    assert len(uncompared) <= MAX_UNCOMPARED


@each_notebook
def test_lines_are_seen_whole(notebook):
    lines = [line for cell in code_cells(notebook) for line in cell.source.splitlines()]
    assert [line for line in lines if len(line) > MAX_CHARACTERS] == []


PATHS = re.compile(r"(?<![\w.])/(home|root|Users|work|tmp|usr)/|[A-Z]:\\\\")


@each_notebook
def test_cells_name_no_machine(notebook):
    assert [cell.source for cell in notebook.cells if PATHS.search(cell.source)] == []
    assert [cell.source for cell in notebook.cells if cell.get("attachments")] == []


@each_notebook
def test_outputs_are_clean(notebook):
    """No warnings, no errors that are not meant, nothing that tells whose machine it was."""
    for cell, output in outputs(notebook):
        assert output.get("name") != "stderr", cell.source
        if output.output_type == "error":
            assert "raises-exception" in cell.metadata.get("tags", []), cell.source
        shown = nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[output])]))
        assert not PATHS.search(shown), cell.source
        picture = output.get("data", {}).get("image/png")
        if picture:
            assert len(base64.b64decode(picture)) < MAX_PNG_BYTES, cell.source
            assert output.data["text/plain"].startswith("Figure: "), "a picture without words"


@each_notebook
def test_has_the_shape_of_all(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.match(r"# .*\?\n", text), "the title is the question"
    for part in ("**In one minute.**", "*Predict", "**Takeaway.**", "## Try it", "## Exercises"):
        assert part in text, part
    assert 2 <= text.count("<details><summary>Answer</summary>") == text.count("</details>") <= 3
    assert "assert " in code_cells(notebook)[-1].source, "the last code cell checks what the page says"
    code = "\n".join(cell.source for cell in code_cells(notebook))
    assert not re.search("pyplot|matplotlib", code)


@each_notebook
def test_links_lead_somewhere(path, notebook):
    links = re.findall(r"\]\(([^)#]+?\.ipynb)\)", "\n".join(cell.source for cell in notebook.cells))
    assert links, "no next notebook"
    for link in links:
        assert (path.parent / link).exists(), link


@each_notebook
def test_has_a_control_to_play_with(notebook):
    """Made by `viz.explore`, and so put through its stops (`every_stop.py`)."""
    assert any("viz.explore(" in cell.source for cell in code_cells(notebook))
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for _, output in outputs(notebook))


@pytest.mark.parametrize(
    ("alternatives", "verdict"), [("'one', 'two'", "passed"), ("'one', 'one'", "the control changes the picture")]
)
def test_every_stop_is_drawn_where_cells_are_compared(tmp_path, alternatives, verdict):
    """`every_stop.py` is at work: a notebook whose control does nothing fails."""
    render = f"render = lambda stop=0: viz.Html('<p></p>', alt=[{alternatives}][stop])"
    sources = f"from qjax import viz\n{render}", "render()", "explorer = viz.explore(render, stop=[0, 1])"
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "page.ipynb")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "conftest", "--nbval-lax", "page.ipynb"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests"])), "PYTHONUTF8": "1"}
    report = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, encoding="utf-8").stdout
    assert verdict in report
    assert ("failed" in report) == (verdict != "passed")
