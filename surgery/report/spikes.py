"""The section about an index's super weights: spikes, their persistence, and published coordinates."""

from __future__ import annotations

import math
from typing import Any

from surgery.chart import LAYER_AXIS, Axis, Figure, Series, layer_line
from surgery.index.channel_index import ChannelIndex
from surgery.index.findings import Finding
from surgery.index.prove import MIN_EFFECT
from surgery.index.spike_detector import PROMPT
from surgery.index.super_weights import SuperWeight
from surgery.report.document import Section, Table, Unit

NOTE = (
    "Explained: share of the output spike that the product input × weight accounts for. Persists: share of "
    "the layers above in which the spike keeps its size in the residual stream. Without it: perplexity on "
    "the same tokens with this weight set to zero. Prompts: in how many of them the weight was found."
)
EFFECT_NOTE = (
    "Effect: nats per token that removal adds to the loss, with its 95% interval over blocks. At its mean: "
    "the same with what it adds set to its mean over tokens. Controls: the smallest and the largest effect "
    "of removing other weights of the same row, magnitude and layer. A dash: not compared, because the "
    "interval includes no effect."
)
EFFECT_COLUMNS: list[tuple[str, Unit]] = [
    *(("structure", "text"), ("kind", "text"), ("effect", "number"), ("95% interval", "text")),
    *(("perplexity", "number"), ("without it", "number"), ("at its mean", "text"), ("controls", "text")),
]
CATALOGUE = {"match": "matches {}", "near": "near one of {}", "new": "not published"}


def spike_sections(index: ChannelIndex) -> list[Section]:
    """Spikes of down_proj, their persistence, and tables of super weights and other spikes."""
    figures = [figure for figure in (_maxima(index), _persistence(index)) if figure is not None]
    proved = [found for found in index.structures if found.is_super]
    spikes = [found for found in index.structures if not found.is_super]
    text = (
        f"Proved: {len(proved)}. A super weight is a structure of down_proj (a scalar, a column, a row, or "
        f"several together) whose removal multiplies perplexity by more than {math.exp(MIN_EFFECT):.3g}, "
        "with its whole interval, and by more than that beyond any measured part of it. All other spikes of "
        "activation are only spikes, however large."
    )
    tables = [
        _effects("structures", "Super weights, by measured effect", proved, EFFECT_NOTE),
        _effects("spikes-measured", "Spikes, by measured effect", spikes),
        _table("super-weights", "Scalars of super weights", index.super_weights, NOTE),
        _table("echoes", "Scalars of other spikes", index.echoes),
    ]
    return [
        Section(
            "super-weights",
            "Super weights and activation spikes",
            text,
            tables=[table for table in tables if table.rows],
            figures=figures,
        )
    ]


def _maxima(index: ChannelIndex) -> Figure | None:
    """Largest |input| and |output| of down_proj by layer, as in the first figure of The Super Weight."""
    maxima = [layer.maxima for layer in index.layers]
    if not any(maxima):
        return None
    layers = sorted({weight.layer for weight in index.super_weights})
    found = f" Layers with a super weight: {', '.join(map(str, layers))}." if layers else ""
    series = [
        layer_line(f"largest |{way}|", [positive(m.get(way)) for m in maxima], style)
        for way, style in (("output", "core"), ("input", "control"))
    ]
    marked = [
        (float(n), max(v for v in (maxima[n].get("input"), maxima[n].get("output")) if v))
        for n in layers
        if any(maxima[n].values())
    ]
    if marked:
        series.append(Series("layer with a super weight", points=marked, style="points"))
    return Figure(
        "spikes",
        "Largest activation into and out of down_proj, by layer",
        "lines",
        LAYER_AXIS,
        Axis("largest |activation| (log)", log=True),
        series=series,
        text=f"Prompt: “{PROMPT}” A layer where both spike may hold a super weight.{found}",
    )


def positive(value: float | None) -> float | None:
    """None for zero, which a log scale can't show."""
    return value if value else None


def _persistence(index: ChannelIndex) -> Figure | None:
    """The layers in which each spike keeps its size: the last is layer + persistence * (layers above it)."""
    entries = [("super weight", w) for w in index.super_weights] + [("spike", w) for w in index.echoes]
    if not entries:
        return None
    last = len(index.layers) - 1
    spans = [[w.layer, w.layer + round(w.persistence * (last - w.layer))] for _, w in entries]
    kinds = [kind for kind, _ in entries]
    return Figure(
        "persistence",
        "Layers in which each spike persists in the residual stream",
        "spans",
        LAYER_AXIS,
        Axis("weight: layer [row, column]"),
        series=[
            Series(
                name,
                values=[s if kind == name else None for s, kind in zip(spans, kinds, strict=True)],
                style=style,
            )
            for name, style in (("super weight", "core"), ("spike", "control"))
            if name in kinds
        ],
        categories=[place(w) for _, w in entries],
        text="A bar runs from the layer that makes the spike to the last layer that keeps its size within a "
        "factor of two.",
    )


def place(weight: SuperWeight) -> str:
    """Layer, FFN (unless it is the layer's only one), row and column."""
    ffn = "" if weight.ffn == "dense" else f" {weight.ffn}"
    return f"{weight.layer}{ffn} [{weight.row}, {weight.column}]"


def _table(id: str, title: str, weights: list[SuperWeight], note: str = "") -> Table:
    """A table of weights, with a column for the FFN if any layer has several."""
    name_ffns = any(w.ffn != "dense" for w in weights)
    columns: list[tuple[str, Unit]] = [("layer", "figure"), ("row", "figure"), ("column", "figure")]
    columns += [("weight", "number"), ("input", "number"), ("output", "number")]
    columns += [("explained", "percent"), ("persists", "percent")]
    columns += [("perplexity", "number"), ("without it", "number"), ("prompts", "text")]
    columns.append(("published", "text"))
    if name_ffns:
        columns.append(("FFN", "text"))
    rows: list[list[Any]] = [
        [
            *(w.layer, w.row, w.column, w.value, w.input, w.output, w.explained, w.persistence),
            w.ablation.get("perplexity"),
            w.ablation.get("perplexity_without"),
            f"{w.prompts} of {w.prompts_tried}",
            CATALOGUE[w.catalogue].format(w.published),
            *([w.ffn] if name_ffns else []),
        ]
        for w in weights
    ]
    return Table(id, title, columns, rows, note)


def _effects(id: str, title: str, findings: list[Finding], note: str = "") -> Table:
    """A table of measured structures."""
    rows = [[*effect_cells(found), sightings(found)] for found in findings]
    return Table(id, title, [*EFFECT_COLUMNS, ("seen", "text")], rows, note)


def effect_cells(found: Finding) -> list[Any]:
    """The cells of a measured structure, under EFFECT_COLUMNS."""
    low, high = found.effect.as_json()
    controls = found.controls.values()
    return [
        *(found.structure.name, found.structure.kind, found.effect.mean),
        "one block" if low is None or high is None else f"{low:+.4f} to {high:+.4f}",
        *(found.perplexity, found.perplexity_without),
        "–" if found.mean is None else f"{found.mean.mean:+.4f}",
        f"{min(controls):+.4f} to {max(controls):+.4f}" if controls else "–",
    ]


def sightings(found: Finding) -> str:
    """Where the detector saw a structure: prompt, position and criterion."""
    return "; ".join(
        f"prompt {one['prompt']}, position {one['position']}: {one['criterion']}"
        + (" (masked: seen without the others)" if one["round"] > 1 else "")
        for one in found.seen[:3]
    )
