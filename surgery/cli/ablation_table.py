"""What `surgeon ablate` and `surgeon quantize --compare` measured: the folder, and tables in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from surgery.cli.common import data_console
from surgery.cli.terminal import bare_table, short_number

if TYPE_CHECKING:
    from rich.console import Console

WITH_INTERVALS = 140  # columns a terminal needs for long conditions and the interval of their effect


def save_outcomes(folder: Path, file: str, fields: dict[str, Any], as_json: bool) -> None:
    """Write the folder of outcomes, with `fields` as `file` and plots, and print them."""
    from surgery.card.figures import save_ablations
    from surgery.checkpoint.output_folder import complete_folder

    with complete_folder(folder) as partial:
        (partial / file).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        save_ablations(partial, fields)
    if as_json:
        click.echo(json.dumps(fields))
    else:
        show_outcomes(fields, data_console())


def show_outcomes(fields: dict[str, Any], console: Console) -> None:
    """Print the conditions and, if measured, the super activation's trace and next-token probabilities."""
    wide = console.width >= WITH_INTERVALS
    headings = ("condition", "changed", "perplexity", "factor", *(["nats/token [95%]"] if wide else []))
    table = bare_table((*headings, "bits/byte", "KL"), left=("condition",))
    for row in fields["conditions"]:
        table.add_row(
            row["condition"],
            f"{row['changed']:,}",
            short_number(row["perplexity"]),
            f"x{row['factor']:.3g}",
            *([escape(_effect(row))] if wide else []),
            f"{row['bits_per_byte']:.3f}",
            f"{row['kl']:.4f}",
        )
    console.print(table)
    console.print(f"{fields['conditions'][0]['tokens']:,} predicted tokens of {fields['text']['name']}")
    if "trace" in fields:
        _show_trace(fields["trace"], console)
    if "stop_words" in fields:
        _show_stop_words(fields["stop_words"], console)


def _effect(row: dict[str, Any]) -> str:
    """What a condition adds to the loss, with its interval over blocks."""
    low, high = row["interval"]
    bounds = "" if low is None or high is None else f" [{low:+.3f}, {high:+.3f}]"
    return f"{row['effect']:+.3f}{bounds}"


def _show_trace(trace: dict[str, Any], console: Console) -> None:
    place = trace["weight"]
    console.print(
        f"Hidden state at the spike of layer {place['layer']} [{place['row']}, {place['column']}], by "
        "prompt: with super weights → without"
    )
    for layer in sorted({point["layer"] for point in trace["points"]}):
        here = [point for point in trace["points"] if point["layer"] == layer]
        if layer < place["layer"]:
            continue
        values = "  ".join(f"{p['followed']:>9,.1f} → {p['followed_without']:<9,.1f}" for p in here)
        console.print(f"  layer {layer:>3}  {values}")


def _show_stop_words(found: dict[str, Any], console: Console) -> None:
    console.print(
        f"Next token over {found['prompts']} prompts, probability of function words ({found['qualified']} of "
        f"{found['listed']} are one token): {100 * found['mass']:.1f}% → {100 * found['mass_without']:.1f}% "
        "without super weights"
    )
    table = bare_table(("token", "with", "without", "ratio"), left=("token",))
    for token, original, without in found["tokens"][:10]:
        ratio = f"x{without / original:.2f}" if original > 0 else "-"
        table.add_row(repr(token), f"{100 * original:.2f}%", f"{100 * without:.2f}%", ratio)
    console.print(table)
    likeliest = max(found["example"], key=lambda row: row[1])
    likeliest_without = max(found["example"], key=lambda row: row[2])
    console.print(
        f"“Summer is hot. Winter is” → {likeliest[0]!r} ({100 * likeliest[1]:.1f}%); without: "
        f"{likeliest_without[0]!r} ({100 * likeliest_without[2]:.1f}%)"
    )
