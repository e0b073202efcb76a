"""What measuring sensitivity takes: one forward pass with five pruned copies of every layer's output.

And what a pass of the search for widths takes, which has two copies, at most, of the output of every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.budget.budget import Budget, largest_micro_batch
from surgery.budget.model_size import ModelSize
from surgery.budget.repair_cost import solve_bytes
from surgery.engine.device import TOKENS_PER_STEP
from surgery.engine.run_options import RunOptions

FRACTIONS = (0.0625, 0.125, 0.25, 0.5, 0.75)  # of the width kept
MEASURE_TOKENS = 2048  # of calibration text that each branch runs
FIT_BLOCKS = 32  # calibration blocks that the branches are refitted on


@dataclass(frozen=True)
class SensitivityCost:
    """`resident_bytes` beside the branches, `branch_bytes` of all branches, stored in `branches_on` memory or
    disk. `keeps_moments` says whether all layers' moments fit beside both, for later passes.
    """

    micro_batch: int
    resident_bytes: int
    branch_bytes: int
    branches_on: str
    keeps_moments: bool = False


def measured_blocks(blocks: int, block_size: int) -> int:
    """Calibration blocks that each branch runs: MEASURE_TOKENS, at most a quarter of all, at least one."""
    return max(1, min(MEASURE_TOKENS // block_size, blocks // 4))


def sensitivity_cost(size: ModelSize, blocks: int, block_size: int, run: RunOptions) -> SensitivityCost:
    """Cost of measuring sensitivity on calibration blocks within `run.memory`; branches go to disk where they
    must.
    """
    matrices = sensitivity_bytes(size.widest, size.hidden, max(FRACTIONS))
    return _pass_cost(size, blocks, block_size, run, matrices, len(FRACTIONS))


def width_search_cost(size: ModelSize, blocks: int, block_size: int, run: RunOptions) -> SensitivityCost:
    """Cost of one pass of the search for widths, likewise. Any width may be solved for."""
    return _pass_cost(size, blocks, block_size, run, sensitivity_bytes(size.widest, size.hidden, 1.0), 2)


def _pass_cost(
    size: ModelSize, blocks: int, block_size: int, run: RunOptions, matrices: int, copies: int
) -> SensitivityCost:
    """Cost of a pass that takes so many bytes of `matrices` in a layer and makes `copies` of its output."""
    budget = Budget.of(run)
    tokens = max(TOKENS_PER_STEP[run.device.type], block_size)
    token_bytes = run.dtype.itemsize * size.hidden
    streams = token_bytes * (FIT_BLOCKS * block_size + MEASURE_TOKENS)
    layers = 3 * size.layer + size.merging + size.saved_token * tokens + matrices
    resident = streams + max(layers, size.other_resident + size.compared_bytes(MEASURE_TOKENS))
    branches = size.layers * copies * measured_blocks(blocks, block_size) * block_size * token_bytes
    place = budget.place(branches, resident)
    kept = resident + branches * (place == budget.first_place) + 8 * size.layers * size.widest**2
    return SensitivityCost(
        largest_micro_batch(block_size, run.device.type), resident, branches, place, kept <= budget.usable
    )


def sensitivity_bytes(width: int, outputs: int, largest: float) -> int:
    """Bytes of matrices that measuring a layer of F = `width` channels and D = `outputs` takes at its peak.

    All channels' moments [F, F] and, for the `largest` fraction kept, its own moments and what solving takes.
    """
    kept = round(largest * width)
    return 8 * (width**2 + kept**2 + outputs * (width + kept)) + solve_bytes(kept, outputs)
