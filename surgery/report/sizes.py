"""The section that `surgeon compare` gives: loss against size, a line a way of cutting, a figure a text."""

from __future__ import annotations

from typing import Any

from surgery.report.document import Axis, Figure, Section, Series, Table


def comparison_section(rows: list[dict[str, Any]]) -> Section:
    """Perplexity against parameters, from the rows of compare.json; every line starts at the dense model."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    figures = [
        Figure(
            f"loss-against-size-{number}",
            f"Perplexity against size on {text}",
            "lines",
            Axis("parameters (millions)"),
            Axis("perplexity (log)", log=True),
            series=_ways([row for row in rows if row["text"] == text]),
            text="Lower and further left is better. Every line starts at the dense model.",
        )
        for number, text in enumerate(texts)
    ]
    table = Table(
        "comparison",
        "Cuts measured side by side",
        [
            ("method", "text"),
            ("repair", "text"),
            ("allocation", "text"),
            ("removed", "percent"),
            ("text", "text"),
            ("perplexity", "number"),
            ("bits per byte", "number"),
            ("KL to dense (nats)", "number"),
            ("parameters", "millions"),
        ],
        [
            [
                row[key]
                for key in (
                    *("method", "repair", "allocation", "sparsity", "text"),
                    *("perplexity", "bits_per_byte", "kl", "parameters"),
                )
            ]
            for row in rows
        ],
    )
    return Section("comparison", "Loss against size", tables=[table], figures=figures)


def _ways(rows: list[dict[str, Any]]) -> list[Series]:
    dense = next(row for row in rows if row["method"] == "dense")
    ways: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row is not dense:
            ways.setdefault((row["method"], row["repair"], row["allocation"]), []).append(row)
    return [
        Series(
            f"{method}, repair {repair}, {allocation}",
            points=[
                (row["parameters"] / 1e6, row["perplexity"])
                for row in sorted([dense, *own], key=lambda row: row["parameters"])
            ],
        )
        for (method, repair, allocation), own in ways.items()
    ]
