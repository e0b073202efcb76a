"""Calibration text: a seeded sample of blocks, from one text or from a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from surgery.errors import CalibrationError, UsageError
from surgery.text.blocks import TokenBlocks, TokenisedText, check_length, check_shape, tokenise
from surgery.text.marks import MarkedText, TokenMarks
from surgery.text.sources import Text

WHOLE = 4 << 20  # bytes: a file up to this size is sampled by blocks, a larger one by stretches
CHOICE = 4  # times the text that is needed is read of a stream, to draw blocks from
BYTES_PER_TOKEN = 6  # more than English needs


def draw_blocks(
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    blocks: int,
    block_size: int,
    seed: int,
    weights: Sequence[float] | None = None,
    answers: bool = False,
) -> TokenBlocks:
    """Draw `blocks` blocks of `block_size` tokens with `seed`, shared among texts by `weights`.

    Blocks of several texts take turns evenly, so that any stretch has about the share of each: what holds out
    the last blocks, or fits on the first, does so of every text. Those of one text are in its order. Without
    weights every text has the same share. A file of up to WHOLE bytes is drawn from as a whole; of a larger
    one, stretches at seeded places are read; of a stream, CHOICE times what is needed. With `answers`,
    `counted` says which of the tokens, which are the same, belong to answers of chat or to plain text. Raises
    CalibrationError for a text that is too short, UsageError for weights that do not fit.
    """
    check_shape(blocks, block_size)
    counts = share_blocks(blocks, [text.name for text in texts], weights)
    ids, counted, predicted = [], [], 0
    parts: list[dict[str, Any]] = []
    for text, count in zip(texts, counts, strict=True):
        if count == 0:
            continue
        found = _tokenised(tokenizer, text, count, block_size, seed, TokenMarks() if answers else None)
        available = len(found.ids) // block_size
        check_length(text.name, available, count, block_size, len(found.ids))
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
        chosen = order[:count].sort().values
        drawn, size = found.blocks(block_size, chosen)
        ids.append(drawn)
        counted.append(found.counted_blocks(block_size, chosen))
        predicted += size
        parts.append({"name": text.name, "revision": text.revision, "blocks": count, "share": count / blocks})
    several = len(parts) > 1
    name = " + ".join(part["name"] for part in parts)
    kept = tuple(parts) if several or parts[0]["revision"] else ()
    notes = tuple(note for text in texts for note in text.notes)
    turns = in_turn([len(drawn) for drawn in ids])
    mask = torch.cat(counted)[turns] if answers else None
    return TokenBlocks(torch.cat(ids)[turns], name, seed, predicted, kept, notes, mask)


def in_turn(counts: Sequence[int]) -> torch.Tensor:
    """An order [sum of counts] of the blocks of several texts, which lie one text after the other.

    Texts take turns: block k of a text of n blocks comes at (k + 1/2) / n.
    """
    places = torch.cat([(torch.arange(count, dtype=torch.float64) + 0.5) / count for count in counts])
    return places.argsort(stable=True)


def share_blocks(blocks: int, names: Sequence[str], weights: Sequence[float] | None) -> list[int]:
    """Blocks for each text: their weights' shares, rounded so that they add up to `blocks`."""
    if weights is None:
        weights = [1.0] * len(names)
    if len(weights) != len(names) or min(weights) < 0 or sum(weights) <= 0:
        raise UsageError(
            "there has to be one weight of 0 or more for each calibration text",
            where="--calibration-weights",
            expected=f"{len(names)} numbers",
            found=", ".join(map(str, weights)),
        )
    if blocks < sum(weight > 0 for weight in weights):
        raise CalibrationError(
            "there are fewer blocks than calibration texts",
            where="--blocks",
            expected=f"{len(names)} or more",
            found=str(blocks),
            next_step="give more blocks, or fewer texts with --calibration",
        )
    exact = [blocks * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    for place in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: blocks - sum(counts)]:
        counts[place] += 1
    return counts


def _tokenised(
    tokenizer: Any, text: Text, blocks: int, block_size: int, seed: int, marks: TokenMarks | None
) -> TokenisedText:
    """As much of a text as blocks are drawn from, tokenised; with `marks`, where it has answers."""
    pieces, marked = text.pieces, text.marked
    if marks is None or marked is None:
        marks = None
    else:
        pieces = partial(_read_along, marks, marked)
    wanted = CHOICE * BYTES_PER_TOKEN * blocks * block_size
    whole = max(WHOLE, wanted)
    if text.size is not None and text.size <= whole:
        return tokenise(tokenizer, pieces(None), block_size, None, marks)
    if text.sample is not None:
        return tokenise(tokenizer, text.sample(wanted, CHOICE * blocks, seed), block_size, None)
    stream = _up_to(pieces(seed), wanted if text.size is None else whole)
    return tokenise(tokenizer, stream, block_size, None, marks)


def _read_along(
    marks: TokenMarks, marked: Callable[[int | None], Iterator[MarkedText]], seed: int | None
) -> Iterator[str]:
    """The pieces of a text with answers, which `marks` reads along."""
    return marks.strings(marked(seed))


def _up_to(pieces: Iterator[str], limit: int) -> Iterator[str]:
    """The pieces of a stream up to about `limit` bytes."""
    read = 0
    for piece in pieces:
        yield piece
        read += len(piece.encode())
        if read >= limit:
            return
