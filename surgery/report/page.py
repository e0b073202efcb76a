"""Write a document as one self-contained HTML file, with style, data, scripts and Chart.js inside.

Its Content-Security-Policy forbids all requests, and all scripts except the two whose hashes it names, so
that a page from somebody else is safe to open.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from importlib import resources
from typing import Any

from surgery.report.document import Document, Unit


def render_page(document: Document, json_name: str) -> str:
    """The HTML of a document; `json_name` is the file beside the page that holds the same numbers."""
    from markupsafe import Markup

    style, script = _read("page.css"), _read("page.js")
    library = re.sub(r"//# sourceMappingURL=\S+\s*$", "", _read("chart.umd.min.js"))
    fields = document.as_json()
    page: str = _template().render(
        report=fields,
        json_name=json_name,
        style=Markup(style),
        script=Markup(script),
        library=Markup(library),
        data=Markup(embedded(fields)),
        style_hash=Markup(_source_hash(style)),
        script_hashes=Markup(f"{_source_hash(library)} {_source_hash(script)}"),
    )
    return page


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = shown
    environment.filters["between"] = between
    return environment.from_string(_read("page.html"))


def embedded(fields: dict[str, Any]) -> str:
    """JSON that is safe inside a script element whatever its strings contain."""
    text = json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def shown(value: Any, unit: Unit) -> str:
    """A value formatted for reading, with the sign or unit that `unit` asks for."""
    if value is None:
        return ""
    match unit:
        case "percent":
            return f"{100 * value:.1f}%"
        case "count":
            return f"{value:,}"
        case "bytes":
            return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"
        case "millions":
            return f"{value / 1e6:,.1f} M"
        case "number":
            return f"{value:.3g}" if abs(value) >= 1e6 else f"{value:,.{_decimals(value)}f}"
        case _:
            return str(value)


def between(interval: list[float], unit: Unit) -> str:
    """An interval formatted for reading, both ends as `shown`."""
    return f"({shown(interval[0], unit)} to {shown(interval[1], unit)})"


def interval_text(interval: list[float] | None) -> str:
    """An interval of a share or a ratio, in percent."""
    return f"{100 * interval[0]:.1f}% to {100 * interval[1]:.1f}%" if interval else ""


def _decimals(value: float) -> int:
    """Decimal places that show at least four significant digits (three from 0.1 to 1)."""
    size = abs(value)
    if size < 0.1:
        return 6 if size else 0
    return next(places for places, least in enumerate((1000, 100, 10, 1, 0.1)) if size >= least)


def _source_hash(text: str) -> str:
    """A source expression for Content-Security-Policy that allows exactly this inline text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _read(name: str) -> str:
    return resources.files("surgery").joinpath(f"data/report/{name}").read_text(encoding="utf-8")
