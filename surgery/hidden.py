"""Hidden states between layers: kept on the device, in memory, or in an unlinked file, as the budget allows."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from surgery.devices import room


class HiddenStore:
    """Slots of hidden states [N, T, D] in the compute dtype.

    `shape` is (slots, N, T, D). On an accelerator they stay there while they take at most half of what is free. Else
    they are on the host, pinned for an accelerator, so that copies either way keep the order of its stream without
    anybody waiting. When the whole takes more than `host_bytes` it is a memory-mapped temporary file (in TMPDIR), whose
    pages the operating system writes out as memory runs short; the file has no name, so that it vanishes with the process
    however that ends. With `path` it is a file of that name, whose content is kept, so that a run can be taken up again. `place` ("device", "memory" or "disk")
    is where it has been decided that it goes, whatever its size.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        host_bytes: int | None,
        folder: str | None = None,
        path: Path | None = None,
        device: torch.device | None = None,
        place: str | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.nbytes = torch.Size(shape).numel() * dtype.itemsize
        on_device = device is not None and path is None and 2 * self.nbytes <= room(device)
        too_large = host_bytes is not None and self.nbytes > host_bytes
        if place is not None:
            on_device, too_large = place == "device", place == "disk"
        self.pinned = False
        self.spilled = path is not None or (too_large and not on_device)
        if path is not None:
            with path.open("ab") as handle:
                _claim(handle.fileno(), self.nbytes)
            flat = torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=dtype)
            self._data = flat.view(shape)
        elif self.spilled:
            number, name = tempfile.mkstemp(prefix="surgeon-hidden-", dir=folder)
            try:
                _claim(number, self.nbytes)
                flat = torch.from_file(name, shared=True, size=torch.Size(shape).numel(), dtype=dtype)
            finally:
                os.close(number)
                os.unlink(name)  # noqa: PTH108 (the name came from mkstemp as a string)
            self._data = flat.view(shape)
        else:
            self.pinned = not on_device and device is not None and device.type == "cuda"
            self._data = torch.empty(
                shape, dtype=dtype, device=device if on_device else None, pin_memory=self.pinned
            )

    def get(self, slot: int, blocks: slice, device: torch.device, width: int | None = None) -> torch.Tensor:
        """A copy of blocks [n, T, D] of a slot on `device`; of the first `width` of D where that is given."""
        return self._data[slot, blocks, :, :width].to(device, non_blocking=True, copy=True)

    def take(self, other: HiddenStore) -> None:
        """Become a copy of a store of the same shape."""
        self._data.copy_(other._data)

    def put(self, slot: int, blocks: slice, hidden: torch.Tensor) -> None:
        """Store blocks [n, T, D] into a slot, or into the first of a wider one's D."""
        self._data[slot, blocks, :, : hidden.shape[-1]].copy_(hidden, non_blocking=self.pinned)


def _claim(number: int, nbytes: int) -> None:
    """Give an open file its size, the disk's blocks included: a page that finds none later would kill the process."""
    os.ftruncate(number, nbytes)
    if nbytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(number, 0, nbytes)
