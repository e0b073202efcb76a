"""Charts: `Figure` describes one without naming a drawing library, `save_chart` draws it with matplotlib.

The same data gives the same bytes on every run. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["lines", "scatter", "stacked", "bars", "spans", "matrix"]

# Okabe-Ito colours, which colour-blind readers can tell apart. Colours and markers cycle together: their
# counts share no factor, so that 56 lines differ in one or the other.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "o^Ds*XvP"
STYLE_COLOURS = {"core": "#0072B2", "points": "#D55E00", "control": "#6B7280", "dashed": "#009E73"}
STYLE_MARKERS = {"core": "o", "points": "^", "control": "s", "dashed": "D"}
LINE_STYLES = {"dashed": "--", "companion": "--", "control": ":", "points": "none"}
BACKGROUND = "#C8CDD3"  # of the frames behind the one in focus

WIDTH, SHARED_WIDTH = 7.2, 5.2  # inches of one figure, alone and beside others
DPI = 160
TITLE_SIZE, LEGEND_SIZE = 10, 7.5
LEGEND_ROW = 0.16  # inches
TITLE_CHARACTERS, LEGEND_CHARACTERS = 12, 19  # per inch, of those sizes
DENSE = 60  # points of a line above which it gets no markers
SETTINGS: Any = {
    "font.size": 9,
    "svg.hashsalt": "surgeon",  # ids in SVG are random without it
    "text.parse_math": False,  # a "$" in a model's name is a dollar sign
}
METADATA: dict[str, dict[str, Any]] = {".png": {"Software": None}, ".svg": {"Date": None}}


@dataclass(frozen=True)
class Axis:
    """What an axis measures, with its unit; `percent` when its values are shares in [0, 1]."""

    label: str
    log: bool = False
    percent: bool = False


LAYER_AXIS = Axis("decoder layer (from 0)")
LP_SHARE_AXIS = Axis("share of the layer's loss proxy (%)", percent=True)


@dataclass(frozen=True)
class Series:
    """One line, one group of points or one colour of bars.

    `points` are the (x, y) of lines and scatters, `values` hold one value for each category of bars, None for
    no bar. `spread` holds the interval [low, high] of each point or value, None where it has none; empty
    where none has. `of` is the number of points before sampling. `style` sets colour and marker: "line" takes
    the next colour of the cycle; "core" is the subject of the figure, "control" the reference, "dashed" one
    more line, "points" markers without a line; "companion" is a dashed line in the colour of the series
    before it (not drawn in the HTML page). A series without a name is not in the legend.
    """

    name: str
    points: list[tuple[float, float]] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    of: int | None = None
    style: str = "line"
    spread: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """A chart of `series`, or of `frames`: series by decoder layer, one layer shown at a time, `focus` first.

    `categories` are the names that bars, spans and matrices have one value for. `text` explains the figure,
    `reduction` says what the drawing leaves out. `mark` is an x position drawn as a dotted vertical line.
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


def layer_line(
    name: str, values: list[float | None], style: str = "line", spread: list[Any] | None = None
) -> Series:
    """A line with one value per decoder layer; layers without a value are left out."""
    points = [(float(number), value) for number, value in enumerate(values) if value is not None]
    drawn = [ends for ends, value in zip(spread or [], values, strict=bool(spread)) if value is not None]
    return Series(name, points=points, style=style, spread=drawn if any(drawn) else [])


def save_chart(figures: Sequence[Figure], *paths: Path) -> None:
    """Draw figures side by side as one picture and write it to every path, as PNG or SVG by suffix."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        canvas = _draw(figures)
        for path in paths:
            canvas.savefig(path, dpi=DPI, metadata=METADATA[path.suffix])


def _draw(figures: Sequence[Figure]) -> Any:
    """A matplotlib figure with one panel per figure and a common legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    each = WIDTH if len(figures) == 1 else SHARED_WIDTH
    canvas = Canvas(figsize=(each * len(figures), max(map(_height, figures))), layout="constrained")
    FigureCanvasAgg(canvas)
    titles = [textwrap.wrap(_title(figure), round(TITLE_CHARACTERS * each)) for figure in figures]
    lines = max(map(len, titles))
    legend: dict[str, Any] = {}
    panels = canvas.subfigures(1, len(figures), squeeze=False)[0]
    for panel, figure, title in zip(panels, figures, titles, strict=True):
        axes = panel.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        PAINTERS[figure.kind](axes, figure)
        panel.suptitle("\n".join([*title, *[" "] * (lines - len(title))]), x=0.01, ha="left", size=TITLE_SIZE)
        if figure.mark is not None:
            axes.axvline(figure.mark, color=STYLE_COLOURS["control"], linestyle=":", linewidth=1)
        handles, labels = axes.get_legend_handles_labels()
        legend = {**dict(zip(labels, handles, strict=True)), **legend}
    if len(legend) > 1:
        _add_legend(canvas, legend)
    return canvas


def _add_legend(canvas: Any, legend: dict[str, Any]) -> None:
    """One legend below all panels, in as many columns as fit; it makes the picture higher."""
    fitting = int(canvas.get_figwidth() * LEGEND_CHARACTERS / (max(map(len, legend)) + 6))
    columns = max(1, min(4, fitting))
    canvas.set_figheight(canvas.get_figheight() + LEGEND_ROW * -(-len(legend) // columns))
    place = {"loc": "outside lower left", "ncols": columns, "fontsize": LEGEND_SIZE, "frameon": False}
    canvas.legend(legend.values(), legend.keys(), **place)


def _height(figure: Figure) -> float:
    """Inches; figures with one row per category grow with them."""
    if figure.kind in ("bars", "spans", "matrix"):
        return max(2.8, 1.3 + 0.3 * len(figure.categories))
    return 3.4


def _title(figure: Figure) -> str:
    """The title, with the layer shown where there are several."""
    others = ", others in grey" if figure.kind == "lines" else ""
    return f"{figure.title} (layer {figure.focus}{others})" if figure.frames else figure.title


def _lines(axes: Any, figure: Figure) -> None:
    for number, frame in figure.frames.items():
        if number != figure.focus:
            for series in frame:
                axes.plot(*_columns(series), color=BACKGROUND, linewidth=0.6, zorder=1)
    number = -1  # in the cycle of colours
    for series in figure.frames.get(figure.focus, figure.series):
        number += series.style == "line"
        cycled = series.style in ("line", "companion")
        marker = MARKERS[number % len(MARKERS)] if cycled else STYLE_MARKERS[series.style]
        axes.plot(
            *_columns(series),
            color=COLOURS[number % len(COLOURS)] if cycled else STYLE_COLOURS[series.style],
            linestyle=LINE_STYLES.get(series.style, "-"),
            marker=None if len(series.points) > DENSE else marker,
            markersize=8 if series.style == "points" else 3.5,
            linewidth=1.5,
            label=series.name,
        )
        if series.spread:
            x = [place for place, _ in series.points]
            ends = [interval or (math.nan, math.nan) for interval in series.spread]
            low, high = zip(*ends, strict=True)
            axes.fill_between(x, low, high, color=axes.lines[-1].get_color(), alpha=0.2, linewidth=0)
    _scales(axes, figure)
    if figure.categories:
        axes.set_xticks(range(len(figure.categories)), figure.categories, rotation=30, ha="right")


def _scatter(axes: Any, figure: Figure) -> None:
    for series in figure.frames.get(figure.focus, figure.series):
        counted = "" if series.of is None else f" ({len(series.points)} of {series.of:,})"
        axes.scatter(
            *_columns(series),
            s=8 if series.style == "control" else 16,
            marker=STYLE_MARKERS[series.style],
            color=STYLE_COLOURS[series.style],
            alpha=0.75,
            linewidths=0,
            label=series.name + counted,
        )
    _scales(axes, figure)


def _stacked(axes: Any, figure: Figure) -> None:
    places = range(len(figure.categories))
    bottom = [0.0] * len(figure.categories)
    for series in figure.series:
        axes.bar(places, series.values, bottom=bottom, color=STYLE_COLOURS[series.style], label=series.name)
        bottom = [low + value for low, value in zip(bottom, series.values, strict=True)]
        for place, interval in enumerate(series.spread):
            if interval is not None:
                axes.vlines(place, *interval, color="black", linewidth=0.8)
    axes.margins(x=0.01)
    _scales(axes, figure)


def _bars(axes: Any, figure: Figure) -> None:
    """Horizontal bars: those of one category below each other, without gaps for missing values."""
    drawn = [0] * len(figure.categories)  # bars of each category so far
    by_category = zip(*(series.values for series in figure.series), strict=True)
    thickness = 0.8 / max(sum(value is not None for value in values) for values in by_category)
    for series in figure.series:
        own = [(place, value) for place, value in enumerate(series.values) if value is not None]
        axes.barh(
            [place + (drawn[place] + 0.5) * thickness - 0.4 for place, _ in own],
            [value for _, value in own],
            height=thickness,
            color=STYLE_COLOURS[series.style],
            label=series.name,
        )
        for place, _ in own:
            if series.spread and series.spread[place]:
                height = place + (drawn[place] + 0.5) * thickness - 0.4
                axes.hlines(height, *series.spread[place], color="black", linewidth=0.8)
            drawn[place] += 1
    _rows(axes, figure)


def _spans(axes: Any, figure: Figure) -> None:
    for series in figure.series:
        own = [(place, span) for place, span in enumerate(series.values) if span is not None]
        axes.barh(
            [place for place, _ in own],
            [max(0.15, end - start) for _, (start, end) in own],
            left=[start for _, (start, _) in own],
            color=STYLE_COLOURS[series.style],
            label=series.name,
        )
    _rows(axes, figure)
    axes.set_xlim(left=-0.5)


def _rows(axes: Any, figure: Figure) -> None:
    """Categories on the y axis, the first on top."""
    _scales(axes, figure)
    small = max(map(len, figure.categories)) > 40
    axes.set_yticks(range(len(figure.categories)), figure.categories, fontsize=7 if small else None)
    margin = max(0, 4 - len(figure.categories)) / 2  # so that few bars are not drawn thick
    axes.set_ylim(len(figure.categories) - 0.4 + margin, -0.6 - margin)


def _matrix(axes: Any, figure: Figure) -> None:
    values = [series.values for series in figure.series]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            colour = "white" if value > 0.6 else "black"
            interval = figure.series[row].spread[column] if figure.series[row].spread else None
            ends = f"\n{100 * interval[0]:.0f} to {100 * interval[1]:.0f}%" if interval else ""
            axes.text(column, row, f"{100 * value:.0f}%{ends}", ha="center", va="center", color=colour)
    names = figure.categories
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), [series.name for series in figure.series])
    axes.set(xlabel=figure.y.label, ylabel=figure.x.label)


PAINTERS: dict[str, Callable[[Any, Figure], None]] = {
    "lines": _lines,
    "scatter": _scatter,
    "stacked": _stacked,
    "bars": _bars,
    "spans": _spans,
    "matrix": _matrix,
}


def _scales(axes: Any, figure: Figure) -> None:
    """Labels, scales, ticks and limits of both axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    for axis, way in ((figure.x, "x"), (figure.y, "y")):
        getattr(axes, f"set_{way}label")(axis.label)
        if axis.log:
            getattr(axes, f"set_{way}scale")("log")
        ticks = getattr(axes, f"{way}axis")
        numbers = FuncFormatter(lambda value, _, percent=axis.percent: _tick(value, percent))
        if axis.percent or axis.log:
            ticks.set_major_formatter(numbers)
        low, high = getattr(axes, f"get_{way}lim")()
        if axis.log and high < 1000 * low:  # too few powers of ten to read values from
            ticks.set_minor_locator(LogLocator(subs=[2, 3, 5] if high < 30 * low else [2, 5]))
            ticks.set_minor_formatter(numbers)
        if axis.percent and not axis.log and figure.kind != "scatter":
            getattr(axes, f"set_{way}lim")(0, 1.03)
    if figure.x == LAYER_AXIS:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _tick(value: float, percent: bool) -> str:
    """A tick's number: as it is up to a million, with an exponent outside."""
    shown = 100 * value if percent else value
    text = f"{shown:,g}" if 1e-3 <= abs(shown) < 1e6 or shown == 0 else f"{shown:.3g}".replace("e+0", "e")
    return f"{text}%" if percent else text


def _columns(series: Series) -> tuple[list[float], list[float]]:
    return [x for x, _ in series.points], [y for _, y in series.points]
