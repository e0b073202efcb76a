"""Slice: the indices of a parameter that belong to the members of a group (FFN channels, heads)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slice:
    """The members of a group along one axis of a decoder layer's parameter.

    - `parameter`: path inside the layer ("mlp.down_proj.weight").
    - `axis`: the axis of the members, counting the expert axis where there is one.
    - `block`: neighbouring indices per member (head_dim for an attention head, 1 for an FFN channel).
    - `parts`: how often the axis holds the members (2 for gate and up rows of one matrix). The parts are
      stored one after the other or, when `interleaved`, alternate member by member.
    - `blocks`: of each part by itself, where parts have blocks of different size; then `block` and `parts`
      are not used (queries, keys and values of one matrix).
    - `expert`: index along axis 0 of a parameter that stacks all experts, None for other parameters.
    """

    parameter: str
    axis: int
    block: int = 1
    parts: int = 1
    interleaved: bool = False
    expert: int | None = None
    blocks: tuple[int, ...] = ()

    def length(self, members: int) -> int:
        """Length of the axis for a group of `members` members."""
        if self.blocks:
            return members * sum(self.blocks)
        return members * self.parts * self.block

    def indices(self, kept: torch.Tensor, members: int) -> torch.Tensor:
        """Indices along the axis [K * parts * block] of the `kept` members [K] out of `members`.

        A kept member of -1 stands for zeros; its indices are -1.
        """
        if self.blocks:
            edges = [members * sum(self.blocks[:place]) for place in range(len(self.blocks))]
            each = [Slice("", self.axis, block).indices(kept, members) for block in self.blocks]
            return torch.cat(
                [torch.where(one < 0, -1, one + at) for one, at in zip(each, edges, strict=True)]
            )
        part = torch.arange(self.parts)
        starts = (
            kept[:, None] * self.parts + part
            if self.interleaved
            else (kept + part[:, None] * members).reshape(self.parts, len(kept))
        )
        found = starts[..., None] * self.block + torch.arange(self.block)
        missing = (kept < 0)[:, None] if self.interleaved else kept < 0
        return torch.where(missing[..., None], -1, found).flatten()
