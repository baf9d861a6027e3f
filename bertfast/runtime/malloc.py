"""Memory that a process keeps: fresh pages cost several times what is written to them.

glibc gives large blocks back to the system as soon as they are freed, so that every large tensor of every step is made
of fresh pages, each of which the system clears when it is first touched.
"""

from __future__ import annotations

import ctypes
from functools import cache

# Of mallopt, as <malloc.h> numbers them.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


@cache
def keep_freed_memory() -> bool:
    """From now on have this process keep what it frees, for what it takes next; whether that can be done here.

    It holds on to its peak until it ends. Where the allocator is not glibc's, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, 64 << 20)])


def give_freed_memory_back() -> None:
    """Once: between tensors of many sizes more and more of what is kept is too small for the next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
