"""What a user may name as a text: a named text, a file, or a data set as PATH_OR_ID[:CONFIG[:SPLIT]].

Nothing is read whole: a `Text` gives its pieces one by one, so that a data set of any size costs what is
asked of it. Parquet of the Hub is read by row groups.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import CalibrationError
from surgery.text.local_files import file_pieces, is_compressed, json_rows, row_format, sampled_pieces
from surgery.text.marks import MarkedText
from surgery.text.rows import RowReader

NAMED_TEXTS = {
    "wikitext": "Salesforce/wikitext:wikitext-2-raw-v1:train",
    "wikitext-test": "Salesforce/wikitext:wikitext-2-raw-v1:test",
    "web": "allenai/c4:en:train",
    "code": "codeparrot/codeparrot-clean-valid::train",
    "chat": "HuggingFaceH4/ultrachat_200k:default:train_sft",
}
DATASET_ADDRESS = re.compile(
    r"(?:hf://datasets/|https?://(?:huggingface\.co|hf\.co)/datasets/)([\w.-]+/[\w.-]+)"
)
DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
BETWEEN = "\n\n"  # two rows


@dataclass
class Text:
    """A text that can be read piece by piece.

    - `name` identifies it, without a path; `revision` is the commit of a Hub data set.
    - `pieces(shard_seed)` are strings whose concatenation is the text; rows are joined by blank lines. With a
      seed, the files of a Hub data set come in a drawn order.
    - `size` is its length in bytes where that is known before reading.
    - `sample(wanted, parts, seed)` gives about `wanted` bytes from `parts` places of a large file; None where
      only reading from the start is possible.
    - `marked(shard_seed)` gives the same strings with the spans of answers in them, for text from rows; None
      where all of the text counts.
    - `skipped` counts rows without text so far, by reason; `whole` chat rows whose answers are not known.
    """

    name: str
    pieces: Callable[[int | None], Iterator[str]]
    size: int | None = None
    revision: str | None = None
    sample: Callable[[int, int, int], Iterator[str]] | None = None
    marked: Callable[[int | None], Iterator[MarkedText]] | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out so far, and which rows count whole, one sentence a reason."""
        left_out = (f"{count} rows of {self.name} left out: {why}" for why, count in self.skipped.items())
        whole = (
            f"the loss is on all tokens of {count} rows of {self.name}, not on their answers alone: {why}"
            for why, count in self.whole.items()
        )
        return (*left_out, *whole)

    def start(self, characters: int) -> str:
        """At most so many characters of the text, from its start."""
        read = ""
        for piece in self.pieces(None):
            read += piece
            if len(read) >= characters:
                break
        return read[:characters]


def open_text(spec: str, tokenizer: Any = None, column: str | None = None) -> Text:
    """The text that `spec` names; nothing of it is read yet, but a Hub data set is resolved to a commit.

    `tokenizer` renders chat rows, `column` names the column of the text. Raises CalibrationError for anything
    that does not exist.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return _file(path, tokenizer, column)
    source, config, split = _parts(NAMED_TEXTS.get(spec, spec))
    if Path(source).expanduser().exists():
        return _dataset(source, Path(source).name, config, split, None, tokenizer, column)
    address = DATASET_ADDRESS.match(source)
    source = address[1] if address else source
    if not DATASET_ID.fullmatch(source) or Path(source).suffix in (
        ".txt",
        ".jsonl",
        ".json",
        ".csv",
        ".parquet",
    ):
        raise CalibrationError(
            "no such text",
            where=source,
            expected="a text file, .jsonl, .csv or .parquet, or a data set as ID[:CONFIG[:SPLIT]]",
            next_step="check the spelling; a file behind a URL has to be downloaded first",
        )
    return _dataset(source, source, config, split, _commit(source), tokenizer, column)


def _parts(spec: str) -> tuple[str, str, str]:
    """(source, config, split); a local path may hold colons, and so may the beginning of an address."""
    for count in (0, 1, 2):
        words = spec.rsplit(":", count) if count else [spec]
        if len(words) == count + 1 and Path(words[0]).expanduser().exists():
            source, config, split, *_ = [*words, "", ""]
            return source, config, split
    start = spec.find("://")
    head, rest = (spec[: start + 3], spec[start + 3 :]) if start >= 0 else ("", spec)
    source, config, split, *_ = [*rest.split(":"), "", ""]
    return head + source, config, split


def _file(path: Path, tokenizer: Any, column: str | None) -> Text:
    kind = row_format(path)
    size = None if is_compressed(path) else path.stat().st_size
    if kind is None:
        plain = size is not None and _is_utf8(path)
        return Text(
            path.name,
            lambda _: file_pieces(path),
            size=size,
            sample=(lambda wanted, parts, seed: sampled_pieces(path, wanted, parts, seed)) if plain else None,
        )
    reader = RowReader(path.name, tokenizer, column)
    if kind == "json":
        return _text_of_rows(reader, lambda _: json_rows(path, reader.skipped), size=size)
    files = {"data_files": str(path.absolute()), **({"sep": "\t"} if ".tsv" in path.suffixes else {})}
    rows = _rows(path.name, kind, None, "train", None, files)
    return _text_of_rows(reader, lambda _: rows(None), size=size)


def _text_of_rows(
    reader: RowReader,
    rows: Callable[[int | None], Iterator[Any]],
    size: int | None = None,
    revision: str | None = None,
) -> Text:
    """Rows as one text, with blank lines between them."""
    return Text(
        reader.name,
        lambda seed: joined(reader.texts(rows(seed))),
        size=size,
        revision=revision,
        marked=lambda seed: joined_marked(reader.marked(rows(seed))),
        skipped=reader.skipped,
        whole=reader.whole,
    )


def _is_utf8(path: Path) -> bool:
    with path.open("rb") as handle:
        return not handle.read(2).startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00"))


def _dataset(
    source: str, name: str, config: str, split: str, revision: str | None, tokenizer: Any, column: str | None
) -> Text:
    label = ":".join(part for part in (name, config, split) if part)
    reader = RowReader(label, tokenizer, column)
    path = str(Path(source).expanduser()) if Path(source).expanduser().exists() else source
    rows = _rows(label, path, config or None, split or "train", revision, {})
    return _text_of_rows(reader, rows, revision=revision)


def _commit(repo: str) -> str | None:
    """The commit a Hub data set is at now; None in offline mode, where the cache decides."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    with dataset_errors(repo):
        return str(HfApi().dataset_info(repo).sha)


def _rows(
    label: str, path: str, config: str | None, split: str, revision: str | None, files: dict[str, Any]
) -> Callable[[int | None], Iterator[Any]]:
    """A function that opens a data set and yields its rows; with a seed, its files in a drawn order."""

    def rows(seed: int | None) -> Iterator[Any]:
        import datasets
        from huggingface_hub import constants

        datasets.disable_progress_bars()
        cached = constants.HF_HUB_OFFLINE and not Path(path).exists() and not files
        with dataset_errors(label):
            if cached:
                yield from datasets.load_dataset(path, config, split=split, revision=revision)
                return
            builder = datasets.load_dataset_builder(path, config, revision=revision, **files)
            if hasattr(builder.config, "fragment_scan_options"):
                builder.config.fragment_scan_options = _by_row_groups()
            found = builder.as_streaming_dataset(split=split)
            if seed is not None and found.num_shards > 1:
                order = list(range(found.num_shards))
                random.Random(seed).shuffle(order)
                for number in order:
                    yield from found.shard(len(order), number)
                return
            yield from found

    return rows


def _by_row_groups() -> Any:
    """Options that read Parquet by row groups; by default datasets fetches 128 MiB ahead."""
    import pyarrow.dataset

    return pyarrow.dataset.ParquetFragmentScanOptions(
        pre_buffer=False, use_buffered_stream=True, buffer_size=1 << 20
    )


@contextlib.contextmanager
def dataset_errors(name: str) -> Iterator[None]:
    """Translate any error of datasets or the Hub client into CalibrationError, without their messages."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise CalibrationError(
            "the text can't be loaded",
            where=name,
            expected="a text file, .jsonl, .csv or .parquet, or a data set as ID[:CONFIG[:SPLIT]]",
            found=f"{type(error).__name__}: {first}"[:200],
            next_step="check the spelling and the network, or give a local text file",
        ) from error
    finally:
        logger.setLevel(level)


def joined(texts: Iterator[str]) -> Iterator[str]:
    """Texts with blank lines between them."""
    for number, text in enumerate(texts):
        yield text if number == 0 else BETWEEN + text


def joined_marked(rows: Iterator[MarkedText]) -> Iterator[MarkedText]:
    """The same of texts with answers."""
    for number, row in enumerate(rows):
        yield row if number == 0 else row.after(BETWEEN)
