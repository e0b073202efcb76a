"""The section about what `surgeon compare` measured: perplexity against size, one figure per text."""

from __future__ import annotations

from typing import Any

from surgery.card.figures import size_figures
from surgery.report.document import Section, Table


def comparison_section(rows: list[dict[str, Any]]) -> Section:
    """A table and figures from the rows of compare.json."""
    table = Table(
        "comparison",
        "Pruned models side by side",
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
    return Section("comparison", "Perplexity against size", tables=[table], figures=size_figures(rows))
