"""Fuzzes the readers of files, for long.

    python -m tests.fuzz --executions 5000000 [--targets gguf chat ...] [--jobs 2] [--json ...]
    python -m tests.fuzz --coverage [--executions 5000] [--json ...]

Each target runs in a process of its own, led by atheris where that is installed (pip install -e ".[fuzz]", on Linux).
The summary in the JSON file (benchmarks/results/fuzz.json) counts what earlier runs did too; their corpus is under
build/fuzz.  Exit code 1 if there is an input, from this run or before, that a reader does not take as it should: see
`running`.
--coverage: the lines of the readers that seeds, kept cases, the corpus, and so many random inputs of each target reach,
by coverage.py.  Exit code 1 if that is less than 95 % of them.
"""

import argparse
import sys
from pathlib import Path

from . import guided


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=5000, help="of all targets together, with --coverage of each")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="by default all")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="targets at a time")
    parser.add_argument("--json", type=Path, help="summary to read and write")
    parser.add_argument("--folder", type=Path, default=guided.ROOT / "build" / "fuzz", help="corpus and findings")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        guided.work(arguments.worker, arguments.executions, arguments.folder)
        return 0

    if arguments.coverage:
        from . import covered

        return covered.report(arguments.executions, arguments.folder, arguments.json)

    from . import reports  # which imports the readers: not before a worker, or the measuring of lines, begins

    return reports.fuzz(arguments.targets, arguments.executions, arguments.jobs, arguments.folder, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
