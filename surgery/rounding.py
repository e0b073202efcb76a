"""Round-to-nearest weights, with super-outlier handling (The Super Weight, arXiv 2411.07191, section 4).

One matrix W [R, C] is cut into blocks that share a scale; in each, with N bits, b the block's values clipped to [-z, z]
deviations around zero where clipping is asked for, and codes q in [-2^(N-1), 2^(N-1) - 1]:

    symmetric   scale = 2 max|b| / (2^N - 1),            q = round(b / scale)
    asymmetric  scale = (max b - min b) / (2^N - 1),     q = round(b / scale) + zero,  zero = round(-min b / scale) - 2^(N-1)

and W^ = (q - zero) scale, the scale rounded to the storage dtype first, as packed files hold it. Zero is always a code, so
that pruned weights stay zero (the paper's real-valued offset has no integer zero point to be packed).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from surgery.errors import UsageError

CLIPS = (4.0, 6.0, 9.0, 12.0, 20.0)  # deviations; the paper's are 9, 11, 12 and 20


@dataclass(frozen=True)
class Scheme:
    """How weights are rounded: `bits` 2 to 8; blocks by `granularity`, of `size` weights where that is group or block.

    group: `size` neighbours of a row; block: `size` neighbours of the flattened matrix, as the paper has it; channel: a
    row; tensor: all. `clip` is z, None for none.
    """

    bits: int = 4
    symmetric: bool = False
    granularity: str = "group"
    size: int = 128
    clip: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError("bits out of range", where="--bits", expected="2 to 8", found=str(self.bits))
        if self.granularity in ("group", "block") and self.size < 2:
            raise UsageError("a block needs two weights or more", where="--group-size", found=str(self.size))

    @property
    def name(self) -> str:
        """In words, as tables have it."""
        size = f" {self.size}" if self.granularity in ("group", "block") else ""
        return f"INT{self.bits} {'sym' if self.symmetric else 'asym'} {self.granularity}{size}"

    @property
    def bits_per_weight(self) -> float:
        """Codes, and 16 bits of scale and N of zero point for each block; for rows of any length those go unseen."""
        if self.granularity not in ("group", "block"):
            return float(self.bits)
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / self.size


@dataclass(frozen=True)
class Rounded:
    """Codes q, scales and zero points of a matrix: q [blocks, n] int8, the others [blocks, 1]; `shape` the matrix's."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    shape: torch.Size

    def dequantised(self) -> torch.Tensor:
        """W^ [R, C], in the dtype of the scales."""
        values = (self.codes.float() - self.zero.float()) * self.scale.float()
        return values.flatten()[: self.shape.numel()].view(self.shape).to(self.scale.dtype)


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> Rounded:
    """Round W [R, C]; a last short group or block is filled up with zeros, which change neither minimum nor maximum.

    Raises UsageError for a group that does not divide the rows.
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
    """W as [blocks, weights of a block]."""
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


def held_out(
    weight: torch.Tensor, scheme: Scheme, places: list[tuple[int, int]]
) -> tuple[Rounded, torch.Tensor]:
    """(rounded, W^): super weights at `places` are held out of the rounding, as zeros, and put back into W^."""
    rest = weight.clone()
    for row, column in places:
        rest[row, column] = 0
    rounded = round_to_nearest(rest, scheme)
    back = rounded.dequantised()
    for row, column in places:
        back[row, column] = weight[row, column]
    return rounded, back


def choose_clip(
    weight: torch.Tensor, scheme: Scheme, places: list[tuple[int, int]], power: torch.Tensor | None
) -> Scheme:
    """The scheme with the z of CLIPS, or none, whose reconstruction error on calibration text is smallest.

    Error: sum_ij p_j (W^ - W)_ij^2, p [C] the mean square of each input (ones where unknown): that of the layer's output
    with inputs taken as uncorrelated.
    """
    best, least = scheme, math.inf
    p = torch.ones(weight.shape[1]) if power is None else power
    for clip in (None, *CLIPS):
        tried = replace(scheme, clip=clip)
        _, back = held_out(weight, tried, places)
        error = float(((back.float() - weight.float()).square() @ p.to(weight.device).float()).sum())
        if error < least:
            best, least = tried, error
    return best
