"""A score and a repair of one's own, which surgeon finds through entry points once this package is installed.

pip install examples/own_method
surgeon prune SmolLM2-135M-Instruct --method loudest --repair halfway
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery import Method, RepairMethod
from surgery.repair.least_squares import least_squares

if TYPE_CHECKING:
    import torch

    from surgery import FfnIndex
    from surgery.repair.least_squares import Moments


def loudest(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """max |u_i| * ||W_i||, W = down_proj, [F]: the most that a channel can write."""
    return ffn.statistics["max_abs"] * ffn.statistics["down_norm"]


def halfway(moments: Moments, ridge: float, has_bias: bool) -> torch.Tensor:
    """dW [D, K]: half of what least squares would change, for those who trust their calibration text half."""
    return 0.5 * least_squares(moments, ridge, has_bias)


LOUDEST = Method(loudest, label="largest possible output", protects=True)
HALFWAY = RepairMethod(
    "what stays was moved halfway to its least-squares refit on the calibration text", halfway
)
