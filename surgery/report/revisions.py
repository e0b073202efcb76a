"""Sections about several indexes: concentration over training, and which supernodes they share."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from surgery.index import ChannelIndex
from surgery.report.document import LAYER_AXIS, Axis, Figure, Section, Series, Table, layer_line

Named = list[tuple[str, ChannelIndex]]
MOST_LINES = 7  # lines of one figure that can be told apart


def revision_sections(indexes: Named) -> list[Section]:
    """What several indexes, in the order given, say beside each other."""
    return [_table(indexes), _concentration(indexes), _shared(indexes)]


def shares(index: ChannelIndex) -> list[float | None]:
    """Share of the LP mass in the top 1%, layer by layer; None where a layer has no FFN."""
    return [layer.summary()["lp_share"].get("0.01") for layer in index.layers]


def same_shape(one: ChannelIndex, other: ChannelIndex) -> bool:
    """Whether channels of one can be looked up in the other."""
    return [layer.width for layer in one.layers] == [layer.width for layer in other.layers]


def supernodes_shared(one: ChannelIndex, other: ChannelIndex) -> float:
    """Share of the supernodes of `one` that are supernodes of `other` too, over all layers."""
    pairs = [(a, b) for a, b in zip(one.layers, other.layers, strict=True) if a.ffns]
    found = sum(int(torch.isin(a.supernodes, b.supernodes).sum()) for a, b in pairs)
    return found / sum(len(a.supernodes) for a, _ in pairs)


def chance(index: ChannelIndex) -> float:
    """Share of channels that are supernodes, hence of those that a random choice would share."""
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
                "Models, calibration and super weights",
                [
                    ("index", "text"),
                    ("model", "text"),
                    ("revision", "text"),
                    ("parameters", "millions"),
                    ("layers", "figure"),
                    ("calibration", "text"),
                    ("tokens", "count"),
                    ("perplexity there", "number"),
                    ("super weights: layer [row, column]", "text"),
                ],
                rows,
            )
        ],
    )


def _concentration(indexes: Named) -> Section:
    own = [[value for value in shares(index) if value is not None] for _, index in indexes]

    def line(name: str, of: Any, style: str) -> Series:
        return Series(name, points=[(float(n), of(values)) for n, values in enumerate(own)], style=style)

    drawn = indexes if len(indexes) <= MOST_LINES else _spread(indexes)
    left = len(indexes) - len(drawn)
    axis = Axis("share of the layer's loss proxy (%)", percent=True)
    return Section(
        "over-training",
        "Concentration from index to index",
        figures=[
            Figure(
                "concentration-over-indexes",
                "Share of a layer's loss proxy held by its supernodes, index by index",
                "lines",
                Axis("index, in the order given"),
                axis,
                series=[
                    line("most of all layers", max, "control"),
                    line("median of layers", statistics.median, "core"),
                    line("least of all layers", min, "dashed"),
                ],
                categories=[name for name, _ in indexes],
            ),
            Figure(
                "concentration-by-layer",
                "Share of each layer's loss proxy held by its supernodes, a line an index",
                "lines",
                LAYER_AXIS,
                axis,
                series=[layer_line(name, shares(index)) for name, index in drawn],
                reduction=f"{left} of {len(indexes)} indexes are left out, evenly." if left else "",
            ),
        ],
    )


def _spread(indexes: Named) -> Named:
    """As many indexes as can be told apart, the first and the last among them."""
    step = (len(indexes) - 1) / (MOST_LINES - 1)
    return [indexes[round(number * step)] for number in range(MOST_LINES)]


def _shared(indexes: Named) -> Section:
    first = indexes[0][1]
    title = "Which supernodes stay supernodes"
    if not all(same_shape(index, first) for _, index in indexes):
        return Section("shared", title, "These models differ in shape: their channels can't be matched.")
    return Section(
        "shared",
        title,
        figures=[
            Figure(
                "supernodes-shared",
                "Supernodes of one index that are supernodes of another too",
                "matrix",
                Axis("supernodes of"),
                Axis("found in"),
                series=[
                    Series(name, values=[supernodes_shared(index, other) for _, other in indexes])
                    for name, index in indexes
                ],
                categories=[name for name, _ in indexes],
                text="Share of the supernodes of the row's index, over all layers, that are supernodes of the column's. Chance "
                f"would give {chance(first):.1%}.",
            )
        ],
    )
