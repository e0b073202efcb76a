"""Pages that the C library's heap holds free: kept for the next layer while they are few, given back beyond that.

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
OWN_MAP_BYTES = 1 << 26  # tensors from here on are maps of their own, given back at once: large weights
TIGHT_BYTES = 1 << 30  # a budget below this has no room for freed memory
TIGHT_MAP_BYTES = 1 << 20  # then tensors from here on are maps of their own
OLD_LIMIT = 1 << 25  # the largest such threshold that older versions accept
NEVER = 2**31 - 1
SHARE = 8  # of a memory budget, one part in so many may be held free


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of <malloc.h>; `hblkhd` and `uordblks` are bytes in use, in maps and in the heap."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


class Heap:
    """The heap of this process, which may hold free pages up to an eighth of `budget` bytes.

    A glibc too old to count beyond 2 GiB (before 2.33) gives all back between layers; of another C library nothing is asked.
    """

    def __init__(self, budget: int) -> None:
        self.limit = budget // SHARE
        if _counts():
            _own_maps_from(OWN_MAP_BYTES if budget >= TIGHT_BYTES else TIGHT_MAP_BYTES)
            _at_first()

    def settle(self) -> None:
        """Give free pages back when too many are held; call it between layers, experts and blocks, from any thread."""
        library = _glibc()
        if library is not None and (not _counts() or _beside_use() - _at_first() > self.limit):
            library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


@cache
def _counts() -> bool:
    """Whether the C library can say how much it has handed out."""
    library = _glibc()
    if library is None or not hasattr(library, "mallinfo2"):
        return False
    library.mallinfo2.restype = _MallInfo
    return True


def _beside_use() -> int:
    """Bytes of private memory that the C library has not handed out: its free pages, and what others mapped."""
    library = _glibc()
    assert library is not None
    info, held = library.mallinfo2(), psutil.Process().memory_info()
    return int(held.rss - held.shared - info.uordblks - info.hblkhd)


@cache
def _at_first() -> int:
    """The same before the first layer of this process."""
    return _beside_use()


def _own_maps_from(size: int) -> None:
    """Have freed tensors of fewer bytes stay in the heap, and larger ones be maps that go back at once."""
    library = _glibc()
    assert library is not None
    library.mallopt(M_MMAP_THRESHOLD, size) or library.mallopt(M_MMAP_THRESHOLD, OLD_LIMIT)
    library.mallopt(M_TRIM_THRESHOLD, NEVER)
