"""Which stored tensor holds the scales of an FP8 tensor, and which part of it each scale belongs to.

All forms store codes q (FP8) and scales s so that w = q * s, whatever the scales are called:
`weight_scale_inv` (DeepSeek-V3, Qwen3-FP8) is the inverse of what the weights were multiplied by before they
were rounded, and multiplies like `weight_scale`. Every shape of scales is a grid over the matrix: one for a
tensor, a row, a column or a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from surgery.checkpoint.quantised_forms import FP8_DTYPES, Fp8Scheme
from surgery.checkpoint.safetensors_header import DTYPE_NAMES, TensorEntry
from surgery.errors import CheckpointError

EXPONENT_DTYPE: torch.dtype | None = getattr(torch, "float8_e8m0fnu", None)  # since PyTorch 2.7
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, EXPONENT_DTYPE)
ONE, ROW, COLUMN = "one scale a matrix", "one scale a row", "one scale a column"


@dataclass(frozen=True)
class ScaleGrid:
    """The scales of one FP8 tensor [E, R, C] (E is 1 for a matrix).

    `scale` is the stored tensor that holds them, in the order of a grid [E, r, c], r = ceil(R / b0),
    c = ceil(C / b1); `block` is (b0, b1), and `kind` says it in words. `zero_point` is a stored tensor that
    has to be all zeros, if there is one. With `exponents` the scales are integers e that stand for 2^(e-127).
    """

    scale: str
    block: tuple[int, int]
    grid: tuple[int, int, int]
    kind: str
    exponents: bool = False
    zero_point: str | None = None


def find_grids(tensors: Mapping[str, TensorEntry], scheme: Fp8Scheme) -> dict[str, ScaleGrid]:
    """FP8 tensor -> its scales, from headers alone.

    Raises CheckpointError for an FP8 tensor without scales or with two, and for scales of a shape or dtype
    that does not fit.
    """
    return {
        name: _grid(entry, tensors, scheme) for name, entry in tensors.items() if entry.dtype in FP8_DTYPES
    }


def _grid(entry: TensorEntry, tensors: Mapping[str, TensorEntry], scheme: Fp8Scheme) -> ScaleGrid:
    scale = _scale_of(entry, tensors)
    exponents = scheme.exponents and scale.dtype == torch.uint8
    if scale.dtype not in SCALE_DTYPES and not exponents:
        raise CheckpointError(
            "the scales of an FP8 weight are stored in a dtype that scales don't have",
            where=scale.name,
            expected="F32, BF16, F16 or F8_E8M0",
            found=DTYPE_NAMES[scale.dtype],
            next_step="use the unquantised checkpoint it was made from",
        )
    block, grid, kind = _layout(entry, scale, scheme)
    zero_point = entry.name + "_zero_point"
    return ScaleGrid(scale.name, block, grid, kind, exponents, zero_point if zero_point in tensors else None)


def _scale_of(entry: TensorEntry, tensors: Mapping[str, TensorEntry]) -> TensorEntry:
    """The entry of an FP8 tensor's scales. Raises CheckpointError unless there is exactly one."""
    name = entry.name
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if name.endswith(".weight"):
        stem = name.removesuffix("weight")
        names += [f"{stem}scale", f"{stem}qscale_weight"]  # DeepSeek's own files; Mistral's
    found = [tensors[one] for one in names if one in tensors]
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        "an FP8 tensor has two tensors of scales" if found else "an FP8 tensor is stored without its scales",
        where=f"{entry.file}, {name}",
        expected=" or ".join(names[:2]),
        found=" and ".join(one.name for one in found),
        next_step="fetch the checkpoint again, or use the unquantised checkpoint it was made from",
    )


def _layout(
    entry: TensorEntry, scale: TensorEntry, scheme: Fp8Scheme
) -> tuple[tuple[int, int], tuple[int, int, int], str]:
    """(block, grid, words) of scales by their shape. Raises CheckpointError where none fits."""
    if len(entry.shape) > 3 or not entry.numel:
        raise _misfit(entry, scale, "a matrix, or matrices of experts", entry.shape)
    experts, rows, columns = (1, 1, 1, *entry.shape)[-3:]
    leaf = entry.name.rpartition(".")[2]
    lead = (experts,) if len(entry.shape) == 3 else ()
    if scale.numel == 1:
        return (rows * experts, columns), (1, 1, 1), ONE
    if lead and scale.shape in (lead, (*lead, 1), (*lead, 1, 1)):
        return (rows, columns), (experts, 1, 1), ONE
    if lead and leaf == "gate_up_proj" and scale.shape == (*lead, 2, 1):  # one for gate and one for up
        return (rows // 2, columns), (experts, 2, 1), ONE
    wanted = [*lead, rows, 1]
    if scheme.block is not None:
        grid = (-(-rows // scheme.block[0]), -(-columns // scheme.block[1]))
        wanted = [*lead, *grid]
        if len(entry.shape) > 1 and scale.shape == tuple(wanted):
            return scheme.block, (experts, *grid), f"blocks of {scheme.block[0]} x {scheme.block[1]}"
    flipped = scheme.flipped_experts and bool(lead) and leaf == "down_proj"
    if scale.shape == ((*lead, columns, 1) if flipped else (*lead, 1, columns)):
        return (rows, 1), (experts, 1, columns), COLUMN
    if not flipped and (
        scale.shape == (*lead, rows, 1) or (len(entry.shape) == 2 and scale.shape == (rows,))
    ):
        return (1, columns), (experts, rows, 1), ROW
    raise _misfit(entry, scale, f"{wanted} for a weight {list(entry.shape)}", scale.shape)


def _misfit(entry: TensorEntry, scale: TensorEntry, expected: str, found: tuple[int, ...]) -> CheckpointError:
    """The error for scales of a shape that does not fit."""
    return CheckpointError(
        "the scales of an FP8 weight do not have a shape that fits it",
        where=f"{entry.file}, {scale.name}",
        expected=expected,
        found=str(list(found)),
        next_step="see that quantization_config in config.json has the right weight_block_size, or use the "
        "unquantised checkpoint it was made from",
    )
