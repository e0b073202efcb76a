"""FfnIndex: statistics of the channels of one FFN, as they were measured and as a plan takes them."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace

import torch

from surgery.index.block_sums import BlockSums
from surgery.index.codes import rounded
from surgery.index.lazy_statistics import LazyStatistics
from surgery.index.supernodes import halo
from surgery.model.families import DENSE

STATISTICS = (
    "loss_proxy",
    "activation_power",
    "curvature",
    "taylor",
    "mean",
    "max_abs",
    "gate_norm",
    "up_norm",
    "down_norm",
    "down_l1",
    "halo_connectivity",
    "halo_redundancy",
)
LATER = ("halo_redundancy_published", "weight_range")  # missing from indexes of earlier versions
SECOND_ORDER = ("obs", "obs_loss", "unexplained", "taylor_weight", "read_norm")  # with --second-order

LEFT_OUT = ("curvature", "max_abs")  # of the published form: no plan needs them
HALO_ONLY = ("halo_redundancy", "halo_redundancy_published")  # of the published form: elsewhere NaN


@dataclass
class FfnIndex:
    """Index of one FFN: a dense FFN, a shared FFN, or one expert.

    `statistics` are [F] float32 by name; `supernodes` sorted channel indices. `tokens` is the number of
    calibration tokens that reached the FFN; an expert that no token was routed to has no supernodes. `sample`
    [S, F] is q = u * dL/du of every `sample_stride`-th token, with --save-samples. For an expert, `positions`
    [S] are the positions of these tokens in their blocks. `channels` is F where it is known before
    `statistics` are read. `by_block` [2, N, F] are LP and activation power summed over each block, with
    --save-samples too. `block_sums` is what intervals are computed from; None in published indexes and in
    those of earlier versions.
    """

    statistics: MutableMapping[str, torch.Tensor]
    supernodes: torch.Tensor
    tokens: int
    sample: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    kind: str = DENSE
    expert: int | None = None
    channels: int = 0
    by_block: torch.Tensor | None = None
    block_sums: BlockSums | None = None

    @property
    def width(self) -> int:
        """Number of channels F."""
        return self.channels or len(self.statistics["loss_proxy"])

    @property
    def weight_norm(self) -> torch.Tensor:
        """Sum of the L2 norms of gate row, up row and down column, [F]."""
        return sum((self.statistics[n] for n in ("gate_norm", "up_norm", "down_norm")), torch.zeros(()))

    @property
    def halo(self) -> torch.Tensor:
        """Sorted indices of the halo: the top 10% of the other channels by connectivity."""
        if len(self.supernodes) == 0:
            return self.supernodes
        return halo(self.statistics["halo_connectivity"], self.supernodes)


def as_planned(ffn: FfnIndex) -> FfnIndex:
    """The FFN with statistics rounded to 16-bit codes (`codes.rounded`): what scores are computed from.

    So an index in memory, in a folder and in its published form give the same plan. Statistics that were
    decoded from codes keep their values: rounding them again changes nothing.
    """

    def load(name: str) -> torch.Tensor:
        values = ffn.statistics[name]
        if name not in HALO_ONLY:
            return rounded(values)
        members = planned.halo
        return values.index_copy(0, members, rounded(values[members]))

    planned = replace(ffn, statistics=LazyStatistics(ffn.statistics, load, LEFT_OUT))
    return planned
