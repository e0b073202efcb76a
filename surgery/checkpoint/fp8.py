"""Fp8Checkpoint: a checkpoint stored in FP8, whose tensors are dequantised one at a time on request.

w = q * s in float32, with q the FP8 code and s the scale of its block, row or tensor, then one cast. Codes
are looked up in a table of their 256 values: several times faster on a CPU than PyTorch's own conversion.
"""

from __future__ import annotations

import math

import torch

from surgery.checkpoint.dequantised import DequantisedCheckpoint
from surgery.checkpoint.fp8_scales import ScaleGrid, find_grids
from surgery.checkpoint.quantised_forms import fp8_scheme
from surgery.checkpoint.reader import Checkpoint
from surgery.errors import CheckpointError

# Elements dequantised together. PyTorch runs operations on so few in the calling thread, which is the reader
# beside the threads that compute; waiting for these in every operation would take many times longer.
CHUNK = 1 << 15
CHUNK_BYTES = 4 * 4 * CHUNK  # table indices, values, scales and what a sum takes


class Fp8Checkpoint(DequantisedCheckpoint):
    """A checkpoint stored in FP8 as a plain one; arguments as there.

    Raises CheckpointError from headers for an FP8 tensor without scales that fit it, and on reading for
    scales that are not finite and positive.
    """

    def __init__(self, stored: Checkpoint, dtype: torch.dtype | None = None) -> None:
        scheme = fp8_scheme(stored.config)
        assert scheme is not None, "the checkpoint states another form, which opening it refuses"
        self.grids = find_grids(stored.tensors, scheme)
        if not self.grids:
            raise CheckpointError(
                "the config says that weights are FP8, and no stored tensor is",
                where=stored.name,
                next_step="remove quantization_config from config.json if the weights were dequantised",
            )
        presented = {name: (name, tuple(stored.tensors[name].shape)) for name in self.grids}
        scales = {name for grid in self.grids.values() for name in (grid.scale, grid.zero_point) if name}
        super().__init__(stored, dtype, presented, scales)

    @property
    def form(self) -> str:
        """FP8 format, and what a scale belongs to."""
        dtypes = {self.stored.tensors[name].dtype for name in self.grids}
        formats = [str(dtype).removeprefix("torch.float8_").removesuffix("fn") for dtype in dtypes]
        kinds = sorted({grid.kind for grid in self.grids.values()})
        return f"FP8 ({' and '.join(sorted(formats))}, {' and '.join(kinds)})"

    @property
    def reading_bytes(self) -> int:
        """Bytes beside a result while it is dequantised: its codes, its scales, and a chunk in float32."""
        return CHUNK_BYTES + max(
            self.stored.tensors[name].nbytes + 2 * 4 * math.prod(grid.grid)
            for name, grid in self.grids.items()
        )

    def _dequantised(self, name: str) -> torch.Tensor | None:
        grid = self.grids[name]
        scales = self._scales(grid)
        return dequantise(self.stored.read(name), scales, grid, self.dtype)

    def _scales(self, grid: ScaleGrid) -> torch.Tensor:
        """Scales [E, r, c] float32. Raises CheckpointError for one that is not finite and positive."""
        scales = self.stored.read(grid.scale)
        if grid.exponents:
            scales = torch.exp2(scales.float() - 127)
        scales = scales.float().view(grid.grid)
        if not ((scales > 0) & scales.isfinite()).all():
            raise CheckpointError(
                "a scale of an FP8 weight is zero, negative or not finite",
                where=f"{self.stored.tensors[grid.scale].file}, {grid.scale}",
                next_step="fetch the file again, or use the unquantised checkpoint it was made from",
            )
        if grid.zero_point is not None and self.stored.read(grid.zero_point).float().any():
            raise CheckpointError(
                "an FP8 weight has a zero point, which surgeon does not read",
                where=grid.zero_point,
                next_step="use the unquantised checkpoint it was made from",
            )
        return scales


def dequantise(
    codes: torch.Tensor, scales: torch.Tensor, grid: ScaleGrid, dtype: torch.dtype
) -> torch.Tensor | None:
    """w = q * s in float32, cast once to `dtype`; None where a value is not finite.

    `codes` is FP8 [E, R, C], [R, C] or [C], `scales` float32 [E, r, c] as `grid` describes. Rows are taken in
    chunks, so that memory holds little beside codes and result.
    """
    result = torch.empty(codes.shape, dtype=dtype)
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    experts, columns = grid.grid[0], codes.shape[-1]
    bits, values = codes.view(torch.uint8).reshape(experts, -1, columns), result.view(experts, -1, columns)
    for part in zip(bits, scales, values, strict=True):
        if not _dequantise_matrix(*part, grid.block, table):
            return None
    return result


def _dequantise_matrix(
    bits: torch.Tensor,
    scales: torch.Tensor,
    result: torch.Tensor,
    block: tuple[int, int],
    table: torch.Tensor,
) -> bool:
    """Fill `result` [R, C] from codes [R, C] uint8 and scales [r, c]; whether all values are finite.

    `table` holds the values of the 256 codes. No chunk spans two rows of blocks higher than one row.
    """
    (rows, columns), (high, wide) = bits.shape, block
    step = max(1, CHUNK // columns)
    indices = torch.empty(step, columns, dtype=torch.int32)
    buffer = torch.empty(step * columns)
    start, own = 0, scales
    while start < rows:
        stop = min(start + step, rows if high == 1 else min(rows, (start // high + 1) * high))
        chosen, products = indices[: stop - start], buffer[: (stop - start) * columns]
        torch.index_select(table, 0, chosen.copy_(bits[start:stop]).view(-1), out=products)
        products = products.view(stop - start, columns)
        if high == 1 or start % high == 0:  # rows of another block
            own = scales[start:stop] if high == 1 else scales[start // high, None]
            own = own if wide >= columns else own.repeat_interleave(wide, 1)[:, :columns]
        products *= own
        target = result[start:stop].copy_(products)
        if not target.sum(dtype=torch.float32).isfinite():
            return False
        start = stop
    return True
