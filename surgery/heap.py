"""Pages that the C library's heap holds free: kept for the next layer while the budget allows, given back beyond it.

The next layer asks for what the last one freed. Pages that went back to the system meanwhile have to be found and
cleared again, at every large tensor: that took a third of the time of an index of a small model on a CPU, measured
(`tests/benchmarks/streamed.py --time`).
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h> of glibc
OWN_MAP_BYTES = 1 << 30  # tensors from here on are maps of their own: long-lived ones, as hidden states
OLD_LIMIT = 1 << 25  # the largest such threshold that older versions accept
NEVER = 2**31 - 1


class Heap:
    """The heap of this process, which may hold on to free pages until the process has `budget` / 2 bytes.

    Half, because what is free between two layers may be in the wrong sizes for the next. Without glibc nothing is done.
    """

    def __init__(self, budget: int) -> None:
        self.limit = budget // 2
        self.process = psutil.Process()
        _keep_freed()

    def settle(self) -> None:
        """Give free pages back when the process holds more than half of the budget; call it between layers."""
        library = _glibc()
        if library is None:
            return
        held = self.process.memory_info()
        if held.rss - held.shared > self.limit:
            library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None


@cache
def _keep_freed() -> None:
    """Have freed tensors stay in the heap; once is enough for a process."""
    library = _glibc()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, OWN_MAP_BYTES) or library.mallopt(M_MMAP_THRESHOLD, OLD_LIMIT)
        library.mallopt(M_TRIM_THRESHOLD, NEVER)
