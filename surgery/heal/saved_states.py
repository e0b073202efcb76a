"""Which saved state several processes of one heal go on from."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from surgery.engine import distributed
from surgery.engine.resume import Journal


def agree_on_saves(journal: Journal | None, marks: Iterable[str], device: torch.device) -> None:
    """Take marks of saves out of the journal that other processes' journals don't have.

    Each process has a journal, and all save at the same steps, so that their last saves are one apart at
    most, whenever a process was killed; the state before the last is whole as long as no step followed.
    `marks` name the steps of saves. A journal that was lost takes all processes back to the start. Raises
    DistributedError.
    """
    if journal is None:
        return
    for mark in marks:
        numbers = journal.numbers(mark)
        last = max(numbers, default=0)
        shared = int(distributed.all_reduce_min(torch.tensor(last, device=device)))
        (held,) = distributed.all_true([shared >= last - 1], device)
        agreed = shared if held else 0
        later = [f"{mark} {number}" for number in numbers if number > agreed]
        if later:  # their files are written again: a mark from before would vouch for half a file
            journal.unmark(*later)
