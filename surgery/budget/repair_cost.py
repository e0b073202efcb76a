"""What the matrices of a repair take, and how channels are divided into column blocks and passes so that they
fit.

Symbols: K channels solved for together, D outputs. Sums are in double precision; so is what a
ridge is solved with, where float32 would not do.
"""

from __future__ import annotations

DENSE_STORES = 3  # of the dense model: a layer's input, its output, the stream before its FFN
GRAMS = 3  # K x K beside the sums while a ridge is solved for, the copy LAPACK makes included
CHANGES = 4  # D x K at the same time
HELD_OUT = 8  # one calibration block in eight is held out, to choose ridges and the final norm's scale
NORM_SCALES = tuple(round(1.05 - 0.05 * step, 2) for step in range(8))  # of the final norm, that are tried
NORM_SLICE = 64  # tokens that they are tried on together
NORM_TOKENS = 4096  # tokens of held-out blocks that they are tried on, at most
EXPERT_PASSES = 3  # over a layer, for its routed experts together, each from what the one before left


def held_out_blocks(blocks: int) -> int:
    """Number of blocks, of so many calibration blocks, that are held out; one at least."""
    return max(1, blocks // HELD_OUT)


def moment_bytes(width: int, outputs: int) -> int:
    """Bytes of the sums for K = `width` channels and D = `outputs`, training and held-out blocks apart."""
    return 2 * 8 * width * (width + outputs)


def solve_bytes(width: int, outputs: int) -> int:
    """Bytes that solving for K = `width` channels takes at its peak, beside the sums."""
    return 8 * width * (GRAMS * width + CHANGES * outputs)


def repair_bytes(widths: list[int], outputs: int) -> int:
    """Bytes of matrices when the sums for several FFNs are held and one FFN is solved for at a time."""
    sums = sum(moment_bytes(width, outputs) for width in widths)
    return sums + solve_bytes(max(widths, default=0), outputs)


def column_blocks(width: int, outputs: int, budget: int | None) -> list[slice]:
    """Channels solved for together: all, or as many at a time as keep the matrices within `budget` bytes."""
    if width == 0:
        return []
    count = 1
    while budget is not None and count < width and repair_bytes([-(-width // count)], outputs) > budget:
        count += 1
    step = -(-width // count)
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def pass_schedule(blocks: dict[str, list[slice]], outputs: int, budget: int | None) -> list[dict[str, slice]]:
    """Which column block of which FFN is solved in which pass over a layer: as many together as `budget`
    bytes hold.

    The blocks of one FFN follow each other.
    """
    left = {name: list(found) for name, found in blocks.items()}
    passes: list[dict[str, slice]] = []
    while any(left.values()):
        now: dict[str, slice] = {}
        for name, found in left.items():
            widths = [block.stop - block.start for block in (*now.values(), *found[:1])]
            if found and (not now or budget is None or repair_bytes(widths, outputs) <= budget):
                now[name] = found.pop(0)
        passes.append(now)
    return passes
