"""Trials: KL to the dense model of whole configurations, cut and repaired, on held-out calibration blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from surgery.engine.open_model import Model
from surgery.engine.resume import Journal
from surgery.evaluate.compare import Comparison
from surgery.index.channel_index import ChannelIndex
from surgery.plan.prune_plan import PrunePlan
from surgery.progress import Progress, no_progress
from surgery.repair.sensitivity import split_blocks
from surgery.text import TokenBlocks


class Trials:
    """Measures plans side by side: each layer is read once for all of them, and the dense model runs once.

    The last calibration blocks are held out to measure on; up to FIT_BLOCKS of the others are what layers
    are repaired on, fewer than the final cut has.
    """

    def __init__(
        self,
        model: Model,
        index: ChannelIndex,
        progress: Progress[Any] = no_progress,
        journal: Journal | None = None,
    ) -> None:
        fitted, held_out = split_blocks(index.input_ids)
        self.model = model
        self.held_out = TokenBlocks(held_out.long(), "held-out calibration blocks", None, predicted_bytes=1)
        self.index = replace(index, input_ids=fitted)
        self.progress = progress
        self.journal = journal

    @property
    def tokens(self) -> int:
        """Tokens that are measured on."""
        return self.held_out.ids.numel()

    def measure(self, plans: list[PrunePlan]) -> list[float]:
        """KL(dense || cut and repaired) of each plan, in nats a token; what the journal has is not measured
        again.
        """
        names = [plan.digest[:16] for plan in plans]
        unknown = {name: plan for name, plan in zip(names, plans, strict=True) if self._saved(name) is None}
        found: dict[str, float] = {}
        if unknown:
            comparison = Comparison(self.model, self.index, [self.held_out])
            rows = comparison.add(list(unknown.values()), self.progress)[1:]  # the first is the dense model's
            found = {name: row.kl for name, row in zip(unknown, rows, strict=True)}
        for name, kl in found.items():
            if self.journal is not None:
                self.journal.save(f"trial-{name}", {"kl": kl})
                self.journal.mark(f"trial {name}")
        return [found[name] if name in found else float(self._saved(name) or 0.0) for name in names]

    def _saved(self, name: str) -> float | None:
        if self.journal is None or f"trial {name}" not in self.journal:
            return None
        return float(self.journal.load(f"trial-{name}")[0]["kl"])
