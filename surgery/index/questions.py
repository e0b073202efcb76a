"""Questions that people ask of an index, each one call: common supernodes, outliers, concentration, movement.

Channels are numbered as in `LayerIndex.supernodes`: those of E routed experts of width F from 0 to E·F − 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import torch

from surgery.bootstrap import Interval
from surgery.budget.model_size import ModelSize
from surgery.budget.pass_cost import PassJob, pass_cost
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.errors import IndexMismatchError, UsageError
from surgery.index.channel_index import ChannelIndex
from surgery.index.intervals import channel_values, overlap_interval, top_share, why_no_sums
from surgery.index.supernodes import SUPERNODE_FRACTION
from surgery.model.ffn import Ffn


def common_supernodes(one: ChannelIndex, other: ChannelIndex) -> dict[int, list[int]]:
    """Channels that are supernodes in both indexes, by layer; layers without an FFN are left out.

    Raises IndexMismatchError for models whose layers differ in width.
    """
    _check_same_shape(one, other)
    return {
        number: sorted({*mine.supernodes.tolist()} & {*theirs.supernodes.tolist()})
        for number, (mine, theirs) in enumerate(zip(one.layers, other.layers, strict=True))
        if mine.ffns
    }


def supernode_overlap(one: ChannelIndex, other: ChannelIndex) -> Interval:
    """Share of the supernodes of `one` that are supernodes of `other` too, with its interval over blocks.

    Raises IndexMismatchError for models whose layers differ in width and where an index gives no intervals.
    """
    _check_same_shape(one, other)
    return _found(overlap_interval(one, other), one, other)


def supernode_outliers(index: ChannelIndex, by: str = "activation_power") -> dict[int, list[int]]:
    """Supernodes that are also outliers, by layer: among as many of the FFN's largest by a statistic.

    `by` is a statistic of the index (activation_power, max_abs, …) or weight_norm. Raises UsageError for
    another.
    """
    found: dict[int, list[int]] = {}
    for number, layer in enumerate(index.layers):
        for place, ffn in enumerate(layer.main):
            if by != "weight_norm" and by not in ffn.statistics:
                raise UsageError("no such statistic", expected=", ".join(ffn.statistics), found=by)
            largest = torch.topk(channel_values(ffn, by), len(ffn.supernodes)).indices
            both = ffn.supernodes[torch.isin(ffn.supernodes, largest)] + place * ffn.width
            found.setdefault(number, []).extend(both.tolist())
    return found


def concentration(index: ChannelIndex, layer: int, fraction: float = SUPERNODE_FRACTION) -> Interval:
    """Share of a layer's LP in its top channels, in [0, 1], with its interval over calibration blocks.

    Raises IndexMismatchError where the index gives no intervals.
    """
    return _found(top_share(index.layers[layer], fraction), index)


def differing_layers(one: ChannelIndex, other: ChannelIndex) -> dict[int, tuple[Interval, Interval]]:
    """Layers whose LP is concentrated differently in two indexes: the intervals of the top 1%'s share part.

    For two texts, two revisions, or two models with as many layers. Raises IndexMismatchError for another
    number of layers and where an index gives no intervals.
    """
    if len(one.layers) != len(other.layers):
        raise IndexMismatchError(
            "models with different numbers of layers can't be compared layer by layer",
            expected=f"{len(one.layers)} layers",
            found=f"{len(other.layers)}",
        )
    both = [n for n, layer in enumerate(one.layers) if layer.ffns and other.layers[n].ffns]
    pairs = {number: (concentration(one, number), concentration(other, number)) for number in both}
    return {number: pair for number, pair in pairs.items() if pair[0].differs_from(pair[1])}


@dataclass(frozen=True)
class Movement:
    """Spearman's rank correlation of LP with how far a channel's weights moved, by layer, in [-1, 1].

    There is no interval: it would take sums by block of all channels, and an index keeps those of the top.
    """

    correlations: dict[int, float]

    @property
    def median(self) -> float:
        """Median over layers."""
        return median(self.correlations.values())


def lp_against_movement(
    index: ChannelIndex, before: Model, after: Model, *, relative: bool = False
) -> Movement:
    """Whether channels with a high LP move more in later training, from two revisions of a model.

    A channel's movement is sqrt(‖Δgate row‖² + ‖Δup row‖² + ‖Δdown column‖²), with `relative` over the same
    norm of its weights in `before`. `index` is of `before`. One layer of each model is in memory at a time.
    Raises IndexMismatchError for a model with other tensors than the index's, and MemoryBudgetError.
    """
    index.check_source(before.checkpoint)
    index.check_source(after.checkpoint)
    beside = 2 * ModelSize.of(after.meta_model, after.run.dtype, 2, after.run.device.type).layer
    pass_cost(before.meta_model, PassJob((), beside=beside), before.run)
    first, second = StreamedModel(before), StreamedModel(after)
    count = range(len(first.layers))
    correlations = {}
    for (number, _), _ in zip(first.stream_layers(count), second.stream_layers(count), strict=True):
        weights = {ffn.name: ffn for ffn in first.ffns(number)}
        later = {ffn.name: ffn for ffn in second.ffns(number)}
        layer = index.layers[number]
        names = [name for name, ffn in layer.ffns.items() if ffn.kind == layer.main[0].kind and ffn.tokens]
        if names:
            proxy = torch.cat([layer.ffns[name].statistics["loss_proxy"] for name in names])
            moved = torch.cat([_movement(weights[name], later[name], relative) for name in names])
            correlations[number] = _spearman(proxy, moved)
    return Movement(correlations)


def _movement(before: Ffn, after: Ffn, relative: bool) -> torch.Tensor:
    """L2 distance [F] of each channel's gate row, up row and down column in two revisions, float32."""
    old, new = (_channel_weights(ffn) for ffn in (before, after))
    squares = torch.zeros(before.width, device=before.down_weight().device)
    norms = torch.zeros_like(squares)
    for a_FD, b_FD in zip(old, new, strict=True):
        squares += (b_FD.to(a_FD.device).float() - a_FD.float()).square().sum(1)
        norms += a_FD.float().square().sum(1)
    moved = squares / norms.clamp_min(torch.finfo(torch.float32).tiny) if relative else squares
    return moved.sqrt().cpu()


def _channel_weights(ffn: Ffn) -> list[torch.Tensor]:
    return [rows for rows in (*ffn.in_weights(), ffn.down_weight().T) if rows is not None]


def _spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's rank correlation of values [F]; ties share their mean rank, 0 where all of one are equal."""
    ranks = torch.stack([_ranks(one), _ranks(other)])
    found = float(torch.corrcoef(ranks)[0, 1])
    return 0.0 if math.isnan(found) else found


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks [F] from 1, float64; equal values get the mean of theirs."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    mean_ranks: torch.Tensor = last - (counts.double() - 1) / 2
    return mean_ranks[group]


def _check_same_shape(one: ChannelIndex, other: ChannelIndex) -> None:
    shapes = [[(len(layer.main), layer.width) for layer in index.layers] for index in (one, other)]
    if shapes[0] != shapes[1]:
        raise IndexMismatchError(
            "channels can't be matched between models of different shape",
            expected=f"the layers and widths of {one.source['name']}",
            found=f"those of {other.source['name']}",
        )


def _found(interval: Interval | None, *indexes: ChannelIndex) -> Interval:
    """The interval; raises IndexMismatchError, which says why, where there is none."""
    if interval is None:
        reason = next(filter(None, map(why_no_sums, indexes)), "No intervals: the layer has no loss proxy.")
        raise IndexMismatchError(
            reason.removeprefix("No intervals: "),
            where="intervals over calibration blocks",
            next_step="run surgeon index again, on enough blocks",
        )
    return interval
