"""The progress bar of everything that takes long."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def progress(
    iterable: Iterable[T],
    *,
    desc: str,
    total: int | None = None,
    unit: str = "it",
    label: Callable[[T], str] | None = None,
) -> Iterable[T]:
    """``iterable`` itself, with a tqdm bar on stderr where a person is watching one.

    Silent when stderr is not a terminal (pipes, stored notebooks) and in tests.  ``total`` is needed only
    where ``iterable`` has no length.  ``label`` says what to call an item while it is worked on.
    """
    if sys.stderr is None or not sys.stderr.isatty() or "PYTEST_CURRENT_TEST" in os.environ:
        return iterable
    from tqdm import tqdm

    bar = tqdm(iterable, desc=desc, total=total, unit=unit, file=sys.stderr)
    return bar if label is None else _labelled(bar, label)


def _labelled(bar: Any, label: Callable[[T], str]) -> Iterator[T]:
    for item in bar:
        bar.set_postfix_str(label(item))
        yield item
