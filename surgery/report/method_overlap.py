"""What every pruning method would keep at the widths of a pruned model, computed from the index alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from surgery.index.channel_index import ChannelIndex, LayerIndex
from surgery.index.intervals import bounds, held_share
from surgery.plan.methods import METHODS
from surgery.plan.prune_plan import FfnPlan
from surgery.plan.ranking import plan_ffn, rank_channels


@dataclass(frozen=True)
class Survival:
    """What a method keeps when nothing is protected: supernodes, super weights, and LP.

    `lp_kept` is the share of a layer's LP held by the kept channels, mean of layers, in [0, 1]. `lp_interval`
    is its 95% interval over calibration blocks, for the kept channels as they are.
    """

    method: str
    supernodes_kept: int
    supernodes: int
    super_weights_kept: int
    super_weights: int
    lp_kept: float
    lp_interval: list[float] | None = None


def survivals(index: ChannelIndex, manifest: dict[str, Any]) -> list[Survival]:
    """One entry per method that this index has the statistics for, sorted by LP kept, largest first.

    Widths are those of the manifest's plan.
    """
    pairs = zip(manifest["plan"]["layers"], index.layers, strict=True)
    counts = [kept_counts(entry, layer) for entry, layer in pairs]
    found = [_survival(index, method, counts, manifest["plan"]["seed"]) for method in computable(index)]
    return sorted(found, key=lambda s: -s.lp_kept)


def computable(index: ChannelIndex) -> list[str]:
    """Names of the methods that this index has the statistics for."""
    parts = [ffn for layer in index.layers for ffn in layer.ffns.values()]
    held = set.intersection(*(set(part.statistics) for part in parts))
    return [name for name, method in METHODS.items() if not method.needs or method.needs in held]


def kept_counts(entry: dict[str, Any], layer: LayerIndex) -> dict[str, int]:
    """FFN name -> number of kept channels, from the entry of a layer in a manifest's plan."""
    if "ffns" in entry:
        return {name: len(part["kept"]) for name, part in entry["ffns"].items()}
    return {name: len(entry["kept"]) for name in layer.ffns}


def _survival(index: ChannelIndex, method: str, counts: list[dict[str, int]], seed: int) -> Survival:
    generator = torch.Generator().manual_seed(seed)
    plans: dict[tuple[int, str], FfnPlan] = {}
    for number, (layer, widths) in enumerate(zip(index.layers, counts, strict=True)):
        for name, ffn in layer.ffns.items():
            ranked = rank_channels(index, number, name, method, generator, protect=False)
            count = widths[name]
            plans[number, name] = plan_ffn(ffn, ranked, count, count, f"layer {number}, {name}")
    seen = [
        plan for plan in plans.values() if plan.supernodes
    ]  # experts without calibration tokens have none
    kept = [
        [(index.layers[number].ffns[name], plan.kept)] for (number, name), plan in plans.items()
    ]  # the mean is over FFNs
    weights = index.super_weights
    return Survival(
        method=method,
        supernodes_kept=sum(plan.supernodes_kept for plan in seen),
        supernodes=sum(plan.supernodes for plan in seen),
        super_weights_kept=sum(w.column in plans[w.layer, w.ffn].kept.tolist() for w in weights),
        super_weights=len(weights),
        lp_kept=sum(plan.lp_kept for plan in seen) / max(1, len(seen)),
        lp_interval=bounds(held_share(kept)),
    )
