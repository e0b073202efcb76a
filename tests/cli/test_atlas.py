"""`surgeon atlas`: one page and table of many members, resumed, with what failed listed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.planted import ROW, Planted
from helpers.report_page import Page, table
from helpers.tiny_models import CALIBRATION, opened

from surgery.index.build import build_index
from surgery.index.channel_index import ChannelIndex
from surgery.index.intervals import median_top_share, published_intervals
from surgery.index.super_weights import published_coordinates
from surgery.report.page import shown


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


def test_structures_and_intervals_are_in_page_table_and_catalogue(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], tmp_path: Path
) -> None:
    planted = Planted(save_tiny("llama", name="planted"))
    planted.channel(1, 11)
    planted.write(1, ROW, 11, 3000.0)
    planted.model.save_pretrained("planted")
    (tmp_path / "own").mkdir()
    build_index(opened(Path("planted")), planted.calibration(blocks=8)).save(tmp_path / "own")
    save_tiny("llama", name="plain", intermediate_size=64)
    surgeon("atlas", "own", "plain", "--out", "made", *CALIBRATION)
    fields = json.loads(Path("made/atlas.json").read_text())
    index = ChannelIndex.load("own")
    (row,) = table(fields, "super-weights")["rows"]
    (found,) = [one for one in index.structures if one.is_super]
    assert row[:4] == ["own", "layer 1 [17, 11]", "scalar", found.effect.mean]
    concentration = {row[0]: row[1:] for row in table(fields, "concentration")["rows"]}
    interval = median_top_share(index)
    assert interval is not None
    assert concentration["own"][0].startswith(f"{100 * interval.estimate:.1f}% (")
    told = Path("made/atlas.md").read_text()
    assert f"| own | layer 1 [17, 11] | scalar | {shown(found.effect.mean, 'number')} |" in told

    rows = pytest.importorskip("pyarrow.parquet").read_table("made/atlas.parquet").to_pylist()
    mine = [one for row in rows if row["member"] == "own" for one in row["structures"]]
    assert {one["name"]: one["effect"] for one in mine} == {
        one.structure.name: one.effect.mean for one in index.structures
    }
    catalogue = Path("made/super_weights.json").read_text()
    known = {
        name: published_coordinates(json.loads(Path(name, "config.json").read_text()), catalogue)
        for name in ("planted", "plain")
    }
    assert list(known["planted"]) == [(1, ROW, 11)] and known["plain"] == {}
    assert "planted: surgeon" in known["planted"][1, ROW, 11]


def test_a_published_index_has_a_report(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], tmp_path: Path
) -> None:
    blocks = ["--calibration", "text.txt", "--blocks", "8", "--block-size", "16"]  # enough for intervals
    surgeon("index", str(save_tiny("llama")), "--out", "own", "--quiet", *blocks)
    (tmp_path / "published").mkdir()
    index = ChannelIndex.load("own")
    index.save_published(tmp_path / "published", *published_intervals(index))
    pages = [surgeon("report", name, "--out", f"{name}.html", "--json") for name in ("own", "published")]
    own, published = (json.loads(page.stdout) for page in pages)
    figures = [{f["id"]: f for s in fields["sections"] for f in s["figures"]} for fields in (own, published)]
    assert figures[0].keys() == figures[1].keys()
    for name in ("lp-concentration", "overlap"):
        assert figures[0][name] == figures[1][name]
        assert any(figures[1][name]["series"][0]["spread"])
