"""Intervals of the LP shares in a plan's entry of surgeon.json."""

from __future__ import annotations

from typing import Any

from surgery.index.channel_index import ChannelIndex
from surgery.index.intervals import bounds, held_share, top_share_of, why_no_sums
from surgery.plan.prune_plan import PrunePlan


def with_intervals(plan: PrunePlan, index: ChannelIndex) -> dict[str, Any]:
    """The entry `plan` of surgeon.json with 95% intervals [low, high] over the index's calibration blocks.

    Each layer gets `lp_share_top_interval`, for which the top channels are chosen again in every resample,
    and `lp_kept_interval`, of the kept channels as they are. Where they are null, `no_intervals` says why.
    """
    fields = plan.as_json()
    fields["no_intervals"] = why_no_sums(index)
    for entry, layer_plan, layer in zip(fields["layers"], plan.layers, index.layers, strict=True):
        kept = [(layer.ffns[name], part.kept) for name, part in layer_plan.ffns.items()]
        entry["lp_share_top_interval"] = bounds(top_share_of(list(layer.ffns.values())))
        entry["lp_kept_interval"] = bounds(held_share([kept]))
    return fields
