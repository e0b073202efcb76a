"""What a report is made of, before anybody decides how it looks: sections of facts, tables and figures.

A document knows neither HTML nor matplotlib. Its JSON is what the page draws from and what is saved beside it, so that
a number on the page is a number in that file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1
Unit = Literal["text", "count", "number", "percent", "bytes", "millions", "figure", "row"]
Kind = Literal["lines", "scatter", "stacked", "bars", "spans", "matrix"]


@dataclass(frozen=True)
class Fact:
    """One line of a list of facts; `unit` says how `value` is written."""

    label: str
    value: Any
    unit: Unit = "text"


@dataclass(frozen=True)
class Table:
    """`rows` of raw values under `columns` of (heading, unit); None is an empty cell.

    A column of unit "row" holds values of `row_units`, one a row: of a table that lists different things.
    """

    id: str
    title: str
    columns: list[tuple[str, Unit]]
    rows: list[list[Any]]
    note: str = ""
    row_units: list[Unit] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """What an axis measures, with its unit; `percent` when its values are shares in [0, 1]."""

    label: str
    log: bool = False
    percent: bool = False


@dataclass(frozen=True)
class Series:
    """Values that belong together: `points` (x, y) of lines and scatters, `values` one a category of bars.

    `of` is how many there are where only some are drawn. `style` is how it is told from its neighbours: "line",
    "dashed", "points", "core" for what the figure is about, "control" for what it is held against.
    """

    name: str
    points: list[tuple[float, float]] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    of: int | None = None
    style: str = "line"


@dataclass(frozen=True)
class Figure:
    """A chart. `series`, or `frames` of them by decoder layer of which one is shown at a time, `focus` first.

    `categories` name what bars, spans and matrices have one value for. `text` says what is seen, `reduction` what was
    left out of the drawing.
    """

    id: str
    title: str
    kind: Kind
    x: Axis
    y: Axis
    series: list[Series] = field(default_factory=list)
    frames: dict[int, list[Series]] = field(default_factory=dict)
    focus: int = 0
    categories: list[str] = field(default_factory=list)
    text: str = ""
    reduction: str = ""
    mark: float | None = None


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it; `quotes` are (title, text) to be read side by side."""

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
    """A report: of one "index", of several "indexes", or of a "cut"."""

    kind: Literal["index", "indexes", "cut"]
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


LAYER_AXIS = Axis("decoder layer (from 0)")


def layer_line(name: str, values: list[float | None], style: str = "line") -> Series:
    """A line with one value a decoder layer; layers without one are left out."""
    points = [(number, value) for number, value in enumerate(values) if value is not None]
    return Series(name, points=[(float(n), v) for n, v in points], style=style)
