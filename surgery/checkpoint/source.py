"""Byte sources of checkpoints: the protocol and local folders; `hub.py` has the Hub source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import torch

from surgery.errors import CheckpointError


class ByteSource(Protocol):
    """Lists files and returns byte ranges of them. `path` is a local folder with at least the small files."""

    path: Path

    def files(self) -> list[str]:
        """Relative names of all files, with '/' as separator."""

    def size(self, file: str) -> int:
        """Size of `file` in bytes."""

    def read(self, file: str, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of `file`, in memory that the caller owns."""


def new_buffer(size: int) -> memoryview:
    """Writable memory of `size` bytes from PyTorch's allocator, so that layers reuse each other's memory."""
    return torch.empty(size, dtype=torch.uint8, device="cpu").numpy().data


class LocalFolder:
    """A checkpoint folder on this machine. Files are read without memory maps, so no page stays resident."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> list[str]:
        """Relative names of all files below the folder, without hidden files and folders."""
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
