"""Intervals of what an index says: LP shares and overlaps of sets of channels, over calibration blocks.

Every function returns None where the index has no block sums, or fewer than LEAST_BLOCKS groups of blocks;
`why_none` and `why_no_sums` say which. A published index has no block sums: the intervals of its own figures
were computed when it was published (`published_intervals`) and are in its index.json.

Shapes: m resamples, G groups of blocks, K channels of an FFN that are kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from surgery.bootstrap import (
    CHUNK,
    LEAST_BLOCKS,
    SEED,
    Interval,
    Statistic,
    overlap_of_sets,
    resampled,
    studentized,
)
from surgery.index.block_sums import BIN_EDGES, BlockSums, bin_members
from surgery.index.channel_index import ChannelIndex, FfnIndex, LayerIndex
from surgery.index.layer_index import INTERVALS
from surgery.index.supernodes import SHARE_FRACTIONS, SUPERNODE_FRACTION

OUTLIERS = ("activation_power", "max_abs", "weight_norm")  # that supernodes are compared with
TOP, OVERLAP, HALO = "top_share", "outlier_overlap", "halo_share"  # words of published intervals

Chosen = tuple[FfnIndex, torch.Tensor]  # an FFN and some of its channels


def why_none(index: ChannelIndex) -> str:
    """Why an index gives no intervals of its own figures; empty where it does."""
    return "" if index.intervals.get(TOP) else why_no_sums(index)


def why_no_sums(index: ChannelIndex) -> str:
    """Why an index gives no intervals of figures that depend on more: another index, a plan; or empty."""
    sums = [ffn.block_sums for layer in index.layers for ffn in layer.ffns.values()]
    if len(index.input_ids) < LEAST_BLOCKS:
        return f"No intervals: they need {LEAST_BLOCKS} calibration blocks or more."
    if index.coded:
        return "No intervals: a published index leaves out the sums by calibration block."
    if any(one is None for one in sums):
        return "No intervals: the index was made by a version that kept no sums by calibration block."
    if any(one.groups < LEAST_BLOCKS for one in sums if one is not None):
        return f"No intervals: they need {LEAST_BLOCKS} calibration blocks or more."
    return ""


def resampled_groups(index: ChannelIndex) -> int:
    """Groups of calibration blocks that an index's intervals are from; 0 where it gives none."""
    if why_none(index):
        return 0
    sums = [ffn.block_sums for layer in index.layers for ffn in layer.main if ffn.block_sums]
    kept = [one["blocks"] for one in index.intervals.get(TOP, {}).values() if one]
    return next((one.groups for one in sums), next(iter(kept), 0))


def top_share(layer: LayerIndex, fraction: float = SUPERNODE_FRACTION) -> Interval | None:
    """Share of a layer's LP in the top `fraction` of the channels of each FFN, in [0, 1].

    The LP is that of the routed experts, or of the dense FFN. The top channels are chosen again in every
    resample, among those that are kept apart. Where these are too few, the others are taken by their rank in
    the whole sum, and `fraction` must be one of BIN_EDGES.
    """
    return top_share_of(layer.main, fraction) or _of_layer(layer, TOP, str(fraction))


def top_share_of(ffns: Sequence[FfnIndex], fraction: float = SUPERNODE_FRACTION) -> Interval | None:
    """`top_share` of any FFNs of one layer, together."""
    seen = [ffn for ffn in ffns if len(ffn.supernodes)]
    exact = [[_exact_top(ffn, fraction) for ffn in seen]]
    return _interval([[_top(ffn, fraction) for ffn in seen]], _mean, exact)


def median_top_share(index: ChannelIndex, fraction: float = SUPERNODE_FRACTION) -> Interval | None:
    """Median over layers of `top_share`, all layers resampled together."""
    seen = [ffns for layer in index.layers if (ffns := _with_tokens(layer))]
    parts = [[_top(ffn, fraction) for ffn in ffns] for ffns in seen]
    exact = [[_exact_top(ffn, fraction) for ffn in ffns] for ffns in seen]
    return _interval(parts, _median, exact) or _published(index.intervals, TOP, str(fraction))


def held_share(layers: Sequence[Sequence[Chosen]]) -> Interval | None:
    """Share of a layer's LP in chosen channels of its FFNs, in [0, 1]; of several layers, the mean.

    The channels stay the same in all resamples. Layers without LP are left out.
    """
    seen = [[(ffn, chosen) for ffn, chosen in layer if len(ffn.supernodes)] for layer in layers]
    seen = [layer for layer in seen if layer]
    parts = [[_held(ffn, chosen) for ffn, chosen in layer] for layer in seen]
    exact = [[_exact(ffn, chosen) for ffn, chosen in layer] for layer in seen]
    return _interval(parts, _mean, exact)


def halo_share(index: ChannelIndex) -> Interval | None:
    """`held_share` of the halo of every layer."""
    halos = [[(ffn, ffn.halo) for ffn in layer.main] for layer in index.layers]
    return held_share(halos) or _published(index.intervals, HALO, "mean")


def outlier_overlap(layer: LayerIndex, by: str) -> Interval | None:
    """Share of a layer's supernodes that are also its largest channels by a statistic, in [0, 1].

    `by` is activation_power, max_abs or weight_norm (the sum of the L2 norms of gate row, up row and down
    column). Supernodes are chosen again in every resample, and the largest by activation power too. Weights
    do not depend on the text, and the largest by max_abs are held fixed: a maximum has no sums by block.
    """
    return _outlier_overlap(_with_tokens(layer), by) or _of_layer(layer, OVERLAP, by)


def model_outlier_overlap(index: ChannelIndex, by: str) -> Interval | None:
    """`outlier_overlap` of the supernodes of all layers, which are resampled together."""
    ffns = [ffn for layer in index.layers for ffn in _with_tokens(layer)]
    return _outlier_overlap(ffns, by) or _published(index.intervals, OVERLAP, by)


def _outlier_overlap(ffns: Sequence[FfnIndex], by: str) -> Interval | None:
    shared: list[torch.Tensor] = []
    exact = total = groups = 0
    for ffn in ffns:
        sums, count = _usable(ffn), len(ffn.supernodes)
        if sums is None:
            return None
        groups, weights = sums.groups, resampled(sums.groups)
        largest = torch.topk(channel_values(ffn, by), count).indices
        core = Members.of(sums.block_lp_channels, sums.lp, weights, count)
        if by == "activation_power":
            other = Members.of(sums.block_power_channels, sums.power, weights, count)
        else:
            other = Members.fixed(largest, len(weights))
        shared.append(core.shared(other))
        exact += int(torch.isin(ffn.supernodes, largest).sum())
        total += count
    return overlap_of_sets(exact / total, torch.stack(shared).sum(0) / total, groups) if total else None


def overlap_interval(one: ChannelIndex, other: ChannelIndex) -> Interval | None:
    """Share of the supernodes of `one` that are supernodes of `other` too, as `overlap_intervals`."""
    return overlap_intervals([one, other])[0][1]


def overlap_intervals(indexes: Sequence[ChannelIndex]) -> list[list[Interval | None]]:
    """Share of the supernodes of each index (rows) that are supernodes of each (columns), over all layers.

    Supernodes are chosen again in every resample. Indexes of the same calibration blocks are resampled
    together: a block counts equally often for both. The layers of all must have the same FFNs.
    """
    texts: list[torch.Tensor] = []
    draws = []
    for index in indexes:
        known = (n for n, ids in enumerate(texts) if torch.equal(ids, index.input_ids))
        text = next(known, len(texts))
        texts += [index.input_ids] if text == len(texts) else []
        draws.append(_supernode_draws(index, SEED + text))
    return [
        [_overlap(one, mine, other, theirs) for other, theirs in zip(indexes, draws, strict=True)]
        for one, mine in zip(indexes, draws, strict=True)
    ]


def _supernode_draws(index: ChannelIndex, seed: int) -> list[Members] | None:
    """The supernodes of every FFN in resamples drawn with a seed; None without block sums."""
    found = []
    for ffn in (ffn for layer in index.layers for ffn in layer.main):
        sums = _usable(ffn)
        if sums is None:
            return None
        weights = resampled(sums.groups, seed=seed)
        found.append(Members.of(sums.block_lp_channels, sums.lp, weights, len(ffn.supernodes)))
    return found


def _overlap(
    one: ChannelIndex, mine: list[Members] | None, other: ChannelIndex, theirs: list[Members] | None
) -> Interval | None:
    if not mine or not theirs:
        return None
    cores = [[ffn.supernodes for layer in index.layers for ffn in layer.main] for index in (one, other)]
    total = sum(map(len, cores[0]))
    exact = sum(int(torch.isin(a, b).sum()) for a, b in zip(*cores, strict=True))
    shared = sum(a.shared(b) for a, b in zip(mine, theirs, strict=True))
    sizes = [f.block_sums.groups for x in (one, other) for y in x.layers for f in y.main if f.block_sums]
    return overlap_of_sets(exact / total, torch.as_tensor(shared) / total, min(sizes)) if total else None


@dataclass(frozen=True)
class Members:
    """A set of channels in each of m resamples: `channels` [K], and `member` [m, K], which are in it."""

    channels: torch.Tensor
    member: torch.Tensor

    @classmethod
    def of(cls, channels: torch.Tensor, sums: torch.Tensor, weights: torch.Tensor, count: int) -> Members:
        """The `count` largest of `channels` [K] by their sums [G, K], under weights [m, G]."""
        member = torch.zeros(len(weights), len(channels), dtype=torch.bool)
        for part, drawn in zip(member.split(CHUNK), weights.split(CHUNK), strict=True):
            part.scatter_(1, (drawn @ sums).topk(count, dim=1).indices, True)
        return cls(channels.long(), member)

    @classmethod
    def fixed(cls, channels: torch.Tensor, resamples: int) -> Members:
        """The same channels in every resample."""
        return cls(channels, torch.ones(1, len(channels), dtype=torch.bool).expand(resamples, -1))

    def shared(self, other: Members) -> torch.Tensor:
        """Number of channels that are in both sets, [m] float64."""
        mine, theirs = (self.channels[:, None] == other.channels).nonzero(as_tuple=True)
        return (self.member[:, mine] & other.member[:, theirs]).sum(1).double()


def published_intervals(index: ChannelIndex) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Intervals of an index's figures and of each layer's, as index.json holds them; empty without sums."""
    if why_none(index):
        return {}, [{} for _ in index.layers]
    own = {
        TOP: {str(fraction): median_top_share(index, fraction) for fraction in SHARE_FRACTIONS},
        OVERLAP: {by: model_outlier_overlap(index, by) for by in OUTLIERS},
        HALO: {"mean": halo_share(index)},
    }
    layers = [
        {
            TOP: {str(fraction): top_share(layer, fraction) for fraction in SHARE_FRACTIONS},
            OVERLAP: {by: outlier_overlap(layer, by) for by in OUTLIERS},
        }
        if layer.ffns
        else {}
        for layer in index.layers
    ]
    return _as_json(own), [_as_json(layer) for layer in layers]


def _as_json(fields: dict[str, dict[str, Interval | None]]) -> dict[str, Any]:
    return {
        word: {key: None if one is None else asdict(one) for key, one in entries.items()}
        for word, entries in fields.items()
    }


def _published(fields: dict[str, Any], word: str, key: str) -> Interval | None:
    """An interval that index.json holds."""
    found = fields.get(word, {}).get(key)
    return None if found is None else Interval.from_json(found)


def _of_layer(layer: LayerIndex, word: str, key: str) -> Interval | None:
    """An interval that a layer's entry of index.json holds."""
    return _published((layer.stored or {}).get(INTERVALS, {}), word, key)


def bounds(interval: Interval | None) -> list[float] | None:
    """[low, high] of an interval, None where there is none, as JSON files hold it."""
    return None if interval is None else interval.bounds


def channel_values(ffn: FfnIndex, name: str) -> torch.Tensor:
    """A statistic [F] by name, or weight_norm (`FfnIndex.weight_norm`)."""
    return ffn.weight_norm if name == "weight_norm" else ffn.statistics[name]


@dataclass(frozen=True)
class _Part:
    """LP of some channels of an FFN under weights [m, G], and that of all its channels by group, [G]."""

    held: Statistic
    total: torch.Tensor


def _usable(ffn: FfnIndex) -> BlockSums | None:
    """An FFN's block sums, if there are enough groups."""
    sums = ffn.block_sums
    return sums if sums is not None and sums.groups >= LEAST_BLOCKS else None


def _with_tokens(layer: LayerIndex) -> list[FfnIndex]:
    return [ffn for ffn in layer.main if len(ffn.supernodes)]


def _top(ffn: FfnIndex, fraction: float) -> _Part | None:
    """LP in the top `fraction` of an FFN's channels, chosen under the weights."""
    sums = _usable(ffn)
    if sums is None:
        return None
    lp, total = sums.lp, sums.block_lp_total.double()
    count = max(1, round(fraction * ffn.width))
    if count <= lp.shape[1]:
        return _Part(lambda weights: (weights @ lp).topk(count, dim=1).values.sum(1), total)
    held = lp.sum(1) + sums.lp_bins[:, : BIN_EDGES.index(fraction) + 1].sum(1)
    return _Part(lambda weights: weights @ held, total)


def _held(ffn: FfnIndex, chosen: torch.Tensor) -> _Part | None:
    """LP in the same channels under all weights; of a bin, the part that they hold of it in the whole sum.

    It is the total less what the other channels hold, whose rounding errors are smaller where they hold less.
    """
    sums = _usable(ffn)
    if sums is None:
        return None
    proxy = ffn.statistics["loss_proxy"].double()
    outside = torch.ones(ffn.width, dtype=torch.float64)
    outside[chosen] = 0
    missed = sums.lp @ outside[sums.block_lp_channels.long()]
    for place, members in enumerate(bin_members(proxy)):
        mass = proxy[members].sum()
        if mass > 0:
            missed += sums.lp_bins[:, place] * (proxy[members] @ outside[members]) / mass
    total = sums.block_lp_total.double()
    return _Part(lambda weights: weights @ (total - missed), total)


def _exact(ffn: FfnIndex, chosen: torch.Tensor) -> tuple[float, float]:
    """LP of chosen channels and of all channels, from the statistics."""
    proxy = ffn.statistics["loss_proxy"].double()
    return float(proxy[chosen].sum()), float(proxy.sum())


def _exact_top(ffn: FfnIndex, fraction: float) -> tuple[float, float]:
    count = max(1, round(fraction * ffn.width))
    return _exact(ffn, torch.topk(ffn.statistics["loss_proxy"], count).indices)


def _interval(
    layers: list[list[_Part | None]],
    combine: Callable[[torch.Tensor], torch.Tensor],
    exact: list[list[tuple[float, float]]],
) -> Interval | None:
    """Interval of `combine` (of [L, m] to [m]) of the share of each of L layers.

    The estimate is from the `exact` LP of chosen and of all channels of every FFN.
    """
    known = [[part for part in parts if part is not None] for parts in layers]
    if not known or any(len(a) < len(b) or not a for a, b in zip(known, layers, strict=True)):
        return None
    if any(sum(total for _, total in parts) <= 0 for parts in exact):
        return None

    def statistic(weights: torch.Tensor) -> torch.Tensor:
        shares = []
        for parts in known:
            held = torch.stack([part.held(weights) for part in parts]).sum(0)
            shares.append(held / (weights @ torch.stack([part.total for part in parts]).sum(0)))
        return combine(torch.stack(shares))

    found = studentized(statistic, len(known[0][0].total), within=(0.0, 1.0))
    values = [[sum(held for held, _ in parts) / sum(total for _, total in parts)] for parts in exact]
    return replace(found, estimate=float(combine(torch.tensor(values, dtype=torch.float64))))


def _mean(shares: torch.Tensor) -> torch.Tensor:
    return shares.mean(0)


def _median(shares: torch.Tensor) -> torch.Tensor:
    """Median over the first axis, with the mean of the two middle values where they are even in number."""
    ordered = shares.sort(0).values
    return ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1].mean(0)
