"""Cuts measured in passing, against the same cuts written and evaluated."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import CALIBRATION


def test_rows_equal_written_checkpoints(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = save_tiny("llama")
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    common = ["--index", "index", "--multiple-of", "8"]
    options = ["--sparsity", "0.5", "--methods", "scar-prot,wanda", "--repairs", "none,lstsq-acc"]
    texts = ["--text", "text.txt", "--text-blocks", "2"]
    shown = surgeon("compare", str(source), *common, *options, *texts, "--out", "table").output
    rows = json.loads((source.parent / "table" / "compare.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "scar-prot", "wanda", "scar-prot", "wanda"]
    for row in rows:
        if row["method"] == "dense":
            folder = str(source)
            assert row["kl"] == pytest.approx(0, abs=1e-6)
        else:
            folder = f"{row['method']}-{row['repair']}"
            how = ["--method", row["method"], "--repair", row["repair"], "--sparsity", "0.5"]
            surgeon("prune", str(source), *common, *how, "--out", folder)
            assert row["kl"] > 0
        text = ["--text", "text.txt", "--blocks", "2", "--json"]
        written = json.loads(surgeon("eval", folder, *text).stdout)
        assert row["perplexity"] == pytest.approx(written["perplexity"], rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(written["bits_per_byte"], rel=1e-5)
    with (source.parent / "table" / "compare.csv").open() as handle:
        assert [line["repair"] for line in csv.DictReader(handle)] == [row["repair"] for row in rows]
    table = (source.parent / "table" / "compare.md").read_text().splitlines()
    assert len(table) == 2 + len(rows) and f"| {rows[1]['perplexity']:.1f} |" in table[3]
    assert (source.parent / "table" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "lstsq-acc" in shown


def test_unknown_words_are_usage_errors(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = save_tiny("llama")
    refused = surgeon("compare", str(source), "--text", "text.txt", "--methods", "scar-prot,guess", code=2)
    assert "guess" in refused.stderr
    dry = surgeon("compare", str(source), "--text", "text.txt", "--multiple-of", "8", "--dry-run")
    assert "12 cuts on 1 texts" in dry.output
