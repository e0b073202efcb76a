"""The scripts in examples/ that need no network, each on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.subprocesses import run_forked
from helpers.tiny_models import CALIBRATION, ROOT
from transformers import AutoModelForCausalLM

import surgery
from surgery.errors import PlanError
from surgery.index.channel_index import ChannelIndex
from surgery.registry import Registry


@pytest.fixture
def indexed(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> Path:
    """A tiny model with its index beside it."""
    source = save_tiny("llama")
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    return source


def run(folder: Path, script: str, *arguments: str) -> list[str]:
    examples = ROOT / "examples"
    start = (
        f"import runpy, sys; sys.path.insert(0, {str(examples)!r}); runpy.run_path({str(examples / script)!r}"
    )
    ended = run_forked(f"{start}, run_name='__main__')", *arguments, where=folder)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_read_index(indexed: Path) -> None:
    lines = run(indexed.parent, "read_index.py", "index")
    fields = json.loads((indexed.parent / "index" / "index.json").read_text())
    found = [float(line.split(" ")[-1]) for line in lines if line.startswith("layer")]
    assert found == pytest.approx([layer["lp_share"]["0.01"] for layer in fields["layers"]], abs=1e-6)


def test_questions(indexed: Path, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    """The lines of docs/library.md, which are those of the script, on two texts and two revisions."""
    more = ["--calibration", "text.txt", "--blocks", "8", "--block-size", "32"]
    for seed in ("1", "2"):
        surgeon("index", "tiny", "--out", f"index-{seed}", *more, "--seed", seed)
    save_tiny("llama", name="later", seed=3)
    lines = run(indexed.parent, "questions.py", "index-1", "index-2", "tiny", "later")
    one, other = (ChannelIndex.load(indexed.parent / f"index-{seed}") for seed in ("1", "2"))
    both = {
        n: [*{*a.supernodes.tolist()} & {*b.supernodes.tolist()}]
        for n, (a, b) in enumerate(zip(one.layers, other.layers, strict=True))
    }
    assert lines[0] == f"supernodes in both: {both}"
    share = sum(map(len, both.values())) / len(both)
    assert lines[1].startswith(f"their share: {share:.4g} [")
    assert -1 <= float(lines[2].split()[-1]) <= 1
    assert f"{one.layers[0].summary()['lp_share']['0.01']:.4g} [" in lines[4] and len(lines) == 6
    table = (ROOT / "docs" / "library.md").read_text()
    script = (ROOT / "examples" / "questions.py").read_text()
    for name in re.findall(r"\| `surgery\.(\w+)\(", table):
        assert f"surgery.{name}(" in script


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
        surgeon("index", "tiny", "--out", f"part-{place}", *calibration, "--save-samples")
    lines = run(where, "merge_indexes.py", "tiny", "merged", "part-0", "part-1")
    assert lines[0] == "merged: 8 blocks of 0.txt + 1.txt"
    assert [line.split(" ")[-2] for line in lines[1:]] == ["6", "6"]
    assert ChannelIndex.load(where / "merged").loss["tokens"] == 8 * 31


def test_hub_round_trip(tmp_path: Path) -> None:
    lines = run(tmp_path, "hub_round_trip.py")
    assert lines[-1] == "A stranger loads it: intermediate_size 24"


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(PlanError, match="a method of this name exists"):
        surgery.register_method("wanda", surgery.Method(lambda ffn, _: ffn.statistics["max_abs"]))


def test_the_library_writes_the_bytes_of_the_commands(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    folder = save_tiny(
        "llama", max_position_embeddings=512, intermediate_size=256, num_hidden_layers=2
    ).parent
    text = (folder / "text.txt").read_text()
    (folder / "long.txt").write_text(text * 4)  # 64 blocks of 512 tokens, a byte each
    (line,) = run(folder, "library.py", "tiny", "long.txt", "by-library", "text.txt")
    surgeon("index", "tiny", "--calibration", "long.txt", "--out", "index")
    surgeon("prune", "tiny", "--index", "index", "--sparsity", "0.5", "--out", "by-command")
    ours, theirs = (folder / name / "model.safetensors" for name in ("by-library", "by-command"))
    assert ours.read_bytes() == theirs.read_bytes()
    told = json.loads(surgeon("eval", "by-command", "--text", "text.txt", "--json").stdout)
    assert f"perplexity {told['perplexity']:.4f}" in line


@pytest.fixture
def own_method(tmp_path: Path) -> dict[str, str]:
    """An environment in which the example package is installed."""
    source, site = tmp_path / "own_method", tmp_path / "site"
    shutil.copytree(ROOT / "examples" / "own_method", source)
    how = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *how, str(source)], check=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "COLUMNS": "200"}


SEVERAL = """
import json, sys
from surgery.cli.main import main
for command in json.loads(sys.argv[1]):
    main(command, prog_name="surgeon", standalone_mode=False)
    print(end="\\f", flush=True)
"""


def test_a_score_and_a_repair_of_an_installed_package(indexed: Path, own_method: dict[str, str]) -> None:
    """In one process of its own, as importing torch takes the time of all commands."""
    folder = indexed.parent
    shape = ["--blocks", "16", "--block-size", "64", "--overwrite"]
    how = ["--index", "index", "--sparsity", "0.5", "--multiple-of", "8"]
    text = ["--text", "text.txt", "--text-blocks", "2", "--json"]
    commands = [
        ["index", "tiny", "--out", "index", *CALIBRATION[:2], *shape],
        ["prune", "--help"],
        ["prune", "tiny", *how, "--method", "loudest", "--repair", "halfway", "--out", "cut"],
        ["report", "cut", "--index", "index", "--out", "page.html"],
        ["compare", "tiny", *how, *text, "--cut", "loudest:halfway"],
    ]
    words = [sys.executable, "-c", SEVERAL, json.dumps(commands)]
    done = subprocess.run(words, cwd=folder, env=own_method, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout.split("\f")
    said = " ".join(told[1].split())
    assert "random, loudest" in said and "lstsq-acc, halfway" in said
    manifest = json.loads((folder / "cut" / "surgeon.json").read_text())
    assert manifest["plan"]["method"] == "loudest" and manifest["plan"]["repair"] == "halfway"
    assert any(layer["ffns"]["dense"]["ridge"] is not None for layer in manifest["repair"])
    card = (folder / "cut" / "README.md").read_text()
    assert "largest possible output" in card and "halfway to its least-squares refit" in card
    index = ChannelIndex.load(folder / "index")
    ffn = index.layers[0].ffns["dense"]
    score = ffn.statistics["max_abs"] * ffn.statistics["down_norm"]
    score[ffn.supernodes] = torch.inf
    assert manifest["plan"]["layers"][0]["kept"] == sorted(torch.topk(score, 24).indices.tolist())
    assert "largest possible output" in (folder / "page.html").read_text()
    rows = json.loads(told[4])["rows"]
    assert [(row["method"], row["repair"]) for row in rows][1:] == [("loudest", "halfway")]


def test_a_broken_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "broken-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[surgeon.methods]\nabsent = no_such_module:METHOD\nwrong = math:pi\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    methods = Registry("method", "surgeon.methods", surgery.Method, {})
    assert list(methods) == ["absent", "wrong"]
    with pytest.raises(PlanError, match="can't be imported") as refused:
        methods.find("absent")
    assert "no_such_module" in refused.value.found
    with pytest.raises(PlanError, match="wrong type"):
        methods.find("wrong")
    with pytest.raises(PlanError, match="unknown method"):
        methods.find("neither")
