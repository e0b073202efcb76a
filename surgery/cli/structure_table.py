"""Terminal tables of super weights and spikes, by what their removal was measured to cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from surgery.cli.terminal import ROOMY, bare_table, short_number, show_weights

if TYPE_CHECKING:
    from rich.console import Console

SPIKES_SHOWN = 12


def show_structures(fields: dict[str, Any], console: Console) -> None:
    """Print what an index, or an ablation, says of super weights, and of spikes that are none."""
    structures = fields.get("structures", [])
    if not structures and (fields["super_weights"] or fields.get("echoes")):  # of an earlier version
        show_weights("Super weights", fields["super_weights"], console)
        show_weights("Echoes (spikes that are not super weights)", fields.get("echoes", []), console)
        return
    proved = [one for one in structures if one["super"]]
    others = [one for one in structures if not one["super"]]
    _show("Super weights", proved, console)
    _show("Spikes (no super weight by their effect)", others[:SPIKES_SHOWN], console)
    if len(others) > SPIKES_SHOWN:
        console.print(f"{len(others) - SPIKES_SHOWN} more spikes cost less; index.json lists them")
    if structures:
        first = structures[0]
        console.print(
            f"Effect: nats per token that removal adds to the loss, with its 95% interval over "
            f"{first['blocks']} blocks ({first['ablation']['tokens']:,} tokens)"
        )


def _show(title: str, entries: list[dict[str, Any]], console: Console) -> None:
    """One table, or one line for each structure in a narrow terminal."""
    if not entries:
        console.print(f"\n{title}: none found")
        return
    console.print(f"\n{title}:")
    if console.width < ROOMY:
        for entry in entries:
            name = escape(entry["name"])
            console.print(f"{name}: {effect_text(entry)}, perplexity {perplexity_text(entry)}")
        return
    headings = ("structure", "effect [95%]", "perplexity without", "at its mean", "controls", "seen")
    table = bare_table(headings, left=("structure", "seen"))
    for entry in entries:
        mean = entry["mean_effect"]
        table.add_row(
            escape(entry["name"].replace(" + ", "\n+ ")),
            escape(effect_text(entry)),
            perplexity_text(entry),
            "-" if mean is None else f"{mean:+.3f}",
            controls_text(entry),
            escape(seen_text(entry)),
        )
    console.print(table)


def effect_text(entry: dict[str, Any]) -> str:
    """Effect and interval in nats per token; only the effect where one block gives no interval."""
    low, high = entry["interval"]
    if low is None or high is None:
        return f"{entry['effect']:+.3f} (one block)"
    return f"{entry['effect']:+.3f} [{low:+.3f}, {high:+.3f}]"


def perplexity_text(entry: dict[str, Any]) -> str:
    """Perplexity with and without a structure."""
    effect = entry["ablation"]
    without = f"{short_number(effect['perplexity_without'])} (x{short_number(effect['factor'])})"
    return f"{effect['perplexity']:.1f} → {without}"


def controls_text(entry: dict[str, Any]) -> str:
    """The spread of the effects of matched controls."""
    values = list(entry["controls"].values())
    return f"{min(values):+.3f} to {max(values):+.3f}" if values else "-"


def seen_text(entry: dict[str, Any]) -> str:
    """Where the detector saw a structure: the clearest of its sightings."""
    if not entry["seen"]:
        return "-"
    one = max(entry["seen"], key=lambda sighting: sighting["prompts"])
    masked = ", masked" if any(sighting["round"] > 1 for sighting in entry["seen"]) else ""
    return f"{one['prompts']} of {one['prompts_tried']} prompts{masked}"
