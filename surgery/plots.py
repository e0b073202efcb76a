"""Figures of a cut, for the card: PNG, made by matplotlib, the same bytes for the same data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe-Ito colours: told apart by colour-blind readers and in grey.
BLUE, ORANGE = "#0072B2", "#E69F00"
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
