"""Checkpoints that see as well as read: the language model is cut, everything else passes through byte for
byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.masking import IDS, kept_channels, mask
from helpers.model_families import TINY
from helpers.tiny_models import CALIBRATION, byte_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from surgery.checkpoint.reader import Checkpoint
from surgery.model.meta_model import MetaModel

# As many layers as the language model, so that the wrong list of layers could be taken.
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 6, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            **TINY,
            "model_type": "gemma3_text",
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
        },
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 1,
    },
    "qwen2_5_vl": {
        "text_config": {**TINY, **MROPE, "model_type": "qwen2_5_vl_text"},
        "vision_config": {**QWEN_VISION, "model_type": "qwen2_5_vl"},
    },
    "qwen3_vl": {
        "text_config": {**TINY, **MROPE, "model_type": "qwen3_vl_text"},
        "vision_config": {**QWEN_VISION, "model_type": "qwen3_vl", "deepstack_visual_indexes": [0, 1]},
    },
    "llama4": {
        "text_config": {
            **TINY,
            "model_type": "llama4_text",
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
        },
        "vision_config": {
            **VISION,
            "model_type": "llama4_vision_model",
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "vision_output_dim": 16,
        },
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_language_model_is_cut(name: str, tmp_path: Path, surgeon: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **CONFIGS[name])).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    source, cut = tmp_path / "source", tmp_path / "cut"
    model.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    surgeon(
        "prune",
        str(source),
        "--sparsity",
        "0.5",
        "--multiple-of",
        "8",
        "--repair",
        "none",
        "--out",
        "cut",
        *CALIBRATION,
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (source, cut))
    changed = {key for key in before if before[key].shape != after[key].shape}
    assert changed and all("mlp" in key or "feed_forward" in key for key in changed)
    assert not any("vision" in key or "visual" in key for key in changed)
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - changed)
    assert before.keys() == after.keys()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, cut))
    assert new["vision_config"] == old["vision_config"]
    widths = json.loads((cut / "surgeon.json").read_text())["plan"]["widths"]
    assert new["text_config"] == {**old["text_config"], **{k: c["after"] for k, c in widths.items()}}
    pruned, info = AutoModelForImageTextToText.from_pretrained(cut, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    meta_model = MetaModel(Checkpoint.open(source), torch.float32)
    mask(
        model,
        meta_model.family.sites,
        meta_model.layers_path,
        kept_channels(json.loads((cut / "surgeon.json").read_text())),
    )
    with torch.no_grad():
        difference = pruned.eval()(input_ids=IDS).logits - model(input_ids=IDS).logits
    assert difference.abs().max() < 1e-4
    assert not any(
        "vision" in stored or "visual" in stored for a in meta_model.other_parameters for stored in a.stored
    )
