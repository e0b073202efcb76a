"""A run that was killed goes on where it stopped, and ends as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.subprocesses import KILL, run_forked
from helpers.tiny_models import CALIBRATION

from surgery.engine.resume import Journal, journal_folder

INDEX = ["index", "tiny", "--out", "index", *CALIBRATION]
# fsync opens each file once a step; steps.jsonl is read once at the start and appended to at each step
MOMENTS = [
    "hidden.bin:1",
    "hidden.bin:4",
    "steps.jsonl:3",
    "steps.jsonl:9",
    "forward.json:1",
    "layer-4.json:1",
]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill(moment: str, where: Path, *arguments: str, kind: str = "") -> None:
    moments = {"KILL_AT": moment, "KILL_IN": f"surgeon-journal{kind}/"}
    killed = run_forked(KILL, *arguments, where=where, **moments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def test_a_killed_index_goes_on(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    where = save_tiny("mixtral").parent
    surgeon(*INDEX)
    expected = contents(where / "index")
    for moment in MOMENTS:
        if (where / "index").exists():
            for file in (where / "index").iterdir():
                file.unlink()
            (where / "index").rmdir()
        kill(moment, where, *INDEX)
        assert not (where / "index").exists() and journal_folder(where / "index").exists()
        again = surgeon(*INDEX)
        assert "Resuming" in again.stderr
        assert contents(where / "index") == expected
        assert not journal_folder(where / "index").exists()


def test_killed_over_and_over_it_still_arrives(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    where = save_tiny("llama").parent
    surgeon(*INDEX[:2], "--out", "plain", *CALIBRATION)
    for number in range(1, 5):
        kill(f"layer-{6 - number}.json:1", where, *INDEX)
    surgeon(*INDEX)
    assert contents(where / "index") == contents(where / "plain")


def test_another_run_starts_over(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    where = save_tiny("llama").parent
    surgeon(*INDEX)
    expected = contents(where / "index")
    kill("layer-2.json:1", where, *INDEX, "--overwrite", "--seed", "7")
    assert contents(where / "index") == expected
    assert "Resuming" not in surgeon(*INDEX, "--overwrite").stderr
    assert contents(where / "index") == expected
    kill("layer-2.json:1", where, *INDEX, "--overwrite")
    assert "Resuming" not in surgeon(*INDEX, "--overwrite", "--no-resume").stderr
    assert contents(where / "index") == expected


def test_prune_keeps_the_index_it_made_on_the_fly(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    where = save_tiny("llama").parent
    prune = ["prune", "tiny", "--multiple-of", "8", "--out", "cut", *CALIBRATION]
    surgeon(*prune)
    expected = contents(where / "cut")
    for file in (where / "cut").iterdir():
        file.unlink()
    (where / "cut").rmdir()
    kill("layer-0.json:1", where, *prune)
    assert "Resuming" in surgeon(*prune).stderr
    assert contents(where / "cut") == expected and not journal_folder(where / "cut").exists()


@pytest.mark.parametrize(
    ("variant", "how", "moments"),
    [
        (
            "llama",
            [],
            ["stream-1-1:1", "cut-0.json:1", "stream-2-0:3", "cut-5.json:1", "shards/model.safetensors:1"],
        ),
        ("mixtral", [], ["cut-3.json:1", "steps.jsonl:7"]),
        ("qwen2", ["--repair", "lstsq"], ["stream-1-0:2"]),
    ],
)
def test_a_killed_cut_goes_on(
    variant: str,
    how: list[str],
    moments: list[str],
    save_tiny: Callable[..., Path],
    surgeon: Callable[..., Any],
) -> None:
    where = save_tiny(variant).parent
    surgeon(*INDEX)
    prune = ["prune", "tiny", "--index", "index", "--multiple-of", "8", "--out", "cut", *how]
    surgeon(*prune)
    expected = contents(where / "cut")
    shutil.rmtree(where / "cut")
    for moment in moments:
        kill(moment, where, *prune, kind="-prune")
        assert not (where / "cut").exists()
    assert "Resuming" in surgeon(*prune).stderr
    assert contents(where / "cut") == expected and not journal_folder(where / "cut", "prune").exists()


@pytest.mark.parametrize(
    ("allocation", "scarce", "moments"),
    [
        ("global", False, ["steps.jsonl:1", "pass-0.json:1"]),
        ("score", True, ["pass-1.json:1", "pass-2.json:1"]),
    ],
)
def test_a_killed_comparison_goes_on(
    allocation: str,
    scarce: bool,
    moments: list[str],
    save_tiny: Callable[..., Path],
    surgeon: Callable[..., Any],
) -> None:
    where = save_tiny("llama").parent
    surgeon(*INDEX)
    cuts = ["--cut", f"scar-prot:none:{allocation}", "--cut", "wanda", "--cut", "scar-prot:lstsq"]
    compare = ["compare", "tiny", "--index", "index", "--multiple-of", "8", "--sparsity", "0.5", *cuts]
    compare += ["--text", "text.txt", "--text-blocks", "1"]
    told = json.loads(surgeon(*compare, "--dry-run", "--json").stdout)
    if scarce:  # one cut a pass
        compare += ["--memory", str(told["costs"]["smallest_bytes"])]
    surgeon(*compare, "--out", "plain")
    for moment in moments:
        kill(moment, where, *compare, "--out", "table", kind="-compare")
    assert "Resuming" in surgeon(*compare, "--out", "table").stderr
    plain, table = (json.loads((where / n / "compare.json").read_text())["rows"] for n in ("plain", "table"))
    assert [{**row, "seconds": 0} for row in plain] == [{**row, "seconds": 0} for row in table]
    assert not journal_folder(where / "table", "compare").exists()


def test_what_makes_no_sense_twice_leaves_no_journal(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = save_tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[3].mlp.down_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(folder)
    refused = surgeon(*INDEX, code=1)
    assert "layer 3" in refused.stderr and not journal_folder(folder.parent / "index").exists()


def test_a_step_cut_short_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", {"run": 1})
    journal.mark("forward 0")
    with journal.path("steps.jsonl").open("a") as handle:
        handle.write("forward 1")  # no full stop, no end of line
    again = Journal(tmp_path / "out", {"run": 1})
    assert again.resumed and "forward 0" in again and "forward 1" not in again


def test_numbers_of_complete_steps(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", {"a": 1})
    for step in ("state 3", "state 12", "targets 0"):
        journal.mark(step)
    with journal.path("steps.jsonl").open("a") as handle:
        handle.write("state 13")  # cut short
    again = Journal(tmp_path / "out", {"a": 1})
    assert again.numbers("state") == [3, 12]
    assert again.numbers("index") == []
