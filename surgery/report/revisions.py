"""Sections about several indexes: LP concentration over training, and which supernodes they share."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from surgery.chart import LAYER_AXIS, LP_SHARE_AXIS, Axis, Figure, Series, layer_line
from surgery.index.channel_index import ChannelIndex
from surgery.index.intervals import (
    bounds,
    median_top_share,
    overlap_intervals,
    top_share,
    why_no_sums,
    why_none,
)
from surgery.index.questions import differing_layers
from surgery.report.document import Fact, Section, Table

Named = list[tuple[str, ChannelIndex]]
MOST_LINES = 7  # of one figure; more are hard to tell apart


def revision_sections(indexes: Named) -> list[Section]:
    """A comparison of several indexes, in the order given."""
    return [_table(indexes), _concentration(indexes), _shared(indexes)]


def shares(index: ChannelIndex) -> list[float | None]:
    """Share of the LP held by the top 1% of channels, by layer; None for a layer without an FFN."""
    return [layer.summary()["lp_share"].get("0.01") for layer in index.layers]


def same_shape(one: ChannelIndex, other: ChannelIndex) -> bool:
    """Whether both models have the same widths, so that channels can be matched by number."""
    return [layer.width for layer in one.layers] == [layer.width for layer in other.layers]


def supernodes_shared(one: ChannelIndex, other: ChannelIndex) -> float:
    """Share of the supernodes of `one` that are also supernodes of `other`, over all layers."""
    pairs = [(a, b) for a, b in zip(one.layers, other.layers, strict=True) if a.ffns]
    found = sum(int(torch.isin(a.supernodes, b.supernodes).sum()) for a, b in pairs)
    return found / sum(len(a.supernodes) for a, _ in pairs)


def chance(index: ChannelIndex) -> float:
    """Share of channels that are supernodes: the expected overlap of supernodes chosen at random."""
    layers = [layer for layer in index.layers if layer.ffns]
    channels = sum(layer.statistics["loss_proxy"].numel() for layer in layers)
    return sum(len(layer.supernodes) for layer in layers) / channels


def _table(indexes: Named) -> Section:
    rows: list[list[Any]] = []
    for name, index in indexes:
        weights = ", ".join(f"{w.layer} [{w.row}, {w.column}]" for w in index.super_weights)
        rows.append(
            [
                name,
                index.source["name"],
                index.source["revision"] or "",
                index.source["parameters"],
                len(index.layers),
                index.calibration["name"],
                index.calibration["blocks"] * index.calibration["block_size"],
                index.loss["perplexity"],
                weights or "none",
            ]
        )
    return Section(
        "indexes",
        "The indexes",
        tables=[
            Table(
                "indexes",
                "Models, calibration texts and super weights",
                [
                    ("index", "text"),
                    ("model", "text"),
                    ("revision", "text"),
                    ("parameters", "millions"),
                    ("layers", "figure"),
                    ("calibration", "text"),
                    ("tokens", "count"),
                    ("perplexity on it", "number"),
                    ("super weights: layer [row, column]", "text"),
                ],
                rows,
            )
        ],
    )


def _concentration(indexes: Named) -> Section:
    own = [[value for value in shares(index) if value is not None] for _, index in indexes]
    spread = [[bounds(top_share(layer)) for layer in index.layers] for _, index in indexes]
    medians = [bounds(median_top_share(index)) for _, index in indexes]

    def line(name: str, of: Any, style: str) -> Series:
        points = [(float(n), of(values)) for n, values in enumerate(own)]
        ends: list[Any] = medians
        if of is not statistics.median:  # the interval of the layer whose share is drawn
            places = zip(indexes, points, spread, strict=True)
            ends = [s[shares(index).index(point[1])] for (_, index), point, s in places]
        return Series(name, points=points, style=style, spread=ends if any(ends) else [])

    drawn = indexes if len(indexes) <= MOST_LINES else _spread(indexes)
    left = len(indexes) - len(drawn)
    return Section(
        "over-training",
        "Concentration of the loss proxy",
        facts=_differing(indexes),
        figures=[
            Figure(
                "concentration-over-indexes",
                "Share of a layer's loss proxy held by its supernodes, by index",
                "lines",
                Axis("index, in the order given"),
                LP_SHARE_AXIS,
                series=[
                    line("largest of all layers", max, "control"),
                    line("median of layers", statistics.median, "core"),
                    line("smallest of all layers", min, "dashed"),
                ],
                categories=[name for name, _ in indexes],
            ),
            Figure(
                "concentration-by-layer",
                "Share of each layer's loss proxy held by its supernodes, by layer",
                "lines",
                LAYER_AXIS,
                LP_SHARE_AXIS,
                series=[
                    layer_line(name, shares(index), spread=spread[place])
                    for place, (name, index) in enumerate(indexes)
                    if (name, index) in drawn
                ],
                reduction=f"{left} of {len(indexes)} indexes, evenly spaced, are not drawn." if left else "",
            ),
        ],
    )


def _differing(indexes: Named) -> list[Fact]:
    """Layers whose concentration differs between the first and the last index, or why that can't be said."""
    (first_name, first), (last_name, last) = indexes[0], indexes[-1]
    if len(first.layers) != len(last.layers):
        return []
    label = f"layers whose share differs between {first_name} and {last_name}"
    reason = why_none(first) or why_none(last)
    if reason:
        return [Fact(label, reason)]
    numbers = ", ".join(map(str, differing_layers(first, last)))
    return [Fact(f"{label}: their 95% intervals part", numbers or "none")]


def _spread(indexes: Named) -> Named:
    """MOST_LINES indexes, evenly spaced, with the first and the last."""
    step = (len(indexes) - 1) / (MOST_LINES - 1)
    return [indexes[round(number * step)] for number in range(MOST_LINES)]


def _shared(indexes: Named) -> Section:
    first = indexes[0][1]
    title = "Supernodes that indexes share"
    if not all(same_shape(index, first) for _, index in indexes):
        return Section("shared", title, "The models differ in shape, so their channels can't be matched.")
    overlaps = overlap_intervals([index for _, index in indexes])
    spread = [[bounds(interval) for interval in row] for row in overlaps]
    return Section(
        "shared",
        title,
        figures=[
            Figure(
                "supernodes-shared",
                "Share of the supernodes of one index that are supernodes of another",
                "matrix",
                Axis("supernodes of"),
                Axis("found in"),
                series=[
                    Series(
                        name,
                        values=[supernodes_shared(index, other) for _, other in indexes],
                        spread=ends if any(ends) else [],
                    )
                    for (name, index), ends in zip(indexes, spread, strict=True)
                ],
                categories=[name for name, _ in indexes],
                text="Rows: the index whose supernodes are looked up. Columns: the index they are looked up "
                f"in. Over all layers; supernodes chosen at random would share {chance(first):.1%}. "
                + _overlap_note(indexes),
            )
        ],
    )


def _overlap_note(indexes: Named) -> str:
    """What the intervals of overlaps are, or which index gives none."""
    without = [f"{name}: {reason}" for name, index in indexes if (reason := why_no_sums(index))]
    return " ".join(without) or (
        "In parentheses: 95% intervals over calibration blocks; indexes of the same blocks are resampled "
        "together."
    )
