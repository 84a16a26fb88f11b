"""What the C library keeps of the memory that loading has used."""

import ctypes
import os


def give_back_memory() -> None:
    """Makes the C library return what was freed: glibc keeps blocks of up to 32 MiB, which together can be as large as
    the model that was made of them.  Does nothing where there is no such function."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
