"""Ablations in one shared pass over the layers, against the whole model with its weights changed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION, opened
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.evaluate.ablation import Condition, Drop, DropLargest, Restore, Scale, run_ablations
from surgery.evaluate.experiments import conditions_for, lp_matched
from surgery.index.channel_index import ChannelIndex
from surgery.text import TokenBlocks

IDS = torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(5))
PLACE = (1, 17, 11)


def planted(folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder)
    mlp = model.model.layers[PLACE[0]].mlp
    mlp.down_proj.weight.data[PLACE[1:]] = 4000.0
    mlp.up_proj.weight.data[PLACE[2]] *= 4
    # The spike makes predictions cautious, and wrong ones come without it, so that it costs on any text.
    head = model.get_output_embeddings().weight.data
    head *= 2
    head[:, PLACE[1]] = 0.05 * torch.randn(len(head), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return folder


def by_hand(folder: Path, change: Callable[[Any], Any]) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    change(model)
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits[:, :-1]
        return float(
            functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), IDS[:, 1:].reshape(-1)).exp()
        )


def measured(folder: Path, **edits: Any) -> dict[str, Any]:
    conditions = [Condition(name, "test", by_layer) for name, by_layer in edits.items()]
    blocks = TokenBlocks(IDS.int(), "random", None, 100)
    return {o.condition: o for o in run_ablations(opened(folder), conditions, blocks)}


def test_conditions_equal_changing_the_whole_model(save_tiny: Callable[..., Path]) -> None:
    folder = planted(save_tiny("llama"))
    layer, row, column = PLACE
    one = Scale("dense", torch.tensor([row]), torch.tensor([column]), 0.5)
    channels = torch.tensor([3, 11, 40])
    found = measured(
        folder,
        scaled={layer: [one]},
        dropped={2: [Drop("dense", channels)], 4: [Drop("dense", channels)]},
        largest={n: [DropLargest(0.01, (("dense", row, column),) if n == layer else ())] for n in range(6)},
        untouched={},
    )

    def scale(model: Any) -> None:
        model.model.layers[layer].mlp.down_proj.weight.data[row, column] *= 0.5

    def drop(model: Any) -> None:
        for number in (2, 4):
            model.model.layers[number].mlp.down_proj.weight.data[:, channels] = 0

    def largest(model: Any) -> None:
        for number, block in enumerate(model.model.layers):
            for parameter in block.parameters():
                if parameter.dim() > 1:
                    flat = parameter.data.view(-1)
                    flat[flat.abs().topk(round(0.01 * flat.numel())).indices] = 0
            if number == layer:
                block.mlp.down_proj.weight.data[row, column] = 4000.0

    for name, change in (
        ("scaled", scale),
        ("dropped", drop),
        ("largest", largest),
        ("original", lambda _: None),
    ):
        assert found[name].perplexity == pytest.approx(by_hand(folder, change), rel=1e-4), name
    assert found["untouched"].kl == pytest.approx(0, abs=1e-6) and found["untouched"].changed == 0
    assert found["dropped"].changed == 6 and found["scaled"].changed == 1
    assert found["original"].tokens == 6 * 31 and found["original"].factor == 1
    assert found["scaled"].kl > 0


def test_restoring_the_activation_undoes_what_little_else_the_weight_does(
    save_tiny: Callable[..., Path],
) -> None:
    folder = planted(save_tiny("llama"))
    layer, row, column = PLACE
    gone = Scale("dense", torch.tensor([row]), torch.tensor([column]))
    found = measured(
        folder,
        gone={layer: [gone]},
        back={layer: [gone, Restore("dense", row)]},
        nothing={layer: [Restore("dense", row)]},
    )
    assert found["nothing"].kl == pytest.approx(0, abs=1e-6)
    seen: dict[str, torch.Tensor] = {}

    def restore(model: Any) -> None:
        down = model.model.layers[layer].mlp.down_proj
        handle = down.register_forward_hook(lambda _, __, y: seen.__setitem__("y", y.detach()))
        with torch.no_grad():
            model(IDS, use_cache=False)
        handle.remove()
        down.weight.data[row, column] = 0
        at = seen["y"][..., row].abs().argmax(1)

        def write(_: Any, __: Any, y: torch.Tensor) -> torch.Tensor:
            y = y.clone()
            y[torch.arange(len(y)), at, row] = seen["y"][torch.arange(len(y)), at, row]
            return y

        down.register_forward_hook(write)

    assert found["back"].perplexity == pytest.approx(by_hand(folder, restore), rel=1e-4)
    assert found["back"].kl < found["gone"].kl


@pytest.mark.draws
def test_the_command_runs_every_experiment(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = planted(save_tiny("llama"))
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    index = ChannelIndex.load("index")
    assert [(w.layer, w.row, w.column) for w in index.super_weights] == [PLACE]
    options = ["--index", "index", "--text", "text.txt", "--text-blocks", "4"]
    everything = ["--conditions", "super-weights,channels,hit-rate", "--scale", "0:2:0.5"]
    listed = surgeon("ablate", str(source), *options, *everything, "--plan").stdout.splitlines()
    extras = ["--trace", "--stop-words", "12", "--out", "result"]
    shown = surgeon("ablate", str(source), *options, *everything, *extras).stdout
    fields = json.loads(Path("result/ablation.json").read_text())
    rows = {row["condition"]: row for row in fields["conditions"]}
    assert (
        len(listed)
        == len(rows) - 1
        == len(conditions_for(index, ["super-weights", "channels", "hit-rate"], [0, 0.5, 1, 1.5, 2], 42))
    )
    assert rows["super weights x 1"]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["super weights x 0"]["perplexity"] == rows["prune SW"]["perplexity"]
    assert {row["changed"] for row in rows.values() if row["group"] == "hit rate"} == {6 * 24}
    assert rows["prune non-SW"]["changed"] in (
        5,
        6,
    )  # the largest of a layer, which in one may be the super weight
    for file in ("ablation.png", "scale.png", "hit_rate.png", "trace.png"):
        assert Path("result", file).read_bytes().startswith(b"\x89PNG")
    points = [point for point in fields["trace"]["points"] if point["layer"] == 1]
    assert all(abs(point["followed"]) > 3 * abs(point["followed_without"]) for point in points)
    words = fields["stop_words"]
    assert words["prompts"] == 12 and 0 < words["mass"] < 1 and words["qualified"] > 5
    assert "prune SW" in shown and "Next token over 12 prompts" in shown


def test_stop_word_probabilities_are_the_models_own(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = planted(save_tiny("llama"))
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    surgeon(
        *("ablate", str(source), "--index", "index", "--text", "text.txt", "--text-blocks", "2"),
        *("--conditions", "none", "--stop-words", "5", "--out", "result"),
    )
    found = json.loads(Path("result/ablation.json").read_text())["stop_words"]["example"]
    tokenizer, model = (
        AutoTokenizer.from_pretrained(source),
        AutoModelForCausalLM.from_pretrained(source).eval(),
    )
    ids = torch.tensor([tokenizer("Summer is hot. Winter is")["input_ids"]])
    with torch.no_grad():
        whole = model(ids).logits[0, -1].softmax(-1)
        model.model.layers[PLACE[0]].mlp.down_proj.weight.data[PLACE[1:]] = 0
        without = model(ids).logits[0, -1].softmax(-1)
    for _, probability, _ in found:  # the likeliest of either
        assert float((whole - probability).abs().min()) < 1e-6
    assert max(p for _, _, p in found) == pytest.approx(float(without.max()), rel=1e-4)


def test_halo_controls_match_its_loss_proxy(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama", intermediate_size=400)
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    ffn = ChannelIndex.load("index").layers[3].ffns["dense"]
    chosen = lp_matched(ffn, torch.Generator().manual_seed(0))
    assert not set(chosen.tolist()) & {*ffn.halo.tolist(), *ffn.supernodes.tolist()}
    proxy = ffn.statistics["loss_proxy"].log()
    assert len(chosen) == pytest.approx(len(ffn.halo), abs=2)
    assert float(proxy[chosen].mean()) == pytest.approx(float(proxy[ffn.halo].mean()), abs=0.5)


def test_no_super_weight_is_said_before_anything_is_measured(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    refused = surgeon("ablate", str(source), "--index", "index", "--text", "text.txt", code=2)
    assert "no super weight" in refused.stderr
    bad = surgeon("ablate", str(source), "--text", "text.txt", "--scale", "3:0:1", code=2)
    assert "START:STOP:STEP" in bad.stderr


def test_activations_are_put_back_where_blocks_are_flattened(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("opt")
    gone = Scale("dense", torch.full((5,), 7), torch.arange(5))
    found = measured(folder, gone={1: [gone]}, back={1: [gone, Restore("dense", 7)]})
    assert found["back"].kl != pytest.approx(found["gone"].kl, rel=1e-3) and found["gone"].kl > 0


def test_what_needs_super_weights_is_refused_before_measuring(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny("llama")
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    monkeypatch.setattr("surgery.evaluate.ablation.run_ablations", lambda *_: pytest.fail("measured"))
    common = ["ablate", str(source), "--index", "index", "--text", "text.txt", "--conditions", "channels"]
    for option in (["--trace"], ["--stop-words", "3"]):
        assert "no super weight" in surgeon(*common, *option, code=2).stderr
