"""Full or failing disks: translates the OS error into one StorageError that names the layer."""

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
    """The StorageError for a failed read or write, with `where` as its location.

    None for an error that is neither a full nor a failing disk.
    """
    if isinstance(error, OSError):
        number, file = error.errno, error.filename
    else:
        found = re.search(r"os error (\d+)", str(error))  # safetensors: number only in the message
        number, file = int(found[1]) if found else None, None
    if number not in (*FULL, errno.EIO):
        return None
    location = [where, Path(os.fsdecode(file)).name if file else ""]
    return StorageError(
        "the disk is full" if number in FULL else "a disk failed",
        where=", ".join(part for part in location if part),
        found=os.strerror(number),
        next_step=("free disk space" if number in FULL else "check the disk")
        + ", then run the same command again: an index resumes where it stopped",
    )


@contextlib.contextmanager
def in_layer(number: int) -> Iterator[None]:
    """Add the layer number to file errors raised inside the block.

    Raises StorageError for a full or failing disk; a CheckpointError gets the layer in its `where`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        translated = storage_error(error, f"layer {number}")
        if translated is None:
            raise
        raise translated from error
    except CheckpointError as error:
        if not error.where.startswith("layer"):
            error.where = f"layer {number}, {error.where}" if error.where else f"layer {number}"
        raise
