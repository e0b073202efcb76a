"""The header of a safetensors file: where each tensor is, with which dtype and shape."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgery.checkpoint.refusals import is_git_lfs_pointer, pointer_error
from surgery.checkpoint.source import ByteSource
from surgery.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
if hasattr(torch, "float8_e8m0fnu"):  # scales that are powers of two; since PyTorch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Location of one stored tensor: bytes [start, stop) of `file` in the checkpoint."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(source: ByteSource, file: str) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, in the order of their bytes. Raises CheckpointError."""
    size = source.size(file)
    first = bytes(source.read(file, 0, min(size, 64)))
    if is_git_lfs_pointer(first):
        raise pointer_error(file)
    length = int.from_bytes(first[:8], "little") if size >= 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            "not a safetensors file, or one cut off inside its header",
            where=file,
            found=f"{size} bytes",
            next_step="download it again",
        )
    try:
        header = json.loads(bytes(source.read(file, 8, 8 + length)))
        header.pop("__metadata__", None)
        entries = [_entry(name, file, fields, 8 + length) for name, fields in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            "the safetensors header is damaged", where=file, found=" ".join(repr(error).split())[:200]
        ) from error
    end = 8 + length
    for entry in sorted(entries, key=lambda e: (e.start, e.stop)):
        if entry.start != end:
            raise CheckpointError("tensors overlap or leave holes", where=file, found=entry.name)
        end = entry.stop
    if end != size:
        raise CheckpointError(
            "a weight file has the wrong length (truncated?)",
            where=file,
            expected=f"{end} bytes",
            found=f"{size}",
            next_step="download it again",
        )
    return {entry.name: entry for entry in entries}


def make_header(
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]],
) -> tuple[bytes, dict[str, int], int]:
    """The start of a file that holds tensors (name, dtype, shape) in this order.

    Returns the bytes before the tensors, the place of each tensor in the file, and the file's size in bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        places[name] = start
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: start + p for n, p in places.items()}, start + end


def _entry(name: str, file: str, fields: dict[str, Any], data_start: int) -> TensorEntry:
    if fields["dtype"] not in DTYPES:
        raise CheckpointError(
            "a tensor is stored in a dtype that surgeon does not read",
            where=f"{file}, {name}",
            expected=", ".join(DTYPES),
            found=str(fields["dtype"]),
            next_step="use a checkpoint with float32, float16 or bfloat16 weights",
        )
    dtype = DTYPES[fields["dtype"]]
    shape = tuple(int(n) for n in fields["shape"])
    start, stop = (data_start + int(offset) for offset in fields["data_offsets"])
    if min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {stop - start} bytes do not hold {fields['dtype']} {list(shape)}")
    return TensorEntry(name, file, dtype, shape, start, stop)
