"""The progress of everything that takes long: a bar for who watches the terminal, or steps for who observes it."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

from qjax.errors import escaped

T = TypeVar("T")


class Step(NamedTuple):
    """How far a loop is: ``done`` of ``total`` (None: nobody knows) of ``unit``, as in 3 of 39 tensors."""

    desc: str
    done: int
    total: int | None
    unit: str


class Stopped(BaseException):
    """For an observer to raise, so that the work ends.

    Not an Exception, like KeyboardInterrupt: what handles errors on the way must not take it for one.
    """


_observer: ContextVar[Callable[[Step], None] | None] = ContextVar("observer", default=None)


@contextmanager
def observed(by: Callable[[Step], None]) -> Iterator[None]:
    """While the block runs, in its thread, ``by`` is told each step of what `progress` counts, and no bar is drawn.

    What ``by`` raises ends the work where it is; files are left whole, as after any error.
    """
    token = _observer.set(by)
    try:
        yield
    finally:
        _observer.reset(token)


def progress(
    iterable: Iterable[T],
    *,
    desc: str,
    total: int | None = None,
    unit: str = "it",
    label: Callable[[T], str] | None = None,
    size: Callable[[T], int] | None = None,
) -> Iterable[T]:
    """``iterable`` itself, with a tqdm bar on stderr where a person is watching one, or `observed` by the program.

    Silent when stderr is not a terminal (pipes, stored notebooks) and in tests.  ``total`` is needed only
    where ``iterable`` has no length.  ``label`` says what to call an item while it is worked on, ``size`` how many
    units it is, if not one.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if observer := _observer.get():
        return _told(observer, iterable, Step(desc, 0, total, unit), size)
    if sys.stderr is None or not sys.stderr.isatty() or "PYTEST_CURRENT_TEST" in os.environ:
        return iterable
    from tqdm import tqdm

    if label is None and size is None:
        return tqdm(iterable, desc=desc, total=total, unit=unit, file=sys.stderr)
    bar = tqdm(desc=desc, total=total, unit=unit, unit_scale=unit == "B", file=sys.stderr)
    return _drawn(bar, iterable, label, size)


def _told(
    observer: Callable[[Step], None], iterable: Iterable[T], step: Step, size: Callable[[T], int] | None
) -> Iterator[T]:
    observer(step)
    for item in iterable:
        yield item
        step = step._replace(done=step.done + (size(item) if size else 1))
        observer(step)


def _drawn(
    bar: Any, iterable: Iterable[T], label: Callable[[T], str] | None, size: Callable[[T], int] | None
) -> Iterator[T]:
    with bar:
        for item in iterable:
            if label:
                bar.set_postfix_str(escaped(label(item)))
            yield item
            bar.update(size(item) if size else 1)
