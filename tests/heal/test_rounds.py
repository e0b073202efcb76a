"""`surgeon prune --heal TOKENS --rounds N`: what it writes, tells and refuses, and that it resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION
from safetensors.torch import load_file

from surgery.engine.open_model import open_model
from surgery.errors import PlanError
from surgery.heal.rounds import round_sizes
from surgery.heal.train import Trainer
from surgery.index.calibration import calibrate, calibration_of
from surgery.index.channel_index import ChannelIndex
from surgery.pruning.verify import verify_folder

HEAL = (
    *("--sparsity", "0.5", "--multiple-of", "4", *CALIBRATION, "--heal", "1024", "--batch-tokens", "128"),
    *("--cross-entropy", "0.9"),
)


def test_rounds_keep_equal_shares_and_reach_the_width_of_one_cut() -> None:
    sizes = round_sizes({"intermediate_size": 1536}, {"sparsity": 0.5}, 3)
    assert [size["intermediate_size"] for size in sizes] == [1216, 960, 768]
    assert round_sizes({"intermediate_size": 64}, {"sparsity": 0.5}, 1) == [
        {"sparsity": 0.5, "intermediate_size": None}
    ]
    (one, two) = round_sizes({"a": 64, "b": 32}, {"sparsity": 0.75, "multiple_of": 4}, 2)
    assert one == two == {"sparsity": pytest.approx(0.5), "intermediate_size": None}
    with pytest.raises(PlanError, match="so many rounds"):
        round_sizes({"intermediate_size": 128}, {"sparsity": 0.5}, 2)
    with pytest.raises(PlanError, match="one width for all layers"):
        round_sizes({"intermediate_size": 1536}, {"sparsity": 0.5, "allocation": "global"}, 2)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_result_of_two_rounds_is_told_as_one_cut(
    family: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    """The kept channels are those of the dense model: without training and repair, its very columns."""
    dense = save_tiny(family, name="dense", dtype=torch.float32)
    options = (*HEAL, "--rounds", "2", "--train", "norms", "--repair", "none")
    surgeon("prune", str(dense), *options, "--out", "cut")
    folder = dense.parent / "cut"
    verify_folder(folder)
    manifest = json.loads((folder / "surgeon.json").read_text())
    assert manifest["source"]["name"] == "dense"
    assert [entry["teacher"]["name"] for entry in manifest["heals"]] == ["dense", "dense"]
    assert sum(entry["tokens"] for entry in manifest["heals"]) == 1024
    plan, rounds = manifest["plan"], manifest["rounds"]
    assert [r["width_before"] for r in rounds] == [plan["width_before"], rounds[0]["width_after"]]
    assert plan["width_after"] == rounds[1]["width_after"] == plan["width_before"] // 2
    assert plan["sparsity"] == pytest.approx(0.5)
    before, after = load_file(dense / "model.safetensors"), load_file(folder / "model.safetensors")
    layer = plan["layers"][0]
    kept = layer["kept"] if "kept" in layer else layer["ffns"]["expert.0"]["kept"]
    assert kept == sorted(kept)
    down = "model.layers.0." + ("mlp.down_proj" if "kept" in layer else "mlp.experts.0.down_proj") + ".weight"
    if down not in before:
        down = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    torch.testing.assert_close(after[down], before[down][:, kept], atol=0, rtol=0)
    card = (folder / "README.md").read_text()
    assert "in 2 rounds of index, cut and heal" in card
    assert "one shot" not in card
    assert "--heal 1024 --rounds 2 --train norms" in card
    assert sorted(path.name for path in dense.parent.iterdir()) == ["cut", "dense", "text.txt"]


def test_one_round_gives_the_bytes_of_prune_and_heal(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    folder = save_tiny("llama", name="dense").parent
    surgeon("prune", "dense", *HEAL, "--out", "both")
    surgeon("prune", "dense", *HEAL[:4], *CALIBRATION, "--out", "cut")
    heal = ("--tokens", "1024", "--text", "text.txt", *HEAL[-4:], "--block-size", CALIBRATION[-1])
    surgeon("heal", "cut", *heal, "--out", "healed")
    assert (folder / "both/model.safetensors").read_bytes() == (
        folder / "healed/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("stop", [2, 6])
def test_an_interrupted_run_goes_on_with_the_same_bytes(
    stop: int, save_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", name="dense").parent
    options = (*HEAL, "--rounds", "2")
    surgeon("prune", "dense", *options, "--out", "one")
    step, calls = Trainer.step, []

    def stopping(self: Trainer, number: int) -> float:
        calls.append(number)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", stopping)
    surgeon("prune", "dense", *options, "--out", "two", code=1)
    assert not (folder / "two").exists()
    result = surgeon("prune", "dense", *options, "--out", "two")
    assert "Resuming" in result.stderr
    assert (folder / "one/model.safetensors").read_bytes() == (folder / "two/model.safetensors").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["dense", "one", "text.txt", "two"]


def test_where_healing_does_not_help_the_cut_is_written(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    folder = save_tiny("llama", name="dense").parent
    options = (*HEAL, "--train", "norms", "--learning-rate", "1e-30")
    result = surgeon("prune", "dense", *options, "--out", "both")
    assert "did not help" in result.stderr
    surgeon("prune", "dense", *HEAL[:4], *CALIBRATION, "--out", "cut")
    assert (folder / "both/model.safetensors").read_bytes() == (folder / "cut/model.safetensors").read_bytes()
    assert "Healed" not in (folder / "both" / "README.md").read_text()


def test_a_dry_run_tells_the_cut_and_the_heal(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    folder = save_tiny("llama", name="dense").parent
    before = sorted(folder.iterdir())
    said = json.loads(surgeon("prune", "dense", *HEAL, "--dry-run", "--json").stdout)
    assert said["heal"]["options"]["train"] == "lora:16"
    assert said["heal"]["costs"]["flops"] > 0
    assert "Healing, at most" in surgeon("prune", "dense", *HEAL, "--dry-run").output
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("--rounds", "2"), "give --heal TOKENS", 2),
        (("--heal", "1M"), "too short", 1),
        (("--heal", "1024", "--allocation", "score", "--pad"), "zeros of a padded model", 2),
        (("--heal", "1024", "--allocation", "score", "--rounds", "2"), "one width for all layers", 1),
        (("--heal", "1024", "--train", "some"), "unknown --train", 2),
    ],
)
def test_what_cannot_be_healed_is_refused_before_the_index(
    arguments: tuple[str, ...],
    message: str,
    code: int,
    save_tiny: Callable[..., Path],
    surgeon: Callable[..., Any],
) -> None:
    save_tiny("llama", name="dense")
    result = surgeon("prune", "dense", *HEAL[:4], *CALIBRATION, *arguments, code=code)
    assert message in result.stderr
    assert "Indexing" not in result.stderr


def test_later_rounds_are_indexed_on_the_blocks_and_prompts_of_the_first(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    model = open_model(save_tiny("llama", name="dense"))
    surgeon("index", "dense", *CALIBRATION, "--spike-prompt", "a prompt", "--out", "index")
    index = ChannelIndex.load("index")
    first = calibrate(
        model, "text.txt", blocks=len(index.input_ids), block_size=32, seed=42, spike_prompt="a prompt"
    )
    again = calibration_of(index, model, "a prompt")
    assert again.blocks.as_json() == index.calibration
    assert [ids.tolist() for ids in again.prompts] == [ids.tolist() for ids in first.prompts]
    assert len(again.prompts) > len(calibration_of(index, model).prompts)
