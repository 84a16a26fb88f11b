"""Writes the repository's public address, which pyproject.toml holds, into README.md and the notebooks:

python tools/repository.py

The start buttons in the README and the first cell of each notebook, which installs the package on Colab, need it.  A
fork changes [project.urls] in pyproject.toml and runs this once.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BRANCH = "main"
START = "notebooks/00_start_here.ipynb"

_NAME = r"[\w.-]+/[\w.-]+?"


def address() -> str:
    """As in https://github.com/owner/name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"]


def colab(notebook: str) -> str:
    """The address that opens ``notebook`` on Colab, as `binder` does the first one on Binder."""
    return f"https://colab.research.google.com/github/{_name()}/blob/{BRANCH}/notebooks/{notebook}"


def binder() -> str:
    return f"https://mybinder.org/v2/gh/{_name()}/{BRANCH}?urlpath=lab/tree/{START}"


def first_lines() -> list[str]:
    """What the first code cell of each notebook begins with."""
    install = f"    %pip install -q git+{address()}"
    return ["try:", "    import qjax", "except ImportError:  # on Colab", install, "    import qjax"]


def update(text: str) -> str:
    """A README or a notebook with the address that pyproject.toml has."""
    for before, after in (
        (r"https://colab\.research\.google\.com/github/", "/blob/"),
        (r"https://mybinder\.org/v2/gh/", f"/{BRANCH}?"),
    ):
        text = re.sub(f"({before}){_NAME}(?={re.escape(after)})", rf"\g<1>{_name()}", text)
    return re.sub(r'(%pip install -q git\+)[^\s"\\]+', rf"\g<1>{address()}", text)


def _name() -> str:
    return address().removeprefix("https://github.com/")


def files() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]


if __name__ == "__main__":
    for path in files():
        old = path.read_text(encoding="utf-8")
        if (new := update(old)) != old:
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(ROOT))
