"""make_plan: choose the channels that every layer keeps, from an index."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from surgery import defaults
from surgery.errors import PlanError
from surgery.index.channel_index import ChannelIndex
from surgery.plan.allocation import allocate, score_damage, standardised
from surgery.plan.kind_plan import (
    KindPlan,
    check_an_ffn_stays,
    check_something_stays,
    removed_attention,
    removed_ffns,
    removed_layers,
    with_expert_places,
)
from surgery.plan.methods import METHODS
from surgery.plan.prune_plan import ALLOCATIONS, GIVEN, MEASURED, FfnPlan, LayerPlan, PrunePlan
from surgery.plan.ranking import ChannelRanking, plan_ffn, plan_without, rank_channels
from surgery.plan.search_plan import WidthSearch
from surgery.plan.widths import (
    WidthChange,
    check_layer_widths,
    default_multiple,
    width_changes,
)


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
    _check_arguments(sparsity, width, allocation, sensitivity is not None, layer_widths is not None)
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
    have = {number for number, layer in enumerate(index.layers) if layer.ffns}
    check_an_ffn_stays(have, bare)
    found = width_search.widths if width_search is not None else layer_widths
    if found is not None:
        changes = (_at_widths(index, found, have - bare),)
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


def _check_arguments(
    sparsity: float | None, width: int | None, allocation: str, measured: bool, given: bool
) -> None:
    """Raise PlanError for arguments of `make_plan` that contradict each other."""
    if (sparsity is None) == (width is None):
        raise PlanError("give either a sparsity or a width", where="--sparsity, --intermediate-size")
    if (allocation == GIVEN) != given:
        raise PlanError("widths of layers must be given with the allocation given, and only then")
    if allocation not in (*ALLOCATIONS, GIVEN) or (allocation in MEASURED) != measured:
        raise PlanError(
            "sensitivity must be given with the allocations global and searched, and only then",
            expected=", ".join(ALLOCATIONS),
            found=allocation,
        )


def _at_widths(index: ChannelIndex, widths: Sequence[int], have: Collection[int]) -> WidthChange:
    """The change to these widths of layers; those that `have` an FFN then have one. Raises PlanError."""
    check_layer_widths(index.widths, widths, len(index.layers), have)
    ((key, before),) = index.widths.items()
    own = tuple(width if number in have else None for number, width in enumerate(widths))
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
    if not numbers:  # every FFN of this width goes
        return change
    widths = allocate(damages, multiple, floors, change.after * len(numbers))
    per_layer: list[int | None] = [None] * len(index.layers)
    for number, width in zip(numbers, widths, strict=True):
        per_layer[number] = width
    return WidthChange(change.key, change.before, max(widths), tuple(per_layer))


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
