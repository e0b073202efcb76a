"""Building blocks of terminal tables, for wide and narrow terminals."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

BAR_WIDTH = 20
WIDE, ROOMY = 108, 84  # columns a terminal needs for every column of a table, and for a table at all


def bar(share: float, cells: int = BAR_WIDTH) -> str:
    """A bar of up to `cells` cells for a share in [0, 1]."""
    eighths = round(share * cells * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def bare_table(headings: tuple[str, ...], left: tuple[str, ...] = ()) -> Table:
    """An empty table without rules; columns are right-aligned except those in `left`."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right")
    return table


def short_number(value: float) -> str:
    """Two decimals below 100, none above, an exponent from 100,000."""
    return f"{value:.2g}" if value >= 1e5 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def show_weights(title: str, entries: list[dict[str, Any]], console: Console) -> None:
    """Print super weights or echoes: as a table, or one line each in a narrow terminal."""
    if not entries:
        console.print(f"\n{title}: none found")
        return
    console.print(f"\n{title}:")
    if console.width < ROOMY:
        for entry in entries:
            console.print(_weight_line(entry))
        return
    table = bare_table(
        (
            "layer",
            "row",
            "column",
            "value",
            "input",
            "output",
            "explained",
            "persists",
            "perplexity without",
        ),
    )
    for entry in entries:
        table.add_row(
            str(entry["layer"]) + ("" if entry["ffn"] == "dense" else f" {entry['ffn']}"),
            str(entry["row"]),
            str(entry["column"]),
            f"{entry['value']:.3f}",
            f"{entry['input']:,.1f}",
            f"{entry['output']:,.0f}",
            f"{100 * entry['explained']:.0f}%",
            f"{100 * entry['persistence']:.0f}%",
            _without(entry),
        )
    console.print(table)
    for entry in entries:
        if entry["published"]:
            console.print(
                f"Layer {entry['layer']} [{entry['row']}, {entry['column']}] matches {entry['published']}"
            )


def _without(entry: dict[str, Any]) -> str:
    """Perplexity with and without a super weight."""
    effect = entry["ablation"]
    if not effect:
        return "not measured"
    without = f"{short_number(effect['perplexity_without'])} (x{short_number(effect['factor'])})"
    return f"{effect['perplexity']:.1f} → {without}"


def _weight_line(entry: dict[str, Any]) -> str:
    """A super weight as one line, for terminals too narrow for the table."""
    ffn = "" if entry["ffn"] == "dense" else f" {entry['ffn']}"
    return (
        f"layer {entry['layer']}{ffn} \\[{entry['row']}, {entry['column']}] = {entry['value']:.3f}: "
        f"{entry['input']:,.1f} in, {entry['output']:,.0f} out, {100 * entry['explained']:.0f}% explained, "
        f"persists {100 * entry['persistence']:.0f}%, perplexity {_without(entry)}"
    )
