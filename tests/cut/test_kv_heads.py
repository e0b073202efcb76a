"""Key/value heads go with their query heads: other ones in each layer, as many in all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.cuts import IDS, generated, write
from helpers.tiny_models import opened, tiny_model
from transformers import AutoModelForCausalLM

from surgery.cut.groups import Cut
from surgery.cut.kinds import KINDS
from surgery.cut.kv_heads import check_heads_kept, possible_heads
from surgery.errors import PlanError, UnsupportedModelError
from surgery.plan.kind_plan import KV_HEADS, kv_plan

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
FAMILIES = {
    "llama": HEADS,
    "llama-bias": {**HEADS, "attention_bias": True},
    "qwen2": {**HEADS, "head_dim": 8},
    "qwen3": HEADS,
    "gemma2": HEADS,
    "phi3": HEADS,
    "phi": HEADS,
    "mixtral": HEADS,
    "gpt_oss": HEADS,
    "cohere2": HEADS,
    "olmo": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8},
}
REFUSED = {
    "gpt2": "c_attn",
    "olmo2": "q_norm",
    "deepseek_v3": "kv_lora_rank",
    "falcon-alibi": "alibi",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_go_add_nothing(family: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    dense = tiny_model(family.removesuffix("-bias"), **FAMILIES[family])
    dense.save_pretrained(source)
    meta_model = opened(source).meta_model
    KINDS["kv"].check_model(meta_model)
    part = kv_plan({(number, KV_HEADS): [number % 2, 3] for number in range(6)})
    cut = KINDS["kv"].add(meta_model, Cut((), {}, {}, meta_model.checkpoint.config), part)
    write(source, cut, tmp_path / "cut")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for number, layer in enumerate(dense.get_submodule(meta_model.layers_path)):
        weight = getattr(layer.self_attn, "dense" if family == "phi" else "o_proj").weight.data
        by_group = weight.view(len(weight), 4, -1)
        by_group[:, [group for group in range(4) if group not in (number % 2, 3)]] = 0
    with torch.no_grad():
        expected = dense(IDS, use_cache=False).logits
        assert torch.allclose(model.eval()(IDS, use_cache=False).logits, expected, atol=1e-4)
        assert torch.equal(*generated(model))
    assert model.num_parameters() < dense.num_parameters()


@pytest.mark.parametrize("family", REFUSED)
def test_heads_that_the_config_can_not_say_are_refused(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="heads can't go") as refusal:
        KINDS["kv"].check_model(opened(tmp_path).meta_model)
    assert REFUSED[family] in str(refusal.value)


def test_only_numbers_that_the_config_can_say_are_left(tmp_path: Path) -> None:
    tiny_model("llama", **HEADS).save_pretrained(tmp_path)
    meta_model = opened(tmp_path).meta_model
    assert possible_heads(meta_model) == [2, 1]  # 3 would make 6 query heads, which don't divide 32
    with pytest.raises(PlanError, match="expected 1, 2"):
        check_heads_kept(meta_model, 3)
