"""States of a training run in two files of the journal, from which all processes go on at the same step."""

from __future__ import annotations

import time
from typing import Any

import torch

from surgery.engine import distributed
from surgery.engine.resume import Journal


class SavedStates:
    """Saves states in turn in two files of `journal`; without one nothing is saved.

    With several processes each has a journal. All save at the same steps, so that the journals' newest states
    are one save apart at most, whenever a process was killed.
    """

    def __init__(self, journal: Journal | None, device: torch.device) -> None:
        self.journal = journal
        self.device = device
        self.number = 0  # of the newest state
        self.at = time.monotonic()  # when it was saved

    def due(self, seconds: float) -> bool:
        """Whether `seconds` have passed since the last save, by the clock of the first process.

        Raises DistributedError.
        """
        return self.journal is not None and distributed.first_says(
            time.monotonic() - self.at >= seconds, self.device
        )

    def save(self, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Save a state over the last but one."""
        if self.journal is None:
            return
        self.number += 1
        self.journal.save(f"state-{self.number % 2}", fields, tensors)
        self.journal.mark(f"state {self.number}")
        self.at = time.monotonic()

    def newest(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """The newest state that the journals of all processes hold; None where there is none.

        Raises DistributedError.
        """
        if self.journal is None:
            return None
        numbers = self.journal.numbers("state")
        last = max(numbers, default=0)
        shared = int(distributed.all_reduce_min(torch.tensor(last, device=self.device)))
        (held,) = distributed.all_true([shared >= last - 1], self.device)
        self.number = shared if held else 0  # a journal that was lost takes all processes back to the start
        later = [f"state {number}" for number in numbers if number > self.number]
        if later:  # their files are written again: a mark from before would vouch for half a file
            self.journal.unmark(*later)
        return self.journal.load(f"state-{self.number % 2}") if self.number else None
