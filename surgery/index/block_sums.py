"""Sums over calibration blocks that are kept in an index, so that its figures get bootstrap intervals.

Shapes: N blocks, G groups of consecutive blocks, E FFNs of equal width F, K channels that are kept apart, B
bins of the other channels. LP: loss proxy.

What is approximated, to keep the sums of an 8B model below 2 MB:

- Blocks beyond GROUPS are summed in groups of consecutive blocks, which are then resampled as one.
- Of each statistic only the top channels are kept apart: of LP three times as many as there are supernodes,
  of activation power twice as many, at least LEAST_KEPT. A channel that is not among them in the whole sum is
  taken never to be a supernode.
- The other channels are summed in bins, by their rank in LP. What part of a bin a set of channels holds is
  taken to be the same in every group.
- Shares are float16: the relative error of a channel is below 0.05% where it holds 0.006% of its group's sum
  or more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from surgery.engine import distributed
from surgery.engine.device import wide_dtype
from surgery.index.supernodes import SUPERNODE_FRACTION

GROUPS = 32
LP_FRACTION, POWER_FRACTION = 3 * SUPERNODE_FRACTION, 2 * SUPERNODE_FRACTION  # of channels, kept apart
LEAST_KEPT = 16
BIN_EDGES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # shares of channels, largest LP first, where bins end


@dataclass(frozen=True)
class BlockSums:
    """Sums of LP and of activation power of one FFN, in G groups of calibration blocks.

    A group's LP is ½ Σ q² over its tokens and all channels (nats²), its power Σ u².

    block_lp_total, block_power_total: [G] float32.
    block_lp_channels, block_power_channels: [K] int32, the top channels by each, in order of their number; K
        differs between the two.
    block_lp, block_power: [G, K] float16, what each of them holds of its group's total, in [0, 1].
    block_lp_bins: [G, B] float16, what the other channels hold, by rank in LP up to each of BIN_EDGES.
    """

    block_lp_total: torch.Tensor
    block_lp_channels: torch.Tensor
    block_lp: torch.Tensor
    block_lp_bins: torch.Tensor
    block_power_total: torch.Tensor
    block_power_channels: torch.Tensor
    block_power: torch.Tensor

    @property
    def groups(self) -> int:
        """Number of groups G."""
        return len(self.block_lp_total)

    @property
    def lp(self) -> torch.Tensor:
        """LP [G, K] of the channels that are kept apart, float64."""
        return self.block_lp.double() * self.block_lp_total.double()[:, None]

    @property
    def lp_bins(self) -> torch.Tensor:
        """LP [G, B] of the bins, float64."""
        return self.block_lp_bins.double() * self.block_lp_total.double()[:, None]

    @property
    def power(self) -> torch.Tensor:
        """Activation power [G, K] of the channels that are kept apart, float64."""
        return self.block_power.double() * self.block_power_total.double()[:, None]


TENSOR_NAMES = tuple(field.name for field in fields(BlockSums))


def block_sums(
    loss_proxy: torch.Tensor, power: torch.Tensor, lp_blocks: torch.Tensor, power_blocks: torch.Tensor
) -> list[BlockSums]:
    """Sums of E FFNs, from those of this process's blocks; the same on all processes.

    `loss_proxy` and `power` [E, F] rank the channels and are equal on all processes; `lp_blocks` and
    `power_blocks` [E, n, F] are sums over each of this process's n blocks.
    """
    lp_channels, bins = _kept_and_bins(loss_proxy, LP_FRACTION)
    power_channels = _kept_and_bins(power, POWER_FRACTION)[0]
    lp = _columns(lp_blocks, lp_channels)
    binned = torch.stack([_columns(lp_blocks, members).sum(2) for members in bins], 2)
    wide = wide_dtype(lp_blocks.device)
    total, power_total = (b.sum(2, keepdim=True, dtype=wide).cpu() for b in (lp_blocks, power_blocks))
    parts = [total, lp, binned, power_total, _columns(power_blocks, power_channels)]
    rows = torch.cat(parts, 2).transpose(0, 1)  # [n, E, …]
    grouped = _grouped(distributed.all_gather_rows(rows))
    lp_total, lp, binned, power_total, power_top = grouped.split([part.shape[2] for part in parts], 2)
    return [
        BlockSums(
            block_lp_total=lp_total[:, e, 0].float(),
            block_lp_channels=lp_channels[e].int().cpu(),
            block_lp=_shares(lp[:, e], lp_total[:, e]),
            block_lp_bins=_shares(binned[:, e], lp_total[:, e]),
            block_power_total=power_total[:, e, 0].float(),
            block_power_channels=power_channels[e].int().cpu(),
            block_power=_shares(power_top[:, e], power_total[:, e]),
        )
        for e in range(len(loss_proxy))
    ]


def stored(stem: str, sums: Sequence[BlockSums | None], *, stacked: bool) -> dict[str, torch.Tensor]:
    """Tensors of FFNs by stored name, which begins with `stem`; empty where one of them has no sums.

    Those of experts are `stacked`, [E, …].
    """
    held = [one for one in sums if one is not None]
    if len(held) < len(sums) or not held:
        return {}
    each = {name: [getattr(one, name) for one in held] for name in TENSOR_NAMES}
    return {
        stem + name: (torch.stack(values) if stacked else values[0]).contiguous()
        for name, values in each.items()
    }


def restored(stem: str, tensors: Mapping[str, torch.Tensor], expert: int | None = None) -> BlockSums | None:
    """Inverse of `stored`, of one FFN; None where an earlier version wrote the tensors."""
    if stem + TENSOR_NAMES[0] not in tensors:
        return None
    held = {name: tensors[stem + name] for name in TENSOR_NAMES}
    return BlockSums(**{name: value if expert is None else value[expert] for name, value in held.items()})


def kept_count(width: int, fraction: float) -> int:
    """Number K of channels that are kept apart of an FFN with `width` channels."""
    return min(width, max(LEAST_KEPT, round(fraction * width)))


def bin_members(loss_proxy: torch.Tensor) -> list[torch.Tensor]:
    """The channels of each bin, for LP [F]; bins may be empty."""
    return [members[0] for members in _kept_and_bins(loss_proxy[None], LP_FRACTION)[1]]


def _kept_and_bins(values: torch.Tensor, fraction: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The top K channels [E, K] in order of number, and the members [E, …] of each bin of the others."""
    width = values.shape[1]
    kept = kept_count(width, fraction)
    order = values.sort(dim=1, descending=True, stable=True).indices
    ends = [max(kept, round(edge * width)) for edge in BIN_EDGES]
    bins = [order[:, start:end] for start, end in zip([kept, *ends[:-1]], ends, strict=True)]
    return order[:, :kept].sort(1).values, bins


def _columns(blocks: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Columns of blocks [E, n, F] at channels [E, K], [E, n, K] float64."""
    where = channels.to(blocks.device)[:, None].expand(-1, blocks.shape[1], -1)
    return blocks.gather(2, where).cpu().double()


def _grouped(rows: torch.Tensor) -> torch.Tensor:
    """Rows [N, …] summed in at most GROUPS groups of consecutive rows, whose sizes differ by at most one."""
    count = min(GROUPS, len(rows))
    group = torch.arange(len(rows)) * count // max(1, len(rows))
    return torch.zeros(count, *rows.shape[1:], dtype=rows.dtype).index_add_(0, group, rows)


def _shares(values: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Values as float16 shares of a total; 0 where the total is 0."""
    return torch.where(total > 0, values / total, torch.zeros_like(values)).half().contiguous()
