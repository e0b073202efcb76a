"""The figures of a document as PNG and SVG, for papers and cards, by matplotlib; same data, same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.plots import COLOURS
from surgery.report.document import Axis, Document, Figure, Series

ROLES = {"core": "#0072B2", "points": "#D55E00", "control": "#6B7280", "dashed": "#009E73"}
ROLE_MARKERS = {"core": "o", "points": "^", "control": "s", "dashed": "D"}
MARKERS = "o^Ds*Xv"


def save_report_figures(document: Document, folder: Path) -> list[str]:
    """Write every figure as ID.png and ID.svg into an existing folder; returns the names."""
    import matplotlib

    names = []
    with matplotlib.rc_context({"svg.hashsalt": "surgeon", "font.size": 9, "axes.titlesize": 10}):
        for figure in document.figures():
            canvas = draw(figure)
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                canvas.savefig(folder / f"{figure.id}.{suffix}", dpi=160, metadata=metadata)
                names.append(f"{figure.id}.{suffix}")
    return names


def draw(figure: Figure) -> Any:
    """One figure; of frames by layer, the layer in focus, and of curves all others in grey behind it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    tall = figure.kind in ("bars", "spans", "matrix")
    height = 1.6 + 0.3 * len(figure.categories) if tall else 3.6
    canvas = Canvas(figsize=(7.2, height), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    painters[figure.kind](axes, figure)
    others = ", others in grey" if figure.kind == "lines" else ""
    title = f"{figure.title} (layer {figure.focus}{others})" if figure.frames else figure.title
    axes.set_title(title, loc="left", wrap=True)
    if figure.mark is not None:
        axes.axvline(figure.mark, color=ROLES["control"], linestyle=":", linewidth=1)
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        columns = 3 if max(map(len, labels)) < 45 else 2
        canvas.legend(handles, labels, frameon=False, fontsize=7.5, ncols=columns, loc="outside lower left")
    return canvas


def _lines(axes: Any, figure: Figure) -> None:
    for number, frame in figure.frames.items():
        if number != figure.focus:
            for series in frame:
                axes.plot(*_columns(series), color="#C8CDD3", linewidth=0.6, zorder=1)
    for number, series in enumerate(figure.frames.get(figure.focus, figure.series)):
        own = series.style != "line"
        dense = len(series.points) > 60
        axes.plot(
            *_columns(series),
            color=ROLES[series.style] if own else COLOURS[number % len(COLOURS)],
            linestyle={"dashed": "--", "control": ":", "points": "none"}.get(series.style, "-"),
            marker=None if dense else ROLE_MARKERS[series.style] if own else MARKERS[number % len(MARKERS)],
            markersize=8 if series.style == "points" else 3.5,
            linewidth=1.5,
            label=series.name,
        )
    _scales(axes, figure)
    if figure.categories:
        axes.set_xticks(range(len(figure.categories)), figure.categories, rotation=30, ha="right")


def _scatter(axes: Any, figure: Figure) -> None:
    for series in figure.frames.get(figure.focus, figure.series):
        axes.scatter(
            *_columns(series),
            s=8 if series.style == "control" else 16,
            marker=ROLE_MARKERS[series.style],
            color=ROLES[series.style],
            alpha=0.75,
            linewidths=0,
            label=f"{series.name} ({len(series.points)} of {series.of:,})",
        )
    _scales(axes, figure)


def _stacked(axes: Any, figure: Figure) -> None:
    places = range(len(figure.categories))
    bottom = [0.0] * len(figure.categories)
    for series in figure.series:
        axes.bar(places, series.values, bottom=bottom, color=ROLES[series.style], label=series.name)
        bottom = [low + value for low, value in zip(bottom, series.values, strict=True)]
    _scales(axes, figure)


def _bars(axes: Any, figure: Figure) -> None:
    thickness = 0.8 / len(figure.series)
    for number, series in enumerate(figure.series):
        places = [place + (number + 0.5) * thickness - 0.4 for place in range(len(figure.categories))]
        axes.barh(places, series.values, height=thickness, color=ROLES[series.style], label=series.name)
    _rows(axes, figure)


def _spans(axes: Any, figure: Figure) -> None:
    for series in figure.series:
        own = [(place, span) for place, span in enumerate(series.values) if span is not None]
        axes.barh(
            [place for place, _ in own],
            [max(0.15, end - start) for _, (start, end) in own],
            left=[start for _, (start, _) in own],
            color=ROLES[series.style],
            label=series.name,
        )
    _rows(axes, figure)
    axes.set_xlim(left=-0.5)


def _rows(axes: Any, figure: Figure) -> None:
    """Categories down the side, the first on top."""
    _scales(axes, figure)
    axes.set_yticks(range(len(figure.categories)), figure.categories)
    axes.invert_yaxis()


def _matrix(axes: Any, figure: Figure) -> None:
    values = [series.values for series in figure.series]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            colour = "white" if value > 0.6 else "black"
            axes.text(column, row, f"{100 * value:.0f}%", ha="center", va="center", color=colour)
    names = figure.categories
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), [series.name for series in figure.series])
    axes.set(xlabel=figure.y.label, ylabel=figure.x.label)


painters: dict[str, Callable[[Any, Figure], None]] = {
    "lines": _lines,
    "scatter": _scatter,
    "stacked": _stacked,
    "bars": _bars,
    "spans": _spans,
    "matrix": _matrix,
}


def _scales(axes: Any, figure: Figure) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    for axis, way in ((figure.x, "x"), (figure.y, "y")):
        part: Axis = axis
        getattr(axes, f"set_{way}label")(part.label)
        if part.log:
            getattr(axes, f"set_{way}scale")("log")
        ticks = getattr(axes, f"{way}axis")
        low, high = getattr(axes, f"get_{way}lim")()
        if part.percent:
            ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        if part.log and high < 30 * low:  # too few powers of ten to go by
            unit, scale = ("%", 100) if part.percent else ("", 1)
            plain = FuncFormatter(lambda value, _, unit=unit, scale=scale: f"{scale * value:g}{unit}")
            ticks.set_major_formatter(plain)
            ticks.set_minor_formatter(plain)
            ticks.set_minor_locator(LogLocator(subs=[2, 3, 5]))
        if part.percent and not part.log and figure.kind != "scatter":
            getattr(axes, f"set_{way}lim")(0, 1.03)
    if figure.x.label.startswith("decoder layer"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _columns(series: Series) -> tuple[list[float], list[float]]:
    return [x for x, _ in series.points], [y for _, y in series.points]
