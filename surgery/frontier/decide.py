"""Which point of a frontier is best, in one sentence. Pure: rows in, words out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgery.byte_units import format_bytes
from surgery.errors import UsageError


@dataclass(frozen=True)
class TextLoss:
    """Cross-entropy of a point on a text: nats of every block, and bytes of text of all blocks."""

    text: str
    digest: str
    nats: tuple[float, ...]
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text."""
        return sum(self.nats) / math.log(2) / self.text_bytes


@dataclass(frozen=True)
class Row:
    """What was measured of a point; `bytes` are those of its weights.

    `decode` are tokens a second, the median of rounds, and `slowest` those of the slowest round; None where
    they were not measured.
    """

    name: str
    is_cut: bool
    bytes: int
    losses: tuple[TextLoss, ...]
    decode: float | None = None
    slowest: float | None = None

    @property
    def bits_per_byte(self) -> float:
        """Mean over texts of bits per byte."""
        return sum(loss.bits_per_byte for loss in self.losses) / len(self.losses)


def difference(row: Row, other: Row) -> tuple[float, float | None]:
    """Bits per byte of `row` less those of `other`, and its standard error over blocks paired by text.

    The error is None where the two were not measured on the same tokens, or a text has one block only.
    """
    variance: float | None = 0.0
    for ours, theirs in zip(row.losses, other.losses, strict=True):
        count = len(ours.nats)
        if ours.digest != theirs.digest or count < 2:
            variance = None
            break
        scale = count / math.log(2) / ours.text_bytes
        each = [scale * (one - two) for one, two in zip(ours.nats, theirs.nats, strict=True)]
        mean = sum(each) / count
        assert variance is not None
        variance += sum((value - mean) ** 2 for value in each) / (count - 1) / count
    error = None if variance is None else math.sqrt(variance) / len(row.losses)
    return row.bits_per_byte - other.bits_per_byte, error


def not_dominated(rows: Sequence[Row]) -> list[Row]:
    """The rows than which no other has both fewer bytes and fewer bits per byte, smallest first."""
    order = sorted(rows, key=lambda row: (row.bytes, row.bits_per_byte))
    best, found = math.inf, []
    for row in order:
        if row.bits_per_byte < best:
            found.append(row)
            best = row.bits_per_byte
    return found


def best_row(rows: Sequence[Row], size: int | None, speed: float | None) -> Row | None:
    """The row of the fewest bits per byte with at most `size` bytes and at least `speed` tokens a second.

    Raises UsageError for a target speed where no row's speed was measured.
    """
    if speed is not None and all(row.decode is None for row in rows):
        raise UsageError("no speed was measured", where="--target-speed", next_step="leave out --no-speed")
    fitting = [
        row
        for row in rows
        if (size is None or row.bytes <= size)
        and (speed is None or (row.decode is not None and row.decode >= speed))
    ]
    return min(fitting, key=lambda row: (row.bits_per_byte, row.bytes), default=None)


def sentence(rows: Sequence[Row], size: int | None = None, speed: float | None = None) -> str:
    """Which point is best at the targets; without targets, which cuts are worth their bytes.

    `rows[0]` is the dense model. A difference within two standard errors is called unclear.
    """
    if size is None and speed is None:
        return _overall(rows)
    target = " and ".join(
        [
            *([f"at most {format_bytes(size)}"] if size is not None else []),
            *([f"at least {speed:g} tokens a second"] if speed is not None else []),
        ]
    )
    best = best_row(rows, size, speed)
    if best is None:
        least, most = min(row.bytes for row in rows), max((row.decode or 0.0 for row in rows), default=0.0)
        reached = f"the smallest has {format_bytes(least)}" + (
            f", the fastest {most:.1f} tokens a second" if speed is not None else ""
        )
        return f"No point has {target}: {reached}."
    rivals = [row for row in rows if row.is_cut != best.is_cut]
    rival = best_row(rivals, size, speed) if rivals else None
    if rival is None:
        none = "no uncut point fits." if best.is_cut else "no cut fits. Do not cut."
        said = f"With {target}, {_described(best, rows[0])} is best; {none}"
    else:
        if best.is_cut and not _clearly_worse(rival, best):
            best, rival = rival, best  # a cut has to be clearly better
        gap, error = difference(rival, best)
        than = f"{abs(gap):.4f} bits per byte {'more' if gap >= 0 else 'less'}"
        than += "" if error is None else f" (± {error:.4f})"
        unclear = "" if error is None or abs(gap) > 2 * error else ", which is no clear difference"
        cut = "" if best.is_cut else ": do not cut"
        said = f"With {target}, {_described(best, rows[0])} is best{cut}; {rival.name} has {than}{unclear}."
    if speed is not None and best.slowest is not None and best.slowest < speed:
        said += f" Its slowest round decoded {best.slowest:.1f} tokens a second."
    return said


def worth_cutting(cut: Row, rows: Sequence[Row]) -> bool:
    """Whether every uncut point of at most the bytes of `cut` has clearly more bits per byte."""
    fitting = [row for row in rows if not row.is_cut and row.bytes <= cut.bytes]
    return all(_clearly_worse(row, cut) for row in fitting)


def _clearly_worse(row: Row, other: Row) -> bool:
    """Whether a row has more bits per byte than another by more than two standard errors."""
    gap, error = difference(row, other)
    return gap > 2 * (error or 0.0)


def _overall(rows: Sequence[Row]) -> str:
    """The sentence without targets."""
    uncut = sorted((row for row in rows if not row.is_cut), key=lambda row: row.bytes)
    smallest = uncut[0]
    if len(uncut) == len(rows):
        return f"No cut was measured; the smallest point is {_described(smallest, rows[0])}."
    cuts = [row for row in rows if row.is_cut and worth_cutting(row, rows)]
    if not cuts:
        return (
            "Do not cut: every cut has an uncut point that is no larger and not clearly worse; the smallest "
            f"is {_described(smallest, rows[0])}."
        )
    largest = max(cuts, key=lambda row: row.bytes)
    if largest.bytes < smallest.bytes:
        return (
            f"Do not cut unless the model must be smaller than {_described(smallest, rows[0])}: down to "
            "there no cut is clearly better than rounding alone. The first cut below it is "
            f"{_described(largest, rows[0])}."
        )
    named = ", ".join(row.name for row in cuts)
    return f"Cutting is worth it at some sizes: no uncut point of the same bytes is as good as {named}."


def _described(row: Row, dense: Row) -> str:
    """A row with its size and loss."""
    more = row.bits_per_byte - dense.bits_per_byte
    return f"{row.name} ({format_bytes(row.bytes)}, {row.bits_per_byte:.4f} bits per byte, {more:+.4f})"


def as_row(fields: dict[str, Any]) -> Row:
    """A row from an entry of frontier.json's `points`."""
    losses = tuple(
        TextLoss(text["text"], text["sha256"], tuple(text["block_nats"]), text["bytes"])
        for text in fields["texts"]
    )
    speed = fields["speed"]
    decode, slowest = (None, None) if speed is None else (speed["decode"], speed["slowest"])
    is_cut = fields["sparsity"] is not None
    return Row(fields["name"], is_cut, fields["bytes"], losses, decode, slowest)
