"""Output folders that get their final name only when complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import DestinationError

MARGIN_BYTES = 64 << 20  # disk space reserved for all files other than weights


def check_destination(
    path: Path,
    *,
    overwrite: bool,
    source: Path | None = None,
    needs_bytes: int = 0,
    option: str = "--out",
) -> None:
    """Raise DestinationError when the folder `path`, named with `option`, can't be written.

    Reasons: it exists (and not `overwrite`), it is a file, it is or lies inside `source`, there is no
    permission, or the disk lacks `needs_bytes` bytes plus MARGIN_BYTES.
    """
    if source is not None and path.resolve() == source.resolve():
        raise DestinationError(
            "the destination is the source", where=path.name, next_step=f"name another folder with {option}"
        )
    if source is not None and source.resolve() in path.resolve().parents:
        raise DestinationError(
            "the destination lies inside the source",
            where=path.name,
            next_step=f"name another folder with {option}",
        )
    recover(path)
    if path.exists() and not overwrite:
        raise DestinationError(
            "the destination exists",
            where=str(path),
            next_step=f"name another with {option}, or give --overwrite",
        )
    if path.exists() and not path.is_dir():
        raise DestinationError("the destination is a file", where=str(path), expected="a folder")
    parent = _existing_parent(path)
    if not os.access(parent, os.W_OK):
        raise DestinationError("no permission to write", where=str(parent))
    check_disk(parent, needs_bytes, option)


def check_temporary(destination: Path, needs_bytes: int, temporary_bytes: int) -> None:
    """Raise DestinationError where the disk of temporary files lacks `temporary_bytes`.

    Where `destination` is on the same disk, its `needs_bytes` are counted too.
    """
    folder = Path(tempfile.gettempdir())
    same = folder.stat().st_dev == _existing_parent(destination).stat().st_dev
    check_disk(folder, temporary_bytes + (needs_bytes if same else 0), "the environment variable TMPDIR")


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def check_disk(folder: Path, needs_bytes: int, option: str) -> None:
    """Raise DestinationError where the disk of `folder` lacks `needs_bytes` bytes plus MARGIN_BYTES."""
    free = shutil.disk_usage(folder).free
    if needs_bytes and free < needs_bytes + MARGIN_BYTES:
        raise DestinationError(
            "the disk is too small",
            where=str(folder),
            expected=f"{(needs_bytes + MARGIN_BYTES) / 2**30:.2f} GiB free",
            found=f"{free / 2**30:.2f} GiB",
            next_step=f"free some space, or name another disk with {option}",
        )


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raise DestinationError when the file `path` can't be written.

    Reasons: it is a folder, it exists (and not `overwrite`), or there is no permission.
    """
    if path.is_dir():
        raise DestinationError("the destination is a folder", where=str(path), expected="a file")
    if path.exists() and not overwrite:
        raise DestinationError(
            "the destination exists",
            where=str(path),
            next_step="name another with --out, or give --overwrite",
        )
    parent = _existing_parent(path)
    if not os.access(parent, os.W_OK):
        raise DestinationError("no permission to write", where=str(parent))


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path` to write into, and rename it to `path` when the block succeeds.

    When the block raises, the hidden folder is removed and `path` is unchanged. After a kill it remains; the
    next run removes it. An existing folder at `path` is moved aside before the rename and deleted after it.
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
    """Write a text file atomically: after a kill it has either the old content or the new."""
    new = path.with_name(f".{path.name}.surgeon-new")
    new.write_text(text, encoding="utf-8")
    flush(new)
    new.replace(path)


def recover(path: Path) -> None:
    """Restore the old folder after a kill between the two renames of `complete_folder`."""
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
    """fsync a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
