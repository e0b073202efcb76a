"""The content of a report, independent of its layout: sections of facts, tables and figures.

A document knows neither HTML nor matplotlib. The HTML page is drawn from its JSON, which is also saved beside
the page: every number on the page is in that file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from surgery.chart import Figure

SCHEMA_VERSION = 1
Unit = Literal["text", "count", "number", "percent", "bytes", "millions", "figure", "row"]


@dataclass(frozen=True)
class Fact:
    """A label with a value; `unit` says how the value is formatted, and its 95% interval [low, high]."""

    label: str
    value: Any
    unit: Unit = "text"
    interval: list[float] | None = None


@dataclass(frozen=True)
class Table:
    """`rows` of unformatted values under `columns` of (heading, unit); None is an empty cell.

    In a column of unit "row", the unit of each row is in `row_units`.
    """

    id: str
    title: str
    columns: list[tuple[str, Unit]]
    rows: list[list[Any]]
    note: str = ""
    row_units: list[Unit] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """A heading and its content.

    `quotes` are texts shown side by side, each {"prompt": ..., "texts": [[name, text], ...]}.
    """

    id: str
    title: str
    text: str = ""
    facts: list[Fact] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    quotes: list[dict[str, Any]] = field(default_factory=list)
    code: str = ""


@dataclass(frozen=True)
class Document:
    """A report on one "index", on several "indexes", a pruned folder ("cut"), or a "frontier"."""

    kind: Literal["index", "indexes", "cut", "frontier"]
    title: str
    subtitle: str
    surgeon: str
    sections: list[Section]

    def as_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def figures(self) -> Iterator[Figure]:
        """Every figure, in order."""
        for section in self.sections:
            yield from section.figures
