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


def save_ablations(folder: Path, fields: dict[str, Any]) -> None:
    """ablation.png, of conditions; scale.png and hit_rate.png, of sweeps; trace.png: those that `fields` has data for."""
    named = [row for row in fields["conditions"] if row["x"] is None]
    figure, axes = _figure(8, 1.2 + 0.28 * len(named))
    axes.barh(
        range(len(named)),
        [row["perplexity"] for row in named],
        color=[BLUE if row["group"] == "original" else ORANGE for row in named],
    )
    axes.set(title="Perplexity without …", xlabel=f"perplexity on {fields['text']['name']}", xscale="log")
    axes.set_yticks(range(len(named)), [row["condition"] for row in named], fontsize=7)
    axes.invert_yaxis()
    figure.savefig(folder / "ablation.png", dpi=120, metadata={"Software": None})
    for group, file, title, label in (
        ("scale", "scale.png", "Perplexity as super weights are scaled", "multiplier of the super weights"),
        (
            "hit rate",
            "hit_rate.png",
            "Perplexity at 50% random channels, by supernodes deleted",
            "share of supernodes deleted",
        ),
    ):
        rows = [row for row in fields["conditions"] if row["group"] == group]
        if rows:
            figure, axes = _figure(6, 3.6)
            axes.plot([r["x"] for r in rows], [r["perplexity"] for r in rows], "o", color=BLUE)
            axes.set(title=title, xlabel=label, ylabel="perplexity", yscale="log")
            figure.savefig(folder / file, dpi=120, metadata={"Software": None})
    if "trace" in fields:
        save_trace(folder / "trace.png", fields["trace"])


def save_trace(path: Path, trace: dict[str, Any]) -> None:
    """Largest |hidden state| after each layer, a line a prompt, with super weights (solid) and without (dashed)."""
    figure, axes = _figure(8, 3.8)
    for number, prompt in enumerate(trace["prompts"]):
        mine = [point for point in trace["points"] if point["prompt"] == number]
        colour = COLOURS[number % len(COLOURS)]
        layers = [point["layer"] for point in mine]
        label = prompt.splitlines()[0][:32]
        axes.plot(layers, [point["peak"] for point in mine], color=colour, label=label)
        axes.plot(layers, [point["peak_without"] for point in mine], "--", color=colour)
    axes.set(
        title="Largest |hidden state| with super weights (solid) and without (dashed)",
        xlabel="decoder layer (from 0)",
        ylabel="largest |hidden state|",
        yscale="log",
    )
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(path: Path, values: list[float], colour: str, title: str, label: str) -> None:
    figure, axes = _figure(8, 3.2)
    axes.bar(range(len(values)), values, color=colour)
    axes.set(title=title, xlabel="decoder layer (from 0)", ylabel=label, ylim=(0, 100))
    figure.savefig(path, dpi=120, metadata={"Software": None})
