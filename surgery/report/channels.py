"""Sections about an index's channels: LP concentration, supernodes beside outliers, the halo.

Shapes: F channels of one FFN. Layers of experts are shown as one pool of all routed experts' channels.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch

from surgery.halo import SUPERNODE_FRACTION
from surgery.index import ChannelIndex
from surgery.report.document import LAYER_AXIS, Axis, Fact, Figure, Section, Series, layer_line
from surgery.report.pool import DIGITS, SEED, Pool, drawn_note, others, point_series, pool, rounded, sample

CONTROLS = 256  # random channels the halo is held against, as in the paper
CURVE_POINTS = 96  # ranks of a sorted LP curve
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
        Fact("tokens in a block", calibration["block_size"], "count"),
        Fact("perplexity there", index.loss["perplexity"], "number"),
        Fact("sha256 of the token ids", calibration["sha256"]),
        Fact("computed in", f"{run['dtype']} on {run['device']}"),
        Fact("versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
    ]


def channel_sections(index: ChannelIndex) -> list[Section]:
    """Concentration, overlap and halo of an index."""
    summaries = [layer.summary() for layer in index.layers]
    pools = {number: pool(layer) for number, layer in enumerate(index.layers) if layer.ffns}
    shares = {n: summaries[n]["lp_share"]["0.01"] for n in pools}
    focus = max(shares, key=lambda n: shares[n])
    sections = [_concentration(summaries, pools, shares, focus)]
    sections.append(_outliers(summaries, pools, focus))
    sections.append(_halo(summaries, pools, focus))
    return sections


def _concentration(
    summaries: list[dict[str, Any]], pools: dict[int, Pool], shares: dict[int, float], focus: int
) -> Section:
    def line(name: str, key: str, style: str) -> Series:
        return layer_line(name, [s["lp_share"].get(key) for s in summaries], style)

    values = list(shares.values())
    return Section(
        "concentration",
        "How few channels carry the loss",
        "The loss proxy (LP) of a channel estimates what removing it costs. Supernodes are the top 1% of a layer by LP.",
        facts=[
            Fact("top 1% of a layer holds, median of layers", statistics.median(values), "percent"),
            Fact("least", min(values), "percent"),
            Fact("most", max(values), "percent"),
            Fact("layer of the most", focus, "count"),
        ],
        figures=[
            Figure(
                "lp-concentration",
                "Share of each layer's loss proxy held by its top channels",
                "lines",
                LAYER_AXIS,
                Axis("share of the layer's loss proxy (%)", percent=True),
                series=[
                    line("top 5%", "0.05", "control"),
                    line("top 1% (supernodes)", "0.01", "core"),
                    line("top 0.1%", "0.001", "dashed"),
                ],
                text="Point at a layer, or choose one below, to see its whole curve.",
            ),
            Figure(
                "lp-curve",
                "Loss proxy held by a layer's best channels, added up from the largest",
                "lines",
                Axis("share of channels, largest first (%, log)", log=True, percent=True),
                Axis("share of the layer's loss proxy (%)", percent=True),
                frames={
                    number: [Series("cumulative LP", points=mass_curve(p.statistics["loss_proxy"]))]
                    for number, p in pools.items()
                },
                focus=focus,
                reduction=f"Drawn at no more than {CURVE_POINTS} ranks a layer, evenly spread on the log scale and "
                f"rounded to {DIGITS} digits; nothing is smoothed.",
                mark=SUPERNODE_FRACTION,
            ),
        ],
    )


def mass_curve(loss_proxy: torch.Tensor) -> list[tuple[float, float]]:
    """(share of channels, share of the LP mass they hold), largest first, at log-spaced ranks of LP [F]."""
    ordered = loss_proxy.double().sort(descending=True).values.cumsum(0)
    total = float(ordered[-1])
    if total <= 0:
        return []
    count = len(ordered)
    steps = torch.logspace(0, math.log10(count), CURVE_POINTS, dtype=torch.float64)
    ranks = sorted({min(count, max(1, round(float(step)))) for step in steps})
    return [(rounded(rank / count), rounded(float(ordered[rank - 1]) / total)) for rank in ranks]


def _outliers(summaries: list[dict[str, Any]], pools: dict[int, Pool], focus: int) -> Section:
    def line(name: str, key: str, style: str) -> Series:
        return layer_line(name, [s["overlap"].get(key) for s in summaries], style)

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
        "Supernodes beside activation and weight outliers",
        "The same count of channels is taken by loss proxy, by activation and by weight norm; the overlap says how many "
        "supernodes the other two would have found.",
        figures=[
            Figure(
                "overlap",
                "Share of supernodes that are outliers by activation or by weight too",
                "lines",
                LAYER_AXIS,
                Axis("share of the layer's supernodes (%)", percent=True),
                series=[
                    line("top by mean u²", "activation_power", "core"),
                    line("top by max |u|", "max_abs", "dashed"),
                    line("top by weight norm", "weight_norm", "control"),
                ],
                text="u is the input of down_proj; the weight norm adds those of gate row, up row and down column.",
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
                "weight norm: sum of three L2 norms (log)",
                "top by weight norm, not supernodes",
            ),
        ],
    )


def _against(p: Pool, key: str, other: str, number: int) -> list[Series]:
    """LP against a statistic: supernodes, what is largest by the statistic instead, and some of the rest."""
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
        controls = sample(others(len(x), p.core, p.halo), CONTROLS, number)
        frames[number] = [
            point_series("random controls", x, y, controls, number, "control"),
            point_series("halo", x, y, p.halo, number, "points"),
            point_series("supernodes", x, y, p.core, number, "core"),
        ]
        means["halo"].append(summaries[number]["halo"]["redundancy_mean"])
        for name, members in (("controls", controls), ("core", p.core)):
            means[name].append(float(y[members].mean()) if len(members) else None)
    return Section(
        "halo",
        "The halo: who writes where supernodes write",
        "The halo are the 10% of the other channels with the highest connectivity: the share of a channel's writing that "
        "lands where the core writes. Redundancy is how much a channel's loss contribution tells about the core's.",
        figures=[
            Figure(
                "halo-redundancy",
                "Mean redundancy with the core: halo against random channels",
                "lines",
                LAYER_AXIS,
                Axis("mean redundancy (nats)"),
                series=[
                    layer_line("supernodes, with the others", means["core"], "dashed"),
                    layer_line("halo", means["halo"], "core"),
                    layer_line("random controls", means["controls"], "control"),
                ],
                text=f"Controls: {CONTROLS} random channels a layer outside core and halo (all, where fewer), seed {SEED}.",
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
