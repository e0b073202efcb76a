"""The tables of a document as Markdown, for a README, an issue or a paper's appendix."""

from __future__ import annotations

from surgery.markdown import markdown_table
from surgery.report.document import Document, Table
from surgery.report.page import shown


def markdown_tables(document: Document) -> str:
    """Every table of a document under its title, with the values as the page shows them."""
    parts = [f"# {document.title}", document.subtitle]
    for section in document.sections:
        for table in section.tables:
            parts += [f"## {table.title}", *_table(table), *([table.note] if table.note else [])]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> list[str]:
    """The table as one block of lines; none for a table without rows."""
    if not table.rows:
        return []
    rows = []
    for number, row in enumerate(table.rows):
        units = [table.row_units[number] if unit == "row" else unit for _, unit in table.columns]
        rows.append([shown(value, unit) for value, unit in zip(row, units, strict=True)])
    return [markdown_table([name for name, _ in table.columns], rows)]
