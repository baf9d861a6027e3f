"""Memory that a process keeps after freeing it, because fresh pages cost several times as much as writing to them.

glibc returns large blocks to the system as soon as they are freed. Then each large tensor of each step consists of
fresh pages, which the system clears when they are first touched.

Freed blocks of many sizes, with a few long-lived ones between them, are not always reused: memory then creeps up over
thousands of batches. `reuse_freed_memory` returns it once it has grown.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

# Parameters of mallopt, numbered as in <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4

_CALLS_PER_CHECK, _GROWTH = 64, 1.1
_STATM = Path("/proc/self/statm")


@cache
def keep_freed_memory() -> bool:
    """Make the process keep freed memory for its next allocations; its memory then stays at its peak until it ends.

    Returns:
        Whether that is possible: only glibc's allocator can be told so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_TOP_PAD, 64 << 20)])


def give_freed_memory_back() -> None:
    """Return freed memory to the system once: after tensors of many sizes, most free blocks are too small to reuse."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_memory() -> int:
    """Return the resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class _Reuse:
    """Keep freed memory from one call to the next, and give it back when resident memory has grown by a tenth."""

    def __init__(self) -> None:
        self.calls = 0
        self.baseline: int | None = None  # resident memory _CALLS_PER_CHECK calls after memory was given back

    def __call__(self) -> None:
        if not keep_freed_memory():
            return
        self.calls += 1
        if self.calls % _CALLS_PER_CHECK:
            return
        resident = resident_memory()
        if self.baseline is None:
            self.baseline = resident
        elif resident > _GROWTH * self.baseline:
            give_freed_memory_back()
            self.baseline = None


reuse_freed_memory = _Reuse()
"""Call before each batch of inference on a CPU: see `_Reuse`."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory of the machine or of a GPU was exhausted."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )
