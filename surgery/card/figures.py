"""The pictures beside model cards, comparisons and ablations: what each shows, drawn by `chart`."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from surgery.chart import LAYER_AXIS, LP_SHARE_AXIS, Axis, Figure, Series, save_chart

CONCENTRATION, CUT, HEAL = "lp_concentration.png", "cut.png", "heal.png"
PERPLEXITY = Axis("perplexity (log)", log=True)
PROMPT_LENGTH = 40  # characters of a prompt in a legend


def save_figures(folder: Path, manifest: dict[str, Any]) -> None:
    """Write lp_concentration.png and cut.png, from the per-layer shares in the manifest's plan."""
    plan = manifest["plan"]
    title = "Loss proxy held by each layer's top 1% of FFN channels"
    save_chart([_layer_bars("lp-concentration", title, plan, "lp_share_top")], folder / CONCENTRATION)
    title = "Loss proxy held by the channels that pruning kept"
    if plan.get("allocation", "uniform") == "uniform":
        title += f" ({plan['width_before']} → {plan['width_after']} per layer)"
    save_chart([_layer_bars("cut", title, plan, "lp_kept")], folder / CUT)


def _layer_bars(name: str, title: str, plan: dict[str, Any], key: str) -> Figure:
    """One bar per layer for an entry of the plan's layers, with its interval where the plan has one."""
    shares = [layer[key] for layer in plan["layers"]]
    spread = [layer.get(f"{key}_interval") for layer in plan["layers"]]
    return Figure(
        name,
        title,
        "stacked",
        LAYER_AXIS,
        LP_SHARE_AXIS,
        series=[Series("share", values=shares, style="core", spread=spread if any(spread) else [])],
        categories=[str(number) for number in range(len(shares))],
    )


def save_heal_figure(folder: Path, manifest: dict[str, Any]) -> None:
    """Write heal.png: held-out perplexities of the last heal by step."""
    save_chart(heal_figures(manifest["heals"][-1])[1:], folder / HEAL)


def heal_figures(entry: dict[str, Any]) -> list[Figure]:
    """The training loss of one heal by step, and the perplexity of every held-out text."""
    steps = Axis("steps")
    losses = [(float(step + 1), loss) for step, loss in enumerate(entry["losses"])]
    measured = [
        Series(name, points=[(float(m["step"]), math.exp(m["nats"][name])) for m in entry["measures"]])
        for name in entry["held_out"]
    ]
    text = "Blocks that were not trained on; the state with the lowest mean of log-perplexities was kept."
    return [
        Figure(
            "heal-loss",
            "Training loss of every step",
            "lines",
            steps,
            Axis("nats a token"),
            series=[Series("loss", points=losses, style="core")],
        ),
        Figure(
            "heal-perplexity",
            "Perplexity on held-out blocks while healing",
            "lines",
            steps,
            PERPLEXITY,
            series=measured,
            text=text,
        ),
    ]


def save_comparison(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write perplexity against parameters from the rows of compare.json, one panel per text."""
    save_chart(size_figures(rows), path)


def size_figures(rows: list[dict[str, Any]]) -> list[Figure]:
    """Perplexity against parameters from the rows of compare.json, one figure per text.

    A line for each combination of method, repair and allocation; every line starts at the dense model.
    """
    texts = list(dict.fromkeys(row["text"] for row in rows))
    return [
        Figure(
            f"loss-against-size-{number}",
            f"Perplexity against size on {text}",
            "lines",
            Axis("parameters (millions)"),
            PERPLEXITY,
            series=_size_lines([row for row in rows if row["text"] == text]),
            text="Lower and further left is better. Every line starts at the dense model.",
        )
        for number, text in enumerate(texts)
    ]


def _size_lines(rows: list[dict[str, Any]]) -> list[Series]:
    dense = next(row for row in rows if row["method"] == "dense")
    variants: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row is not dense:
            variants.setdefault((row["method"], row["repair"], row["allocation"]), []).append(row)
    return [
        Series(
            f"{method}, repair {repair}, {allocation}",
            points=[
                (row["parameters"] / 1e6, row["perplexity"])
                for row in sorted([dense, *own], key=lambda row: row["parameters"])
            ],
        )
        for (method, repair, allocation), own in variants.items()
    ]


def save_ablations(folder: Path, fields: dict[str, Any]) -> None:
    """Write ablation.png; scale.png, hit_rate.png and trace.png if `fields` has data for them."""
    save_chart([_condition_bars(fields)], folder / "ablation.png")
    scale = _sweep(
        fields, "scale", "Perplexity as super weights are scaled", Axis("multiplier of the super weights")
    )
    hit_rate = _sweep(
        fields,
        "hit rate",
        "Perplexity with a random half of the channels removed, by supernodes among them",
        Axis("share of the supernodes removed (%)", percent=True),
    )
    for figure, file in ((scale, "scale.png"), (hit_rate, "hit_rate.png")):
        if figure.series[0].points:
            save_chart([figure], folder / file)
    if "trace" in fields:
        save_chart([_trace(fields["trace"])], folder / "trace.png")


def _condition_bars(fields: dict[str, Any]) -> Figure:
    """Perplexity of every condition outside the sweeps, the unchanged model first."""
    rows = [row for row in fields["conditions"] if row["x"] is None]

    def bars(original: bool) -> list[float | None]:
        return [row["perplexity"] if (row["group"] == "original") == original else None for row in rows]

    return Figure(
        "ablation",
        f"Perplexity on {fields['text']['name']}",
        "bars",
        PERPLEXITY,
        Axis(""),
        series=[
            Series("unchanged model", values=bars(True), style="control"),
            Series("changed as named", values=bars(False), style="core"),
        ],
        categories=[row["condition"] for row in rows],
        mark=next((row["perplexity"] for row in rows if row["group"] == "original"), None),
    )


def _sweep(fields: dict[str, Any], group: str, title: str, axis: Axis) -> Figure:
    points = [(row["x"], row["perplexity"]) for row in fields["conditions"] if row["group"] == group]
    return Figure(
        group, title, "scatter", axis, PERPLEXITY, series=[Series(group, points=points, style="core")]
    )


def _trace(trace: dict[str, Any]) -> Figure:
    """Largest |hidden state| after each layer, two lines per prompt: with super weights and without."""
    series = []
    for number, prompt in enumerate(trace["prompts"]):
        points = [point for point in trace["points"] if point["prompt"] == number]
        name = textwrap.shorten(prompt.splitlines()[0], PROMPT_LENGTH, placeholder=" …")
        for key, label, style in (("peak", name, "line"), ("peak_without", "", "companion")):
            line = [(float(point["layer"]), point[key]) for point in points]
            series.append(Series(label, points=line, style=style))
    return Figure(
        "trace",
        "Largest |hidden state| with super weights (solid) and without (dashed)",
        "lines",
        LAYER_AXIS,
        Axis("largest |hidden state| (log)", log=True),
        series=series,
    )
