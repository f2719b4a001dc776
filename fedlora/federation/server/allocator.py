"""Keeps freed memory in the process, so that the next round need not fault it in again; or not.

glibc gives freed memory back to the system; each page of it is then zeroed anew when it is next
touched. An aggregation whose result is as large as its uploads paid as much for that as for its
arithmetic (docs/use/performance.md).
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 32 * 2**20
"""Bytes of the largest tensor that is kept so: the most that glibc allows."""


def keep_freed_memory() -> None:
    """From now on, this process keeps the memory that it frees. Without glibc, does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_freed_memory_back() -> None:
    """What this process has freed, and kept so far, is the system's. Without glibc, does nothing.

    Freed tensors of some 32 MB and below leave holes that glibc keeps.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
