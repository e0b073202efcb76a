"""Experiments of both papers as conditions for `ablation`.

They ablate super weights and their controls, supernodes and halos.
"""

from __future__ import annotations

import torch

from surgery.errors import UsageError
from surgery.evaluate.ablation import Condition, Drop, DropLargest, Edit, Restore, Scale
from surgery.index.channel_index import ChannelIndex, FfnIndex
from surgery.index.controls import control_edits
from surgery.index.super_weights import SuperWeight

CONTROL_FRACTION = 1e-6  # of every matrix, largest first (The Super Weight, table 1)
TRIALS = 3
HIT_RATES = (0.0, 0.05, 0.1, 0.2, 0.3)  # shares of the supernodes that random masks delete
LP_BINS = 10
GROUPS = ("super-weights", "structures", "channels", "hit-rate")


def conditions_for(index: ChannelIndex, groups: list[str], scales: list[float], seed: int) -> list[Condition]:
    """All conditions of `groups` (see GROUPS), and one for each factor in `scales` on the super weights.

    Raises UsageError when super weights are requested and the index has none.
    """
    found: list[Condition] = []
    if ("super-weights" in groups or scales) and not index.super_weights:
        raise UsageError(
            "the index lists no super weight",
            where="--conditions",
            next_step="ask for structures, channels or hit-rate, or index with another --spike-prompt",
        )
    if "super-weights" in groups:
        found += super_weight_conditions(index, seed)
    found += [
        Condition(f"super weights x {scale:g}", "scale", scaled(index.super_weights, scale), scale)
        for scale in scales
    ]
    if "structures" in groups:
        found += structure_conditions(index)
    if "channels" in groups:
        found += channel_conditions(index, seed)
    if "hit-rate" in groups:
        found += hit_rate_conditions(index, seed)
    return found


def scaled(weights: list[SuperWeight], factor: float) -> dict[int, list[Edit]]:
    """Edits that multiply super weights by `factor`."""
    edits: dict[int, list[Edit]] = {}
    for weight in weights:
        edit = Scale(weight.ffn, torch.tensor([weight.row]), torch.tensor([weight.column]), factor)
        edits.setdefault(weight.layer, []).append(edit)
    return edits


def super_weight_conditions(index: ChannelIndex, seed: int) -> list[Condition]:
    """The Super Weight's table 1, and controls: a super weight's column, its row, and random scalars."""
    weights = index.super_weights
    kept = tuple((w.ffn, w.row, w.column) for w in weights)
    largest: dict[int, list[Edit]] = {
        number: [
            DropLargest(
                CONTROL_FRACTION, tuple(k for k, w in zip(kept, weights, strict=True) if w.layer == number)
            )
        ]
        for number in range(len(index.layers))
    }
    zeroed = scaled(weights, 0.0)
    found = [Condition("prune SW", "super weights", zeroed)]
    found.append(Condition("prune non-SW", "super weights", largest))
    # Super activations of experts can't be restored, because their tokens have no fixed order.
    routed = any(index.layers[weight.layer].ffns[weight.ffn].expert is not None for weight in weights)
    for name, mean in () if routed else (("prune SW, restore SA", False), ("prune SW, SA at its mean", True)):
        restored = {number: list(edits) for number, edits in zeroed.items()}
        for weight in weights:
            restored[weight.layer].append(Restore(weight.ffn, weight.row, mean))
        found.append(Condition(name, "super weights", restored))
    for weight in weights:
        place = f"layer {weight.layer} [{weight.row}, {weight.column}]"
        if len(weights) > 1:
            found.append(Condition(f"prune {place} alone", "super weights", scaled([weight], 0.0)))
        width = index.layers[weight.layer].ffns[weight.ffn].width
        column: Edit = Drop(weight.ffn, torch.tensor([weight.column]))
        row: Edit = Scale(weight.ffn, torch.full((width,), weight.row), torch.arange(width))
        others = torch.arange(width)[torch.arange(width) != weight.column]
        rest: Edit = Scale(weight.ffn, torch.full((width - 1,), weight.row), others)
        found += [
            Condition(f"prune column of {place}", "structure", {weight.layer: [column]}),
            Condition(f"prune row of {place}", "structure", {weight.layer: [row]}),
            Condition(f"prune row of {place} but for it", "structure", {weight.layer: [rest]}),
        ]
    generator = torch.Generator().manual_seed(seed)
    for trial in range(TRIALS):
        edits: dict[int, list[Edit]] = {}
        for weight in weights:
            width = index.layers[weight.layer].ffns[weight.ffn].width
            random_column = torch.randint(width, (1,), generator=generator)
            edit = Scale(weight.ffn, torch.tensor([weight.row]), random_column)
            edits.setdefault(weight.layer, []).append(edit)
        found.append(Condition(f"prune random scalars of the same rows, trial {trial + 1}", "chance", edits))
    return found


def structure_conditions(index: ChannelIndex) -> list[Condition]:
    """Every structure that the index measured: removed, at its mean, and controls of those that cost.

    Raises UsageError when the index has no structures.
    """
    if not index.structures:
        raise UsageError(
            "the index lists no measured structure",
            where="--conditions",
            next_step="run surgeon index again: indexes of earlier versions have none",
        )
    found = []
    for finding in index.structures:
        one = finding.structure
        found.append(Condition(f"remove {one.name}", f"{one.kind}s", dict(one.edits())))
        if finding.mean is not None:
            found.append(Condition(f"{one.name} at its mean", f"{one.kind}s", dict(one.edits(mean=True))))
        if finding.effect.low > 0:
            found += [
                Condition(f"{like} as {one.name}", "controls", dict(edits))
                for like, edits in control_edits(one).items()
            ]
    return found


def channel_conditions(index: ChannelIndex, seed: int) -> list[Condition]:
    """Supernodes against random channels, halos against LP-matched channels (Supernodes and Halos)."""
    generator = torch.Generator().manual_seed(seed)
    cores = _each(index, lambda ffn: ffn.supernodes)
    found = [Condition("remove supernodes", "supernodes", cores)]
    for trial in range(TRIALS):
        chance = _each(index, lambda ffn: _sample(_others(ffn), len(ffn.supernodes), generator))
        found.append(Condition(f"remove random others, trial {trial + 1}", "supernodes", chance))
    found.append(Condition("remove halos", "halo", _each(index, lambda ffn: ffn.halo)))
    for trial in range(TRIALS):
        matched = _each(index, lambda ffn: lp_matched(ffn, generator))
        found.append(Condition(f"remove LP-matched non-halo, trial {trial + 1}", "halo", matched))
    return found


def hit_rate_conditions(index: ChannelIndex, seed: int) -> list[Condition]:
    """Random masks at 50% that delete a given share of the supernodes (the first paper's hit-rate sweep)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for share in HIT_RATES:
        for trial in range(TRIALS):

            def mask(ffn: FfnIndex, share: float = share) -> torch.Tensor:
                hits = _sample(ffn.supernodes, round(share * len(ffn.supernodes)), generator)
                return torch.cat([hits, _sample(_others(ffn), ffn.width // 2 - len(hits), generator)])

            name = f"half of the channels at random, {100 * share:.0f}% of supernodes, trial {trial + 1}"
            found.append(Condition(name, "hit rate", _each(index, mask), share))
    return found


def lp_matched(ffn: FfnIndex, generator: torch.Generator) -> torch.Tensor:
    """Random channels outside core and halo, as many as the halo has in each decile of the LP values.

    A decile with too few such channels gives fewer.
    """
    order = ffn.statistics["loss_proxy"].argsort().argsort()
    bins = order * LP_BINS // ffn.width
    outside = torch.ones(ffn.width, dtype=torch.bool)
    outside[ffn.supernodes] = False
    outside[ffn.halo] = False
    chosen = []
    for number in range(LP_BINS):
        count = int((bins[ffn.halo] == number).sum())
        chosen.append(_sample(((bins == number) & outside).nonzero()[:, 0], count, generator))
    return torch.cat(chosen)


def _each(index: ChannelIndex, choose: object) -> dict[int, list[Edit]]:
    """Edits that remove the chosen channels of every FFN."""
    assert callable(choose)
    return {
        number: [Drop(name, choose(ffn)) for name, ffn in layer.ffns.items()]
        for number, layer in enumerate(index.layers)
        if layer.ffns
    }


def _others(ffn: FfnIndex) -> torch.Tensor:
    outside = torch.ones(ffn.width, dtype=torch.bool)
    outside[ffn.supernodes] = False
    return outside.nonzero()[:, 0]


def _sample(channels: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    return channels[torch.randperm(len(channels), generator=generator)[:count]]
