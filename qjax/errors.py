"""The one exception that means "the caller can fix this", and the hint that most of its messages end with."""

import difflib
from collections.abc import Iterable


class QjaxError(ValueError):
    """A user's mistake or a bad file, explained in one line; the command line prints it and exits with 2."""


def nearest_names(name: str, known: Iterable[str]) -> str:
    """A sentence to end a message with: the known names that look like ``name``, all of them if none does."""
    originals = {original.upper(): original for original in known}
    near = difflib.get_close_matches(name.upper(), originals)
    if near:
        return f"Did you mean {' or '.join(originals[match] for match in near)}?"
    return f"Known: {', '.join(originals.values())}."
