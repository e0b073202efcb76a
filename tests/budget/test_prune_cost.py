"""What a cut is said to take, against what it takes; and budgets that are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.live_memory import Live
from helpers.tiny_models import CALIBRATION, opened
from torch.utils.flop_counter import FlopCounterMode

from surgery.budget import budget
from surgery.budget import prune_cost as module
from surgery.budget.model_size import ModelSize
from surgery.budget.prune_cost import PruneJob, prune_cost
from surgery.budget.repair_cost import moment_bytes, repair_bytes
from surgery.budget.sensitivity_cost import SensitivityCost, sensitivity_bytes
from surgery.checkpoint.reader import Checkpoint
from surgery.cut.ffn_channels import ffn_cut
from surgery.engine.run_options import RunOptions
from surgery.engine.streamed_model import StreamedModel
from surgery.errors import MemoryBudgetError
from surgery.model.meta_model import MetaModel
from surgery.plan.make_plan import make_plan
from surgery.pruning.jobs import prune_job
from surgery.repair.layer_repair import LayerRepair, dense_reference
from surgery.repair.least_squares import SplitMoments, least_squares, refit
from surgery.repair.methods import REPAIRS
from surgery.repair.sensitivity import measure_sensitivity

CPU = torch.device("cpu")
PLENTY = 1 << 40
WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}


@pytest.mark.parametrize(("width", "outputs"), [(120, 80), (80, 240), (240, 40)])
def test_matrices_of_a_repair_are_estimated(width: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    with Live() as live:
        both = SplitMoments.zeros(outputs, width, CPU, 1)
        for one in (both.train, both.held_out):
            u, weight = (torch.randn(n, width, generator=generator) for n in (600, outputs))
            one.add(
                u, u @ weight.T + torch.randn(600, outputs, generator=generator), 0 * weight, torch.ones(600)
            )
        del u, weight
        live.peak = 0
        refit(both, least_squares)
    estimated = repair_bytes([width], outputs)
    assert live.peak <= estimated <= 1.6 * live.peak
    assert sum(live.sizes.values()) <= moment_bytes(width, outputs) + 64


@pytest.mark.parametrize("variant", ["llama", "gpt2", "mixtral", "phi3"])
@pytest.mark.parametrize("scarce", [False, True])
def test_memory_of_repairing_a_layer_is_estimated(
    scarce: bool, variant: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    from surgery.index.channel_index import ChannelIndex

    source = save_tiny(variant, **({"n_layer": 3} if variant == "gpt2" else WIDE))
    surgeon("index", str(source), "--out", "index", *CALIBRATION[:2], "--blocks", "8", "--block-size", "64")
    index = ChannelIndex.load("index")
    plan = make_plan(index, method="scar-lp", sparsity=0.5, multiple_of=8, repair="lstsq-acc")
    job = prune_job(plan, index.input_ids.shape)
    meta_model = MetaModel(Checkpoint.open(source), torch.float32)
    memory = prune_cost(meta_model, job, RunOptions(CPU, torch.float32, PLENTY)).smallest_bytes
    options = RunOptions(CPU, torch.float32, memory if scarce else PLENTY)
    costs = prune_cost(meta_model, job, options)
    assert costs.host_bytes <= options.memory and (costs.hidden_on == "disk") == scarce
    model = StreamedModel(opened(source))
    with torch.no_grad():
        dense = dense_reference(model, index.input_ids.long(), costs)
        repair = LayerRepair(dense, ffn_cut(model.meta_model, plan), REPAIRS[plan.repair], costs.matrix_bytes)
        hidden = (0 if scarce else costs.hidden_bytes) * (len(plan.layers[0].ffns) > 0)
        for number, layer in model.stream_layers(range(1 if scarce else 2)):
            live = Live()
            with live:
                dense.run(number, layer)
                repair.layer(number, layer)
            dense.step()
            # weights come in outside of what is watched, as hidden states did
            weights = 2 * ModelSize.of(meta_model, torch.float32, 64).layer
            assert live.peak + hidden <= costs.host_bytes - weights


@pytest.mark.parametrize(("width", "hidden"), [(256, 64), (96, 128)])
def test_memory_of_measuring_sensitivity_is_estimated(
    width: int, hidden: int, save_tiny: Callable[..., Path]
) -> None:
    folder = save_tiny("llama", hidden_size=hidden, intermediate_size=width)
    model = StreamedModel(opened(folder))
    ids = torch.randint(0, 256, (40, 64), generator=torch.Generator().manual_seed(1))
    job = PruneJob([{"dense": width // 2}] * 6, False, False, 40, 64, sensitivity=True)
    estimated = prune_cost(model.meta_model, job, RunOptions(CPU, torch.float32, PLENTY)).host_bytes
    plain = prune_cost(
        model.meta_model, replace(job, sensitivity=False), RunOptions(CPU, torch.float32, PLENTY)
    )
    orders = [torch.arange(width)] * 6
    with Live() as live:
        measure_sensitivity(model, ids, orders, SensitivityCost(32, 0, 0, "disk"))
    assert live.peak <= estimated <= 4 * live.peak
    assert sensitivity_bytes(width, hidden, 0.75) < estimated > plain.host_bytes


def test_less_memory_means_files_and_parts_and_the_least_is_named(save_tiny: Callable[..., Path]) -> None:
    meta_model = MetaModel(Checkpoint.open(save_tiny("llama", **WIDE)), torch.float32)
    job = PruneJob([{"dense": 128}] * 3, True, True, 64, 64, written=10)

    def costs(memory: int) -> Any:
        return prune_cost(meta_model, job, RunOptions(CPU, torch.float32, memory))

    plenty = costs(PLENTY)
    assert (plenty.hidden_on, plenty.repair_parts, plenty.ends_held) == ("memory", 1, True)
    smallest = plenty.smallest_bytes
    budgets = [smallest + step * (2 * plenty.host_bytes - smallest) // 12 for step in range(13)]
    found = [costs(memory) for memory in budgets]
    for memory, one in zip(budgets, found, strict=True):
        assert one.host_bytes <= memory and one.smallest_bytes == smallest
    assert (found[0].hidden_on, found[0].micro_batch) == ("disk", 1) and found[0].repair_parts > 1
    assert (found[-1].hidden_on, found[-1].micro_batch) == ("memory", plenty.micro_batch)
    assert [c.repair_parts for c in found] == sorted((c.repair_parts for c in found), reverse=True)
    assert found[0].write_bytes > plenty.write_bytes and found[0].read_bytes > plenty.read_bytes
    with pytest.raises(MemoryBudgetError) as refused:
        costs(smallest - 1)
    assert f"{-(-smallest // 2**20)}MiB" in refused.value.next_step


def test_operations_are_those_of_a_repair(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    from surgery.index.channel_index import ChannelIndex

    source = save_tiny("llama", **WIDE)
    surgeon("index", str(source), "--out", "index", *CALIBRATION[:2], "--blocks", "16", "--block-size", "64")
    index = ChannelIndex.load("index")
    plan = make_plan(index, method="scar-lp", sparsity=0.5, multiple_of=8, repair="lstsq-acc")
    model = StreamedModel(opened(source))
    job = prune_job(plan, index.input_ids.shape)
    costs = prune_cost(model.meta_model, job, RunOptions(CPU, torch.float32, PLENTY))
    costs = replace(costs, micro_batch=1)  # where layers are tried on the first micro-batch, that is little
    with torch.no_grad():
        dense = dense_reference(model, index.input_ids.long(), costs)
        repair = LayerRepair(dense, ffn_cut(model.meta_model, plan), REPAIRS[plan.repair], costs.matrix_bytes)
        with FlopCounterMode(display=False) as counter:
            for number, layer in model.stream_layers(range(3)):
                dense.run(number, layer)
                repair.layer(number, layer)
                dense.step()
    counted = counter.get_total_flops()  # no solving: the counter does not know factorisations
    cubes = module.SOLVED * sum(width**3 / 3 + 2.0 * 64 * width**2 for width in (128, 64)) * 6
    estimated = costs.flops + costs.float32_flops + costs.float64_flops - cubes
    assert estimated == pytest.approx(counted, rel=0.35)


def test_dry_runs_say_what_a_cut_takes(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = save_tiny("llama")
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    common = [str(source), "--index", "index", "--multiple-of", "8", "--dry-run"]
    told = json.loads(surgeon("prune", *common, "--json").stdout)
    assert told["sizes"]["repair_bytes"] == told["costs"]["repair_bytes"] > 0
    assert told["costs"]["write_bytes"] > told["sizes"]["bytes_after"]
    assert told["machine"]["float64_flops_per_second"] > 0 and told["seconds"]["compute"] > 0
    shown = surgeon("prune", *common).stdout
    assert "at most" in shown and "in float64" in shown and "Time:" in shown
    plain = surgeon("prune", *common, "--repair", "none").stdout
    assert "float64" not in plain and "Hidden states" not in plain
    text = ["--text", "text.txt", "--text-blocks", "2", "--sparsity", "0.5"]
    compared = json.loads(surgeon("compare", *common, *text, "--json").stdout)
    assert (compared["cuts"], compared["texts"], compared["walks"]) == (6, 1, 1)
    one = [*text, "--cut", "scar-lp:lstsq-acc"]
    alone = json.loads(surgeon("compare", *common, *one, "--json").stdout)
    assert alone["costs"]["flops"] < compared["costs"]["flops"]
    assert alone["costs"]["hidden_bytes"] < compared["costs"]["hidden_bytes"]
    few = str(compared["costs"]["smallest_bytes"])
    scarce = json.loads(surgeon("compare", *common, *text, "--json", "--memory", few).stdout)
    assert scarce["walks"] == 6 and scarce["costs"]["host_bytes"] <= int(few)


def test_a_budget_too_small_is_refused_before_an_index_is_made(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    refused = surgeon("prune", str(source), "--multiple-of", "8", "--memory", "1MiB", *CALIBRATION, code=1)
    assert "--memory" in refused.stderr and "at least" in refused.stderr
    assert "Indexing" not in refused.stderr
    assert not list(source.parent.glob("*index*")) and not list(source.parent.glob(".*"))


def test_a_gpu_shares_out_what_it_has(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    meta_model = MetaModel(Checkpoint.open(save_tiny("llama", **WIDE)), torch.float32)
    job = PruneJob([{"dense": 128}] * 3, True, True, 64, 64)
    gpu = RunOptions(torch.device("cuda"), torch.float32, PLENTY)
    has = PLENTY
    monkeypatch.setattr(budget, "total_device_bytes", lambda _: has)
    roomy = prune_cost(meta_model, job, gpu)
    assert roomy.hidden_on == "device" and roomy.device_bytes > roomy.hidden_bytes > roomy.host_bytes
    has = prune_cost(meta_model, job, RunOptions(CPU, torch.float32, PLENTY)).smallest_bytes
    tight = prune_cost(meta_model, job, gpu)
    assert tight.device_bytes <= has and tight.hidden_on == "memory"
    assert tight.host_bytes > tight.hidden_bytes
    little = RunOptions(torch.device("cuda"), torch.float32, tight.hidden_bytes - 1)
    assert prune_cost(meta_model, job, little).hidden_on == "disk"
    has = 1
    with pytest.raises(MemoryBudgetError, match="cuda memory"):
        prune_cost(meta_model, job, gpu)
