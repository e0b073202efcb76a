"""Pieces of a text to blocks of token ids, without ever holding the text or its tokens' offsets whole."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from surgery.errors import CalibrationError
from surgery.text.marks import Counted, TokenMarks
from surgery.text.sources import Text

PIECE = 1 << 15  # characters tokenised at once
AROUND = 200  # characters on either side of a cut that are tokenised to try it
TRIES = 24  # places tried
LINE_BREAKS = re.compile(r"\n+")
LARGEST = 1 << 28  # bytes of text that are tokenised without a limit on blocks


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids [N, T] of one text or of several: N blocks of T tokens.

    `name` identifies the text, without a path. `seed` is None when blocks were taken in order.
    `predicted_bytes` is the UTF-8 length of the predicted tokens: all tokens except the first of each block.
    `parts` are the texts of a mixture: name, revision, blocks and share of each. `notes` say what was left
    out of a text, one sentence each. `counted` [N, T] are the tokens that a loss on answers counts; None
    where that was not asked for.
    """

    ids: torch.Tensor
    name: str
    seed: int | None
    predicted_bytes: int
    parts: tuple[dict[str, Any], ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    counted: torch.Tensor | None = None

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
            **({"parts": list(self.parts)} if self.parts else {}),
        }


@dataclass
class TokenisedText:
    """Token ids [n] int32 of a text, and how many of its UTF-8 bytes come before the edges of its blocks.

    `starts[b]` and `ends[b]` are the bytes up to and including the first and the last token of block b;
    `complete` says whether the text ended. `counted` [n] are the tokens that a loss on answers counts; None
    where all do.
    """

    ids: np.ndarray[Any, np.dtype[np.int32]]
    starts: list[int]
    ends: list[int]
    text_bytes: int
    complete: bool
    counted: Counted | None = None

    def blocks(self, block_size: int, chosen: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(Ids [N, T] of the `chosen` blocks, UTF-8 bytes of the tokens that are predicted in them)."""
        count = len(self.ids) // block_size
        every = torch.from_numpy(self.ids[: count * block_size]).view(count, block_size)
        if not self.ends:  # a tokenizer without offsets
            share = len(chosen) * (block_size - 1) / max(1, len(self.ids))
            return every[chosen].contiguous(), round(self.text_bytes * share)
        predicted = sum(self.ends[int(b)] - self.starts[int(b)] for b in chosen)
        return every[chosen].contiguous(), predicted

    def counted_blocks(self, block_size: int, chosen: torch.Tensor) -> torch.Tensor:
        """Which tokens [N, T] of the `chosen` blocks count."""
        if self.counted is None:
            return torch.ones((len(chosen), block_size), dtype=torch.bool)
        count = len(self.counted) // block_size
        return torch.from_numpy(self.counted[: count * block_size]).view(count, block_size)[chosen]


def first_blocks(tokenizer: Any, text: Text, *, block_size: int, blocks: int | None = None) -> TokenBlocks:
    """The first `blocks` contiguous blocks of `block_size` tokens of a text, all for None.

    The text is tokenised with the tokenizer's own special tokens, and read no further than needed; a last
    partial block is dropped. Raises CalibrationError for a text that is empty, too short, or too long to take
    whole, when `blocks` is less than 1, or `block_size` less than 2.
    """
    check_shape(blocks, block_size)
    limit = None if blocks is None else blocks * block_size
    found = tokenise(tokenizer, text.pieces(None), block_size, limit)
    if blocks is None and not found.complete:
        raise CalibrationError(
            f"the text is longer than {LARGEST >> 20} MiB",
            where=text.name,
            next_step="say how many blocks of it to use, with --text-blocks, --eval-blocks or --blocks",
        )
    available = len(found.ids) // block_size
    wanted = available if blocks is None else blocks
    check_length(text.name, available, max(1, wanted), block_size, len(found.ids))
    ids, predicted = found.blocks(block_size, torch.arange(wanted))
    return TokenBlocks(ids, text.name, None, predicted, notes=text.notes)


def check_shape(blocks: int | None, block_size: int) -> None:
    """Raise CalibrationError for a number or a size of blocks that can't be."""
    if block_size < 2:
        raise CalibrationError(
            "a block needs at least two tokens", expected="--block-size 2 or more", found=str(block_size)
        )
    if blocks is not None and blocks < 1:
        raise CalibrationError(
            "at least one block is needed", expected="--blocks 1 or more", found=str(blocks)
        )


def check_length(name: str, available: int, wanted: int, block_size: int, tokens: int) -> None:
    """Raise CalibrationError when a text has fewer blocks than are wanted."""
    if available < wanted:
        raise CalibrationError(
            "the text is empty" if tokens == 0 else "the text is too short",
            where=name,
            expected=f"{wanted} blocks of {block_size} tokens",
            found=f"{tokens} tokens",
            next_step="give a longer text, or fewer or shorter blocks (--blocks, --block-size)",
        )


def tokenise(
    tokenizer: Any,
    pieces: Iterable[str],
    block_size: int,
    limit: int | None,
    marks: TokenMarks | None = None,
) -> TokenisedText:
    """Tokenise a text piece by piece until `limit` tokens are there, or the text ends.

    Pieces are cut where that gives the same tokens as in one go. Without a limit the text may have LARGEST
    bytes. `marks`, when given, are read along with `pieces` and say which tokens count.
    """
    first, last = special_tokens(tokenizer)
    found: list[np.ndarray[Any, np.dtype[np.int32]]] = [np.array(first, dtype=np.int32)]
    starts: list[int] = []
    ends: list[int] = []
    counted: list[Counted] = []
    count, text_bytes, complete = len(first), 0, True
    if first:
        starts.append(0)
    offsets = bool(tokenizer.is_fast)
    for piece in pieces_at_lines(tokenizer, pieces):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoded = tokenizer(
                piece, add_special_tokens=False, return_offsets_mapping=offsets, verbose=False
            )
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        if offsets:
            _mark_edges(encoded["offset_mapping"], piece, count, block_size, text_bytes, starts, ends)
        if marks is not None:
            counted.append(marks.of_piece(piece, len(ids), encoded["offset_mapping"] if offsets else None))
        found.append(ids)
        count += len(ids)
        text_bytes += len(piece.encode())
        if (limit is not None and count >= limit) or (limit is None and text_bytes > LARGEST):
            complete = False
            break
    if complete and count > len(first):
        found.append(np.array(last, dtype=np.int32))
        if last and offsets and (count + len(last)) % block_size == 0:
            ends.append(text_bytes)
    everything = np.concatenate(found) if count > len(first) else np.empty(0, dtype=np.int32)
    every_mark = None if marks is None else _whole_marks(counted, len(first), len(everything))
    return TokenisedText(everything, starts, ends if offsets else [], text_bytes, complete, every_mark)


def _whole_marks(counted: list[Counted], first: int, tokens: int) -> Counted:
    """Marks of all `tokens`; the special tokens around a text, `first` before it, are as their neighbours."""
    found = np.concatenate([np.empty(0, dtype=np.bool_), *counted])
    return np.pad(found, (first, tokens - first - len(found)), mode="edge") if tokens else found


def _mark_edges(
    offsets: list[tuple[int, int]],
    piece: str,
    before: int,
    block_size: int,
    text_bytes: int,
    starts: list[int],
    ends: list[int],
) -> None:
    """Append the bytes up to the first and the last tokens of blocks that are in a piece."""
    at, total = 0, text_bytes
    number = -before % block_size  # the first token of a block; the one before it is a last one
    edges = sorted(
        {
            *range(number, len(offsets), block_size),
            *range((number - 1) % block_size, len(offsets), block_size),
        }
    )
    for edge in edges:
        end = offsets[edge][1]
        total += len(piece[at:end].encode())
        at = max(at, end)
        (starts if (before + edge) % block_size == 0 else ends).append(total)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return list(full[:start]), list(full[start + len(plain) :])
    return [], []


def pieces_at_lines(tokenizer: Any, pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of about PIECE characters, cut where that leaves the tokens as they are."""
    held = ""
    for piece in pieces:
        held += piece
        while len(held) >= 2 * PIECE:
            cut = _cut(tokenizer, held)
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _cut(tokenizer: Any, text: str) -> int:
    """Where to cut a text after PIECE characters: at a line's end, else at a space, else there.

    Whether line breaks belong to the tokens before or after them depends on the tokenizer, so both are tried
    on the text around. A tokenizer that begins every piece with a token of its own passes nowhere; the first
    place is then taken.
    """
    places = [at for found in LINE_BREAKS.finditer(text, PIECE, 2 * PIECE) for at in found.span()][:TRIES]
    places += [found.start() for found in re.finditer(" ", text[PIECE : PIECE + AROUND])]
    places = [PIECE + at if at < PIECE else at for at in places if at < len(text)]
    for place in places:
        left, right = text[place - AROUND : place], text[place : place + AROUND]
        if _ids(tokenizer, left) + _ids(tokenizer, right) == _ids(tokenizer, left + right):
            return place
    return places[0] if places else PIECE


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
