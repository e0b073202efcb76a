"""Disks that fill up or fail in the middle of a run: one clear line, with the layer."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from surgery.errors import CheckpointError, StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def storage_error(error: OSError | SafetensorError, where: str = "") -> StorageError | None:
    """What to tell of a failed read or write; None for an error that is not the disk's."""
    if isinstance(error, OSError):
        number, file = error.errno, error.filename
    else:
        found = re.search(r"os error (\d+)", str(error))  # safetensors says it in words
        number, file = int(found[1]) if found else None, None
    if number not in (*FULL, errno.EIO):
        return None
    places = [where, Path(os.fsdecode(file)).name if file else ""]
    return StorageError(
        "the disk is full" if number in FULL else "a disk failed",
        where=", ".join(place for place in places if place),
        found=os.strerror(number),
        next_step=("make room" if number in FULL else "check the disk")
        + ", then run the same command again: an index goes on where it stopped",
    )


@contextlib.contextmanager
def at_layer(number: int) -> Iterator[None]:
    """Name the layer in whatever goes wrong with files meanwhile. Raises StorageError for a full or failing disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = storage_error(error, f"layer {number}")
        if told is None:
            raise
        raise told from error
    except CheckpointError as error:
        if not error.where.startswith("layer"):
            error.where = f"layer {number}, {error.where}" if error.where else f"layer {number}"
        raise
