"""ShardWriter: writes safetensors shards, headers first, then tensors one at a time in any order.

The safetensors package can only write a whole dictionary at once. Files written here are byte-identical to
its own (tensors ordered by dtype size, then name).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from surgery.checkpoint.file_roles import INDEX_FILE
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.safetensors_header import TensorEntry, make_header

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor to write."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


def plan_shards(specs: dict[str, TensorSpec], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
    """File name -> tensor names, from sizes alone, by the same rule as transformers."""
    from huggingface_hub import split_torch_state_dict_into_shards

    meta = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=max_bytes)
    return {file: list(names) for file, names in split.filename_to_tensors.items()}


class ShardWriter:
    """Writes the tensors named in `specs` into shards below `folder`; use it as a context manager.

    On a clean exit every tensor must have been written. With several shards, the weight map is then written
    last. On an exception nothing more is written, and the caller deletes the folder. With `resume` the shards
    of an earlier writer of the same `specs` are continued; `complete` records which tensors are already
    written.
    """

    def __init__(
        self,
        folder: Path,
        specs: dict[str, TensorSpec],
        max_bytes: int = MAX_SHARD_BYTES,
        *,
        resume: bool = False,
    ) -> None:
        self.folder = folder
        self.flags = os.O_WRONLY | os.O_CREAT | (0 if resume else os.O_TRUNC)
        self.specs = specs
        self.shards = plan_shards(specs, max_bytes)
        self.offsets: dict[str, int] = {}
        self.handles: dict[str, int] = {}
        self.file_of = {name: file for file, names in self.shards.items() for name in names}
        self.written = dict.fromkeys(specs, 0)

    def __enter__(self) -> ShardWriter:
        for file, names in self.shards.items():
            self._start(file, names)
        return self

    def _start(self, file: str, names: list[str]) -> None:
        ordered = sorted(names, key=lambda n: (-self.specs[n].dtype.itemsize, n))
        start, places, size = make_header((n, self.specs[n].dtype, self.specs[n].shape) for n in ordered)
        self.offsets |= places
        self.handles[file] = os.open(self.folder / file, self.flags, 0o644)
        os.ftruncate(self.handles[file], size)
        _write_at(self.handles[file], start, 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor."""
        spec = self.specs[name]
        assert tensor.dtype == spec.dtype and tuple(tensor.shape) == spec.shape, name
        if spec.nbytes:
            self.write_bytes(name, tensor.contiguous().view(-1).view(torch.uint8).numpy().data, 0)

    def complete(self, names: Iterable[str]) -> None:
        """Record tensors that an earlier writer has written completely."""
        for name in names:
            self.written[name] = self.specs[name].nbytes

    def write_bytes(self, name: str, data: bytes | memoryview, offset: int) -> None:
        """Write part of a tensor's bytes, `offset` bytes from its start."""
        _write_at(self.handles[self.file_of[name]], data, self.offsets[name] + offset)
        self.written[name] += len(data)

    def copy(self, name: str, checkpoint: Checkpoint, entry: TensorEntry) -> None:
        """Copy a tensor of a checkpoint under `name`, as the checkpoint reads it, piece by piece."""
        offset = 0
        for piece in checkpoint.pieces(entry.name):
            self.write_bytes(name, piece, offset)
            offset += len(piece)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self.handles.values():
            os.close(handle)
        if kind is not None:
            return
        incomplete = [name for name, count in self.written.items() if count != self.specs[name].nbytes]
        assert not incomplete, f"never written: {incomplete[:3]}"
        if len(self.shards) > 1:
            metadata = {
                "total_parameters": sum(spec.numel for spec in self.specs.values()),
                "total_size": sum(spec.nbytes for spec in self.specs.values()),
            }
            index = {"metadata": metadata, "weight_map": dict(sorted(self.file_of.items()))}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / INDEX_FILE).write_text(text, encoding="utf-8")


def _write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
