"""What every score in an index would have kept at the widths of a cut: no model, no pass, only the index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from surgery.importance import METHODS
from surgery.index import ChannelIndex, LayerIndex
from surgery.plan import FfnPlan, draft_of, plan_ffn


@dataclass(frozen=True)
class Survival:
    """What a score keeps when nothing is protected: supernodes, super weights, and the share of the LP mass.

    `lp_kept` is the mean of layers' shares, in [0, 1].
    """

    method: str
    supernodes_kept: int
    supernodes: int
    super_weights_kept: int
    super_weights: int
    lp_kept: float


def survivals(index: ChannelIndex, manifest: dict[str, Any]) -> list[Survival]:
    """One entry a score that this index holds, at the widths of the manifest's plan, the best keeper of LP first."""
    pairs = zip(manifest["plan"]["layers"], index.layers, strict=True)
    counts = [kept_counts(entry, layer) for entry, layer in pairs]
    found = [_survival(index, method, counts, manifest["plan"]["seed"]) for method in computable(index)]
    return sorted(found, key=lambda s: -s.lp_kept)


def computable(index: ChannelIndex) -> list[str]:
    """Methods that rank by what this index holds."""
    parts = [ffn for layer in index.layers for ffn in layer.ffns.values()]
    held = set.intersection(*(set(part.statistics) for part in parts))
    return [name for name, method in METHODS.items() if not method.needs or method.needs in held]


def kept_counts(entry: dict[str, Any], layer: LayerIndex) -> dict[str, int]:
    """Channels kept in each FFN of a layer, by name, from its entry in a manifest's plan."""
    if "ffns" in entry:
        return {name: len(part["kept"]) for name, part in entry["ffns"].items()}
    return {name: len(entry["kept"]) for name in layer.ffns}


def _survival(index: ChannelIndex, method: str, counts: list[dict[str, int]], seed: int) -> Survival:
    generator = torch.Generator().manual_seed(seed)
    plans: dict[tuple[int, str], FfnPlan] = {}
    for number, (layer, widths) in enumerate(zip(index.layers, counts, strict=True)):
        for name, ffn in layer.ffns.items():
            draft = draft_of(index, number, name, method, generator, protect=False)
            count = widths[name]
            plans[number, name] = plan_ffn(ffn, draft, count, count, f"layer {number}, {name}")
    seen = [plan for plan in plans.values() if plan.supernodes]
    weights = index.super_weights
    return Survival(
        method=method,
        supernodes_kept=sum(plan.supernodes_kept for plan in seen),
        supernodes=sum(plan.supernodes for plan in seen),
        super_weights_kept=sum(w.column in plans[w.layer, w.ffn].kept.tolist() for w in weights),
        super_weights=len(weights),
        lp_kept=sum(plan.lp_kept for plan in seen) / max(1, len(seen)),
    )
