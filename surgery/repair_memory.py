"""What the matrices of a repair take, and how channels are divided into parts and passes so that they fit.

Symbols: K channels solved for together, D outputs. All matrices are in double precision.
"""

from __future__ import annotations

GRAMS = 4  # K x K beside the sums while a ridge is solved for, the copy LAPACK makes included
CHANGES = 5  # D x K at the same time


def moment_bytes(width: int, outputs: int) -> int:
    """Bytes of the sums for K = `width` channels and D = `outputs`, training and held-out blocks apart."""
    return 2 * 8 * width * (width + outputs)


def solve_bytes(width: int, outputs: int) -> int:
    """Bytes that solving for K = `width` channels takes at its peak, beside the sums."""
    return 8 * width * (GRAMS * width + CHANGES * outputs)


def repair_bytes(widths: list[int], outputs: int) -> int:
    """Bytes of the matrices when the sums for several FFNs are alive, one of which is solved for at a time."""
    sums = sum(moment_bytes(width, outputs) for width in widths)
    return sums + solve_bytes(max(widths, default=0), outputs)


def parts(width: int, outputs: int, budget: int | None) -> list[slice]:
    """Channels solved for together: all of them, or where that takes more than `budget` bytes, so many at a time."""
    if width == 0:
        return []
    count = 1
    while budget is not None and count < width and repair_bytes([-(-width // count)], outputs) > budget:
        count += 1
    step = -(-width // count)
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def schedule(chunks: dict[str, list[slice]], outputs: int, budget: int | None) -> list[dict[str, slice]]:
    """Which part of which FFN is done in which pass over a layer: as many together as `budget` bytes hold.

    The parts of one FFN follow each other.
    """
    left = {unit: list(found) for unit, found in chunks.items()}
    turns: list[dict[str, slice]] = []
    while any(left.values()):
        now: dict[str, slice] = {}
        for unit, found in left.items():
            widths = [part.stop - part.start for part in (*now.values(), *found[:1])]
            if found and (not now or budget is None or repair_bytes(widths, outputs) <= budget):
                now[unit] = found.pop(0)
        turns.append(now)
    return turns
