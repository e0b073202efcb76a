"""Round-to-nearest weights, with super-outlier handling (The Super Weight, arXiv 2411.07191, section 4).

A matrix W [R, C] is split into blocks that share a scale. In each block, with N bits, b the block's values
(with clipping, |b| is at most mean + z standard deviations of its |values|), and codes q in [-2^(N-1),
2^(N-1) - 1]:

    symmetric   scale = 2 max|b| / (2^N - 1),            q = round(b / scale)
    asymmetric  scale = (max b - min b) / (2^N - 1),     q = round(b / scale) + zero,
                zero = round(-min b / scale) - 2^(N-1)

and W^ = (q - zero) scale, with the scale rounded to the storage dtype first, as in packed files. The value 0
is always representable, so that pruned weights stay zero. (The paper's real-valued offset is no integer zero
point and can't be packed.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from surgery.errors import UsageError

CLIPS = (4.0, 6.0, 9.0, 12.0, 20.0)  # standard deviations; those of the paper are 9, 11, 12 and 20
NEAREST, AUTOROUND = "nearest", "autoround"
ROUNDINGS = (NEAREST, AUTOROUND)


@dataclass(frozen=True)
class Scheme:
    """Quantisation scheme of a matrix.

    `bits` is 2 to 8. `granularity` says which weights share a scale: "group" `size` consecutive weights of a
    row; "block" `size` consecutive weights of the flattened matrix, as in the paper; "channel" a row;
    "tensor" all weights. `clip` is z, or None for no clipping. `rounding` is one of ROUNDINGS. Raises
    UsageError for bits or sizes out of range.
    """

    bits: int = 4
    symmetric: bool = False
    granularity: str = "group"
    size: int = 128
    clip: float | None = None
    rounding: str = NEAREST

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError("bits out of range", where="--bits", expected="2 to 8", found=str(self.bits))
        if self.granularity in ("group", "block") and self.size < 2:
            raise UsageError("a block needs two weights or more", where="--group-size", found=str(self.size))

    @property
    def name(self) -> str:
        """Name for tables, such as "INT4 asym group 128"."""
        size = f" {self.size}" if self.granularity in ("group", "block") else ""
        by = " by AutoRound" if self.tuned else ""
        return f"INT{self.bits} {'sym' if self.symmetric else 'asym'} {self.granularity}{size}{by}"

    @property
    def tuned(self) -> bool:
        """Whether AutoRound trains the rounding on calibration text."""
        return self.rounding == AUTOROUND

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, with 16 bits of scale and, if asymmetric, N bits of zero point per group or block.

        Scales of channels and tensors are not counted.
        """
        if self.granularity not in ("group", "block"):
            return float(self.bits)
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / self.size


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix of shape `shape`: codes q [blocks, n] int8, scales and zero points [blocks, 1]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    shape: torch.Size

    def dequantised(self) -> torch.Tensor:
        """W^ [R, C], in the dtype of the scales."""
        values = (self.codes.float() - self.zero.float()) * self.scale.float()
        return values.flatten()[: self.shape.numel()].view(self.shape).to(self.scale.dtype)


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> Rounded:
    """Round W [R, C] to nearest. A short last block is padded with zeros, which do not change its scale.

    Raises UsageError for a group size that does not divide the row length.
    """
    blocks = _blocks(weight.float(), scheme)
    if scheme.clip is not None:
        magnitude = blocks.abs()
        limit = magnitude.mean(1, keepdim=True) + scheme.clip * magnitude.std(1, keepdim=True, correction=0)
        blocks = blocks.clamp(-limit, limit)
    steps = 2**scheme.bits - 1
    low, high = blocks.amin(1, keepdim=True).clamp_max(0), blocks.amax(1, keepdim=True).clamp_min(0)
    spread = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    scale = (spread / steps).to(weight.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a block of zeros
    bottom, top = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    zero = torch.zeros_like(low) if scheme.symmetric else (-low / scale.float()).round() + bottom
    zero = zero.clamp(bottom, top)
    codes = ((blocks / scale.float()).round() + zero).clamp(bottom, top)
    return Rounded(codes.to(torch.int8), scale, zero.to(torch.int8), weight.shape)


def _blocks(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """W as [blocks, n], n weights per block."""
    if scheme.granularity == "tensor":
        return weight.reshape(1, -1)
    if scheme.granularity == "channel":
        return weight.reshape(len(weight), -1)
    if scheme.granularity == "group" and weight.shape[1] % scheme.size:
        raise UsageError(
            "the group size does not divide a matrix's rows",
            where="--group-size",
            expected=f"a divisor of {weight.shape[1]}",
            found=str(scheme.size),
        )
    flat = weight.flatten()
    size = min(scheme.size, len(flat))
    filled = torch.nn.functional.pad(flat, (0, -len(flat) % size))
    return filled.view(-1, size)


def round_excluding(
    weight: torch.Tensor, scheme: Scheme, places: list[tuple[int, int]]
) -> tuple[Rounded, torch.Tensor]:
    """(rounded, W^): super weights at `places` are set to zero before rounding and restored in W^."""
    rest = weight.clone()
    for row, column in places:
        rest[row, column] = 0
    rounded = round_to_nearest(rest, scheme)
    restored = rounded.dequantised()
    for row, column in places:
        restored[row, column] = weight[row, column]
    return rounded, restored


def choose_clip(
    weight: torch.Tensor, scheme: Scheme, places: list[tuple[int, int]], power: torch.Tensor | None
) -> Scheme:
    """The scheme with the clip, from CLIPS or none, whose error on calibration text is smallest.

    The error is sum_ij p_j (W^ - W)_ij^2, with `power` p [C] proportional to the mean square of each input
    (ones if None). It is the squared error of the linear's output for uncorrelated inputs.
    """
    best, least = scheme, math.inf
    p = torch.ones(weight.shape[1]) if power is None else power
    for clip in (None, *CLIPS):
        candidate = replace(scheme, clip=clip)
        _, values = round_excluding(weight, candidate, places)
        error = float(((values.float() - weight.float()).square() @ p.to(weight.device).float()).sum())
        if error < least:
            best, least = candidate, error
    return best
