"""Sections about an index's super weights: the spike plot, persistence, the published coordinates."""

from __future__ import annotations

from typing import Any

from surgery.index import ChannelIndex
from surgery.report.document import LAYER_AXIS, Axis, Figure, Section, Series, Table, Unit, layer_line
from surgery.super_weights import MIN_PERSISTENCE, PROMPT, SuperWeight

NOTE = (
    "Explained: share of the output spike that this one product makes. Persists: share of the layers above through which the "
    "residual keeps its size. Without it: perplexity with this scalar set to zero, on the same tokens."
)
CATALOGUE = {"match": "matches {}", "near": "near one of {}", "new": "none known"}


def spike_sections(index: ChannelIndex) -> list[Section]:
    """The spike plot of down_proj, persistence in the residual stream, and the list of super weights and echoes."""
    figures = [figure for figure in (_maxima(index), _persistence(index)) if figure is not None]
    text = (
        f"Found: {len(index.super_weights)}. A super weight is a single scalar of down_proj behind a spike that stays in "
        "the residual stream; a spike that does not last is an echo."
    )
    tables = [
        _table("super-weights", "Super weights", index.super_weights, NOTE),
        _table("echoes", "Echoes: spikes that are not super weights", index.echoes),
    ]
    return [
        Section(
            "super-weights",
            "Super weights and their spikes",
            text,
            tables=[table for table in tables if table.rows],
            figures=figures,
        )
    ]


def _maxima(index: ChannelIndex) -> Figure | None:
    """Largest |input| and |output| of down_proj, layer by layer: the super-weight papers' first figure."""
    maxima = [layer.maxima for layer in index.layers]
    if not any(maxima):
        return None
    layers = sorted({weight.layer for weight in index.super_weights})
    named = f" Super weights are in layer {', '.join(map(str, layers))}." if layers else ""
    series = [
        layer_line(f"largest |{way}|", [positive(m.get(way)) for m in maxima], style)
        for way, style in (("output", "core"), ("input", "control"))
    ]
    marked = [
        (float(n), max(v for v in (maxima[n].get("input"), maxima[n].get("output")) if v)) for n in layers
    ]
    if marked:
        series.append(Series("a super weight's layer", points=marked, style="points"))
    return Figure(
        "spikes",
        "Largest activation into and out of down_proj, layer by layer",
        "lines",
        LAYER_AXIS,
        Axis("largest |activation| (log)", log=True),
        series=series,
        text=f"Of the prompt “{PROMPT}” Where both spike, one weight may join them.{named}",
    )


def positive(value: float | None) -> float | None:
    """A value that has a place on a log scale."""
    return value if value else None


def _persistence(index: ChannelIndex) -> Figure | None:
    """From which layer to which each spike keeps its size: layer + persistence * (layers above it)."""
    entries = [("super weight", w) for w in index.super_weights] + [("echo", w) for w in index.echoes]
    if not entries:
        return None
    last = len(index.layers) - 1
    spans = [[w.layer, w.layer + round(w.persistence * (last - w.layer))] for _, w in entries]
    kinds = [kind for kind, _ in entries]
    return Figure(
        "persistence",
        "Layers through which each spike stays in the residual stream",
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
        text="A bar runs from the layer that makes the spike to the last that holds it within a factor of two; a super "
        f"weight must hold for {MIN_PERSISTENCE:.0%} of the layers above it.",
    )


def place(weight: SuperWeight) -> str:
    """Layer, expert, row and column."""
    ffn = "" if weight.ffn == "dense" else f" {weight.ffn}"
    return f"{weight.layer}{ffn} [{weight.row}, {weight.column}]"


def _table(id: str, title: str, weights: list[SuperWeight], note: str = "") -> Table:
    """One row a weight; FFNs are named where any is not a layer's only one."""
    named = any(w.ffn != "dense" for w in weights)
    columns: list[tuple[str, Unit]] = [("layer", "figure"), ("row", "figure"), ("column", "figure")]
    columns += [("weight", "number"), ("input", "number"), ("output", "number")]
    columns += [("explained", "percent"), ("persists", "percent")]
    columns += [("perplexity", "number"), ("without it", "number"), ("prompts", "text")]
    columns.append(("published", "text"))
    if named:
        columns.append(("FFN", "text"))
    rows: list[list[Any]] = [
        [
            *(w.layer, w.row, w.column, w.value, w.input, w.output, w.explained, w.persistence),
            w.ablation.get("perplexity"),
            w.ablation.get("perplexity_without"),
            f"{w.prompts} of {w.prompts_tried}",
            CATALOGUE[w.catalogue].format(w.published),
            *([w.ffn] if named else []),
        ]
        for w in weights
    ]
    return Table(id, title, columns, rows, note)
