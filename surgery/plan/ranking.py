"""Which channels of one FFN stay: scores, what is protected, and the plan of the FFN at a width."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from surgery.errors import PlanError
from surgery.index.channel_index import ChannelIndex, FfnIndex
from surgery.index.ffn_index import as_planned
from surgery.plan.allocation import ranking
from surgery.plan.methods import METHODS
from surgery.plan.prune_plan import FfnPlan


@dataclass(frozen=True)
class ChannelRanking:
    """Scores [F] float64 of one FFN's channels, its protected channels, and the method that ranked them."""

    score: torch.Tensor
    protected: torch.Tensor
    ranked_by: str


def rank_channels(
    index: ChannelIndex, layer: int, name: str, method: str, generator: torch.Generator, protect: bool
) -> ChannelRanking:
    """Rank one FFN's channels, by statistics as `as_planned` rounds them.

    The order of calls matters for the method "random", which draws from `generator`.
    """
    ffn = index.layers[layer].ffns[name]
    own_weights = [w for w in index.super_weights if (w.layer, w.ffn) == (layer, name)]
    columns = torch.tensor([w.column for w in own_weights], dtype=torch.long)
    ranked_by = method if ffn.tokens or method == "random" else "magnitude"
    return ChannelRanking(
        score=METHODS[ranked_by].scores(as_planned(ffn), generator).double(),
        protected=torch.unique(torch.cat([ffn.supernodes, columns])) if protect else columns[:0],
        ranked_by=ranked_by,
    )


def channel_orders(
    index: ChannelIndex, method: str, seed: int = 42, protect: bool | None = None
) -> list[torch.Tensor]:
    """Channel indices [F] of the first FFN of every layer, as `ranking` orders them.

    A layer without an FFN gets an empty tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    protect = METHODS[method].protects if protect is None else protect
    orders = []
    for number, layer in enumerate(index.layers):
        if not layer.ffns:
            orders.append(torch.empty(0, dtype=torch.long))
            continue
        ranked = rank_channels(index, number, next(iter(layer.ffns)), method, generator, protect)
        orders.append(ranking(ranked.score, ranked.protected))
    return orders


def plan_ffn(ffn: FfnIndex, ranked: ChannelRanking, count: int, stored: int, where: str) -> FfnPlan:
    """Plan of one FFN that keeps `count` channels; `stored` is its width in a padded plan.

    Raises PlanError when more than `count` channels are protected.
    """
    if len(ranked.protected) > count:
        raise PlanError(
            "more channels are protected than would be kept",
            where=where,
            expected=f"at most {count}",
            found=str(len(ranked.protected)),
            next_step="keep more channels",
        )
    kept = keep_highest(ranked.score, ranked.protected, count)
    proxy = as_planned(ffn).statistics["loss_proxy"]
    return FfnPlan(
        kept=kept,
        protected=ranked.protected,
        supernodes=len(ffn.supernodes),
        supernodes_kept=int(torch.isin(ffn.supernodes, kept).sum()),
        lp_share_top=mass(proxy, ffn.supernodes),
        lp_kept=mass(proxy, kept),
        lp_mass=float(proxy.double().sum()),
        ranked_by=ranked.ranked_by,
        stored=stored,
    )


def plan_without(ffn: FfnIndex, ranked: ChannelRanking) -> FfnPlan:
    """Plan of an FFN that goes as a whole or with its layer: no channel is kept or protected."""
    none = torch.empty(0, dtype=torch.long)
    return plan_ffn(ffn, replace(ranked, protected=none), 0, 0, "")


def mass(loss_proxy: torch.Tensor, channels: torch.Tensor) -> float:
    """Share of the total LP [F] in `channels`, in [0, 1]."""
    values = loss_proxy.double()
    total = float(values.sum())
    return float(values[channels].sum()) / total if total > 0 else 0.0


def keep_highest(score: torch.Tensor, protected: torch.Tensor, count: int) -> torch.Tensor:
    """Sorted indices [count] of the most important channels, as `ranking` orders them."""
    return ranking(score, protected)[:count].sort().values
