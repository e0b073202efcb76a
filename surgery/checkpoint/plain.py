"""Any checkpoint that surgeon reads as a plain one: quantised forms are dequantised on reading."""

from __future__ import annotations

import torch

from surgery.checkpoint.fp8 import Fp8Checkpoint
from surgery.checkpoint.packed_integers import PackedCheckpoint
from surgery.checkpoint.reader import Checkpoint


def as_plain(stored: Checkpoint, dtype: torch.dtype | None = None) -> Checkpoint:
    """`stored`, opened with `quantised`, dequantised to `dtype` where it is quantised.

    `dtype` None stands for the dtype that the config states, or bfloat16. Raises CheckpointError for tensors
    that do not fit each other, UsageError where a library is missing.
    """
    if stored.packed_bits is not None:
        return PackedCheckpoint(stored, dtype)
    return Fp8Checkpoint(stored, dtype) if stored.in_fp8 else stored
