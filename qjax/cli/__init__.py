"""The command line: a thin door over the same functions.

Data go to stdout, progress and messages to stderr.  What fails ends with one line, and with the exit codes of `main`.
"""

from qjax.cli import files, models, training, verification
from qjax.cli.app import main

__all__ = ["files", "main", "models", "training", "verification"]
