"""Sections about the channels of an index: LP concentration, supernodes and outliers, the halo.

Shapes: F channels of one FFN. The channels of all routed experts of a layer are shown as one pool.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch

from surgery.chart import LAYER_AXIS, LP_SHARE_AXIS, Axis, Figure, Series, layer_line
from surgery.index.channel_index import ChannelIndex
from surgery.index.intervals import (
    bounds,
    median_top_share,
    outlier_overlap,
    resampled_groups,
    top_share,
    why_none,
)
from surgery.index.supernodes import SUPERNODE_FRACTION
from surgery.report.channel_sample import (
    DIGITS,
    SEED,
    Pool,
    drawn_note,
    others,
    point_series,
    pool,
    rounded,
    sample,
)
from surgery.report.document import Fact, Section

CONTROLS = 256  # random channels per layer that the halo is compared with, as in the paper
CURVE_POINTS = 96  # at most, in the cumulative LP curve of one layer
LP_UNIT = "loss proxy (nats², log)"


def index_facts(index: ChannelIndex) -> list[Fact]:
    """Model, calibration and run of an index."""
    source, calibration, run = index.source, index.calibration, index.run
    widths = ", ".join(f"{key} {width:,}" for key, width in index.widths.items())
    return [
        Fact("model", source["name"]),
        *([Fact("revision", source["revision"])] if source["revision"] else []),
        Fact("architecture", source["model_type"]),
        *([Fact("read from", source["stored_form"])] if source.get("stored_form") else []),
        Fact("parameters", source["parameters"], "millions"),
        Fact("size", source["bytes"], "bytes"),
        Fact("decoder layers", len(index.layers), "count"),
        Fact("FFN width", widths),
        Fact("calibration text", calibration["name"]),
        Fact("calibration blocks", calibration["blocks"], "count"),
        Fact("tokens per block", calibration["block_size"], "count"),
        Fact("perplexity on the calibration text", index.loss["perplexity"], "number"),
        Fact("sha256 of the token ids", calibration["sha256"]),
        Fact("computed in", f"{run['dtype']} on {run['device']}"),
        Fact("versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
    ]


def channel_sections(index: ChannelIndex) -> list[Section]:
    """LP concentration, overlap of supernodes with outliers, and halo of an index."""
    summaries = [layer.summary() for layer in index.layers]
    pools = {number: pool(layer) for number, layer in enumerate(index.layers) if layer.ffns}
    shares = {n: summaries[n]["lp_share"]["0.01"] for n in pools}
    focus = max(shares, key=lambda n: shares[n])
    sections = [_concentration(index, summaries, pools, shares, focus)]
    sections.append(_outliers(index, summaries, pools, focus))
    sections.append(_halo(summaries, pools, focus))
    return sections


def interval_note(index: ChannelIndex) -> str:
    """What the intervals of an index's figures are, or why it has none."""
    return why_none(index) or (
        f"Bands, and values in parentheses: 95% intervals over {resampled_groups(index)} groups of "
        "calibration blocks, by the bootstrap. "
        "They say how much depends on the blocks drawn from this text, not on the choice of the text."
    )


def _concentration(
    index: ChannelIndex,
    summaries: list[dict[str, Any]],
    pools: dict[int, Pool],
    shares: dict[int, float],
    focus: int,
) -> Section:
    def line(name: str, key: str, style: str) -> Series:
        spread = [bounds(top_share(layer, float(key))) for layer in index.layers]
        return layer_line(name, [s["lp_share"].get(key) for s in summaries], style, spread)

    top = line("top 1% (supernodes)", "0.01", "core")
    ends = dict(zip(shares, top.spread or [None] * len(shares), strict=True))
    low = min(shares, key=lambda n: shares[n])
    return Section(
        "concentration",
        "Concentration of the loss proxy",
        "The loss proxy (LP) of a channel estimates how much removing it raises the loss. Supernodes are the "
        "1% of a layer's channels with the largest LP.",
        facts=[
            Fact(
                "LP share of the top 1%, median of layers",
                statistics.median(shares.values()),
                "percent",
                bounds(median_top_share(index)),
            ),
            Fact("smallest of all layers", shares[low], "percent", ends[low]),
            Fact("largest of all layers", shares[focus], "percent", ends[focus]),
            Fact("layer with the largest", focus, "count"),
        ],
        figures=[
            Figure(
                "lp-concentration",
                "Share of each layer's loss proxy held by its top channels",
                "lines",
                LAYER_AXIS,
                LP_SHARE_AXIS,
                series=[
                    line("top 5%", "0.05", "control"),
                    top,
                    line("top 0.1%", "0.001", "dashed"),
                ],
                text="The next figure shows the whole curve of one layer: point at the layer here or choose "
                f"it there. {interval_note(index)}",
            ),
            Figure(
                "lp-curve",
                "Cumulative loss proxy of a layer's channels, largest first",
                "lines",
                Axis("share of channels, largest first (%, log)", log=True, percent=True),
                LP_SHARE_AXIS,
                frames={
                    number: [Series("cumulative LP", points=mass_curve(p.statistics["loss_proxy"]))]
                    for number, p in pools.items()
                },
                focus=focus,
                reduction=f"Drawn at {CURVE_POINTS} ranks per layer at most, evenly spaced on the log scale, "
                f"rounded to {DIGITS} digits and not smoothed.",
                mark=SUPERNODE_FRACTION,
            ),
        ],
    )


def mass_curve(loss_proxy: torch.Tensor) -> list[tuple[float, float]]:
    """Points (share of channels, share of the LP they hold) at log-spaced ranks of LP [F], largest first."""
    ordered = loss_proxy.double().sort(descending=True).values.cumsum(0)
    total = float(ordered[-1])
    if total <= 0:
        return []
    count = len(ordered)
    steps = torch.logspace(0, math.log10(count), CURVE_POINTS, dtype=torch.float64)
    ranks = sorted({min(count, max(1, round(float(step)))) for step in steps})
    return [(rounded(rank / count), rounded(float(ordered[rank - 1]) / total)) for rank in ranks]


def _outliers(
    index: ChannelIndex, summaries: list[dict[str, Any]], pools: dict[int, Pool], focus: int
) -> Section:
    def line(name: str, key: str, style: str) -> Series:
        spread = [bounds(outlier_overlap(layer, key)) for layer in index.layers]
        return layer_line(name, [s["overlap"].get(key) for s in summaries], style, spread)

    def scatter(key: str, title: str, axis: str, other: str) -> Figure:
        return Figure(
            f"lp-against-{key.replace('_', '-')}",
            title,
            "scatter",
            Axis(axis, log=True),
            Axis(LP_UNIT, log=True),
            frames={number: _against(p, key, other, number) for number, p in pools.items()},
            focus=focus,
            reduction=drawn_note(),
        )

    return Section(
        "outliers",
        "Supernodes and outliers by activation or weight",
        "In each layer, as many channels as there are supernodes are selected by activation and by weight "
        "norm. The overlap is the share of the supernodes that are selected too.",
        figures=[
            Figure(
                "overlap",
                "Share of supernodes that are also outliers by activation or weight",
                "lines",
                LAYER_AXIS,
                Axis("share of the layer's supernodes (%)", percent=True),
                series=[
                    line("top by mean u²", "activation_power", "core"),
                    line("top by max |u|", "max_abs", "dashed"),
                    line("top by weight norm", "weight_norm", "control"),
                ],
                text="u is the input of down_proj. The weight norm is the sum of the L2 norms of gate row, "
                f"up row and down column. {interval_note(index)}",
            ),
            scatter(
                "activation_power",
                "Loss proxy against activation power, channel by channel",
                "activation power mean u² (log)",
                "outliers by activation, not supernodes",
            ),
            scatter(
                "weight_norm",
                "Loss proxy against weight norm, channel by channel",
                "sum of three L2 norms (log)",
                "top by weight norm, not supernodes",
            ),
        ],
    )


def _against(p: Pool, key: str, other: str, number: int) -> list[Series]:
    """LP against a statistic: supernodes, channels among the largest by the statistic only, and the rest."""
    count = len(p.statistics["loss_proxy"])
    elsewhere = p.top[key][~torch.isin(p.top[key], p.core)]
    rest = others(count, p.core, elsewhere)
    x, y = p.statistics[key], p.statistics["loss_proxy"]
    return [
        point_series("other channels", x, y, rest, number, "control"),
        point_series(other, x, y, elsewhere, number, "points"),
        point_series("supernodes", x, y, p.core, number, "core"),
    ]


def _halo(summaries: list[dict[str, Any]], pools: dict[int, Pool], focus: int) -> Section:
    frames: dict[int, list[Series]] = {}
    means: dict[str, list[float | None]] = {"halo": [], "controls": [], "core": []}
    for number in range(len(summaries)):
        p = pools.get(number)
        if p is None:
            for values in means.values():
                values.append(None)
            continue
        x, y = p.statistics["halo_connectivity"], p.statistics["halo_redundancy"]
        known = y.isfinite()  # a published index has redundancies of the halo only
        controls = sample(others(len(x), p.core, p.halo), CONTROLS, number)
        controls, core = controls[known[controls]], p.core[known[p.core]]
        frames[number] = [
            point_series("random controls", x, y, controls, number, "control"),
            point_series("halo", x, y, p.halo, number, "points"),
            point_series("supernodes", x, y, core, number, "core"),
        ]
        means["halo"].append(summaries[number]["halo"]["redundancy_mean"])
        for name, members in (("controls", controls), ("core", core)):
            means[name].append(float(y[members].mean()) if len(members) else None)
    return Section(
        "halo",
        "The halo: channels that write where supernodes write",
        "The supernodes are the core. The connectivity of a channel is the share of its down_proj weights, "
        "by magnitude, that lie in the hidden dimensions the core writes to most. The halo is the 10% of the "
        "other channels with the highest connectivity. Redundancy is the mutual information between the loss "
        "contributions of a channel and those of the supernodes.",
        figures=[
            Figure(
                "halo-redundancy",
                "Mean redundancy with the core: halo and random channels",
                "lines",
                LAYER_AXIS,
                Axis("mean redundancy (nats)"),
                series=[
                    layer_line("supernodes, with each other", means["core"], "dashed"),
                    layer_line("halo", means["halo"], "core"),
                    layer_line("random controls", means["controls"], "control"),
                ],
                text=f"Controls: {CONTROLS} random channels per layer outside core and halo (all if there "
                f"are fewer), seed {SEED}.",
            ),
            Figure(
                "connectivity-redundancy",
                "Connectivity against redundancy, channel by channel",
                "scatter",
                Axis("connectivity to the core (%)", percent=True),
                Axis("redundancy (nats, log)", log=True),
                frames=frames,
                focus=focus,
                reduction=drawn_note(),
            ),
        ],
    )
