"""glibc malloc settings: free heap pages are kept for the next layer, up to a share of the memory budget.

Each layer allocates what the previous one freed. When the free pages have been returned to the system, the
kernel has to map and zero new ones for every large tensor. Measured, this took a third of the time of
indexing a small model on a CPU (`tests/benchmarks/streamed.py --time`).
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's <malloc.h>
OWN_MAP_BYTES = 1 << 26  # larger allocations (large weights) are mmapped, and unmapped when freed
TIGHT_BYTES = 1 << 30  # budgets below this are too small to keep freed memory
TIGHT_MAP_BYTES = 1 << 20  # the mmap threshold for such a budget
OLD_LIMIT = 1 << 25  # the largest mmap threshold that older glibc versions accept
NEVER = 2**31 - 1
SHARE = 8  # free heap pages may take 1 / SHARE of the memory budget


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of <malloc.h>; `hblkhd` and `uordblks` are bytes in use, in mmaps and the heap."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


class Malloc:
    """Configures the heap of this process to keep free pages, up to an eighth of `budget` bytes.

    glibc before 2.33 can't count beyond 2 GiB, so there every `trim` returns all free pages. With another C
    library nothing is done.
    """

    def __init__(self, budget: int) -> None:
        self.limit = budget // SHARE
        if _counts():
            _set_mmap_threshold(OWN_MAP_BYTES if budget >= TIGHT_BYTES else TIGHT_MAP_BYTES)
            _baseline_bytes()

    def trim(self) -> None:
        """Return free pages to the system when they exceed the limit.

        Call it between layers, experts and blocks; any thread may.
        """
        library = _glibc()
        if library is not None and (not _counts() or self._exceeded()):
            library.malloc_trim(0)

    def _exceeded(self) -> bool:
        """Whether free pages exceed the limit: counting them walks the heap, so only where they can."""
        most = self.limit + _baseline_bytes()
        return _private_bytes() > most and _unused_bytes() > most


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc, else None."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


@cache
def _counts() -> bool:
    """Whether the C library has `mallinfo2`, which reports allocated bytes (glibc 2.33 and later)."""
    library = _glibc()
    if library is None or not hasattr(library, "mallinfo2"):
        return False
    library.mallinfo2.restype = _MallInfo
    return True


def _unused_bytes() -> int:
    """Resident private bytes not allocated through malloc: its free pages, and mappings of other code."""
    library = _glibc()
    assert library is not None
    info = library.mallinfo2()
    return _private_bytes() - int(info.uordblks + info.hblkhd)


def _private_bytes() -> int:
    """Resident bytes that are not shared with other processes or files."""
    process = _process(os.getpid()).memory_info()
    return int(process.rss - process.shared)


@cache
def _process(number: int) -> psutil.Process:
    return psutil.Process(number)


@cache
def _baseline_bytes() -> int:
    """`_unused_bytes` at the first call, which is before the first layer of this process."""
    return _unused_bytes()


def _set_mmap_threshold(size: int) -> None:
    """Allocate `size` bytes and more by mmap, unmapped when freed; smaller freed blocks stay in the heap."""
    library = _glibc()
    assert library is not None
    library.mallopt(M_MMAP_THRESHOLD, size) or library.mallopt(M_MMAP_THRESHOLD, OLD_LIMIT)
    library.mallopt(M_TRIM_THRESHOLD, NEVER)
