"""Fp8Checkpoint: a checkpoint stored in FP8, whose tensors are dequantised one at a time on request.

w = q * s in float32, with q the FP8 code and s the scale of its block, row or tensor, then one cast. Codes
are looked up in a table of their 256 values: several times faster on a CPU than PyTorch's own conversion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from surgery.checkpoint.fp8_scales import ScaleGrid, find_grids
from surgery.checkpoint.quantised_forms import fp8_scheme, without_quantisation
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.safetensors_header import TensorEntry
from surgery.checkpoint.transformers_model import text_config
from surgery.errors import CheckpointError

# Elements dequantised together. PyTorch runs operations on so few in the calling thread, which is the reader
# beside the threads that compute; waiting for these in every operation would take many times longer.
CHUNK = 1 << 15
CHUNK_BYTES = 4 * 4 * CHUNK  # table indices, values, scales and what a sum takes
# Files that describe the quantisation, which would make others read a result as FP8.
DESCRIPTIONS = ("hf_quant_config.json", "recipe.yaml")
PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dequantised(stored: Checkpoint, dtype: torch.dtype | None = None) -> Checkpoint:
    """`stored`, as an Fp8Checkpoint where it is stored in FP8; arguments and errors as there."""
    return Fp8Checkpoint(stored, dtype) if stored.in_fp8 else stored


class Fp8Checkpoint(Checkpoint):
    """A checkpoint stored in FP8 as a plain one: its FP8 tensors are presented in `dtype`, and no scales.

    `stored` was opened with `fp8`. `dtype` None stands for the dtype that the config states, or bfloat16.
    Tensors that are not FP8 (norms, embeddings) keep their stored dtype. `config` states `dtype` and no
    quantisation. `parameters` and `nbytes` count what is presented, as results are written; digests are those
    of the stored form, so that an index serves every `dtype`. Raises CheckpointError from headers for an FP8
    tensor without scales that fit it, and on reading for scales that are not finite and positive.
    """

    def __init__(self, stored: Checkpoint, dtype: torch.dtype | None = None) -> None:
        self.stored = stored
        self.source, self.name, self.revision = stored.source, stored.name, stored.revision
        self.file_names = stored.file_names
        self.weight_files, self.weight_map = stored.weight_files, stored.weight_map
        scheme = fp8_scheme(stored.config)
        assert scheme is not None, "the checkpoint states another form, which opening it refuses"
        self.grids = find_grids(stored.tensors, scheme)
        if not self.grids:
            raise CheckpointError(
                "the config says that weights are FP8, and no stored tensor is",
                where=stored.name,
                next_step="remove quantization_config from config.json if the weights were dequantised",
            )
        self.dtype = dtype or _stated_dtype(stored.config)
        self.config = _plain_config(stored.config, self.dtype)
        scales = {name for grid in self.grids.values() for name in (grid.scale, grid.zero_point)}
        self.tensors = {
            name: self._presented(entry) for name, entry in stored.tensors.items() if name not in scales
        }

    def _presented(self, entry: TensorEntry) -> TensorEntry:
        if entry.name not in self.grids:
            return entry
        stop = entry.numel * self.dtype.itemsize
        return TensorEntry(entry.name, entry.file, self.dtype, entry.shape, 0, stop)

    @property
    def stored_form(self) -> str:
        """FP8 format, what a scale belongs to, and the dtype of the result, for the model card."""
        dtypes = {self.stored.tensors[name].dtype for name in self.grids}
        formats = [str(dtype).removeprefix("torch.float8_").removesuffix("fn") for dtype in dtypes]
        kinds = sorted({grid.kind for grid in self.grids.values()})
        form = f"{' and '.join(sorted(formats))}, {' and '.join(kinds)}"
        return f"FP8 ({form}), dequantised to {str(self.dtype).removeprefix('torch.')}"

    @property
    def left_behind(self) -> list[str]:
        """As of any checkpoint, and the files that describe the quantisation."""
        present = [file for file in DESCRIPTIONS if file in self.file_names]
        return sorted({*self.stored.left_behind, *present})

    @property
    def reading_bytes(self) -> int:
        """Bytes beside a result while it is dequantised: its codes, its scales, and a chunk in float32."""
        return CHUNK_BYTES + max(
            self.stored.tensors[name].nbytes + 2 * 4 * math.prod(grid.grid)
            for name, grid in self.grids.items()
        )

    @property
    def config_digest(self) -> str:
        """That of the stored config."""
        return self.stored.config_digest

    @property
    def shape_digest(self) -> str:
        """That of the stored tensors."""
        return self.stored.shape_digest

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` in memory that the caller owns, FP8 tensors dequantised. Raises CheckpointError."""
        grid = self.grids.get(name)
        if grid is None:
            return self.stored.read(name)
        scales = self._scales(grid)
        result = dequantise(self.stored.read(name), scales, grid, self.dtype)
        if result is None:
            raise CheckpointError(
                f"a dequantised weight is not finite in {str(self.dtype).removeprefix('torch.')}",
                where=f"{self.tensors[name].file}, {name}",
                next_step="use --dtype bfloat16" if self.dtype == torch.float16 else "fetch the file again",
            )
        return result

    def pieces(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of a tensor as `read` returns it."""
        if name not in self.grids:
            yield from self.stored.pieces(name)
        else:
            yield self.read(name).view(-1).view(torch.uint8).numpy().data

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


def _stated_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype a config states for its weights; bfloat16 where it states none that a result could have."""
    for part in (text_config(config), config):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in PLAIN:
                return PLAIN[part[key]]
    return torch.bfloat16


def _plain_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config.json without quantisation that states `dtype`, for the model and its language model."""
    plain = without_quantisation(config)
    text = text_config(plain)
    for part in (plain, text):
        keys = [key for key in ("dtype", "torch_dtype") if key in part]
        for key in keys or (["dtype"] if part is plain else []):
            part[key] = str(dtype).removeprefix("torch.")
    return plain
