"""Finding super weights: none in random models, a planted one at its place, the known one in SmolLM2."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import FAMILIES, REAL_TEXT, opened, token_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.engine.streamed_model import StreamedModel
from surgery.index import spike_detector as super_weights
from surgery.index.build import build_index
from surgery.index.calibration import Calibration
from surgery.index.channel_index import ChannelIndex
from surgery.index.spike_detector import PROMPT, PROMPTS, SuperWeightDetector, prompt_ids
from surgery.index.super_weights import SuperWeight, published_coordinates
from surgery.text import TokenBlocks

IDS = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(5), dtype=torch.int32)


def quieten(model: Any, *rows: int) -> None:
    """Let a spike in `rows` make predictions uniform; without it the model has wrong ones on any text."""
    model.get_output_embeddings().weight.data *= 2
    model.get_output_embeddings().weight.data[:, list(rows)] = 0


def index_of(folder: Path, ids: torch.Tensor = IDS) -> ChannelIndex:
    prompts = [ids[0, :12].long(), ids[1, :9].long()]
    return build_index(opened(folder), Calibration(TokenBlocks(ids, "random", 0, 1), prompts))


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_have_none(family: str, save_tiny: Callable[..., Path]) -> None:
    index = index_of(save_tiny(family))
    assert index.super_weights == []


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_planted_weight_is_found_at_its_place(family: str, save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[1].mlp
    layer.down_proj.weight.data[17, 11] = 4000.0
    layer.up_proj.weight.data[11] *= 4
    quieten(model, 17)
    model.save_pretrained(folder)
    index = index_of(folder)
    assert [(w.layer, w.row, w.column) for w in index.super_weights] == [(1, 17, 11)]
    found = index.super_weights[0]
    assert found.value == pytest.approx(4000) and found.rank == 1
    assert found.explained > 0.9 and found.persistence == 1.0
    assert found.ablation["factor"] != 1.0


def test_measured_effect_equals_zeroing_in_the_whole_model(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1].mlp.down_proj.weight.data[17, 11] = 4000.0
    quieten(model, 17)
    model.save_pretrained(folder)
    effect = index_of(folder).super_weights[0].ablation
    model.model.layers[1].mlp.down_proj.weight.data[17, 11] = 0.0
    ids = IDS.long()
    with torch.no_grad():
        logits = model.eval()(ids).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
    assert effect["perplexity_without"] == pytest.approx(nats.exp().item(), rel=1e-4)


def test_catalogue_has_sources_and_the_misprint() -> None:
    text = resources.files("surgery").joinpath("data/published_super_weights.json").read_text()
    catalogue = json.loads(text)
    assert all(entry["source"] in catalogue["sources"] for entry in catalogue["models"])
    olmo = next(entry for entry in catalogue["models"] if entry["model"] == "OLMo-1B-0724")
    assert [2, 1764, 8041] in olmo["coordinates"] and "layer 2" in olmo["note"]
    llama = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008}
    assert (1, 2533, 7890) in published_coordinates({**llama, "max_position_embeddings": 4096})
    assert (2, 3968, 7003) in published_coordinates({**llama, "max_position_embeddings": 2048})
    assert (
        len(catalogue["models"]) == 24
        and sum(len(entry["coordinates"]) for entry in catalogue["models"]) == 45
    )
    assert all(entry["coordinates"] or "note" in entry for entry in catalogue["models"])


PLANTS = {
    "two in one column": [(17, 11, 4000.0), (5, 11, -3500.0)],
    "two in one row": [(17, 11, 4000.0), (17, 30, 3000.0)],
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("plant", PLANTS)
def test_planted_structures_are_found_whole_and_named(
    family: str, plant: str, save_tiny: Callable[..., Path]
) -> None:
    folder = save_tiny(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    mlp = model.model.layers[1].mlp
    for row, column, value in PLANTS[plant]:
        mlp.down_proj.weight.data[row, column] = value
    for column in {column for _, column, _ in PLANTS[plant]}:
        mlp.up_proj.weight.data[column] *= 4
    if plant == "two in one row":  # both channels fire together, or the spike would be one or the other's
        for name in ("gate_proj", "up_proj"):
            getattr(mlp, name).weight.data[30] = getattr(mlp, name).weight.data[11]
    quieten(model, *(row for row, *_ in PLANTS[plant]))
    model.save_pretrained(folder)
    index = index_of(folder)
    found = {(w.row, w.column) for w in index.super_weights}
    assert found == {(row, column) for row, column, _ in PLANTS[plant]}
    expected = {"column 11"} if plant == "two in one column" else {"row 17"}
    assert {w.structure for w in index.super_weights} == expected
    assert all(abs(w.residual_without) < abs(w.residual) for w in index.super_weights)


def test_a_late_spike_is_no_super_weight(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    mlp = model.model.layers[5].mlp
    mlp.down_proj.weight.data[17, 11] = 4000.0
    mlp.up_proj.weight.data[11] *= 4
    model.save_pretrained(folder)
    index = index_of(folder)
    assert index.super_weights == []
    assert [(w.layer, w.row, w.column) for w in index.echoes] == [(5, 17, 11)]


def test_a_spike_that_few_prompts_make_is_an_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = SuperWeight(1, 2, 3, 1.0, 1.0, 500.0, 1.0, 200.0, 1, 0)
    results = [([weight], []), ([], []), ([], [])]

    class One:
        def __init__(self, *_: object) -> None:
            self.found = results.pop()

        def finish(self) -> tuple[list[SuperWeight], list[SuperWeight]]:
            return self.found

    monkeypatch.setattr(super_weights, "PromptDetector", One)
    weights, echoes = SuperWeightDetector(None, [IDS[0]] * 3).finish({})  # type: ignore[arg-type]
    assert weights == [] and [(w.place, w.prompts, w.prompts_tried) for w in echoes] == [(weight.place, 1, 3)]


def test_the_catalogue_is_matched_nearly_too() -> None:
    published = {(1, 788, 2427): "source", (2, 1764, 8041): "misprinted"}
    for place, expected in (
        ((1, 788, 2427), "match"),
        ((1, 9, 2427), "near"),
        ((1, 1764, 8041), "near"),
        ((7, 7, 7), "new"),
    ):
        weight = SuperWeight(*place, 1.0, 1.0, 500.0, 1.0, 200.0, 1, 0)
        assert super_weights._named(weight, [weight], published).catalogue == expected


@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_prompt_finds_exactly_the_known_one_in_smollm2(dtype: torch.dtype, real_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    prompts = prompt_ids(tokenizer, PROMPTS, torch.arange(100, 200)[None])
    assert len(prompts) == 11
    model = StreamedModel(opened(real_model, dtype))
    detector = SuperWeightDetector(model, prompts)
    for number, layer in model.stream_layers(range(len(model.layers))):
        detector.forward(number, layer)
    for one in detector.each:
        weights, echoes = one.finish()
        assert [(w.layer, w.row, w.column) for w in weights] == [(11, 507, 1229)]
        assert {w.layer for w in echoes} >= {28}
    (weight,), _ = detector.finish({})
    assert weight.prompts == weight.prompts_tried == 11
    assert abs(weight.residual_without) < 0.35 * abs(weight.residual)


@pytest.mark.real
def test_smollm2_breaks_without_it(real_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.index.found_structures.PROOF_TOKENS", 24)
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    text = REAL_TEXT.read_text()[:20000]
    blocks = token_blocks(tokenizer, text, "wikipedia.txt", block_size=96, blocks=2, seed=0)
    prompts = [torch.tensor(tokenizer(PROMPT)["input_ids"])]
    index = build_index(opened(real_model), Calibration(blocks, prompts))
    assert [(w.layer, w.row, w.column) for w in index.super_weights] == [(11, 507, 1229)]
    assert index.super_weights[0].ablation["factor"] > 3
