"""`surgeon atlas`: one page and table of many members, resumed, with what failed listed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.report_page import Page, table
from helpers.tiny_models import CALIBRATION

from surgery.index.channel_index import ChannelIndex


def test_members_are_indexed_once_and_failures_listed(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], tmp_path: Path
) -> None:
    save_tiny("llama", name="one")
    save_tiny("llama", name="other", intermediate_size=64)
    surgeon("index", "one", "--out", "own", "--quiet", *CALIBRATION)
    command = ["atlas", "one", "own", "gone", "other", "--out", "made", *CALIBRATION]
    first = surgeon(*command, code=1)
    assert first.stderr.count("Indexing") == 2 and "1 of 4 members failed" in first.stderr
    page, fields = Page(tmp_path / "made" / "atlas.html"), json.loads(Path("made/atlas.json").read_text())
    assert page.data == fields
    assert [row[0] for row in table(fields, "indexes")["rows"]] == ["one", "own", "other"]
    assert (
        table(fields, "failed")["rows"][0][0] == "gone" and "no such" in table(fields, "failed")["rows"][0][1]
    )

    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table("made/atlas.parquet").to_pylist()
    for name, folder in (("one", "made/indexes/one"), ("own", "own"), ("other", "made/indexes/other")):
        layers = json.loads(Path(folder, "index.json").read_text())["layers"]
        mine = [row for row in rows if row["member"] == name]
        assert [row["lp_share_0.01"] for row in mine] == [layer["lp_share"]["0.01"] for layer in layers]
        assert [row["supernodes"] for row in mine] == [layer["supernodes"] for layer in layers]
    shared = {row["member"]: row["supernodes_shared"] for row in rows}
    assert shared == {
        "one": [{"member": "own", "share": 1.0}],
        "own": [{"member": "one", "share": 1.0}],
        "other": [],
    }

    shutil.copytree("one", "gone")
    again = surgeon(*command)
    assert again.stderr.count("Indexing") == 1, "only what was missing is computed"
    assert len(table(json.loads(Path("made/atlas.json").read_text()), "indexes")["rows"]) == 4
    assert "other settings" in surgeon(*command, "--seed", "1", code=2).stderr
    assert "no atlas" in surgeon("atlas", "own", "--out", "one", code=2).stderr


def test_a_published_index_has_a_report(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], tmp_path: Path
) -> None:
    surgeon("index", str(save_tiny("llama")), "--out", "own", "--quiet", *CALIBRATION)
    (tmp_path / "published").mkdir()
    ChannelIndex.load("own").save_published(tmp_path / "published")
    pages = [surgeon("report", name, "--out", f"{name}.html", "--json") for name in ("own", "published")]
    own, published = (json.loads(page.stdout) for page in pages)
    figures = [{f["id"]: f for s in fields["sections"] for f in s["figures"]} for fields in (own, published)]
    assert figures[0].keys() == figures[1].keys()
    for name in ("lp-concentration", "overlap"):
        assert {**figures[0][name], "text": ""} == {**figures[1][name], "text": ""}
        assert "a published index leaves out the sums" in figures[1]["lp-concentration"]["text"]
