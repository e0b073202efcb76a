"""Finding super weights: none in random models, a planted one where it was planted, the known one in SmolLM2."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, REAL_TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.calibration import token_blocks
from surgery.checkpoint import Checkpoint
from surgery.index import ChannelIndex
from surgery.indexing import RunOptions, build_index
from surgery.super_weights import PROMPT, published_coordinates

IDS = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(5), dtype=torch.int32)


def index_of(folder: Path, ids: torch.Tensor = IDS) -> ChannelIndex:
    from surgery.calibration import TokenBlocks

    run = RunOptions(torch.device("cpu"), torch.float32, 1 << 30)
    return build_index(Checkpoint.open(folder), TokenBlocks(ids, "random", 0, 1), ids[0, :12], run)


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


@pytest.mark.real
@pytest.mark.parametrize("prompt", [PROMPT, "The cat sat on the mat and looked"])
def test_smollm2_has_exactly_the_known_one(prompt: str, real_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    blocks = token_blocks(
        tokenizer, REAL_TEXT.read_text()[:40000], "wikipedia.txt", block_size=512, blocks=2, seed=0
    )
    run = RunOptions(torch.device("cpu"), torch.bfloat16, 1 << 30)
    index = build_index(
        Checkpoint.open(real_model), blocks, torch.tensor(tokenizer(prompt)["input_ids"]), run
    )
    assert [(w.layer, w.row, w.column) for w in index.super_weights] == [(11, 507, 1229)]
    assert index.super_weights[0].ablation["factor"] > 3
    assert {w.layer for w in index.echoes} >= {28}
