"""The scripts in examples/ that need no network, each on a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, ROOT
from transformers import AutoModelForCausalLM

from surgery import register_method
from surgery.errors import PlanError
from surgery.index import ChannelIndex


@pytest.fixture
def indexed(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> Path:
    """A tiny model with its index beside it."""
    source = save_tiny("llama")
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    return source


def run(folder: Path, script: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()


def test_read_index(indexed: Path) -> None:
    lines = run(indexed.parent, "read_index.py", "index")
    fields = json.loads((indexed.parent / "index" / "index.json").read_text())
    found = [float(line.split(" ")[-1]) for line in lines if line.startswith("layer")]
    assert found == pytest.approx([layer["lp_share"]["0.01"] for layer in fields["layers"]], abs=1e-6)


def test_custom_score(indexed: Path) -> None:
    folder = indexed.parent
    lines = run(folder, "custom_score.py", "tiny", "index", "smaller")
    assert "width 48 → 36" in lines[-1]
    manifest = json.loads((folder / "smaller" / "surgeon.json").read_text())
    assert manifest["plan"]["method"] == "loudest" and manifest["plan"]["protect"]
    index = ChannelIndex.load(folder / "index")
    for layer, entry in zip(index.layers, manifest["plan"]["layers"], strict=True):
        score = layer.statistics["max_abs"] * layer.statistics["down_norm"]
        score[layer.supernodes] = torch.inf
        assert entry["kept"] == sorted(torch.topk(score, 36).indices.tolist())
    model = AutoModelForCausalLM.from_pretrained(folder / "smaller")
    assert model.config.intermediate_size == 36


def test_compare_methods(indexed: Path, surgeon: Callable[..., Any]) -> None:
    lines = run(indexed.parent, "compare_methods.py", "tiny", "index", "text.txt")
    found = {line.split()[0]: re.findall(r"[\d.]+", line) for line in lines}
    assert list(found) == ["dense", "scar-prot", "wanda", "magnitude", "loudest"]
    text = ["--text", "text.txt", "--text-blocks", "8", "--block-size", "256", "--json"]
    dense = json.loads(surgeon("eval", "tiny", *text).stdout)
    assert float(found["dense"][0]) == pytest.approx(dense["perplexity"], rel=1e-4)
    assert all(float(values[-1]) > 0 for name, values in found.items() if name != "dense")


def test_merge_indexes(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], license_text: str
) -> None:
    where = save_tiny("llama").parent
    for place in range(2):
        (where / f"{place}.txt").write_text(license_text[place * 5000 : (place + 1) * 5000])
        calibration = ["--calibration", f"{place}.txt", *CALIBRATION[2:]]
        surgeon("index", "tiny", "--out", f"part-{place}", *calibration, "--keep-sample")
    lines = run(where, "merge_indexes.py", "tiny", "merged", "part-0", "part-1")
    assert lines[0] == "merged: 8 blocks of 0.txt + 1.txt"
    assert [line.split(" ")[-2] for line in lines[1:]] == ["6", "6"]
    assert ChannelIndex.load(where / "merged").loss["tokens"] == 8 * 31


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(PlanError, match="a method of this name exists"):
        register_method("wanda", lambda ffn, _: ffn.statistics["max_abs"])
