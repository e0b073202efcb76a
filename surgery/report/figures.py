"""The figures of a document as PNG and SVG files."""

from __future__ import annotations

from pathlib import Path

from surgery.chart import save_chart
from surgery.report.document import Document


def save_report_figures(document: Document, folder: Path) -> list[str]:
    """Write every figure as ID.png and ID.svg into an existing folder; returns the names of the files."""
    names = []
    for figure in document.figures():
        paths = [folder / f"{figure.id}.{suffix}" for suffix in ("png", "svg")]
        save_chart([figure], *paths)
        names += [path.name for path in paths]
    return names
