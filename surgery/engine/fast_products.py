"""float32 products at the rate of bfloat16 ones, where their factors are bfloat16 anyway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def fast_products(*factors: torch.Tensor) -> Iterator[None]:
    """Within the block, float32 products round their factors to bfloat16 (on a GPU to TensorFloat32) and sum
    in float32, where all `factors` are bfloat16 anyway: 4 times the rate on a CPU with such instructions.
    """
    if any(factor.dtype != torch.bfloat16 for factor in factors):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
