"""What is printed, in terminals of any width and without colours."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.report_page import synthetic_index
from helpers.tiny_models import CALIBRATION
from rich.console import Console

from surgery.cli.document_table import show_document
from surgery.cli.tables import show_comparison, show_index
from surgery.report.build import Extras, index_report


def printed(width: int, *shows: Callable[[Console], None], terminal: bool = False) -> str:
    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False, force_terminal=terminal)
    for show in shows:
        show(console)
    return text.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 110, 200])
def test_nothing_is_cut_off_in_a_narrow_terminal(width: int) -> None:
    index = synthetic_index(12, 300)
    text = printed(
        width,
        lambda console: show_index(index, console),
        lambda console: show_comparison([("step-1", index), ("step-2", index)], console),
        lambda console: show_document(index_report(index, Extras()), console),
    )
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    fields = index.as_json()["layers"]
    for layer in fields:
        assert f"{100 * layer['lp_share']['0.01']:.1f}%" in text
    assert ("max |out|" in printed(width, lambda console: show_index(index, console))) == (width >= 108)


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    index = synthetic_index(3, 300)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = printed(80, lambda console: show_index(index, console), terminal=True)
    codes = {code for part in text.split("\x1b[")[1:] for code in part.partition("m")[0].split(";")}
    assert codes <= {"0", "1", "2"}  # plain, bold, dim


def test_show_of_a_pruned_folder(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], tmp_path: Path
) -> None:
    source = str(save_tiny("llama"))
    measure = ["--eval", "text.txt", "--eval-blocks", "1"]
    surgeon(
        "prune", source, "--sparsity", "0.5", "--multiple-of", "8", "--out", "cut", *measure, *CALIBRATION
    )
    manifest = json.loads((tmp_path / "cut" / "surgeon.json").read_text())
    assert json.loads(surgeon("show", "cut", "--json").stdout) == manifest
    text = surgeon("show", "cut").stdout
    assert (
        manifest["command"] in text
        and f"sha256 of the token ids: {manifest['calibration']['sha256']}" in text
    )
    pruned = manifest["measurements"]["pruned"]["perplexity"]
    assert "Size and quality" in text and f"{pruned:,.1f}"[:3] in text
