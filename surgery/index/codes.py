"""16-bit codes of float32 statistics: what a published index stores, and what every plan is made from.

A row of codes divides the float32 numbers between its smallest and its largest magnitude into equal steps of
their bit patterns, which are nearly equal steps of the logarithm. float16 has fixed steps of 2^-11: finer
here, because a layer's statistics span few powers of two. Integer arithmetic only, so that every machine
decodes the same numbers.
"""

from __future__ import annotations

import torch

SIGN = 1 << 15  # of the codes of a row with negative values


def encode(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Codes [..., F] uint16, ranges [..., 2] float32) of finite `values` [..., F].

    A range holds the smallest and the largest magnitude of its row that is not zero; the smallest is negative
    where the row has negative values. Code 0 is zero. Otherwise, with b(x) the bit pattern of the float32 x
    as an integer and n = 65535 (32767 in a row with negative values, where the top bit is the sign),
    code = 1 + round((n - 1) (b(|x|) - b(lo)) / (b(hi) - b(lo))). `decode` is exact for lo, hi and zero, and
    coding what it returns gives the same codes.
    """
    values = values.float().contiguous()
    bits = _bits(values.abs())
    zero, negative = bits == 0, (values < 0).any(-1, keepdim=True)
    high = bits.amax(-1, keepdim=True) if values.shape[-1] else bits.new_zeros((*values.shape[:-1], 1))
    low = torch.where(zero, high, bits).amin(-1, keepdim=True) if values.shape[-1] else high
    steps, span = _steps(negative), (high - low).clamp_min(1)
    codes = 1 + (2 * (bits - low) * steps + span) // (2 * span)
    codes = torch.where(zero, 0, codes + SIGN * (values < 0))
    ends = torch.cat([low, high], -1).int().view(torch.float32)
    ends[..., :1] = torch.where(negative, -ends[..., :1], ends[..., :1])
    return codes.to(torch.uint16), ends


def decode(codes: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    """Values [..., F] float32 of the codes and ranges that `encode` returned."""
    numbers, ends = codes.long(), _bits(ranges.abs().contiguous())
    low, high = ends[..., :1], ends[..., 1:]
    signed = ranges[..., :1] < 0
    steps = _steps(signed)
    minus = signed & (numbers >= SIGN)
    numbers = numbers - SIGN * minus
    bits = low + (2 * (numbers - 1) * (high - low) + steps) // (2 * steps)
    found = torch.where(numbers == 0, 0, bits).int().view(torch.float32)
    return torch.where(minus, -found, found)


def rounded(values: torch.Tensor) -> torch.Tensor:
    """`values` [..., F] float32 as their codes hold them; values that are not all finite stay as they are."""
    return decode(*encode(values)) if bool(values.isfinite().all()) else values


def _bits(magnitudes: torch.Tensor) -> torch.Tensor:
    return magnitudes.view(torch.int32).long()


def _steps(signed: torch.Tensor) -> torch.Tensor:
    """Steps between the codes of the smallest and the largest magnitude."""
    return torch.where(signed, SIGN - 2, 2 * SIGN - 2)
