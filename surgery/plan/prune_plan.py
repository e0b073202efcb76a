"""PrunePlan: the channels each layer keeps, and why. Computed before anything is written; immutable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from surgery import defaults
from surgery.errors import PlanError
from surgery.index.channel_index import ChannelIndex, FfnIndex
from surgery.index.ffn_index import as_planned
from surgery.plan.allocation import allocate, ranking, score_damage, standardised
from surgery.plan.kind_plan import (
    KindPlan,
    check_something_stays,
    removed_attention,
    removed_ffns,
    removed_layers,
    with_expert_places,
)
from surgery.plan.methods import METHODS
from surgery.plan.search_plan import SearchPlan, WidthSearch
from surgery.plan.widths import (
    WidthChange,
    check_layer_widths,
    default_multiple,
    deployability,
    width_changes,
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


def make_plan(
    index: ChannelIndex,
    *,
    method: str = defaults.METHOD,
    sparsity: float | None = None,
    width: int | None = None,
    multiple_of: int | None = None,
    seed: int = defaults.SEED,
    allocation: str = defaults.ALLOCATION,
    pad: bool = False,
    repair: str = defaults.REPAIR,
    sensitivity: list[torch.Tensor] | None = None,
    protect: bool | None = None,
    cuts: tuple[KindPlan, ...] = (),
    layer_widths: Sequence[int] | None = None,
    width_search: WidthSearch | None = None,
) -> PrunePlan:
    """Choose the channels to keep from an index, the same number in all FFNs with the same config key.

    method: a name in METHODS.
    sparsity: share of channels to remove, in [0, 1). Give either this or `width`.
    width: exact number of channels to keep, for a model with one FFN width.
    multiple_of: widths are rounded to a multiple of this number (default: `default_multiple`).
    seed: seed of the method "random".
    allocation: "uniform", or "global", "searched" or "score" for a width per layer with the same total of
        channels. Layers that lose the least are pruned the most. "global" and "searched" take the loss from
        `sensitivity`, "score" from the scores.
    pad: zero-pad layers to the widest one, so that stock classes load the checkpoint.
    repair: name of the method that refits the kept weights when the plan is applied.
    sensitivity: [F + 1] per layer, as `measure_sensitivity` returns it.
    protect: whether supernodes and super-weight columns are never removed (default: as the method says).
    cuts: what goes besides FFN channels. FFNs that go as a whole or with their layer keep no channel; sizes
        are those of the others.
    layer_widths: with the allocation "given", channels to keep in each layer, 0 in one without an FFN; give
        neither a sparsity nor a width then.
    width_search: with the allocation "searched", the widths that were found (`search_widths`).

    Raises PlanError for an unknown method, conflicting arguments, or a width that can't be reached.
    """
    chosen = METHODS.find(method)
    if allocation == GIVEN:
        sparsity, width = None, max(layer_widths or [0])
    if (sparsity is None) == (width is None):
        raise PlanError("give either a sparsity or a width", where="--sparsity, --intermediate-size")
    if (allocation == GIVEN) != (layer_widths is not None):
        raise PlanError("widths of layers must be given with the allocation given, and only then")
    if allocation not in (*ALLOCATIONS, GIVEN) or (allocation in MEASURED) != (sensitivity is not None):
        raise PlanError(
            "sensitivity must be given with the allocations global and searched, and only then",
            expected=", ".join(ALLOCATIONS),
            found=allocation,
        )
    changes = width_changes(index.widths, sparsity, width, multiple_of)
    protect = chosen.protects if protect is None else protect
    generator = torch.Generator().manual_seed(seed)
    rankings = [
        {name: rank_channels(index, number, name, method, generator, protect) for name in layer.ffns}
        for number, layer in enumerate(index.layers)
    ]
    multiple = multiple_of or default_multiple(changes[0].before)
    check_something_stays(removed_attention(cuts), removed_ffns(cuts))
    bare = removed_layers(cuts) | removed_ffns(cuts)  # without channels
    found = width_search.widths if width_search is not None else layer_widths
    if found is not None:
        changes = (_at_widths(index, found, bare),)
    elif allocation != "uniform":
        changes = tuple(
            _spread(index, change, rankings, multiple, method, sensitivity, bare) for change in changes
        )
    layers = tuple(
        LayerPlan(
            {
                name: plan_without(ffn, rankings[number][name])
                if number in bare
                else _plan_at_width(index, number, name, changes, rankings[number][name])
                for name, ffn in layer.ffns.items()
            }
        )
        for number, layer in enumerate(index.layers)
    )
    before = sum(ffn.width for layer in index.layers for ffn in layer.ffns.values())
    kept = sum(len(ffn.kept) for layer in layers for ffn in layer.ffns.values())
    return PrunePlan(
        method=method,
        label=chosen.label or method,
        paper=chosen.paper,
        seed=seed,
        multiple_of=multiple,
        widths=changes,
        sparsity=1 - kept / before,
        layers=layers,
        super_weights=with_expert_places(_moved(index, layers, removed_layers(cuts)), cuts),
        allocation=allocation,
        padded=pad and allocation != "uniform",
        repair=repair,
        protect=protect,
        cuts=cuts,
        width_search=width_search,
    )


def _at_widths(index: ChannelIndex, widths: Sequence[int], bare: frozenset[int]) -> WidthChange:
    """The change to these widths of layers; layers `bare` of an FFN have none. Raises PlanError."""
    check_layer_widths(index.widths, widths, len(index.layers))
    ((key, before),) = index.widths.items()
    zero = [number for number, width in enumerate(widths) if not width and number not in bare]
    if zero:
        raise PlanError(
            "an FFN keeps at least one channel",
            where="--layer-widths",
            found=f"0 for layer {zero[0]}",
            next_step="remove whole FFNs with --drop-ffn",
        )
    own = tuple(None if number in bare else width for number, width in enumerate(widths))
    return WidthChange(key, before, max(width for width in own if width is not None), own)


def _plan_at_width(
    index: ChannelIndex,
    number: int,
    name: str,
    changes: tuple[WidthChange, ...],
    ranked: ChannelRanking,
) -> FfnPlan:
    """Plan of one FFN, at the width of its config key in its layer."""
    ffn = index.layers[number].ffns[name]
    change = next(c for c in changes if c.key == index.width_key(ffn))
    width = change.per_layer[number] if change.per_layer else change.after
    assert width is not None
    multiplier = ffn.width // change.before  # a shared FFN may be a multiple of its config key wide
    return plan_ffn(ffn, ranked, width * multiplier, change.after * multiplier, f"layer {number}, {name}")


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


def _spread(
    index: ChannelIndex,
    change: WidthChange,
    rankings: list[dict[str, ChannelRanking]],
    multiple: int,
    method: str,
    sensitivity: list[torch.Tensor] | None,
    bare: frozenset[int],
) -> WidthChange:
    """Allocate a width to each layer; the total number of channels is that of the uniform allocation.

    Scores that are losses are compared across layers as they are. Other scores are standardised within their
    layer. FFNs of one layer with the same config key (experts, a shared FFN) get the same width: their
    damages are summed.
    """
    numbers, damages, floors = [], [], []
    for number, layer in enumerate(index.layers):
        names = [name for name, ffn in layer.ffns.items() if index.width_key(ffn) == change.key]
        if not names or number in bare:
            continue
        total = torch.zeros(change.before + 1, dtype=torch.float64)
        floor = 1
        for name in names:
            multiplier = layer.ffns[name].width // change.before
            ranked = rankings[number][name]
            score = ranked.score if METHODS[method].loss else standardised(ranked.score)
            # The scores of an expert ranked by magnitude can't be compared with the others.
            if ranked.ranked_by == method:
                total += score_damage(score, ranked.protected)[::multiplier]
            floor = max(floor, -(-len(ranked.protected) // multiplier))
        numbers.append(number)
        damages.append(total if sensitivity is None else sensitivity[number])
        floors.append(floor)
    widths = allocate(damages, multiple, floors, change.after * len(numbers))
    per_layer: list[int | None] = [None] * len(index.layers)
    for number, width in zip(numbers, widths, strict=True):
        per_layer[number] = width
    return WidthChange(change.key, change.before, max(widths), tuple(per_layer))


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


def _moved(index: ChannelIndex, layers: tuple[LayerPlan, ...], gone: frozenset[int]) -> list[dict[str, Any]]:
    """Super weights of the index with their columns after pruning; None where the channel is removed.

    Where layers `gone` are removed, `layer` is the number after that (None: removed), `layer_before` before.
    """
    moved = []
    stays = [number for number in range(len(layers)) if number not in gone]
    for weight in index.super_weights:
        place = (layers[weight.layer].ffns[weight.ffn].kept == weight.column).nonzero()
        new = int(place[0]) if len(place) else None
        entry = {**weight.as_json(), "column_before": weight.column, "column": new}
        if gone:
            place_after = None if weight.layer in gone else stays.index(weight.layer)
            entry |= {"layer_before": weight.layer, "layer": place_after}
        moved.append(entry)
    return moved
