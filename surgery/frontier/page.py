"""The page, the table and the plot of a frontier, from the content of frontier.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgery import __version__
from surgery.chart import Axis, Figure, Series, save_chart
from surgery.frontier.decide import as_row, not_dominated
from surgery.markdown import markdown_table
from surgery.report.document import Document, Fact, Section, Table, Unit
from surgery.report.page import render_page

FILE, PAGE, PLOT, TABLE = "frontier.json", "frontier.html", "frontier.png", "frontier.md"
COLUMNS: list[tuple[str, Unit]] = [
    ("point", "text"),
    ("weights", "bytes"),
    ("with cache", "bytes"),
    ("bits/byte", "number"),
    ("KL", "number"),
    ("same token", "percent"),
    ("decode", "text"),
    ("prefill", "number"),
    ("best", "text"),
]
NOTE = (
    "With cache: with the keys and values of the context. KL to the dense model in nats a token. Same token: "
    "how often both have the same likeliest token. Decode and prefill: tokens a second of transformers on "
    "this machine, one sequence, the median of rounds (slowest to fastest); a packed folder runs as "
    "transformers runs it, which is slower than runtimes made for it. Best: no other point has fewer bytes "
    "and fewer bits per byte."
)
BITS = Axis("bits per byte, mean of texts")


def table_rows(fields: dict[str, Any]) -> list[list[Any]]:
    """The rows of the table under COLUMNS, in the order of the points."""
    rows = [as_row(point) for point in fields["points"]]
    front = {row.name for row in not_dominated(rows)}
    found = []
    for point, row in zip(fields["points"], rows, strict=True):
        speed = point["speed"] or {}
        found.append(
            [
                row.name,
                row.bytes,
                _used(point),
                row.bits_per_byte,
                _mean(point, "kl"),
                _mean(point, "top1"),
                _range(speed) if speed else None,
                speed.get("prefill"),
                "yes" if row.name in front else "",
            ]
        )
    return found


def _used(point: dict[str, Any]) -> int | None:
    """Bytes of weights and KV cache; None where the cache of this model is not known."""
    return None if point["cache_bytes"] is None else point["bytes"] + point["cache_bytes"]


def _range(speed: dict[str, float]) -> str:
    """The decode speed with its range over rounds."""
    return f"{speed['decode']:,.1f} ({speed['slowest']:,.1f}-{speed['fastest']:,.1f})"


def _mean(point: dict[str, Any], name: str) -> float | None:
    """Mean over texts of an estimate; None where it was not measured."""
    values = [text[name]["mean"] for text in point["texts"] if text[name] is not None]
    return sum(values) / len(values) if values else None


def markdown(fields: dict[str, Any]) -> str:
    """The table and the sentence as Markdown."""
    rows = []
    for name, size, used, bits, kl, top1, decode, prefill, best in table_rows(fields):
        cells = [name, f"{size / 2**20:,.1f} MiB", "" if used is None else f"{used / 2**20:,.1f} MiB"]
        cells += [f"{bits:.4f}", "" if kl is None else f"{kl:.4f}", "" if top1 is None else f"{top1:.1%}"]
        cells += [decode or "", "" if prefill is None else f"{prefill:,.0f}"]
        rows.append([*cells, best])
    table = markdown_table([name for name, _ in COLUMNS], rows)
    return "\n".join([table, "", NOTE, "", fields["answer"], ""])


def document(fields: dict[str, Any]) -> Document:
    """The report on a frontier."""
    options, texts = fields["options"], fields["points"][0]["texts"]
    facts = [
        Fact("Answer", fields["answer"]),
        Fact("Model", fields["source"]["name"]),
        Fact("Measured on", ", ".join(f"{text['tokens']:,} tokens of {text['text']}" for text in texts)),
        Fact("KV cache counted", f"{options['context']:,} tokens"),
        Fact("Computed in", f"{fields['run']['dtype']} on {fields['run']['device']}"),
    ]
    facts += [Fact(f"Left out: {one['name']}", one["why"]) for one in fields["left_out"]]
    uncounted = {
        point["name"]: point["cache_missing"] for point in fields["points"] if "cache_missing" in point
    }
    facts += [Fact(f"No memory in use of {name}", why) for name, why in uncounted.items()]
    missing = {
        point["name"]: point["speed_missing"] for point in fields["points"] if "speed_missing" in point
    }
    facts += [Fact(f"No speed of {name}", why) for name, why in missing.items()]
    table = Table("points", "Points", COLUMNS, table_rows(fields), NOTE)
    by_text = Table(
        "texts",
        "Bits per byte by text",
        [("point", "text"), *((text["text"], "number") for text in texts)],
        [[point["name"], *(t["bits_per_byte"] for t in point["texts"])] for point in fields["points"]],
    )
    section = Section("frontier", "Frontier", facts=facts, tables=[table, by_text], figures=figures(fields))
    subtitle = "Quality against bytes, memory in use and speed: left as it is, rounded, cut, healed"
    return Document("frontier", fields["source"]["name"], subtitle, __version__, [section])


def figures(fields: dict[str, Any]) -> list[Figure]:
    """Bits per byte against bytes of weights, memory in use, and measured decode speed."""
    points = fields["points"]
    size = [(point, point["bytes"] / 2**20) for point in points]
    used = [(point, total / 2**20) for point in points if (total := _used(point)) is not None]
    speed = [(point, point["speed"]["decode"]) for point in points if point["speed"]]
    found = [_figure("size", "Quality against bytes of weights", Axis("MiB of weights"), size)]
    if used:
        axis = Axis("MiB of weights and KV cache")
        found.append(_figure("memory", "Quality against memory in use", axis, used))
    if speed:
        axis = Axis("tokens a second, decoding")
        found.append(_figure("speed", "Quality against measured speed", axis, speed))
    return found


def _figure(name: str, title: str, x: Axis, points: list[tuple[dict[str, Any], float]]) -> Figure:
    groups: dict[str, list[tuple[float, float]]] = {}
    for point, place in points:
        groups.setdefault(_group(point), []).append((place, as_row(point).bits_per_byte))
    series = [Series(label, points=sorted(own)) for label, own in groups.items()]
    return Figure(name, title, "lines", x, BITS, series=series, text="Lower is better.")


def _group(point: dict[str, Any]) -> str:
    """What a point has in common with others of its line: all that was done but for rounding."""
    if point["slug"].startswith("other-"):
        return str(point["name"])
    if point["sparsity"] is None:
        return "not cut"
    return f"cut {100 * point['sparsity']:g}%" + (", healed" if point["healed"] else "")


def write_page(fields: dict[str, Any], folder: Path) -> None:
    """Write frontier.json, its page, its table and its plot into an existing folder."""
    (folder / FILE).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(render_page(document(fields), FILE), encoding="utf-8")
    (folder / TABLE).write_text(markdown(fields), encoding="utf-8")
    save_chart([one for one in figures(fields) if one.id != "memory"], folder / PLOT)
