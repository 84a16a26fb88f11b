"""Writes .ci/constraints.txt: what CI installs, each package in one version and by the hashes of its files.

    pip install uv && python tools/make_constraints.py [--keep]

For every Python that pyproject.toml allows and all platforms; where a package's newest release wants a later Python, an
older one is named for the earlier.  --keep changes versions only where pyproject.toml asks for it.
"""

import argparse
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
EXTRAS = ("test", "browser")
# What installs the rest, and builds the project.
MORE = ("pip", "setuptools>=77")
HEADER = "# Written by tools/make_constraints.py; do not edit.\n"


def oldest_python() -> str:
    """As in 3.11."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["requires-python"].partition(">=")[2].partition(",")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="the versions that are there")
    arguments = parser.parse_args()
    uv = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv") or sys.exit("pip install uv")
    command = [uv, "pip", "compile", "pyproject.toml", "-", "--universal", "--python-version", oldest_python()]
    command += [part for extra in EXTRAS for part in ("--extra", extra)]
    # Nothing that says which index the packages came from: any may have them, the hashes say whether they are the same.
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
    if arguments.keep and CONSTRAINTS.exists():
        command += ["--constraint", str(CONSTRAINTS)]
    ran = subprocess.run(command, cwd=ROOT, input="\n".join(MORE), capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(ran.stderr)
    CONSTRAINTS.write_text(HEADER + ran.stdout, encoding="utf-8")


if __name__ == "__main__":
    main()
