"""Measured sensitivity, against pruning one layer of the whole model at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION, opened
from torch.nn import functional
from transformers import AutoModelForCausalLM

from surgery.budget.sensitivity_cost import SensitivityCost
from surgery.engine.streamed_model import StreamedModel
from surgery.index.channel_index import ChannelIndex
from surgery.plan.ranking import channel_orders
from surgery.repair import sensitivity
from surgery.repair.sensitivity import measure_sensitivity


def test_costs_are_those_of_cutting_one_layer_of_the_whole_model(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny("llama")
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    index = ChannelIndex.load(source.parent / "index")
    ids, orders = index.input_ids.long(), channel_orders(index, "scar-prot")
    monkeypatch.setattr(sensitivity, "RIDGE", 1e9)  # no refit: masking alone
    model = StreamedModel(opened(source))
    found = measure_sensitivity(model, ids, orders, SensitivityCost(2, 0, 0, "memory"))
    whole = AutoModelForCausalLM.from_pretrained(source).eval()

    held = ids[-(len(ids) // 4) :]

    def predictions() -> torch.Tensor:
        with torch.no_grad():
            return functional.log_softmax(whole(held).logits[:, :-1], -1)

    dense = predictions()
    for number in (0, 3, 5):
        weight = whole.model.layers[number].mlp.down_proj.weight.data
        original, costs = weight.clone(), {}
        for width in (3, 6, 12, 24, 36):
            weight.zero_()
            weight[:, orders[number][:width]] = original[:, orders[number][:width]]
            costs[width] = float((dense.exp() * (dense - predictions())).sum(-1).mean())
        weight.copy_(original)
        assert float(found[number][48]) == 0
        assert torch.all(found[number].diff() <= 0)
        assert float(found[number][36]) == pytest.approx(costs[36], abs=1e-5)
        assert float(found[number][3]) == pytest.approx(max(costs.values()), abs=1e-5)


def test_global_allocation_gives_most_where_a_cut_costs_most(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(source)
    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight.data *= 1.0 if number == 4 else 0.01
    model.save_pretrained(source)
    options = ["--sparsity", "0.5", "--multiple-of", "4", "--allocation", "global", "--out", "cut"]
    surgeon("prune", str(source), *options, *CALIBRATION)
    plan = json.loads((source.parent / "cut" / "surgeon.json").read_text())["plan"]
    widths = plan["widths"]["intermediate_size"]["per_layer"]
    assert widths[4] == 48 and sum(widths) <= 6 * 24
    refused = surgeon(
        "prune", str(save_tiny("mixtral", name="moe")), *options, "--overwrite", *CALIBRATION, code=1
    )
    assert "--allocation score" in refused.stderr
