"""PrunePlan: the channels each layer keeps, and why. Computed before anything is written; immutable."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from surgery.plan.kind_plan import (
    KindPlan,
    removed_attention,
    removed_ffns,
    removed_layers,
)
from surgery.plan.search_plan import SearchPlan, WidthSearch
from surgery.plan.widths import (
    WidthChange,
    deployability,
)

ALLOCATIONS = ("uniform", "global", "searched", "score")
MEASURED = ("global", "searched")  # which start from the sensitivity of layers
GIVEN = "given"  # allocation of a plan whose widths of layers are said one by one


@dataclass(frozen=True)
class FfnPlan:
    """Plan of one FFN.

    kept: sorted indices [K] of the kept channels.
    protected: indices of the channels that must not be removed.
    supernodes, supernodes_kept: number of supernodes before and after pruning.
    lp_share_top: share of the LP mass in the supernodes.
    lp_kept: share of the LP mass in the kept channels.
    lp_mass: total LP.
    ranked_by: the method that ranked the channels. An expert that no calibration token was routed to has no
        LP and is ranked by weight magnitude.
    stored: width in a padded checkpoint, at least K.
    """

    kept: torch.Tensor
    protected: torch.Tensor
    supernodes: int
    supernodes_kept: int
    lp_share_top: float
    lp_kept: float
    lp_mass: float
    ranked_by: str
    stored: int = 0

    def as_json(self) -> dict[str, Any]:
        """Its entry in surgeon.json."""
        return {
            "width": len(self.kept),
            "supernodes": self.supernodes,
            "supernodes_kept": self.supernodes_kept,
            "lp_share_top": self.lp_share_top,
            "lp_kept": self.lp_kept,
            "ranked_by": self.ranked_by,
            "protected": self.protected.tolist(),
            "kept": self.kept.tolist(),
        }


@dataclass(frozen=True)
class LayerPlan:
    """Plan of one decoder layer: the plans of its FFNs by name, as in LayerIndex."""

    ffns: dict[str, FfnPlan]

    @property
    def kept(self) -> torch.Tensor:
        """Kept channels [K] of the only FFN of a dense layer."""
        return next(iter(self.ffns.values())).kept

    def as_json(self) -> dict[str, Any]:
        """Its entry in `plan.layers`: that of its only FFN, or totals and the entry of each FFN by name."""
        if len(self.ffns) == 1:
            return next(iter(self.ffns.values())).as_json()
        parts = list(self.ffns.values())
        mass = sum(part.lp_mass for part in parts)
        return {
            "width": max((len(part.kept) for part in parts), default=0),
            "supernodes": sum(part.supernodes for part in parts),
            "supernodes_kept": sum(part.supernodes_kept for part in parts),
            "lp_share_top": sum(p.lp_share_top * p.lp_mass for p in parts) / mass if mass else 0.0,
            "lp_kept": sum(p.lp_kept * p.lp_mass for p in parts) / mass if mass else 0.0,
            "ffns": {name: part.as_json() for name, part in self.ffns.items()},
        }


@dataclass(frozen=True)
class PrunePlan:
    """Pruning plan of a whole model.

    method, label, paper: the pruning method, its name in cards, and its source.
    multiple_of: widths are multiples of this number.
    widths: changes of the config keys that hold FFN widths, the key with the most channels first.
    sparsity: share of all FFN channels that is removed.
    super_weights: entries of the index, with their columns after pruning (None if removed).
    allocation: "uniform", "global", "searched", "score" or "given".
    padded: whether layers are zero-padded to the widest layer.
    repair: name of the repair method.
    protect: whether supernodes and super-weight columns are kept.
    cuts: what goes besides FFN channels, one entry for each kind.
    search: how the mixture of cuts was found, where it was searched for.
    width_search: how the widths of layers were, with the allocation "searched".
    """

    method: str
    label: str
    seed: int
    multiple_of: int
    widths: tuple[WidthChange, ...]
    sparsity: float
    layers: tuple[LayerPlan, ...]
    super_weights: tuple[dict[str, Any], ...]
    allocation: str = "uniform"
    padded: bool = False
    repair: str = "none"
    protect: bool = True
    paper: str = ""
    cuts: tuple[KindPlan, ...] = ()
    search: SearchPlan | None = None
    width_search: WidthSearch | None = None

    @property
    def per_layer_widths(self) -> bool:
        """Whether stored layers differ in width; stock transformers classes can't load such a checkpoint."""
        return not self.padded and any(len(set(c.per_layer) - {None}) > 1 for c in self.widths)

    @property
    def needs_loader(self) -> bool:
        """Whether stock transformers classes can't load the result."""
        incomplete = removed_attention(self.cuts) | removed_ffns(self.cuts)
        return self.per_layer_widths or bool(incomplete - removed_layers(self.cuts))

    def stored_width(self, layer: int, ffn: str) -> int:
        """Channels of an FFN in the written checkpoint.

        The number of kept channels; in a padded plan, the largest number for its config key.
        """
        plan = self.layers[layer].ffns[ffn]
        return plan.stored if self.padded else len(plan.kept)

    @property
    def kept(self) -> dict[tuple[int, str], torch.Tensor]:
        """Kept channels [K] of every FFN, by (layer, FFN name)."""
        return {
            (number, name): ffn.kept
            for number, layer in enumerate(self.layers)
            for name, ffn in layer.ffns.items()
        }

    @property
    def width_before(self) -> int:
        """Width of an FFN before pruning, for the first config key."""
        return self.widths[0].before

    @property
    def width_after(self) -> int:
        """Width of an FFN after pruning, for the first config key."""
        return self.widths[0].after

    @property
    def digest(self) -> str:
        """What tells this plan from others, in journals."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """The entry `plan` of surgeon.json."""
        return {
            "method": self.method,
            "method_label": self.label,
            "paper": self.paper,
            "allocation": self.allocation,
            "padded": self.padded,
            "repair": self.repair,
            "protect": self.protect,
            "seed": self.seed,
            "sparsity": self.sparsity,
            "multiple_of": self.multiple_of,
            "width_before": self.width_before,
            "width_after": self.width_after,
            "widths": {change.key: change.as_json() for change in self.widths},
            "divides": deployability(self.width_after),
            **({"cuts": {part.kind: part.facts for part in self.cuts}} if self.cuts else {}),
            **({"search": self.search.as_json()} if self.search else {}),
            **({"width_search": self.width_search.as_json()} if self.width_search else {}),
            "layers": [layer.as_json() for layer in self.layers],
        }
