"""Files of this machine as text: plain or compressed, of any ending, or rows of JSON, CSV or Parquet."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from surgery.errors import CalibrationError, one_line
from surgery.text.rows import CHAT_COLUMNS, TEXT_COLUMNS

ROW_ENDINGS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
READ = 1 << 16  # characters read at once
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}


def row_format(path: Path) -> str | None:
    """ "json", "csv", "parquet" or "arrow" for a file of rows, by its ending; None for plain text."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSED:
        endings.pop()
    return ROW_ENDINGS.get(endings[-1]) if endings else None


def is_compressed(path: Path) -> bool:
    """Whether a file is compressed, by its ending."""
    return path.suffix.lower() in COMPRESSED


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[TextIO]:
    """A text file, decompressed, in UTF-8 or what its byte order mark says. Raises CalibrationError."""
    import fsspec

    try:
        with fsspec.open(str(path), "rb", compression="infer") as binary:
            start = binary.read(4)
        encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")
        with fsspec.open(str(path), "rt", encoding=encoding, compression="infer") as handle:
            yield handle
    except UnicodeDecodeError as error:
        raise CalibrationError(
            "the text file is not UTF-8",
            where=path.name,
            found=f"byte {error.object[error.start]:#04x} where a character should begin",
            next_step="save it as UTF-8",
        ) from error
    except ImportError as error:
        raise CalibrationError(
            "this compression needs another package", where=path.name, next_step="pip install zstandard"
        ) from error
    except (OSError, EOFError, ValueError) as error:
        raise CalibrationError(
            "the file can't be read",
            where=path.name,
            found=one_line(error, 150),
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("zlib", "zstandard", "_lzma", "lzma"):
            raise
        raise CalibrationError("the compressed file is damaged", where=path.name, found=str(error)) from error


def file_pieces(path: Path) -> Iterator[str]:
    """A plain text file, in pieces. Raises CalibrationError for a file that is no text."""
    with open_file(path) as handle:
        while piece := handle.read(READ):
            if "\0" in piece:
                raise CalibrationError(
                    "the file is not text", where=path.name, found="a zero byte", next_step="give a text file"
                )
            yield piece


def sampled_pieces(path: Path, wanted: int, parts: int, seed: int) -> Iterator[str]:
    """About `wanted` bytes of a large plain file, in file order, as `parts` stretches at seeded places.

    The file is divided into `parts` equal stretches, and one place is drawn in each. A stretch begins after a
    line's end where there is one near. Raises CalibrationError for a file that is not UTF-8.
    """
    size = path.stat().st_size
    length, stride = max(1, wanted // parts), size // parts
    draw = random.Random(seed)
    with path.open("rb") as handle:
        for part in range(parts):
            handle.seek(part * stride + draw.randrange(max(1, stride - length)))
            data = handle.read(length)
            start = data.find(b"\n", 0, length // 2) + 1
            end = data.rfind(b"\n", length // 2)
            data = data[start : end if end > 0 else None]
            if b"\0" in data:
                raise CalibrationError("the file is not text", where=path.name, found="a zero byte")
            text = data.decode("utf-8", "ignore")  # a character may be cut at either end
            if len(text.encode()) < len(data) - 6:
                raise CalibrationError(
                    "the text file is not UTF-8", where=path.name, next_step="save it as UTF-8"
                )
            yield text.replace("\r\n", "\n")


def json_rows(path: Path, skipped: dict[str, int]) -> Iterator[Any]:
    """Rows of JSON lines, or of one JSON list. A line that does not parse is counted in `skipped`."""
    with open_file(path) as handle:
        first = handle.readline()
        while first.isspace():
            first = handle.readline()
        second = handle.readline()
        if first.lstrip().startswith("[") or not second or not _is_json(first):
            yield from _one_document(path, first + second + handle.read())
            return
        yield json.loads(first)
        for line in itertools.chain([second], handle):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                skipped["not JSON"] = skipped.get("not JSON", 0) + 1


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _one_document(path: Path, text: str) -> Iterator[Any]:
    """The rows of a file that is one JSON value: a list, or an object that holds one list."""
    try:
        content = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise CalibrationError(
            "the file is not JSON", where=path.name, found=str(error), next_step="give one JSON object a line"
        ) from error
    if isinstance(content, dict):
        lists = [key for key, value in content.items() if isinstance(value, list)]
        of_rows = len(lists) == 1 and lists[0] not in (*TEXT_COLUMNS, *CHAT_COLUMNS)
        content = content[lists[0]] if of_rows else [content]
    yield from content if isinstance(content, list) else [content]
