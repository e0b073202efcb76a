"""Where the bytes of a checkpoint are: a folder here; `hub.py` has one on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import torch

from surgery.errors import CheckpointError


class ByteSource(Protocol):
    """Anything that can list files and return byte ranges of them; `path` holds at least the small ones."""

    path: Path

    def files(self) -> list[str]:
        """Relative names of all files, '/' as separator."""

    def size(self, file: str) -> int:
        """Size of `file` in bytes."""

    def read(self, file: str, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of `file`, in memory the caller owns."""


def new_buffer(size: int) -> memoryview:
    """Writable memory for `size` bytes, from PyTorch's allocator: the next layer's weights go where this one's were."""
    return torch.empty(size, dtype=torch.uint8, device="cpu").numpy().data


class LocalFolder:
    """A checkpoint folder on this machine. Files are opened, read and closed, so that no page stays mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> list[str]:
        """Relative names of all files below the folder; hidden ones and caches are left out."""
        found = []
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                found.append(relative.as_posix())
        return found

    def size(self, file: str) -> int:
        """Size of `file` in bytes."""
        return (self.path / file).stat().st_size

    def read(self, file: str, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of `file`. Raises CheckpointError when the file ends before `stop`."""
        view = new_buffer(stop - start)
        with (self.path / file).open("rb", buffering=0) as handle:
            done = 0
            while done < len(view):
                count = os.preadv(handle.fileno(), [view[done : done + (1 << 30)]], start + done)
                if count == 0:
                    raise CheckpointError(
                        "a weight file ends too early",
                        where=file,
                        expected=f"{stop} bytes",
                        found=f"{start + done}",
                        next_step="download the file again",
                    )
                done += count
        return view
