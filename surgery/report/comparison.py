"""The section about what `surgeon compare` measured: perplexity against size, one figure per text."""

from __future__ import annotations

from typing import Any

from surgery.card.figures import size_figures
from surgery.report.document import Section, Table
from surgery.report.page import interval_text


def comparison_section(rows: list[dict[str, Any]]) -> Section:
    """A table and figures from the rows of compare.json."""
    dense = {row["text"]: row["perplexity"] for row in rows if row["method"] == "dense"}
    known = any(row.get("factor_low") for row in rows)
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
            ("/ dense", "percent"),
            ("95% interval", "text"),
            ("bits per byte", "number"),
            ("KL to dense (nats)", "number"),
            ("parameters", "millions"),
        ],
        [
            [
                *(row[key] for key in ("method", "repair", "allocation", "sparsity", "text", "perplexity")),
                row["perplexity"] / dense[row["text"]],
                interval_text([row["factor_low"], row["factor_high"]] if row.get("factor_low") else None),
                *(row[key] for key in ("bits_per_byte", "kl", "parameters")),
            ]
            for row in rows
        ],
        note=(
            "Intervals are of the perplexity over the dense model's, by a bootstrap of the text's blocks, in "
            "which each block counts equally often for both models. Two cuts differ where their intervals "
            "part."
            if known
            else "No intervals: the texts have too few blocks, or an earlier version compared them."
        ),
    )
    return Section("comparison", "Perplexity against size", tables=[table], figures=size_figures(rows))
