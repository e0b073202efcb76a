"""The section about an index's super weights: spikes, their persistence, and published coordinates."""

from __future__ import annotations

from typing import Any

from surgery.chart import LAYER_AXIS, Axis, Figure, Series, layer_line
from surgery.index.channel_index import ChannelIndex
from surgery.index.spike_detector import MIN_PERSISTENCE, PROMPT
from surgery.index.super_weights import SuperWeight
from surgery.report.document import Section, Table, Unit

NOTE = (
    "Explained: share of the output spike that the product input × weight accounts for. Persists: share of "
    "the layers above in which the spike keeps its size in the residual stream. Without it: perplexity on "
    "the same tokens with this weight set to zero. Prompts: in how many of them the weight was found."
)
CATALOGUE = {"match": "matches {}", "near": "near one of {}", "new": "not published"}


def spike_sections(index: ChannelIndex) -> list[Section]:
    """Spikes of down_proj, their persistence, and tables of super weights and echoes."""
    figures = [figure for figure in (_maxima(index), _persistence(index)) if figure is not None]
    text = (
        f"Found: {len(index.super_weights)}. A super weight is a single weight of down_proj whose product "
        "with its input makes an activation spike that persists in the residual stream. A spike that does "
        "not persist is an echo."
    )
    tables = [
        _table("super-weights", "Super weights", index.super_weights, NOTE),
        _table("echoes", "Echoes: spikes that are not super weights", index.echoes),
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
    entries = [("super weight", w) for w in index.super_weights] + [("echo", w) for w in index.echoes]
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
            for name, style in (("super weight", "core"), ("echo", "control"))
            if name in kinds
        ],
        categories=[place(w) for _, w in entries],
        text="A bar runs from the layer that makes the spike to the last layer that keeps its size within a "
        f"factor of two. The spike of a super weight persists in at least {MIN_PERSISTENCE:.0%} of the "
        "layers above it.",
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
