"""The rules of the house that no other test would notice being broken."""

import ast
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import qjax

PACKAGE = ROOT / "qjax"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500

# From the ground up: a room imports only rooms before it.
ROOMS = (
    "errors", "progress", "table", "data", "formats", "tensor", "ops", "models", "io", "metrics", "methods", "source",
    "quantize_file", "model", "convert", "machine", "info", "diff", "soundness", "evaluate", "train", "comparison",
    "bench", "viz", "cli", "__main__",
)  # fmt: skip

# Needed by parts of the package, but not by one who only quantizes arrays.
HEAVY = (
    "matplotlib", "ipywidgets", "IPython", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "tqdm",
    "typer", "pandas", "optax", "yaml",
)  # fmt: skip


def room_of(module: str) -> str:
    return module.split(".")[1]


def imported_rooms(tree: ast.AST):
    """(line, room) of each import of the package's own modules, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [node.module or ""]
            if node.module == "qjax":
                names = [f"qjax.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("qjax."):
                room = room_of(name)
                # `from qjax import load`: a public name stands for the module behind it.
                yield node.lineno, room_of(qjax._LATER[room][0]) if room in qjax._LATER else room


def test_every_module_has_a_room():
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in MODULES} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_up(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == "__init__":
        return
    for line, imported in imported_rooms(ast.parse(path.read_text(encoding="utf-8"))):
        assert imported in ROOMS, f"{path.name}:{line}: {imported} is not a room"
        assert ROOMS.index(imported) <= ROOMS.index(room), f"{path.name}:{line}: {room} imports {imported}"


def test_the_import_check_sees_a_wrong_import():
    tree = ast.parse("def f():\n    from qjax.viz import plots\n    from qjax import load\n    import qjax.cli")
    assert list(imported_rooms(tree)) == [(2, "viz"), (3, "model"), (4, "cli")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_are_short_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text))


def public_things():
    for name in qjax.__all__:
        thing = getattr(qjax, name)
        yield f"qjax.{name}", thing
        if inspect.isclass(thing):
            for method, member in vars(thing).items():
                member = inspect.unwrap(getattr(member, "__func__", member))
                if not method.startswith("_") and inspect.isfunction(member):
                    yield f"qjax.{name}.{method}", getattr(thing, method)


def test_public_names_have_docstrings():
    assert [name for name, thing in public_things() if not inspect.getdoc(thing)] == []
    assert qjax.__all__ == sorted(qjax.__all__, key=str.lower) or qjax.__all__ == sorted(qjax.__all__)
    assert set(qjax.__all__) <= set(dir(qjax))


IMPORT = """
import sys, time
import jax, jaxtyping
start = time.process_time()
import qjax
print(time.process_time() - start)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_import_is_light():
    """Beyond jax, only numpy and jaxtyping; under a second of a processor's time, once Python has compiled it."""
    for _ in range(2):
        result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=ROOT)
        seconds, loaded = result.stdout.splitlines()
    assert {*HEAVY} & {*loaded.split()} == set()
    assert float(seconds) < 1


def test_lazy_names_are_the_modules_names():
    for name, (module, attribute) in qjax._LATER.items():
        loaded = importlib.import_module(module)
        assert getattr(qjax, name) is (getattr(loaded, attribute) if attribute else loaded)
    with pytest.raises(AttributeError, match="no attribute 'perplexty'"):
        _ = qjax.perplexty


# Hosts are put together here, so that this file does not name them either.
FORBIDDEN = re.compile(
    "|".join(
        [
            *(re.escape(".".join(host)) for host in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"))),
            *(re.escape(".".join(host)) for host in (("npmjs", "com"), ("debian", "org"), ("golang", "org"))),
            r"(?<![\w.+~/])/(?:root|work|home|Users)/\w",
        ]
    )
)


def tracked_files():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_files_name_no_hosts_and_no_machine():
    assert FORBIDDEN.search("see /" + "root/x")
    found = []
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in FORBIDDEN.finditer(text)]
    assert found == []


def test_no_large_files_but_the_model():
    sizes = {path: path.stat().st_size for path in tracked_files()}
    large = [path.name for path, size in sizes.items() if size > 2_000_000]
    assert large in ([], ["model.safetensors"])
    assert sum(sizes.values()) < 32_000_000


def tool(name: str):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_registry():
    readme_table = tool("readme_table")
    text = readme_table.README.read_text(encoding="utf-8")
    assert text == readme_table.update(text), "run python tools/readme_table.py"


def test_the_readme_shows_the_notebooks_figures():
    gallery = tool("gallery")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == gallery.update(text), "run python tools/gallery.py"
    pictures = {gallery.picture_of(notebook): gallery.figure(notebook)[0] for notebook in gallery.notebooks()}
    assert pictures == {path: path.read_bytes() for path in (ROOT / gallery.FOLDER).iterdir()}, "run tools/gallery.py"
    assert sum(map(len, pictures.values())) < 500_000


def test_buttons_and_first_cells_have_the_address():
    repository = tool("repository")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[Launch Binder]({repository.binder()})" in readme
    for path in repository.files():
        text = path.read_text(encoding="utf-8")
        assert text == repository.update(text), f"{path.name}: run python tools/repository.py"
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"[Open in Colab]({repository.colab(path.name)})" in readme, path.name
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        assert first.splitlines()[:5] == repository.first_lines(), path.name


def test_a_fork_changes_the_address_in_one_place(monkeypatch):
    repository = tool("repository")
    links = [repository.binder(), repository.colab("x.ipynb"), *repository.first_lines()]
    text = json.dumps({"links": " ".join(links), "source": [f"{line}\n" for line in repository.first_lines()]})
    monkeypatch.setattr(repository, "address", lambda: "https://github.com/some-one/q.jax")
    changed = repository.update(text)
    assert changed.count("some-one/q.jax") == 4
    assert "qjax/qjax" not in changed
    assert json.loads(changed)["source"] == [f"{line}\n" for line in repository.first_lines()]
    assert repository.update(changed) == changed


def test_the_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text):
        target = link[0] or link[1]
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_notebook_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{notebook.name}" in text, notebook.name


def run_tool(*command: str):
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(arguments):
    result = run_tool("ruff", *arguments, ".")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr


def test_types():
    result = run_tool("pyright", "--pythonpath", sys.executable)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr
