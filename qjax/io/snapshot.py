"""Downloads files of a Hub repository: a program of its own, for such a one can be ended whatever it is waiting for.

It takes the arguments of huggingface_hub.snapshot_download as JSON, and prints the folder, or on stderr what `describe`
says of the error.  It is run by its path and imports nothing of the package, so it starts at once.
"""

import json
import sys
import time
from typing import Any

_TRIES, _PAUSE_S = 3, 1.0
# Asking again would not change the answer.
_FINAL = {"HfHubHTTPError", "EntryNotFoundError", "ValueError"}


def describe(error: BaseException) -> dict[str, Any]:
    """An exception of huggingface_hub as JSON can hold it: the names of its classes, the HTTP status, the message."""
    if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__:
        # It only adds that the cache has no such file either.
        error = error.__cause__
    return {
        "kinds": [kind.__name__ for kind in type(error).__mro__],
        "status": getattr(getattr(error, "response", None), "status_code", None),
        "message": " ".join(str(error).split()) or type(error).__name__,
    }


def _passes(error: Exception) -> bool:
    """Whether it may be gone a moment later.  What the file system says, it says with a number, as of a full disk."""
    told = describe(error)
    final = _FINAL.intersection(told["kinds"]) or getattr(error, "errno", None) is not None
    return told["status"] >= 500 if told["status"] else not final


def main(request: str) -> None:
    from huggingface_hub import snapshot_download

    for left in reversed(range(_TRIES)):
        try:
            print(snapshot_download(**json.loads(request)))
            return
        except Exception as error:
            if not left or not _passes(error):
                sys.exit(json.dumps(describe(error)))
            time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main(sys.argv[1])
