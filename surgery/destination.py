"""Output folders that appear under their final name only when complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import DestinationError

MARGIN_BYTES = 64 << 20  # room left on the disk for everything that is not weights


def check_destination(
    path: Path, *, overwrite: bool, source: Path | None = None, needs_bytes: int = 0
) -> None:
    """Raise DestinationError when `path` can't be written: it exists, is the source, or the disk is too small."""
    if source is not None and path.resolve() == source.resolve():
        raise DestinationError(
            "the destination is the source", where=path.name, next_step="name another folder with --out"
        )
    if source is not None and source.resolve() in path.resolve().parents:
        raise DestinationError(
            "the destination lies inside the source",
            where=path.name,
            next_step="name another folder with --out",
        )
    recover(path)
    if path.exists() and not overwrite:
        raise DestinationError(
            "the destination exists",
            where=str(path),
            next_step="name another with --out, or give --overwrite",
        )
    if path.exists() and not path.is_dir():
        raise DestinationError("the destination is a file", where=str(path), expected="a folder")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise DestinationError("no permission to write", where=str(parent))
    free = shutil.disk_usage(parent).free
    if needs_bytes and free < needs_bytes + MARGIN_BYTES:
        raise DestinationError(
            "the disk is too small",
            where=str(parent),
            expected=f"{(needs_bytes + MARGIN_BYTES) / 2**30:.2f} GiB free",
            found=f"{free / 2**30:.2f} GiB",
            next_step="free some space, or name another disk with --out",
        )


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raise DestinationError when a file can't be written to `path`: it exists, or its folder may not be written."""
    if path.is_dir():
        raise DestinationError("the destination is a folder", where=str(path), expected="a file")
    if path.exists() and not overwrite:
        raise DestinationError(
            "the destination exists",
            where=str(path),
            next_step="name another with --out, or give --overwrite",
        )
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise DestinationError("no permission to write", where=str(parent))


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Give a hidden folder beside `path` to write into, and rename it to `path` when the block ends well.

    When the block raises, the hidden folder is removed and `path` is as it was. After a kill it stays and the next
    run removes it. A folder already at `path` is moved aside for the rename and then deleted.
    """
    partial, aside = _partial(path), _aside(path)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                flush(file)
        if path.exists():
            path.rename(aside)
        partial.rename(path)
        flush(path.absolute().parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        recover(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a kill leaves the old content or the new."""
    beside = path.with_name(f".{path.name}.surgeon-new")
    beside.write_text(text, encoding="utf-8")
    flush(beside)
    beside.replace(path)


def recover(path: Path) -> None:
    """Undo what a kill between the two renames of `complete_folder` left: put the old folder back."""
    aside = _aside(path)
    if aside.exists():
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)


def _partial(path: Path) -> Path:
    return path.absolute().with_name(f".{path.name}.surgeon-partial")


def _aside(path: Path) -> Path:
    return path.absolute().with_name(f".{path.name}.surgeon-replaced")


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
