"""Sections about the heals of a folder, from its surgeon.json: loss, held-out perplexities, provenance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from surgery.card.figures import heal_figures
from surgery.report.document import Fact, Section, Table


def heal_sections(manifest: dict[str, Any]) -> list[Section]:
    """One section for each heal."""
    heals = manifest.get("heals") or []
    return [_section(number, entry, len(heals)) for number, entry in enumerate(heals, 1)]


def _section(number: int, entry: dict[str, Any], count: int) -> Section:
    rows: list[list[Any]] = [
        [f"{name}, held out", text["before"], text["after"]] for name, text in entry["held_out"].items()
    ]
    if "evaluation" in entry:
        before, after = entry["evaluation"]["before"], entry["evaluation"]["after"]
        rows.append([after["text"], before["perplexity"], after["perplexity"]])
    table = Table(
        f"heal-{number}-perplexity",
        "Perplexity before and after healing",
        [("text", "text"), ("before", "number"), ("after", "number")],
        rows,
        note="Held-out blocks were not trained on.",
    )
    options = entry["options"]
    facts = [
        Fact("teacher", entry["teacher"]["name"]),
        Fact("trained", options["train"]),
        Fact("text", entry["text"]["name"]),
        Fact("steps, and the one whose state was kept", f"{entry['steps']:,}, {entry['kept_step']:,}"),
        Fact("tokens", f"{entry['tokens']:,}"),
        *_counted(entry["text"]),
        Fact("seconds", f"{entry['seconds']:,.0f}"),
        Fact("peak learning rate", f"{options['learning_rate']:g}"),
    ]
    title = "Healed" if count == 1 else f"Healed, {number} of {count}"
    figures = [replace(figure, id=f"{figure.id}-{number}") for figure in heal_figures(entry)]
    return Section(f"heal-{number}", title, facts=facts, tables=[table], figures=figures)


def _counted(text: dict[str, Any]) -> list[Fact]:
    """How many tokens the loss is on, of the entry of a text; a heal of an older version says nothing."""
    if "tokens_counted" not in text:
        return []
    predicted = text["blocks"] * (text["block_size"] - 1)
    label = "distinct predicted tokens, and those that the loss counts"
    return [Fact(label, f"{predicted:,}, {text['tokens_counted']:,}")]
