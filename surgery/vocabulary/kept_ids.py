"""Sorted token ids as text, short enough for a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def ids_text(ids: Sequence[int]) -> str:
    """Sorted ids as ranges with both ends: "0-255,260,300-310"."""
    starts = [ids[0], *(b for a, b in pairwise(ids) if b != a + 1)] if ids else []
    ends = [*(a for a, b in pairwise(ids) if b != a + 1), ids[-1]] if ids else []
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def ids_of(text: str) -> list[int]:
    """The ids that `ids_text` wrote."""
    found: list[int] = []
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
