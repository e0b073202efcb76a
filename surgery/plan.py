"""ResizePlan: which channels of which layer stay, and why. Made before a byte is written, and never changed after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from surgery.allocation import allocate, ranking, score_damage, standardised
from surgery.errors import PlanError
from surgery.importance import METHODS
from surgery.index import ChannelIndex, FfnIndex
from surgery.widths import WidthChange, default_multiple, deployability, width_changes

ALLOCATIONS = ("uniform", "global", "score")
REPAIRS = ("none", "bias", "lstsq", "lstsq-acc")


@dataclass(frozen=True)
class FfnPlan:
    """One FFN: `kept` sorted channel indices [K]; `protected` those that may not go.

    `supernodes` there were and `supernodes_kept` there are; `lp_share_top` is the share of the LP mass held by the
    supernodes, `lp_kept` the share held by the kept channels; `lp_mass` the mass itself. `ranked_by` is the score: an
    expert that no calibration token reached has no LP, and is ranked by weight magnitude. `stored` is the width it is
    written with, more than its channels where layers are padded to one.
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
        """What surgeon.json says of it."""
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
    """One decoder layer: the plans of its FFNs by name, as in LayerIndex."""

    ffns: dict[str, FfnPlan]

    @property
    def kept(self) -> torch.Tensor:
        """Kept channels of a dense layer's only FFN."""
        return next(iter(self.ffns.values())).kept

    def as_json(self) -> dict[str, Any]:
        """The entry of `plan.layers`: a dense FFN's own, or sums over the FFNs with each under its name."""
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
class ResizePlan:
    """The cut of a whole model. `widths` are its config keys, the one with most channels first."""

    method: str
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

    @property
    def per_layer_widths(self) -> bool:
        """Whether the written layers differ in width, which takes more than stock classes to load."""
        return not self.padded and any(len(set(c.per_layer) - {None}) > 1 for c in self.widths)

    @property
    def changes_config(self) -> bool:
        """Whether any width changes."""
        return self.per_layer_widths or any(change.before != change.after for change in self.widths)

    def stored_width(self, layer: int, ffn: str) -> int:
        """Channels an FFN is written with: those kept, or of a padded plan the most that any with its config key keeps."""
        plan = self.layers[layer].ffns[ffn]
        return plan.stored if self.padded else len(plan.kept)

    @property
    def width_before(self) -> int:
        """Channels of an FFN before, of the first key."""
        return self.widths[0].before

    @property
    def width_after(self) -> int:
        """Channels of an FFN after, of the first key."""
        return self.widths[0].after

    def as_json(self) -> dict[str, Any]:
        """The `plan` entry of surgeon.json."""
        return {
            "method": self.method,
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
            "layers": [layer.as_json() for layer in self.layers],
        }


def make_plan(
    index: ChannelIndex,
    *,
    method: str = "lp-hybrid",
    sparsity: float | None = None,
    width: int | None = None,
    multiple_of: int | None = None,
    seed: int = 42,
    allocation: str = "uniform",
    pad: bool = False,
    repair: str = "none",
    curves: list[torch.Tensor] | None = None,
    protect: bool | None = None,
) -> ResizePlan:
    """Choose the channels to keep from an index, the same number in every FFN whose width one config key holds.

    With `allocation` "global" or "score" layers differ, at the same total: those that lose least give most, by what was
    measured (`curves`, as `surgery.curves` makes them, [F + 1] a layer) or by the scores (`pad` writes layers zero-padded
    to the widest, so that stock classes load them). Give `sparsity` in [0, 1) or, for a model with one width, exactly
    `width`. With `protect` supernodes and columns of super weights are never removed; unless it is given, surgeon's and
    the papers' own methods protect and baselines don't, and the plan says what they lose. `repair` says what is done to the weights that stay when the plan is carried out. Raises
    PlanError for a cut that can't be made.
    """
    if repair not in REPAIRS:
        raise PlanError("unknown repair", expected=", ".join(REPAIRS), found=repair)
    if method not in METHODS:
        raise PlanError("unknown method", expected=", ".join(METHODS), found=method)
    if (sparsity is None) == (width is None):
        raise PlanError("give either a sparsity or a width", where="--sparsity, --intermediate-size")
    changes = width_changes(index.widths, sparsity, width, multiple_of)
    protect = METHODS[method].protects if protect is None else protect
    generator = torch.Generator().manual_seed(seed)
    drafts = [
        {name: draft_of(index, number, name, method, generator, protect) for name in layer.ffns}
        for number, layer in enumerate(index.layers)
    ]
    multiple = multiple_of or default_multiple(changes[0].before)
    if allocation not in ALLOCATIONS or (allocation == "global") != (curves is not None):
        raise PlanError(
            "curves go with the allocation global", expected=", ".join(ALLOCATIONS), found=allocation
        )
    if allocation != "uniform":
        changes = tuple(_spread(index, change, drafts, multiple, method, curves) for change in changes)
    layers = []
    for number, layer in enumerate(index.layers):
        ffns = {}
        for name, ffn in layer.ffns.items():
            change = next(c for c in changes if c.key == index.width_key(name))
            width = change.per_layer[number] if change.per_layer else change.after
            assert width is not None
            count = width * (ffn.width // change.before)
            stored = change.after * (ffn.width // change.before)
            ffns[name] = plan_ffn(ffn, drafts[number][name], count, stored, f"layer {number}, {name}")
        layers.append(LayerPlan(ffns))
    before = sum(ffn.width for layer in index.layers for ffn in layer.ffns.values())
    kept = sum(len(ffn.kept) for layer in layers for ffn in layer.ffns.values())
    return ResizePlan(
        method=method,
        seed=seed,
        multiple_of=multiple,
        widths=changes,
        sparsity=1 - kept / before,
        layers=tuple(layers),
        super_weights=tuple(_moved(index, layers)),
        allocation=allocation,
        padded=pad and allocation != "uniform",
        repair=repair,
        protect=protect,
    )


@dataclass(frozen=True)
class Draft:
    """What one FFN's channels are worth, [F] float64, and which may not go, before it is known how many stay."""

    score: torch.Tensor
    protected: torch.Tensor
    ranked_by: str


def draft_of(
    index: ChannelIndex, layer: int, name: str, method: str, generator: torch.Generator, protect: bool
) -> Draft:
    """The draft of one FFN; drafts of one plan are made layer by layer, since "random" draws from `generator`."""
    ffn = index.layers[layer].ffns[name]
    columns = [w.column for w in index.super_weights if (w.layer, w.ffn) == (layer, name)]
    held = torch.tensor(columns, dtype=torch.long)
    ranked_by = method if ffn.tokens or method == "random" else "magnitude"
    return Draft(
        score=METHODS[ranked_by].score(ffn, generator).double(),
        protected=torch.unique(torch.cat([ffn.supernodes, held])) if protect else held[:0],
        ranked_by=ranked_by,
    )


def _spread(
    index: ChannelIndex,
    change: WidthChange,
    drafts: list[dict[str, Draft]],
    multiple: int,
    method: str,
    curves: list[torch.Tensor] | None,
) -> WidthChange:
    """Give each layer a width of its own, together as many channels as a uniform cut keeps.

    LP-like scores are losses and compare across layers as they are; others are standardised within their layer. FFNs
    of one layer under one key (experts, a shared FFN) keep one width: their damages are summed.
    """
    places, damages, floors = [], [], []
    for number, layer in enumerate(index.layers):
        mine = [name for name in layer.ffns if index.width_key(name) == change.key]
        if not mine:
            continue
        total = torch.zeros(change.before + 1, dtype=torch.float64)
        floor = 1
        for name in mine:
            times = layer.ffns[name].width // change.before
            draft = drafts[number][name]
            score = draft.score if METHODS[method].loss else standardised(draft.score)
            if (
                draft.ranked_by == method
            ):  # an expert ranked by magnitude has lost nothing that could be compared
                total += score_damage(score, draft.protected)[::times]
            floor = max(floor, -(-len(draft.protected) // times))
        places.append(number)
        damages.append(total if curves is None else curves[number])
        floors.append(floor)
    widths = allocate(damages, multiple, floors, change.after * len(places))
    per_layer: list[int | None] = [None] * len(index.layers)
    for number, width in zip(places, widths, strict=True):
        per_layer[number] = width
    return WidthChange(change.key, change.before, max(widths), tuple(per_layer))


def keep_orders(
    index: ChannelIndex, method: str, seed: int = 42, protect: bool | None = None
) -> list[torch.Tensor]:
    """Channels of every layer's dense FFN, the most worth keeping first: protected ones, then by score."""
    generator = torch.Generator().manual_seed(seed)
    protect = METHODS[method].protects if protect is None else protect
    orders = []
    for number, layer in enumerate(index.layers):
        if not layer.ffns:
            orders.append(torch.empty(0, dtype=torch.long))
            continue
        draft = draft_of(index, number, next(iter(layer.ffns)), method, generator, protect)
        orders.append(ranking(draft.score, draft.protected))
    return orders


def plan_ffn(ffn: FfnIndex, draft: Draft, count: int, stored: int, where: str) -> FfnPlan:
    """Which `count` channels of one FFN stay; a padded plan writes `stored`."""
    if len(draft.protected) > count:
        raise PlanError(
            "more channels are protected than would be kept",
            where=where,
            expected=f"at most {count}",
            found=str(len(draft.protected)),
            next_step="keep more channels",
        )
    kept = keep_highest(draft.score, draft.protected, count)
    proxy = ffn.statistics["loss_proxy"]
    return FfnPlan(
        kept=kept,
        protected=draft.protected,
        supernodes=len(ffn.supernodes),
        supernodes_kept=int(torch.isin(ffn.supernodes, kept).sum()),
        lp_share_top=mass(proxy, ffn.supernodes),
        lp_kept=mass(proxy, kept),
        lp_mass=float(proxy.double().sum()),
        ranked_by=draft.ranked_by,
        stored=stored,
    )


def mass(loss_proxy: torch.Tensor, channels: torch.Tensor) -> float:
    """Share of the LP mass [F] that some channels hold, in [0, 1]."""
    values = loss_proxy.double()
    total = float(values.sum())
    return float(values[channels].sum()) / total if total > 0 else 0.0


def keep_highest(score: torch.Tensor, protected: torch.Tensor, count: int) -> torch.Tensor:
    """Sorted indices [count] of the highest scores [F], the protected ones first; ties go to the lower index."""
    return ranking(score, protected)[:count].sort().values


def _moved(index: ChannelIndex, layers: list[LayerPlan]) -> list[dict[str, Any]]:
    """Super weights with the column they have after the cut; None where their channel was removed."""
    moved = []
    for weight in index.super_weights:
        place = (layers[weight.layer].ffns[weight.ffn].kept == weight.column).nonzero()
        new = int(place[0]) if len(place) else None
        moved.append({**weight.as_json(), "column_before": weight.column, "column": new})
    return moved
