"""What the C library keeps of freed memory, seen from outside in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from surgery.engine.malloc import _counts

HELD = """
import sys
import psutil
import torch
from surgery.engine.malloc import Malloc

malloc = Malloc(int(sys.argv[1]))
kept = [torch.ones(48 << 20, dtype=torch.uint8) for _ in range(8)]
last = torch.ones(1 << 20, dtype=torch.uint8)
full = psutil.Process().memory_info().rss
del kept
malloc.trim()
print(full - psutil.Process().memory_info().rss)
"""


def given_back(budget: int) -> int:
    """MiB of 384 freed ones that the system has back after a layer."""
    run = subprocess.run([sys.executable, "-c", HELD, str(budget)], check=True, capture_output=True)
    return int(run.stdout) >> 20


@pytest.mark.skipif(not _counts(), reason="the C library is no glibc of 2.33 or later")
def test_freed_pages_stay_while_they_are_few_for_the_budget() -> None:
    assert given_back(1 << 40) < 40
    assert given_back(1 << 28) > 340
