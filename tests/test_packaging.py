"""The wheel works without the checkout: its data files are in it, and it imports and runs from elsewhere."""

import os
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

# What the package reads at run time beside its modules.
DATA_FILES = (
    "qjax/py.typed",
    "qjax/data/tales.grammar",
    "qjax/data/tiny/config.json",
    "qjax/data/tiny/model.safetensors",
    "qjax/data/tiny/tokenizer.json",
    "qjax/viz/style.mplstyle",
)

USE = """
import sys, pathlib
import numpy as np
import qjax
assert pathlib.Path(qjax.__file__).is_relative_to(sys.argv[1]), qjax.__file__
print(qjax.quantize(np.ones((2, 32), np.float32), "Q4_0"))
[tale] = qjax.data.tales.generate(0, 1)
model = qjax.load("tiny")
ids = model.tokenizer.encode(tale.text)
print(model.logits(np.asarray([ids[:8]])).shape)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # The build runs in a copy: setuptools would leave its build folder in the checkout.
    copy = folder / "source"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing += ["qjax", "pyproject.toml", "LICENSE", "README.md"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    [path] = folder.glob("qjax-*.whl")
    return path


def test_the_wheel_holds_the_data_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [name for name in DATA_FILES if name not in names] == []
    assert any(name.endswith("licenses/LICENSE") for name in names)
    packed = {name for name in names if name.endswith(".py")}
    assert packed == {path.relative_to(ROOT).as_posix() for path in (ROOT / "qjax").rglob("*.py")}


@pytest.mark.thorough
def test_the_wheel_works_elsewhere(wheel, tmp_path):
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*command, str(target), str(wheel)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(target), "QJAX_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", USE, str(target)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert lines[0] == "QTensor(Q4_0, 2×32, 4.50 bpw, 36 B)"
    assert lines[1].startswith("(1, 8, ")
