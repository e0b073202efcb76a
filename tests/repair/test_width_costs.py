"""Costs of widths together, and the search that uses them, against the whole model with masked weights."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION, opened
from torch.nn import functional
from transformers import AutoModelForCausalLM

import surgery
import surgery.loading
from surgery.budget.sensitivity_cost import SensitivityCost
from surgery.cut.model_cut import model_cut
from surgery.engine.loss import measure_divergence
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.errors import PlanError
from surgery.index.channel_index import ChannelIndex
from surgery.model.families import DENSE
from surgery.plan.kind_plan import layers_plan, sublayer_plan
from surgery.plan.ranking import channel_orders
from surgery.pruning import layer_widths
from surgery.pruning.layer_widths import PROMISING, TURNS, moved, search_widths, to_try, uniform
from surgery.repair.dense_reference import DenseReference
from surgery.repair.layer_repair import LayerRepair
from surgery.repair.methods import REPAIRS
from surgery.repair.sensitivity import split_blocks
from surgery.repair.width_costs import WidthCosts, measure_width_costs

COST = SensitivityCost(2, 0, 0, "memory")
NONE = REPAIRS.find("none")


@pytest.fixture
def indexed(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> tuple[Model, ChannelIndex]:
    """A tiny model in the folder "tiny", and its index in "index"."""
    source = save_tiny("llama")
    surgeon("index", "tiny", "--out", "index", *CALIBRATION)
    return opened(source), ChannelIndex.load("index")


def test_costs_are_those_of_the_whole_model_with_masked_weights(
    indexed: tuple[Model, ChannelIndex],
) -> None:
    """All layers at widths of their own; layer 2 is gone, layer 4 has no attention."""
    model, index = indexed
    ids, orders = index.input_ids.long(), channel_orders(index, "scar-prot")
    cuts = (sublayer_plan("attention", range(6), [4]), layers_plan(6, [2]))
    plan = surgery.plan_pruning(model, index, method="scar-prot", sparsity=0.5, multiple_of=4, cuts=cuts)
    cut = model_cut(model.meta_model, plan, widths_only=True)
    widths, others = [24, 8, 0, 40, 16, 48], [[20, 28], [], [], [36], [12, 20], [44]]
    found = measure_width_costs(StreamedModel(model), ids, orders, widths, others, cut, NONE, COST)
    assert [sorted(one) for one in found.others] == others

    whole = AutoModelForCausalLM.from_pretrained("tiny").eval()
    held = ids[-(len(ids) // 4) :]
    with torch.no_grad():
        dense = functional.log_softmax(whole(held).logits[:, :-1], -1)
        whole.model.layers[4].self_attn.o_proj.weight.zero_()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            whole.model.layers[2].get_submodule(name).weight.zero_()
    originals = [layer.mlp.down_proj.weight.clone() for layer in whole.model.layers]

    def kl(sizes: list[int]) -> float:
        with torch.no_grad():
            for layer, original, order, size in zip(
                whole.model.layers, originals, orders, sizes, strict=True
            ):
                layer.mlp.down_proj.weight.zero_()
                layer.mlp.down_proj.weight[:, order[:size]] = original[:, order[:size]]
            cut_logits = functional.log_softmax(whole(held).logits[:, :-1], -1)
        return float((dense.exp() * (dense - cut_logits)).sum(-1).mean())

    assert found.kl == pytest.approx(kl(widths), abs=1e-5)
    for number, width in ((0, 20), (0, 28), (3, 36), (4, 12), (5, 44)):
        expected = kl([*widths[:number], width, *widths[number + 1 :]])
        assert found.others[number][width] == pytest.approx(expected, abs=1e-5)


def test_channels_move_where_they_gain() -> None:
    others = [{12: 1.3, 4: 1.5}, {12: 0.9, 4: 1.05}, {12: 0.99, 4: 1.01}, {4: 1.001}]
    costs = WidthCosts(1.0, others)
    assert moved([8, 8, 8, 8], costs, 4, 1) == [8, 12, 8, 4]
    assert moved([8, 8, 8, 8], costs, 4, 5) == [8, 12, 8, 4]  # another pair would cost more than it gains
    assert moved([8, 8, 8, 8], WidthCosts(1.0, [{}, {}, {}, {}]), 4, 5) == [8, 8, 8, 8]


def test_later_rounds_try_the_promising_steps_and_the_others_in_turn() -> None:
    gains = {layer: float(layer % 7) - 9.0 for layer in range(40)}
    best = set(sorted(gains, key=lambda layer: -gains[layer])[:PROMISING])
    rounds = [set(to_try(gains, turn)) for turn in range(5, 5 + TURNS)]
    assert all(best <= tried for tried in rounds) and max(map(len, rounds)) < 26
    assert set.union(*rounds) == set(gains)
    new = dict.fromkeys(range(20), math.inf)
    assert to_try(new | {40: 1.0}, 0) == list(range(20))  # 40 % TURNS is not 0


def test_one_width_for_all_layers() -> None:
    assert uniform([4, 12, 0, 8], {2}, [4, 4, 9, 4], 4) == [8, 8, 0, 8]
    assert uniform([4, 12, 0, 8], {2}, [4, 9, 9, 4], 4) is None  # a layer needs more
    assert uniform([4, 12, 9], set(), [1, 1, 1], 1) is None  # not as many in sum
    assert uniform([4, 12, 0, 8], {2}, [4, 4, 9, 4], 16) is None  # not such a multiple


def test_a_search_lowers_the_divergence_and_keeps_the_size(
    indexed: tuple[Model, ChannelIndex], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = ("--index", "index", "--sparsity", "0.5", "--multiple-of", "4")
    monkeypatch.setattr(layer_widths, "BETTER", 1e-6)  # random layers differ little
    said = surgeon("prune", "tiny", *cut, "--allocation", "searched", "--out", "cut").stderr
    levels = [float(line.rpartition("KL ")[2].split()[0]) for line in said.splitlines() if "KL" in line]
    written = json.loads(Path("cut/surgeon.json").read_text())
    widths = written["plan"]["widths"]["intermediate_size"]["per_layer"]
    assert sum(widths) == 6 * 24 and len(set(widths)) > 1 and written["plan"]["allocation"] == "searched"
    steps = written["plan"]["width_search"]["steps"]
    assert [step["kl"] for step in steps] == pytest.approx(levels, abs=1e-4)
    better = [step["kl"] for step in steps if step["kept"]]
    assert len(better) > 2 and better == sorted(better, reverse=True)
    assert f"{len(steps)} sets of widths" in Path("cut/README.md").read_text()
    assert f"--layer-widths {','.join(map(str, widths))}" in written["command"]
    loaded = AutoModelForCausalLM.from_pretrained("cut")
    assert [layer.mlp.down_proj.in_features for layer in loaded.model.layers] == widths
    again = surgery.plan_pruning(*indexed, sparsity=0.5, multiple_of=4, allocation="searched")
    assert list(again.widths[0].per_layer) == widths
    words = shlex.split(written["command"])
    surgeon("prune", "tiny", *words[3:], "--index", "index", "--out", "given")
    for name in ("model.safetensors", "config.json"):
        assert Path("given", name).read_bytes() == Path("cut", name).read_bytes()
    surgeon("report", "cut", "--out", "page.html")
    assert "Widths of layers that were tried" in Path("page.html").read_text()


def test_without_time_no_round_begins(indexed: tuple[Model, ChannelIndex]) -> None:
    model, index = indexed
    plan = surgery.plan_pruning(model, index, sparsity=0.5, multiple_of=4, allocation="global")
    found = search_widths(model, index, replace(plan, repair="lstsq"), seconds=0)
    assert [step.name for step in found.steps] == ["single costs", "one width"]
    assert sum(found.widths) == sum(len(layer.kept) for layer in plan.layers)


def test_an_interrupted_search_goes_on(
    indexed: tuple[Model, ChannelIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill only what was not measured is measured; a finished search is told again."""
    model, index = indexed
    monkeypatch.setattr(layer_widths, "BETTER", 1e-6)
    plan = surgery.plan_pruning(model, index, sparsity=0.5, multiple_of=4, allocation="global")
    whole = search_widths(model, index, plan)
    measured: list[list[int]] = []

    def counted(streamed: Any, ids: Any, orders: Any, widths: list[int], *rest: Any) -> WidthCosts:
        measured.append(widths)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure_width_costs(streamed, ids, orders, widths, *rest)

    monkeypatch.setattr(layer_widths, "measure_width_costs", counted)
    with pytest.raises(KeyboardInterrupt):
        search_widths(model, index, plan, journal=Journal(tmp_path / "out", {}, resume=True))
    for again in range(2):
        journal = Journal(tmp_path / "out", {}, resume=True)
        assert search_widths(model, index, plan, seconds=1e9 if not again else 0, journal=journal) == whole
    assert len(measured) == len(whole.steps) + 1 and measured[2] == measured[3]


def test_sensitivity_is_announced_when_it_is_measured(
    indexed: tuple[Model, ChannelIndex], tmp_path: Path
) -> None:
    said: list[str] = []
    for _ in range(2):
        journal = Journal(tmp_path / "out", {}, resume=True)
        surgery.plan_pruning(
            *indexed, sparsity=0.5, multiple_of=4, allocation="global", journal=journal, say=said.append
        )
    assert [line.split(",")[0] for line in said] == ["Measuring the sensitivity of each layer at five widths"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
@pytest.mark.parametrize("name", ["lstsq-acc", "lstsq", "bias"])
def test_layers_are_repaired_as_a_prune_repairs_them(
    family: str, name: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    """The model after a repair on the same blocks: without attention in layer 3, without FFN in layer 1, at
    widths of their own. GPT-2 has biases; OLMo 2's layers add nothing to the stream as it is.
    """
    model = opened(save_tiny(family))
    surgeon("index", "tiny", "--out", "index", *CALIBRATION)
    index = ChannelIndex.load("index")
    ids, orders, method = index.input_ids.long(), channel_orders(index, "scar-prot"), REPAIRS.find(name)
    cuts = (sublayer_plan("attention", range(6), [3]), sublayer_plan("whole-ffn", range(6), [1]))
    plan = surgery.plan_pruning(model, index, sparsity=0.5, multiple_of=4, cuts=cuts, repair=name)
    cut = model_cut(model.meta_model, plan, widths_only=True)
    widths = [24, 0, 12, 40, 16, 48]
    kept = {(i, DENSE): orders[i][:width].sort().values for i, width in enumerate(widths) if width}
    fitted, held = split_blocks(ids)
    streamed = StreamedModel(model)
    others: list[list[int]] = [[20], [], [], [], [], []]
    found = measure_width_costs(streamed, ids, orders, widths, others, cut, method, COST)
    whole = replace(cut, kept={**cut.kept, **kept})
    dense, pruned = (TokenStream(streamed, held, micro_batch=2) for _ in range(2))
    reference = DenseReference(streamed, fitted, 2)
    repair = LayerRepair(reference, whole, method)
    for number, layer in streamed.stream_layers(range(6)):
        dense.forward(number, layer)
        reference.run(number, layer)
        repair.layer(number, layer)
        reference.step()
        pruned.forward(number, layer)
    (expected,) = measure_divergence(streamed, dense, [pruned])
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
    assert found.others[0][20] != pytest.approx(found.kl, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--layer-widths", "8,8"], 1, "expected 6 numbers"),
        (["--layer-widths", "8,8,8,8,8,49"], 1, "layer 5; expected 1 to 48"),
        (["--layer-widths", "8,8,8,8,8,8", "--sparsity", "0.5"], 2, "takes the place"),
        (["--layer-widths", "8,x"], 2, "is not numbers"),
        (["--layer-widths", "8,8,0,8,8,8"], 1, "layer 2; expected 1 to 48"),
        (["--layer-widths", "8,8,8,8,8,8", "--drop-ffn", "2"], 1, "no FFN afterwards"),
        (["--drop-ffn", "0,1,2,3,4,5"], 1, "at least one FFN has to stay"),
        (["--layer-widths", "8,8,8,8,8,8", "--target-params", "1k"], 2, "takes the place"),
        (["--search-time", "1m"], 2, "for --allocation searched"),
    ],
)
def test_widths_that_will_not_do_are_refused_before_any_work(
    options: list[str], code: int, message: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    result = surgeon("prune", str(save_tiny("llama")), *options, *CALIBRATION, "--out", "cut", code=code)
    assert message in result.output and "Indexing" not in result.output


def test_given_widths_beside_layers_and_ffns_that_go(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    """Equal widths are written as one; the card's command makes the same again."""
    save_tiny("llama")
    surgeon("index", "tiny", "--out", "index", *CALIBRATION)
    equal = ("--layer-widths", "16,16,16,16,16,16")
    surgeon("prune", "tiny", *equal, "--index", "index", "--out", "equal", "--quiet")
    assert not Path("equal/modeling_per_layer.py").exists()
    card = Path("equal/README.md").read_text()
    assert "surgery.loading" not in card and "more than others" not in card
    mixed = ("--layer-widths", "16,8,0,0,24,48", "--drop-layers", "2", "--drop-ffn", "3")
    surgeon("prune", "tiny", *mixed, "--index", "index", "--out", "cut", "--quiet")
    loaded = AutoModelForCausalLM.from_pretrained("cut")
    sizes = [
        one.down_proj.in_features for layer in loaded.model.layers if hasattr(one := layer.mlp, "down_proj")
    ]
    assert sizes == [16, 8, 24, 48] and len(loaded.model.layers) == 5
    words = shlex.split(json.loads(Path("cut/surgeon.json").read_text())["command"])
    surgeon("prune", "tiny", *words[3:], "--index", "index", "--out", "again", "--quiet")
    assert Path("again/model.safetensors").read_bytes() == Path("cut/model.safetensors").read_bytes()
    with pytest.raises(PlanError, match="not a width"):
        surgery.plan_pruning(
            opened(Path("tiny")), ChannelIndex.load("index"), layer_widths=[8, 8, 0, 8, 8, 8]
        )
