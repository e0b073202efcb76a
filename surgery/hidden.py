"""Hidden states between layers: kept in memory, or in an unlinked file when they outgrow the budget."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch


class HiddenStore:
    """Slots of hidden states [N, T, D] in the compute dtype, on the host.

    `shape` is (slots, N, T, D). When the whole takes more than `host_bytes` it is a memory-mapped temporary file
    (in TMPDIR), whose pages the operating system writes out as memory runs short; the file has no name, so that it
    vanishes with the process however that ends. With `path` it is a file of that name, whose content is kept, so that
    a run can be taken up again.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        host_bytes: int | None,
        folder: str | None = None,
        path: Path | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.spilled = path is not None or (host_bytes is not None and self.nbytes > host_bytes)
        if path is not None:
            with path.open("ab") as handle:
                handle.truncate(self.nbytes)
            flat = torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=dtype)
            self._data = flat.view(shape)
        elif self.spilled:
            number, name = tempfile.mkstemp(prefix="surgeon-hidden-", dir=folder)
            try:
                os.ftruncate(number, self.nbytes)
                flat = torch.from_file(name, shared=True, size=torch.Size(shape).numel(), dtype=dtype)
            finally:
                os.close(number)
                os.unlink(name)  # noqa: PTH108 (the name came from mkstemp as a string)
            self._data = flat.view(shape)
        else:
            self._data = torch.empty(shape, dtype=dtype)

    def get(self, slot: int, blocks: slice, device: torch.device) -> torch.Tensor:
        """A copy of blocks [n, T, D] of a slot on `device`."""
        part = self._data[slot, blocks]
        return part.clone() if device.type == "cpu" else part.to(device, non_blocking=True)

    def put(self, slot: int, blocks: slice, hidden: torch.Tensor) -> None:
        """Store blocks [n, T, D] into a slot."""
        self._data[slot, blocks].copy_(hidden)
