"""Trials and single costs against whole models in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION, opened
from torch.nn import functional
from transformers import AutoModelForCausalLM

from surgery.engine.resume import Journal
from surgery.engine.streamed_model import StreamedModel
from surgery.index.channel_index import ChannelIndex
from surgery.plan.kind_plan import layers_plan
from surgery.plan.make_plan import make_plan
from surgery.search import trials as trials_module
from surgery.search.head_scores import head_scores
from surgery.search.single_costs import measure_single_costs
from surgery.search.trials import Trials

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))


def divergence(dense: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(dense || other) of logits [N, T, V] but for the last token of a block."""
    logs = [functional.log_softmax(logits[:, :-1].flatten(0, 1), -1) for logits in (other, dense)]
    return float(functional.kl_div(*logs, reduction="batchmean", log_target=True))


def test_single_costs_are_those_of_whole_models(save_tiny: Callable[..., Path]) -> None:
    source = save_tiny("llama-tied-bias", attention_bias=True)
    found = measure_single_costs(StreamedModel(opened(source)), IDS, ("layers", "attention"), 1)
    assert len(found) == 12
    for number in (0, 3):
        for kind in ("layers", "attention"):
            model = AutoModelForCausalLM.from_pretrained(source).eval()
            with torch.no_grad():
                dense = model(IDS).logits
                layer = model.model.layers[number]
                if kind == "layers":
                    layer.forward = lambda hidden, *_, **__: hidden
                else:
                    layer.self_attn.o_proj.weight.zero_()
                    layer.self_attn.o_proj.bias.zero_()
                expected = divergence(dense, model(IDS, use_cache=False).logits)
            assert found[kind, number] == pytest.approx(expected, rel=1e-3)


@pytest.fixture
def indexed(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> tuple[Path, ChannelIndex]:
    source = save_tiny("llama")
    surgeon("index", str(source), *CALIBRATION, "--out", "index", "--quiet")
    return source, ChannelIndex.load("index")


def test_trials_are_measured_once(
    indexed: tuple[Path, ChannelIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, index = indexed
    plans = [make_plan(index, sparsity=0.0), make_plan(index, sparsity=0.0, cuts=(layers_plan(6, [1, 2]),))]
    found = Trials(opened(source), index, journal=Journal(tmp_path / "cut", {})).measure(plans)
    assert found[0] == pytest.approx(0, abs=1e-5) and found[1] > 0.01
    monkeypatch.delattr(trials_module, "Comparison")
    assert Trials(opened(source), index, journal=Journal(tmp_path / "cut", {})).measure(plans) == found


def test_a_silent_head_has_no_score(indexed: tuple[Path, ChannelIndex]) -> None:
    source, index = indexed
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[2].self_attn.o_proj.weight.data[:, 16:] = 0
    model.save_pretrained(source)
    scores = head_scores(opened(source), index)
    assert len(scores) == 6 and all(len(score) == 2 for score in scores.values())
    assert [float(score[1]) > 0 for score in scores.values()] == [True, True, False, True, True, True]
