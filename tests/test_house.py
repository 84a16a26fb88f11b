"""The rules of the house that no other test would notice being broken."""

import ast
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
import typing

import jax
import numpy as np
import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import qjax
from qjax.methods import recipes

PACKAGE = ROOT / "qjax"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500

# From the ground up: a room imports only rooms before it.
ROOMS = (
    "errors", "progress", "table", "data", "formats", "tensor", "ops", "models", "io", "metrics", "methods", "source",
    "quantize_file", "model", "convert", "machine", "info", "diff", "soundness", "verification", "evaluate", "train",
    "comparison", "bench", "viz", "cli", "__main__",
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
                is_field = method in getattr(thing, "__dataclass_fields__", ())
                if not method.startswith("_") and inspect.isfunction(member) and not is_field:
                    yield f"qjax.{name}.{method}", getattr(thing, method)


def test_public_names_have_docstrings():
    assert [name for name, thing in public_things() if not inspect.getdoc(thing)] == []
    assert qjax.__all__ == sorted(qjax.__all__, key=str.lower) or qjax.__all__ == sorted(qjax.__all__)
    assert set(qjax.__all__) <= set(dir(qjax))


def kinds(annotation):
    """What an annotation admits, one after another."""
    parts = () if hasattr(annotation, "dim_str") else typing.get_args(annotation)
    return [kind for part in parts for kind in kinds(part)] or [annotation]


def test_shapes_of_public_arrays_are_said():
    """In the annotation; or, of what may be no array, in the docstring, as in (d_out, d_in).  A seed has none."""
    unsaid, n_said = [], 0
    for name, thing in public_things():
        function = inspect.unwrap(thing)
        if not inspect.isfunction(function):
            continue
        signature = inspect.signature(function)
        annotations = {p.name: p.annotation for p in signature.parameters.values() if p.name != "seed"}
        for argument, annotation in (annotations | {"return": signature.return_annotation}).items():
            found = kinds(annotation)
            n_said += sum(hasattr(kind, "dim_str") for kind in found)
            bare = any(kind in (jax.Array, np.ndarray) for kind in found)
            if bare and not re.search(r"(?<!\w)\(\w+(, \w+)+\)", inspect.getdoc(thing) or ""):
                unsaid.append(f"{name}({argument})")
    assert unsaid == []
    assert n_said > 20


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


# ── what runs code or leaves its folder ──────────────────────────────────────────────────────────────

# Modules that make objects of bytes, and so run what bytes say.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load",
    "yaml.load_all", "torch.load", "tarfile.open", "shutil.unpack_archive", "tempfile.mktemp",
}  # fmt: skip
UNSAFE_METHODS = {"extractall", "extract"}
UNSAFE_ARGUMENTS = {"shell", "allow_pickle"}


def dotted(node: ast.expr) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def unsafe(tree: ast.AST):
    """(line, what) of all that could run what a file says."""
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    loaders = {c.name for c in classes if {"SafeLoader", "yaml.SafeLoader"} & {*map(dotted, c.bases)}}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((node.lineno, name) for name in names if name.split(".")[0] in UNSAFE_MODULES)
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in UNSAFE_CALLS or name.rpartition(".")[2] in UNSAFE_METHODS:
            yield node.lineno, name
        if name == "yaml.load" and (len(node.args) < 2 or dotted(node.args[1]) not in loaders):
            yield node.lineno, name
        for keyword in node.keywords:
            if keyword.arg in UNSAFE_ARGUMENTS and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                yield node.lineno, f"{name}({keyword.arg}=)"


@pytest.mark.parametrize("folder", ["qjax", "tools", "benchmarks"])
def test_nothing_runs_what_a_file_says(folder):
    """No pickle, no eval, no shell: of all that is read, only chat templates are programs, and they have a sandbox."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, what in unsafe(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "import os, shelve", "from joblib import load", "torch.load(file)", "eval('1')", "exec(code)",
        "compile(text, '', 'exec')",
        "os.system('ls')", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=p)", "run('ls', shell=True)",
        "yaml.load(text)", "yaml.load(text, yaml.Loader)", "yaml.unsafe_load(text)", "zip.extractall(folder)",
    ],
)  # fmt: skip
def test_the_check_sees_what_runs_code(code):
    assert len([*unsafe(ast.parse(code))]) == 1


def test_the_check_lets_pass_what_is_safe():
    code = "re.compile('x'); model.eval; np.load(f); run(['ls'], shell=False); yaml.safe_load(t)\n"
    code += "class Loader(yaml.SafeLoader): pass\nyaml.load(t, Loader)"
    assert [*unsafe(ast.parse(code))] == []


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


SPELLED = re.compile(r"(?<![\w./-])(?:iq|q|tq)\d[a-z0-9]*_\w+", re.IGNORECASE)


def misspelled(text: str) -> list[str]:
    """Names of formats and file types that are not written as they are registered: Q4_K_M, not q4_k_m."""
    known = {*qjax.formats.names(), *recipes.FILE_TYPES, *recipes.ALIASES}
    return [match[0] for match in SPELLED.finditer(text) if match[0] not in known]


def without_code(text: str) -> str:
    """Prose: in code there are file names, and llama.cpp's options, whose values are lower-case."""
    return re.sub(r"```.*?```|`[^`]*`|<!--.*?-->", "", text, flags=re.DOTALL)


def test_formats_are_spelled_as_they_are_called():
    assert misspelled("q4_k_m, Q4_k and IQ2_Xs") == ["q4_k_m", "Q4_k", "IQ2_Xs"]
    assert misspelled("Q4_K_M, Q8_0, TQ2_0, IQ4_NL, Q4_K and docs/q4_0.png") == []
    found = {"README.md": misspelled(without_code((ROOT / "README.md").read_text(encoding="utf-8")))}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        found[path.name] = misspelled(without_code(text))
    assert {name: words for name, words in found.items() if words} == {}


def test_the_matrix_of_ci_has_every_python():
    """And runs no command that is not there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    rows = {name: job["strategy"]["matrix"]["include"] for name, job in jobs.items() if "strategy" in job}
    tested = {row["python"] for row in rows["test"]}
    assert tested == {f"3.{i}" for i in range(20) if f"3.{i}.0" in SpecifierSet(project["requires-python"])}
    oldest = [row["jax"] for row in rows["same-bytes"] if row["python"] == "3.11"]
    [required] = [Requirement(text) for text in project["dependencies"] if text.startswith("jax>")]
    assert oldest == [f"jax=={of.version}.0 jaxlib=={of.version}.0" for of in required.specifier]
    for step in (step for job in jobs.values() for step in job["steps"] if "run" in step):
        for script in re.findall(r"(?:tools|\.ci)/\S+", step["run"]):
            assert (ROOT / script).exists(), script


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_what_ci_installs_is_what_the_project_asks_for(python):
    """Every package in one version, by hashes (python tools/make_constraints.py)."""
    text = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    pinned = {}
    for line in (line for line in text.splitlines() if not line.startswith("#")):
        stated, *hashes = line.split("--hash=")
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64} *", of) for of in hashes), line
        assert hashes, line
        requirement = Requirement(stated.strip())
        if requirement.marker is None or requirement.marker.evaluate(here):
            assert pinned.setdefault(requirement.name, requirement.specifier) == requirement.specifier
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *extras["test"], *extras["browser"]):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(here):
            [exact] = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(exact.version), f"{text}: {exact}"


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


@pytest.mark.thorough
def test_types():
    result = run_tool("pyright", "--pythonpath", sys.executable)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr
