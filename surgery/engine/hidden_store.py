"""HiddenStore: hidden states between layers, in device memory, in host memory, or in a file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch


class HiddenStore:
    """Slots of hidden states [N, T, D] in the compute dtype.

    `shape` is (slots, N, T, D). The memory budget chooses `place`:

    - "device": the compute device's memory.
    - "memory": host memory, pinned for a CUDA device, so that copies are asynchronous in stream order.
    - "disk": a memory-mapped temporary file below TMPDIR. The operating system writes its pages out when
      memory runs short. The file is unlinked at once, so it disappears with the process.

    With `path` the store is that file, whose content is kept so that an interrupted run resumes; `place` is
    ignored. Raises OSError when the disk has no space for the file.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        place: str = "device",
        path: Path | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.on_disk = path is not None or place == "disk"
        self.pinned = not self.on_disk and place == "memory" and device.type == "cuda"
        if path is not None:
            self._data = mapped_file(path, torch.Size(shape).numel(), dtype).view(shape)
        elif self.on_disk:
            descriptor, name = tempfile.mkstemp(prefix="surgeon-hidden-")
            try:
                _allocate(descriptor, self.nbytes)
                size = torch.Size(shape).numel()
                self._data = torch.from_file(name, shared=True, size=size, dtype=dtype).view(shape)
            finally:
                os.close(descriptor)
                os.unlink(name)  # noqa: PTH108 (mkstemp returns the name as a string)
        else:
            where = device if place == "device" else torch.device("cpu")
            self._data = torch.empty(shape, dtype=dtype, device=where, pin_memory=self.pinned)

    def get(self, slot: int, blocks: slice, device: torch.device, width: int | None = None) -> torch.Tensor:
        """A copy on `device` of blocks [n, T, D] of a slot, or of the first `width` of the D dimensions."""
        return self._data[slot, blocks, :, :width].to(device, non_blocking=True, copy=True)

    def copy_from(self, other: HiddenStore) -> None:
        """Copy the content of a store of the same shape."""
        self._data.copy_(other._data)

    def put(self, slot: int, blocks: slice, hidden: torch.Tensor) -> None:
        """Store blocks [n, T, D] into a slot, or into the first D dimensions of a wider slot."""
        self._data[slot, blocks, :, : hidden.shape[-1]].copy_(hidden, non_blocking=self.pinned)


def mapped_file(path: Path, size: int, dtype: torch.dtype) -> torch.Tensor:
    """The numbers [size] in a file, mapped into memory; the file is made where it is missing.

    Changes of the tensor change the file. Raises OSError when the disk has no space for the file.
    """
    with path.open("ab") as handle:
        _allocate(handle.fileno(), size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)


def _allocate(descriptor: int, nbytes: int) -> None:
    """Set the size of an open file and allocate its disk blocks.

    Writing to a mapped page for which the disk has no block would kill the process (SIGBUS).
    """
    os.ftruncate(descriptor, nbytes)
    if nbytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
