"""How a perplexity changed, with a paired interval, from two entries of surgeon.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PerplexityChange:
    """Perplexity after over perplexity before, on the same blocks.

    `interval` is its 95% interval [low, high] over `blocks` blocks; where there is none, `reason` says why.
    """

    factor: float
    interval: list[float] | None = None
    blocks: int = 0
    reason: str = ""

    @property
    def differs(self) -> bool | None:
        """Whether the interval excludes 1; None without one."""
        return None if self.interval is None else not self.interval[0] <= 1 <= self.interval[1]

    @property
    def note(self) -> str:
        """What the interval is and whether the models differ by it, or why there is none."""
        if self.interval is None:
            return self.reason
        how = (
            f"In parentheses: 95% interval of the factor, by a bootstrap of the text's {self.blocks} blocks, "
            "in which each block counts equally often for both models."
        )
        return how if self.differs else f"{how} It includes 1: by these blocks the two models do not differ."


def perplexity_change(before: dict[str, Any], after: dict[str, Any]) -> PerplexityChange:
    """The change between two entries that `Perplexity.as_json` wrote."""
    factor = after["perplexity"] / before["perplexity"]
    if "block_nats" not in before or "block_nats" not in after:
        return PerplexityChange(
            factor, reason="No interval: the loss of each block was not kept when this was measured."
        )
    if before["sha256"] != after["sha256"]:
        return PerplexityChange(factor, reason="No interval: the two were measured on different tokens.")
    import torch

    from surgery.bootstrap import LEAST_BLOCKS, paired_ratio

    first, second = (torch.tensor(one["block_nats"], dtype=torch.float64) for one in (before, after))
    if len(first) < LEAST_BLOCKS:
        return PerplexityChange(
            factor, reason=f"No interval: it needs {LEAST_BLOCKS} blocks or more, and there are {len(first)}."
        )
    found = paired_ratio(first, second, before["block_size"] - 1)
    return PerplexityChange(factor, found.bounds, len(first))
