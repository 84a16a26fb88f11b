"""The progress bar of everything that takes long."""

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(iterable: Iterable[T], *, desc: str, total: int | None = None, unit: str = "it") -> Iterable[T]:
    """``iterable`` itself, with a tqdm bar on stderr where a person is watching one.

    Silent when stderr is not a terminal (pipes, stored notebooks) and in tests.  ``total`` is needed only
    where ``iterable`` has no length.
    """
    if sys.stderr is None or not sys.stderr.isatty() or "PYTEST_CURRENT_TEST" in os.environ:
        return iterable
    from tqdm import tqdm

    return tqdm(iterable, desc=desc, total=total, unit=unit, file=sys.stderr)
