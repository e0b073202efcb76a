"""Cuts measured in passing, against the same cuts written and evaluated."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import CALIBRATION


@pytest.mark.draws
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
    assert len(table) == 2 + len(rows) and f"| {rows[1]['perplexity']:.4g} |" in table[3]
    assert (source.parent / "table" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "lstsq-acc" in shown


def test_unknown_words_are_usage_errors(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = save_tiny("llama")
    refused = surgeon("compare", str(source), "--text", "text.txt", "--methods", "scar-prot,guess", code=2)
    assert "guess" in refused.stderr
    dry = surgeon("compare", str(source), "--text", "text.txt", "--multiple-of", "8", "--dry-run")
    assert "12 cuts on 1 texts" in dry.output


def test_kinds_are_compared_at_one_size(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = save_tiny("llama")
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    target = ["--target-params", "45k", "--multiple-of", "4", "--search-time", "0s"]
    kinds = ["--cuts", "ffn", "--cuts", "ffn,layers"]
    measured = [
        "--index",
        "index",
        "--text",
        "text.txt",
        "--text-blocks",
        "1",
        "--cut",
        "lp-hybrid:lstsq-acc",
    ]
    shown = surgeon("compare", str(source), *measured, *target, *kinds, "--out", "table")
    rows = json.loads((source.parent / "table" / "compare.json").read_text())["rows"]
    assert [row["cuts"] for row in rows] == ["", "ffn", "ffn,layers"]
    assert rows[1]["gone"] == "" and all(0.85 * 45_000 < row["parameters"] <= 45_000 for row in rows[1:])
    assert "may go" in shown.stdout and [path.name for path in Path.cwd().glob(".*surgeon*")] == []
    for row in rows[1:]:
        surgeon(
            *("prune", str(source), "--index", "index", *target, "--cuts", row["cuts"], "--quiet"),
            *("--out", row["cuts"], "--repair", "lstsq-acc"),
        )
        manifest = json.loads(Path(row["cuts"], "surgeon.json").read_text())
        assert manifest["result"]["parameters"] == row["parameters"]
        gone = manifest["plan"].get("cuts", {}).get("layers", {}).get("removed", [])
        assert row["gone"] == (f"layers {', '.join(map(str, gone))}" if gone else "")
        text = ["--text", "text.txt", "--blocks", "1", "--json"]
        written = json.loads(surgeon("eval", row["cuts"], *text).stdout)
        assert row["perplexity"] == pytest.approx(written["perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cuts", "layers"], "for a target"),
        (["--target-params", "45k", "--sparsity", "0.5"], "takes the place"),
        (["--target-params", "45k", "--target-size", "1MB"], "one target"),
        (["--target-params", "45k", "--cuts", "ffn,heads"], "not one of"),
    ],
)
def test_targets_that_make_no_sense_are_refused(
    options: list[str], message: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    refused = surgeon("compare", str(save_tiny("llama")), "--text", "text.txt", *options, code=2)
    assert message in refused.stderr and "Indexing" not in refused.stderr


def test_kinds_that_a_model_can_not_be_cut_by_are_left_out_by_default(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("gpt2")
    command = ["compare", str(source), "--text", "text.txt", "--text-blocks", "1", "--dry-run"]
    target = ["--target-params", "45k", "--multiple-of", "8", "--cut", "lp-hybrid"]
    assert "1 cuts on 1 texts" in surgeon(*command, *target).output
    assert "key/value" in surgeon(*command, *target, "--cuts", "ffn,kv", code=1).stderr
