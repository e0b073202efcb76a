"""Whole layers go: the written model is the original with these layers bypassed, in every family."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cuts import IDS, generated, write
from helpers.tiny_models import opened, tiny_model
from transformers import AutoModelForCausalLM

from surgery.checkpoint.transformers_model import text_config
from surgery.cut.groups import Cut
from surgery.cut.kinds import KINDS
from surgery.errors import UnsupportedModelError
from surgery.model.meta_model import MetaModel
from surgery.plan.kind_plan import layers_plan

# Families whose configs say of layers what they are, each in another way, and the plain ones.
FAMILIES = [
    *("llama", "qwen2", "gemma3_text", "smollm3", "cohere2", "lfm2", "qwen3_5_text", "olmo_hybrid"),
    *("phi3", "gpt2", "gpt_neo", "opt", "falcon-alibi", "mixtral", "deepseek_v3", "ernie4_5_moe"),
    *("granitemoehybrid", "llama4_text", "gpt_oss", "qwen3_moe"),
]
REFUSED = {  # family -> what of a layer its config can't say
    "diffllama": "lambda_init",
    "jamba": "JambaMambaDecoderLayer",
    "minicpm3": "residual_scale",
    "minimax": "num_hidden_layers",
}
GONE = (1, 3)


def bypass(model: Any, layers_path: str, gone: tuple[int, ...]) -> None:
    """Make layers of a whole transformers model return their input."""
    for number in gone:
        layer = model.get_submodule(layers_path)[number]
        layer.forward = partial(_passing, layer.forward)


def _passing(forward: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    output = forward(hidden, *args, **kwargs)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def without(source: Path) -> tuple[MetaModel, Cut]:
    """The checkpoint's model, and the cut that removes the layers GONE."""
    meta_model = opened(source).meta_model
    nothing = Cut((), {}, {}, meta_model.checkpoint.config)
    return meta_model, KINDS["layers"].add(meta_model, nothing, layers_plan(6, GONE))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_go_are_bypassed(family: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    dense = tiny_model(family)
    dense.save_pretrained(source)
    meta_model, cut = without(source)
    write(source, cut, tmp_path / "cut")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(model.eval().get_submodule(meta_model.layers_path)) == 4
    bypass(dense, meta_model.layers_path, GONE)
    with torch.no_grad():
        expected = dense(IDS, use_cache=False).logits
        assert torch.allclose(model(IDS, use_cache=False).logits, expected, atol=1e-4)
        assert torch.equal(*generated(model))


@pytest.mark.parametrize("family", REFUSED)
def test_what_the_config_can_not_say_is_refused(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
        without(tmp_path)


def test_scores_scaled_by_the_layer_are_refused(tmp_path: Path) -> None:
    tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="scaled by the number"):
        KINDS["layers"].check_model(opened(tmp_path).meta_model)


def test_keys_that_say_something_of_each_layer(tmp_path: Path) -> None:
    layer_types = ["full_attention"] * 3 + ["sliding_attention"] * 3
    changes = {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
        "layer_types": layer_types,
    }
    tiny_model("qwen2", **changes).save_pretrained(tmp_path)
    meta_model, cut = without(tmp_path)
    text = text_config(cut.config)
    assert (text["num_hidden_layers"], text["max_window_layers"]) == (4, 2)
    assert text["layer_types"] == [layer_types[number] for number in (0, 2, 4, 5)]
    assert json.loads((tmp_path / "config.json").read_text()) == meta_model.checkpoint.config
