"""PackedCheckpoint: integers of 2 to 8 bits in the format pack-quantized of compressed-tensors.

A matrix W [R, C] is stored as codes q of b bits in int32 words (`weight_packed` [R, C b / 32]), scales s
[R, G] (`weight_scale`; G is 1 or the groups of a row), zero points z [R, G] where the codes are asymmetric
(`weight_zero_point`, packed along R), and the group of every column where those are not in order
(`weight_g_idx` [C]). Then

    W[r, c] = (q[r, c] - z[r, g(c)]) s[r, g(c)]        g(c) = c // (C / G), or as stored

in float32, with one cast. `surgeon quantize` and llm-compressor write it, vLLM and transformers read it.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from surgery.checkpoint.dequantised import DequantisedCheckpoint
from surgery.checkpoint.quantised_forms import PACKED_ENDING
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.safetensors_header import DTYPE_NAMES, TensorEntry
from surgery.errors import CheckpointError, UsageError

SCALE, ZERO, SHAPE, GROUP = ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"
BESIDE = (SCALE, ZERO, SHAPE, GROUP)  # stored beside the codes of a matrix
CHUNK = 1 << 20  # weights that are unpacked together
CHUNK_BYTES = 24 * CHUNK  # words, codes and values of a chunk


class PackedCheckpoint(DequantisedCheckpoint):
    """A checkpoint of packed integers as a plain one; arguments as there.

    Raises CheckpointError from headers for codes without scales that fit them, and on reading for scales that
    are not finite; UsageError where compressed-tensors is not installed, which unpacks.
    """

    def __init__(self, stored: Checkpoint, dtype: torch.dtype | None = None) -> None:
        assert stored.packed_bits is not None, "the checkpoint states another form"
        self.bits = stored.packed_bits
        if find_spec("compressed_tensors") is None:
            raise UsageError(
                "packed checkpoints are read with compressed-tensors, which is not installed",
                where=stored.name,
                next_step="pip install 'ffn-surgeon[packed]'",
            )
        stems = [name.removesuffix(PACKED_ENDING) for name in stored.tensors if name.endswith(PACKED_ENDING)]
        if not stems:
            raise CheckpointError(
                "the config says that weights are packed, and no stored tensor is",
                where=stored.name,
                next_step="remove quantization_config from config.json if the weights were dequantised",
            )
        presented = {f"{stem}.weight": (stem + PACKED_ENDING, self._shape(stored, stem)) for stem in stems}
        hidden = {stem + ending for stem in stems for ending in BESIDE}
        super().__init__(stored, dtype, presented, hidden)

    def _shape(self, stored: Checkpoint, stem: str) -> tuple[int, int]:
        """[R, C] of a matrix, from the headers of its tensors. Raises CheckpointError where they disagree."""
        codes, scale = stored.tensors[stem + PACKED_ENDING], stored.tensors.get(stem + SCALE)
        if scale is None:
            raise CheckpointError(
                "packed codes are stored without their scales", where=codes.name, expected=stem + SCALE
            )
        if len(codes.shape) != 2 or codes.dtype != torch.int32:
            raise _unfit(codes, "words I32 [R, C]")
        rows, columns = codes.shape[0], codes.shape[1] * 32 // self.bits
        if not scale.dtype.is_floating_point or len(scale.shape) != 2 or scale.shape[0] != rows:
            raise _unfit(scale, f"scales of floating point [{rows}, G]")
        groups = scale.shape[1]
        if not 0 < groups <= columns:
            raise _unfit(scale, f"1 to {columns} groups of {columns} columns")
        columns -= columns % groups if groups > 1 else 0
        zero, order = stored.tensors.get(stem + ZERO), stored.tensors.get(stem + GROUP)
        if zero is not None and tuple(zero.shape) != (-(-rows * self.bits // 32), groups):
            raise _unfit(zero, f"packed zero points [{-(-rows * self.bits // 32)}, {groups}]")
        if order is not None and tuple(order.shape) != (columns,):
            raise _unfit(order, f"a group for each of {columns} columns")
        return rows, columns

    @property
    def form(self) -> str:
        """Bits, and what a scale belongs to."""
        widths = set()
        for name, (_, shape) in self.presented.items():
            groups = self.stored.tensors[name.removesuffix(".weight") + SCALE].shape[1]
            widths.add("one scale a row" if groups == 1 else f"groups of {shape[1] // groups}")
        return f"INT{self.bits} (packed, {' and '.join(sorted(widths))})"

    @property
    def reading_bytes(self) -> int:
        """Bytes beside a result while it is dequantised: its codes, its scales, and a chunk in float32."""
        stems = [name.removesuffix(".weight") for name in self.presented]
        kept = (PACKED_ENDING, *BESIDE)
        found = self.stored.tensors
        return CHUNK_BYTES + max(
            sum(3 * found[stem + ending].nbytes for ending in kept if stem + ending in found)
            for stem in stems
        )

    def _dequantised(self, name: str) -> torch.Tensor | None:
        from compressed_tensors.compressors import unpack_from_int32

        stem, stored = name.removesuffix(".weight"), self.stored
        rows, columns = self.presented[name][1]
        self._check_shape(stem, (rows, columns))
        codes = stored.read(stem + PACKED_ENDING)
        scales = stored.read(stem + SCALE).float()
        if not scales.isfinite().all():  # AutoRound's may be negative
            raise CheckpointError(
                "a scale of packed weights is not finite",
                where=f"{stored.tensors[stem + SCALE].file}, {stem + SCALE}",
                next_step="fetch the file again, or use the unquantised checkpoint it was made from",
            )
        groups = scales.shape[1]
        zeros = torch.zeros(1, 1)
        if stem + ZERO in stored.tensors:
            packed = stored.read(stem + ZERO)
            zeros = unpack_from_int32(packed, self.bits, torch.Size((rows, groups)), packed_dim=0).float()
        zeros = zeros.expand(rows, groups)
        group = self._group_of_columns(stem, columns, groups)
        result = torch.empty(rows, columns, dtype=self.dtype)
        step = max(1, CHUNK // columns)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            shape = torch.Size((part.stop - start, columns))
            values = unpack_from_int32(codes[part], self.bits, shape).float()
            values -= zeros[part].index_select(1, group)
            values *= scales[part].index_select(1, group)
            if not result[part].copy_(values).sum(dtype=torch.float32).isfinite():
                return None
        return result

    def _group_of_columns(self, stem: str, columns: int, groups: int) -> torch.Tensor:
        """The group [C] of every column. Raises CheckpointError for one that does not exist."""
        in_order = torch.arange(columns) // max(1, columns // groups)
        if stem + GROUP not in self.stored.tensors:
            return in_order
        found = self.stored.read(stem + GROUP).long()
        if (found < 0).all():  # as files have it where columns are in order
            return in_order
        if not ((found >= 0) & (found < groups)).all():
            raise CheckpointError(
                "a column of packed weights belongs to a group that has no scale",
                where=stem + GROUP,
                expected=f"0 to {groups - 1}",
            )
        return found

    def _check_shape(self, stem: str, shape: tuple[int, int]) -> None:
        """Raise CheckpointError where the stored shape of a matrix is another than that of its tensors."""
        if stem + SHAPE not in self.stored.tensors:
            return
        found = tuple(self.stored.read(stem + SHAPE).tolist())
        if found != shape:
            raise CheckpointError(
                "packed codes and scales do not have the stored shape of their matrix",
                where=stem + SHAPE,
                expected=str(list(shape)),
                found=str(list(found)),
                next_step="use the unquantised checkpoint it was made from",
            )


def _unfit(entry: TensorEntry, expected: str) -> CheckpointError:
    return CheckpointError(
        "a tensor of packed weights does not have the shape or dtype that fits the others",
        where=entry.name,
        expected=expected,
        found=f"{DTYPE_NAMES[entry.dtype]} {list(entry.shape)}",
        next_step="use the unquantised checkpoint it was made from",
    )
