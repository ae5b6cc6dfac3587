"""Large buffers kept for reuse: glibc's malloc told not to give them back to the system after every use."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST = 2**31 - 1  # mallopt takes an int


def keep_large_buffers() -> bool:
    """Serve buffers of any size from the heap and keep what is freed. False where the C library is not glibc.

    By default each buffer above 32 MB at most is mapped, zeroed page by page and unmapped at every use: on a CPU half
    of a step at 64^3, a tenth at 32^3 (tests/bench/RESULTS.md). In return the process's memory stays at its peak.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _LARGEST), (_M_TOP_PAD, 64 * 2**20))
    return all(library.mallopt(name, value) == 1 for name, value in settings)
