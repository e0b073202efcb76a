"""What forward passes are said to take, and that every command with --memory refuses less than its least."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.live_memory import Live
from helpers.tiny_models import CALIBRATION, PLENTY, opened

from surgery.budget.pass_cost import PassJob, StreamShape, pass_cost
from surgery.evaluate.ablation import Condition, Scale, ablation_cost, run_ablations
from surgery.evaluate.perplexity import perplexity, perplexity_cost
from surgery.text import TokenBlocks

WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
IDS = torch.randint(0, 256, (40, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "mixtral", "phi3"])
@pytest.mark.parametrize("scarce", [False, True])
def test_memory_of_a_pass_is_estimated(scarce: bool, variant: str, save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny(variant, **({"n_layer": 3} if variant == "gpt2" else WIDE))
    blocks = TokenBlocks(IDS, "random", None, 1)
    changes = {
        2: [Scale("expert.0" if variant == "mixtral" else "dense", torch.tensor([1]), torch.tensor([2]))]
    }
    conditions = [Condition(str(number), "test", changes) for number in range(3)]
    least = perplexity_cost(opened(folder), *IDS.shape).smallest_bytes
    model = opened(folder, memory=least if scarce else PLENTY)
    cost = perplexity_cost(model, *IDS.shape)
    assert (cost.hidden_on == "disk") == scarce and cost.host_bytes <= model.run.memory
    with Live() as live:
        perplexity(model, blocks)
    assert live.peak <= cost.host_bytes
    least = ablation_cost(opened(folder), 3, *IDS.shape).smallest_bytes
    model = opened(folder, memory=least if scarce else PLENTY)
    cost = ablation_cost(model, 3, *IDS.shape)
    assert (cost.hidden_on == "disk") == scarce and cost.host_bytes <= model.run.memory
    with Live() as live:
        run_ablations(model, conditions, blocks)
    assert live.peak <= cost.host_bytes


def test_less_memory_means_files_and_fewer_blocks(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama", **WIDE)
    job = PassJob((StreamShape(64, 64), StreamShape(3, 32, copies=2)))
    meta_model = opened(folder).meta_model
    plenty = pass_cost(meta_model, job, opened(folder).run)
    assert (
        plenty.hidden_on == "memory" and plenty.blocks_together(64) == 32 and plenty.blocks_together(32) == 64
    )
    assert plenty.hidden_bytes == (64 * 64 + 2 * 3 * 32) * 64 * 4
    budgets = range(plenty.smallest_bytes, 2 * plenty.host_bytes, plenty.host_bytes // 8)
    found = [pass_cost(meta_model, job, opened(folder, memory=memory).run) for memory in budgets]
    for memory, cost in zip(budgets, found, strict=True):
        assert cost.host_bytes <= memory
    assert found[0].hidden_on == "disk" and found[0].write_bytes == plenty.hidden_bytes
    assert found[-1].hidden_on == "memory" and found[0].micro_batch <= found[-1].micro_batch


COMMANDS = {
    "index": ["index", "tiny", *CALIBRATION, "--out", "index-again"],
    "prune": ["prune", "tiny", "--index", "index", "--multiple-of", "8", "--out", "cut"],
    "compare": ["compare", "tiny", "--index", "index", "--multiple-of", "8", "--text", "text.txt"],
    "eval": ["eval", "tiny", "--text", "text.txt"],
    "ablate": ["ablate", "tiny", "--index", "index", "--text", "text.txt", "--conditions", "channels"],
    "quantize": ["quantize", "tiny", "--index", "index", "--group-size", "16", "--out", "int4"],
    "quantize --simulate": ["quantize", "tiny", "--simulate", "--group-size", "16", "--out", "simulated"],
    "quantize --compare": ["quantize", "tiny", "--compare", "--group-size", "16", "--text", "text.txt"],
    "merge-index": ["merge-index", "one", "two", "--model", "tiny", "--out", "both"],
}


@pytest.fixture
def indexed(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> Path:
    """A tiny model with an index, and two parts of one to be merged."""
    folder = save_tiny("llama", max_position_embeddings=256, num_hidden_layers=2).parent
    surgeon("index", "tiny", *CALIBRATION, "--out", "index")
    text = (folder / "text.txt").read_text()
    for place, name in enumerate(("one", "two")):
        (folder / f"{name}.txt").write_text(text[place * 5000 : (place + 1) * 5000])
        surgeon(
            "index", "tiny", "--calibration", f"{name}.txt", *CALIBRATION[2:], "--save-samples", "--out", name
        )
    return folder


def test_every_command_refuses_less_than_its_least_and_runs_at_it(
    indexed: Path, surgeon: Callable[..., Any]
) -> None:
    for name, words in COMMANDS.items():
        calibration = CALIBRATION if words[0] in ("quantize", "ablate") else []
        command = [*words, *calibration]
        told = surgeon(*command, "--dry-run", "--json").stdout
        costs = json.loads(told[told.index("{") :])["costs"]
        least = costs["smallest_bytes"]
        assert costs["host_bytes"] > 0, name
        before = sorted(indexed.iterdir())
        refused = surgeon(*command, "--memory", str(least - 1), code=1).stderr
        assert f"--memory {-(-least // 2**20)}MiB" in refused and "at least" in refused, (name, refused)
        assert sorted(indexed.iterdir()) == before, name
        surgeon(*command, "--memory", str(least))


def test_eval_refuses_tasks_on_a_model_that_does_not_fit(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    save_tiny("llama")
    refused = surgeon("eval", "tiny", "--tasks", "hellaswag", "--memory", "10KiB", code=1).stderr
    assert "at least" in refused and "--memory" in refused
