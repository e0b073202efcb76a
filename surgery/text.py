"""Text to blocks of token ids: a seeded sample of blocks for calibration, all in order for evaluation."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.errors import CalibrationError

NAMED_TEXTS = {
    "wikitext": "Salesforce/wikitext:wikitext-2-raw-v1:train",
    "wikitext-test": "Salesforce/wikitext:wikitext-2-raw-v1:test",
}
TEXT_COLUMNS = ("text", "content", "sentence", "document")
TEXT_ENDINGS = (".txt", ".md", ".utf8", ".raw", ".text")


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids [N, T] of one text: N blocks of T tokens.

    `name` identifies the text, without a path. `seed` is None when blocks were taken in order.
    `predicted_bytes` is the UTF-8 length of the predicted tokens: all tokens except the first of each block.
    """

    ids: torch.Tensor
    name: str
    seed: int | None
    predicted_bytes: int

    @property
    def digest(self) -> str:
        """sha256 of the ids as little-endian int32."""
        return hashlib.sha256(self.ids.to(torch.int32).numpy().astype("<i4").tobytes()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """The `calibration` entry of index.json."""
        return {
            "name": self.name,
            "blocks": self.ids.shape[0],
            "block_size": self.ids.shape[1],
            "tokens": self.ids.numel(),
            "sha256": self.digest,
            "seed": self.seed,
        }


def read_text(spec: str) -> tuple[str, str]:
    """(Text, name) of a named text, a text file, or a dataset given as PATH_OR_ID[:CONFIG[:SPLIT]].

    Rows of a dataset are joined by blank lines, as in GPTQ. Raises CalibrationError for anything unreadable.
    """
    path = Path(spec)
    if path.is_file() and path.suffix.lower() in TEXT_ENDINGS:
        try:
            return path.read_text(encoding="utf-8"), path.name
        except UnicodeDecodeError as error:
            raise CalibrationError("the text file is not UTF-8", where=path.name, found=str(error)) from error
    return _read_dataset(NAMED_TEXTS.get(spec, spec))


def _read_dataset(spec: str) -> tuple[str, str]:
    import datasets

    source, config, split = (*spec.split(":"), "", "")[:3]
    local = Path(source)
    suffix = local.suffix.lower().lstrip(".")
    loaders = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}
    name = local.name if local.exists() else source
    datasets.disable_progress_bars()
    try:
        if local.is_file() and suffix in loaders:
            rows = datasets.load_dataset(loaders[suffix], data_files=str(local), split="train")
        else:
            rows = datasets.load_dataset(source, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CalibrationError(
            "the text can't be loaded",
            where=name,
            expected="a .txt/.utf8 file, .jsonl/.parquet/.csv, or a dataset as ID[:CONFIG[:SPLIT]]",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200],
            next_step="check the spelling and the network, or give a local text file",
        ) from error
    column = next((c for c in TEXT_COLUMNS if c in rows.column_names), None)
    if column is None:
        raise CalibrationError(
            "the dataset has no text column",
            where=name,
            expected=" or ".join(TEXT_COLUMNS),
            found=str(rows.column_names),
        )
    label = ":".join(part for part in (name, config, split) if part)
    return "\n\n".join(rows[column]), label


def token_blocks(
    tokenizer: Any,
    text: str,
    name: str,
    *,
    block_size: int,
    blocks: int | None = None,
    seed: int | None = None,
) -> TokenBlocks:
    """Split a text into contiguous blocks of `block_size` tokens, dropping the last partial block.

    The text is tokenised once, with the tokenizer's own special tokens. With `seed`, `blocks` blocks are
    drawn without replacement and kept in text order. Without, the first `blocks` blocks are taken, all for
    None. Raises CalibrationError when the text is too short, `blocks` is less than 1 or `block_size` is less
    than 2.
    """
    if block_size < 2:
        raise CalibrationError(
            "a block needs at least two tokens", expected="--block-size 2 or more", found=str(block_size)
        )
    if blocks is not None and blocks < 1:
        raise CalibrationError(
            "at least one block is needed", expected="--blocks 1 or more", found=str(blocks)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int32)
    available = len(ids) // block_size
    wanted = available if blocks is None else blocks
    if available < max(1, wanted):
        raise CalibrationError(
            "the text is too short",
            where=name,
            expected=f"{max(1, wanted)} blocks of {block_size} tokens",
            found=f"{len(ids)} tokens",
            next_step="give a longer text, or fewer or shorter blocks (--blocks, --block-size)",
        )
    if seed is None:
        chosen = torch.arange(wanted)
    else:
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
        chosen = order[:wanted].sort().values
    selected = ids[: available * block_size].view(available, block_size)[chosen]
    offsets = encoded.get("offset_mapping")
    if offsets is not None:
        ends = [(offsets[int(b) * block_size][1], offsets[(int(b) + 1) * block_size - 1][1]) for b in chosen]
        predicted = sum(len(text[first:last].encode()) for first, last in ends)
    else:
        share = wanted * (block_size - 1) / len(ids)
        predicted = round(len(text.encode()) * share)
    return TokenBlocks(selected.contiguous(), name, seed, predicted)
