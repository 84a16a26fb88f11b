"""The one exception that means "the caller can fix this", and the hint that most of its messages end with."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class QjaxError(ValueError):
    """A user's mistake or a bad file, explained in one line; the command line prints it and exits with 2.

    Names in a file are a stranger's: of what they put into ``message`` control and invisible characters are escaped,
    and the middle of much is left out.
    """

    def __init__(self, message: str):
        if len(message) > _MAX_MESSAGE:
            message = f"{message[: _MAX_MESSAGE // 2]} … {message[-_MAX_MESSAGE // 2 :]}"
        super().__init__(escaped(message))


_MAX_MESSAGE = 4000


@contextmanager
def located(path: object) -> Iterator[None]:
    """What a QjaxError of the block says is said of the file ``path``."""
    try:
        yield
    except QjaxError as error:
        raise QjaxError(f"{path}: {error}") from error


def escaped(text: str) -> str:
    """``text`` with control, invisible and undecodable characters as Python writes them, as in ``\\x1b``: they could
    steer a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def nearest_names(name: str, known: Iterable[str]) -> str:
    """A sentence to end a message with: the known names that look like ``name``, all of them if none does."""
    originals = {original.upper(): original for original in known}
    near = difflib.get_close_matches(name.upper(), originals)
    if near:
        return f"Did you mean {' or '.join(originals[match] for match in near)}?"
    return f"Known: {', '.join(originals.values())}."
