"""Whole attentions and FFNs go: the written model is the original in which they add nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cuts import IDS, generated, write
from helpers.tiny_models import opened, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from surgery.cut.groups import Cut
from surgery.cut.kinds import KINDS
from surgery.cut.sublayers import MODELING_TEMPLATE, SUBLAYERS
from surgery.errors import PlanError, UnsupportedModelError
from surgery.plan.kind_plan import check_something_stays, layers_plan, sublayer_plan

SHARED = ["llama", "qwen3", "gemma2", "olmo2", "phi", "phi3", "gpt2", "gpt_neox"]
FAMILIES = [("attention", name) for name in [*SHARED, "opt", "mixtral", "gpt_oss"]]
FAMILIES += [("whole-ffn", name) for name in [*SHARED, "cohere", "starcoder2"]]
GONE = (0, 2, 3)


@pytest.mark.parametrize(("kind", "family"), FAMILIES)
def test_what_goes_adds_nothing(kind: str, family: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    dense = tiny_model(family)
    dense.save_pretrained(source)
    meta_model = opened(source).meta_model
    assert SUBLAYERS[kind].layers(meta_model) == list(range(6))
    cut = Cut((), {}, {}, meta_model.checkpoint.config)
    cut = KINDS[kind].add(meta_model, cut, sublayer_plan(kind, range(6), GONE))
    cut = KINDS["layers"].add(meta_model, cut, layers_plan(6, [1]))
    write(source, cut, tmp_path / "cut")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    layers = dense.get_submodule(meta_model.layers_path)
    for group in cut.groups:
        for part in group.consumers if group.layer in GONE else ():
            layers[group.layer].get_parameter(part.parameter).data.zero_()
    layers[1].forward = lambda hidden, *_, **__: hidden
    with torch.no_grad():
        expected = dense(IDS, use_cache=False).logits
        assert torch.allclose(model.eval()(IDS, use_cache=False).logits, expected, atol=1e-4)
        assert torch.equal(*generated(model))
    left = sum(one.numel() for one in model.parameters())
    assert left < sum(one.numel() for one in dense.parameters()) - 3 * 32 * 32


def test_the_written_code_counts_tokens_in_an_empty_cache_too() -> None:
    code: dict[str, Any] = {}
    exec(
        MODELING_TEMPLATE.format(
            name="LlamaForCausalLM", layers="model.layers", attention="self_attn", ffn="mlp"
        ),
        code,
    )
    cache = DynamicCache()
    assert not cache  # an empty cache is falsy
    code["NoAttention"](0)(torch.zeros(1, 3, 8), past_key_values=cache)
    assert cache.get_seq_length(0) == 3


def test_attention_and_ffn_of_different_layers(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "source")
    meta_model = opened(tmp_path / "source").meta_model
    cut = Cut((), {}, {}, meta_model.checkpoint.config)
    for kind, gone in (("attention", [1, 4]), ("whole-ffn", [2, 5])):
        cut = KINDS[kind].add(meta_model, cut, sublayer_plan(kind, range(6), gone))
    write(tmp_path / "source", cut, tmp_path / "cut")
    for number in (1, 4):
        dense.model.layers[number].self_attn.o_proj.weight.data.zero_()
    for number in (2, 5):
        dense.model.layers[number].mlp.down_proj.weight.data.zero_()
    with torch.no_grad():
        expected = dense(IDS).logits
        for how in ({}, {"trust_remote_code": True}):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", **how).eval()
            assert torch.allclose(model(IDS).logits, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["opt", "mixtral"])  # not a module of its own; experts
def test_an_ffn_that_cannot_go_is_refused(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no dense FFN was found"):
        KINDS["whole-ffn"].check_model(opened(tmp_path).meta_model)


def test_a_layer_keeps_its_attention_or_its_ffn() -> None:
    with pytest.raises(PlanError, match="neither attention nor FFN") as caught:
        check_something_stays([1, 3], [2, 3])
    assert caught.value.found == "3"


def test_a_model_without_attention_in_its_layers_is_refused(tmp_path: Path) -> None:
    tiny_model("lfm2", layer_types=["conv"] * 6).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no attention"):
        KINDS["attention"].check_model(opened(tmp_path).meta_model)
