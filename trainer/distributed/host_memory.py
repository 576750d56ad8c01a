"""Memory of a CPU run: freed blocks stay with the process.

The C library gives every large block back to the system as soon as it is freed, and the next step's tensor of
the same size is made of new pages that the system has to clear and map: measured on 2 cores, a third of a
MobileNetV1 step, a fifth of a ResNet50 step (benchmarks/results/host_memory.json). GPU memory has torch's own
cache.
"""

from __future__ import annotations

import ctypes
import ctypes.util

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def retain_freed_memory() -> bool:
    """Tell glibc: no blocks of their own mapping, never shrink the heap, one heap for all threads. Call it
    before threads begin. False where the C library is another one."""
    try:
        mallopt = ctypes.CDLL(ctypes.util.find_library("c")).mallopt
    except (OSError, AttributeError):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
