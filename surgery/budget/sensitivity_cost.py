"""What measuring sensitivity takes: one forward pass with five pruned copies of every layer's output.

And what a pass of the search for widths takes, which has two copies, at most, of the output of every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.budget.budget import Budget, largest_micro_batch
from surgery.budget.model_size import ModelSize
from surgery.budget.repair_cost import DENSE_STORES, moment_bytes, solve_bytes
from surgery.engine.device import TOKENS_PER_STEP
from surgery.engine.run_options import RunOptions

FRACTIONS = (0.0625, 0.125, 0.25, 0.5, 0.75)  # of the width kept
MEASURE_TOKENS = 2048  # of calibration text that each branch runs
FIT_BLOCKS = 32  # calibration blocks that the branches are refitted on


@dataclass(frozen=True)
class SensitivityCost:
    """`resident_bytes` beside the branches, `branch_bytes` of all branches, stored in `branches_on` memory or
    disk.
    """

    micro_batch: int
    resident_bytes: int
    branch_bytes: int
    branches_on: str


def measured_blocks(blocks: int, block_size: int) -> int:
    """Calibration blocks that each branch runs: MEASURE_TOKENS, at most a quarter of all, at least one."""
    return max(1, min(MEASURE_TOKENS // block_size, blocks // 4))


def sensitivity_cost(size: ModelSize, blocks: int, block_size: int, run: RunOptions) -> SensitivityCost:
    """Cost of measuring sensitivity on calibration blocks within `run.memory`; branches go to disk where they
    must.
    """
    matrices = sensitivity_bytes(size.widest, size.hidden, max(FRACTIONS))
    fitted = FIT_BLOCKS * block_size * run.dtype.itemsize * size.hidden
    return _pass_cost(size, blocks, block_size, run, matrices, len(FRACTIONS), fitted)


def width_search_cost(size: ModelSize, blocks: int, block_size: int, run: RunOptions) -> SensitivityCost:
    """Cost of one pass of the search for widths, likewise; hidden states and channels of the blocks that
    layers are repaired on go where branches do.
    """
    matrices = width_search_bytes(size.widest, size.hidden)
    stores = DENSE_STORES + 1  # the pruned model's
    fitted = FIT_BLOCKS * block_size * run.dtype.itemsize * (stores * size.hidden + size.widest)
    return _pass_cost(size, blocks, block_size, run, matrices, 2, 0, fitted)


def _pass_cost(
    size: ModelSize,
    blocks: int,
    block_size: int,
    run: RunOptions,
    matrices: int,
    copies: int,
    resident_stores: int,
    stores: int = 0,
) -> SensitivityCost:
    """Cost of a pass that takes so many bytes of `matrices` in a layer and makes `copies` of its output.

    It has `resident_stores` bytes of hidden states in memory, and `stores` bytes where branches go.
    """
    budget = Budget.of(run)
    tokens = max(TOKENS_PER_STEP[run.device.type], block_size)
    token_bytes = run.dtype.itemsize * size.hidden
    layers = 3 * size.layer + size.merging + size.saved_token * tokens + matrices
    ends = size.other_resident + size.compared_bytes(MEASURE_TOKENS)
    resident = resident_stores + token_bytes * MEASURE_TOKENS + max(layers, ends)
    branches = size.layers * copies * measured_blocks(blocks, block_size) * block_size * token_bytes + stores
    place = budget.place(branches, resident)
    return SensitivityCost(largest_micro_batch(block_size, run.device.type), resident, branches, place)


def width_search_bytes(width: int, outputs: int) -> int:
    """Bytes of matrices that trying widths of a layer of F = `width` channels and D = `outputs` takes: sums
    of all channels, those of the kept ones, all at most, and what solving for these takes.
    """
    return 2 * moment_bytes(width, outputs) + solve_bytes(width, outputs)


def sensitivity_bytes(width: int, outputs: int, largest: float) -> int:
    """Bytes of matrices that measuring a layer of F = `width` channels and D = `outputs` takes at its peak.

    All channels' moments [F, F] and [D, F] and what removed ones put out [D, F]; for the `largest` fraction
    kept, its own moments and what solving takes.
    """
    kept = round(largest * width)
    return 8 * (width**2 + kept**2 + outputs * (2 * width + kept)) + solve_bytes(kept, outputs)
