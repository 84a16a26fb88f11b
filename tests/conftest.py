"""Fixtures that find what may be absent, and skip with a reason."""

import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

import jaxtyping
import pytest
from haste import collect_rarely, hasten, share_contexts

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# What is written in the signatures of modules that write shapes is checked in every test, and nowhere else.  Not in the
# others, nor where tales are told, in millions of calls: checks are a quarter of what all tests take.
CHECKED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "qjax").rglob("*.py"))
    if path.stem != "__init__" and "data" not in path.parts and "jaxtyping" in path.read_text(encoding="utf-8")
]


def _with_shapes(check):
    """``check``, of the functions alone that write shapes: of others a type checker has seen the calls."""

    def checked(function, **options):
        written = getattr(function, "__annotations__", {}).values()
        return check(function, **options) if "jaxtyping" in f"{[*written]}" else function

    return lambda **options: functools.partial(checked, **options)


# What the import hook decorates all functions and classes with.
jaxtyping.jaxtyped = _with_shapes(jaxtyping.jaxtyped)
# An int passes for a float, as the language defines it (PEP 484).
jaxtyping.install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# Where in a file each operation of a program is from, which only compilers' messages would say; kernels have it, too.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
collect_rarely()
share_contexts()


def pytest_configure(config):
    """The kernels of nbval start with `every_stop.watch`.

    Here, for whole runs, and not beside the notebooks: the tests import names from this module, and Python has room
    for one of the name of conftest.
    """
    folder = tempfile.mkdtemp()
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    startup = Path(folder) / "profile_default" / "startup"
    startup.mkdir(parents=True)
    lines = f"import sys; sys.path.append({str(TESTS)!r})", "import every_stop; every_stop.watch()"
    (startup / "watch.py").write_text("\n".join([*lines, "del sys, every_stop"]), encoding="utf-8")
    os.environ["IPYTHONDIR"] = folder
    config.pluginmanager.register(Kernels())


# They take longer than the others, and are left to thorough runs.
LONG_NOTEBOOKS = (
    "05_every_format_on_one_page",
    "06_a_quantized_forward_pass",
    "08_perplexity_tradeoff",
    "09_spend_bits_where_they_matter",
    "10_playground",
)


class Kernels:
    """Names the notebook in the kernel's environment, for `every_stop.watch`; leaves long ones to thorough runs."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        os.environ["QJAX_NOTEBOOK"] = item.path.stem

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        for item in items:
            if item.path.stem in LONG_NOTEBOOKS:
                item.add_marker(pytest.mark.thorough)


@pytest.fixture(scope="session", autouse=True)
def _compiled_before():
    """Programs are kept from run to run, as for users: most of the time of a first run goes to compiling."""
    from qjax import model

    model.enable_compilation_cache()


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module(request):
    """Compiled programs stay in memory until they are dropped, several gigabytes over the whole run.

    Those of a module marked `in_haste` are compiled so (see haste.py): where what is tested is an equation, a message
    or a picture.  Where it is bytes or speed, and in exact runs, they are compiled as for users.
    """
    import jax

    hasty = request.node.get_closest_marker("in_haste") and request.config.option.markexpr != "exact"
    undo = hasten() if hasty else lambda: None
    yield
    undo()
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny():
    """The built-in model in float32."""
    import qjax

    return qjax.load("tiny").quantize("F32")


@pytest.fixture(scope="session")
def tiny_windows(tiny):
    """Six short windows of calibration text for it."""
    from qjax.data import tales
    from qjax.methods import pipeline

    text = "".join(tale.text for tale in tales.generate(tales.TRAINING, 40))
    return pipeline.windows(tiny.config, tiny.tokenizer, text, 128, 6)


@pytest.fixture(scope="session")
def tiny_seen(tiny, tiny_windows):
    """What they show of the inputs of its matrices."""
    from qjax.methods import statistics

    return statistics.moments(tiny.config, tiny.tensors, tiny_windows, 4)[0]


def sampled(values, *chosen):
    """Parameters of a test: by default those of ``values`` that are ``chosen``, the others in thorough runs."""
    assert all(value in values for value in chosen), chosen
    return [pytest.param(value, marks=() if value in chosen else pytest.mark.thorough) for value in values]


def shared(name: str) -> Path:
    """A file of the optional folder of peer values and texts beside the repository; skips where it is absent."""
    path = ROOT.parent / "shared" / name
    if not path.exists():
        pytest.skip(f"no {name} beside the repository")
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line with these arguments: (exit code, stdout, stderr)."""

    from qjax import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["qjax", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return call


def fails(result, message):
    """The command line refused its input: exit code 2, one line on stderr with ``message`` in it."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The folder of llama.cpp's programs, named by QJAX_LLAMA_CPP."""
    folder = os.environ.get("QJAX_LLAMA_CPP")
    if not folder:
        pytest.skip("QJAX_LLAMA_CPP does not name a folder with llama.cpp's programs")
    return Path(folder)


@pytest.fixture(scope="session")
def llama_cpp_sources() -> Path:
    """llama.cpp's sources (see `programs.source`), where Python can run the converters in them."""
    from oracles import programs

    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return programs.source()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file: the one that QJAX_SMOLLM2 names, else the cached or downloaded one."""
    from qjax import QjaxError
    from qjax.io import hub

    if named := os.environ.get("QJAX_SMOLLM2"):
        return Path(named)
    try:
        return hub.locate("smollm2-135m-instruct")
    except QjaxError as error:
        pytest.skip(str(error))
