"""Memory that a process keeps after freeing it, because fresh pages cost several times as much as writing to them.

glibc returns large blocks to the system as soon as they are freed. Then each large tensor of each step consists of
fresh pages, which the system clears when they are first touched.
"""

from __future__ import annotations

import ctypes
from functools import cache

# Parameters of mallopt, numbered as in <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


@cache
def keep_freed_memory() -> bool:
    """Make the process keep freed memory for its next allocations; its memory then stays at its peak until it ends.

    Returns:
        Whether that is possible: only glibc's allocator can be told so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, 64 << 20)])


def give_freed_memory_back() -> None:
    """Return freed memory to the system once: after tensors of many sizes, most free blocks are too small to reuse."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
