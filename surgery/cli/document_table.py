"""Print the facts and tables of a report in the terminal, without its figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from surgery.cli.terminal import bare_table
from surgery.report.document import Document, Table
from surgery.report.page import between, shown

if TYPE_CHECKING:
    from rich.console import Console


def show_document(document: Document, console: Console) -> None:
    """Print title, facts and tables by section; sections with nothing but figures are left out."""
    console.print(f"[bold]{escape(document.title)}[/bold]: {escape(document.subtitle)}")
    for section in document.sections:
        if not (section.facts or section.tables or section.code):
            continue
        console.print(f"\n[bold]{escape(section.title)}[/bold]")
        for fact in section.facts:
            interval = f" {between(fact.interval, fact.unit)}" if fact.interval else ""
            console.print(f"{escape(fact.label)}: {escape(shown(fact.value, fact.unit))}{interval}")
        for table in section.tables:
            _show_table(table, console)
        if section.code:
            console.print(escape(section.code), soft_wrap=True)


def _show_table(table: Table, console: Console) -> None:
    """Print one table; in a terminal too narrow for it, one paragraph per row."""
    cells = [
        [
            shown(value, table.row_units[number] if unit == "row" else unit)
            for value, (_, unit) in zip(row, table.columns, strict=True)
        ]
        for number, row in enumerate(table.rows)
    ]
    headings = [heading for heading, _ in table.columns]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    console.print(escape(table.title), style="dim")
    if sum(widths) + 2 * len(widths) > console.width:
        for row in cells:
            known = [(h, c) for h, c in zip(headings[1:], row[1:], strict=True) if c]
            console.print(escape(f"{row[0]}: " + ", ".join(f"{h} {c}" for h, c in known)))
        return
    left = tuple(heading for heading, unit in table.columns if unit == "text")
    drawn = bare_table(tuple(map(escape, headings)), tuple(map(escape, left)))
    for row in cells:
        drawn.add_row(*map(escape, row))
    console.print(drawn)
