"""Figures of a cut, for the card: PNG, made by matplotlib, the same bytes for the same data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.compare import Row

# Okabe-Ito colours: told apart by colour-blind readers and in grey.
BLUE, ORANGE = "#0072B2", "#E69F00"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "osD^vPX*"
CONCENTRATION, CUT = "lp_concentration.png", "cut.png"


def save_figures(folder: Path, manifest: dict[str, Any]) -> None:
    """Write lp_concentration.png and cut.png, from the per-layer shares in the manifest's plan."""
    plan = manifest["plan"]
    _bars(
        folder / CONCENTRATION,
        [100 * layer["lp_share_top"] for layer in plan["layers"]],
        BLUE,
        "Loss proxy held by each layer's top 1% of FFN channels",
        "share of the layer's loss proxy (%)",
    )
    _bars(
        folder / CUT,
        [100 * layer["lp_kept"] for layer in plan["layers"]],
        ORANGE,
        f"Loss proxy kept by the cut ({plan['width_before']} → {plan['width_after']} channels a layer)",
        "share of the layer's loss proxy (%)",
    )


def save_comparison(path: Path, rows: list[Row]) -> None:
    """Perplexity against parameters, one panel a text, one line a way of cutting, through the dense model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = list(dict.fromkeys(row.text for row in rows))
    figure = Figure(figsize=(1.5 + 5 * len(texts), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for panel, text in zip(panels, texts, strict=True):
        here = [row for row in rows if row.text == text]
        dense = here[0]
        ways = list(dict.fromkeys((r.method, r.repair, r.allocation) for r in here[1:]))
        for number, way in enumerate(ways):
            line = [
                dense,
                *sorted(
                    (r for r in here if (r.method, r.repair, r.allocation) == way),
                    key=lambda r: -r.parameters,
                ),
            ]
            panel.plot(
                [r.parameters / 1e6 for r in line],
                [r.perplexity for r in line],
                marker=MARKERS[number % len(MARKERS)],
                color=COLOURS[number % len(COLOURS)],
                label=f"{way[0]}, repair {way[1]}, {way[2]}",
            )
        panel.set(title=text, xlabel="parameters (millions)", ylabel="perplexity", yscale="log")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _bars(path: Path, values: list[float], colour: str, title: str, label: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar(range(len(values)), values, color=colour)
    axes.set(title=title, xlabel="decoder layer (from 0)", ylabel=label, ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
