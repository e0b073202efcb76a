"""What vLLM 0.33.0 asks of a folder, written down from its source, against folders that surgeon wrote.

vLLM itself does not run here. Sources: `models/llama.py`, `models/qwen2.py`, `models/mistral.py` (sizes from
the config), `parameter.py` (a weight is narrowed to the size of its parameter, then compared).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION
from safetensors.torch import load_file
from transformers import AutoConfig

UNEVEN = ("--sparsity", "0.5", "--allocation", "score", "--multiple-of", "4")


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape that vLLM's Llama, Mistral and Qwen2 build, before they fuse any of them."""
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.intermediate_size
    own = None if config.model_type == "qwen2" else getattr(config, "head_dim", None)
    head = own or hidden // heads
    found = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        groups = config.num_key_value_heads * head
        matrices = {
            "self_attn.q_proj": (heads * head, hidden),
            "self_attn.k_proj": (groups, hidden),
            "self_attn.v_proj": (groups, hidden),
            "self_attn.o_proj": (hidden, heads * head),
            "mlp.gate_proj": (width, hidden),
            "mlp.up_proj": (width, hidden),
            "mlp.down_proj": (hidden, width),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found |= {f"{prefix}{name}.weight": shape for name, shape in matrices.items()}
        if config.model_type == "qwen2":
            found |= {
                f"{prefix}self_attn.{n}_proj.bias": found[f"{prefix}self_attn.{n}_proj.weight"][:1]
                for n in "qkv"
            }
    return found


def narrowed(parameter: tuple[int, ...], weight: torch.Tensor) -> torch.Tensor:
    """The part of a stored weight that vLLM's loaders take on one GPU; raises RuntimeError past its end."""
    for dimension, size in enumerate(parameter):
        weight = weight.narrow(dimension, 0, size)
    return weight


def cut(source: Path, surgeon: Callable[..., Any], *options: str) -> tuple[Any, dict[str, torch.Tensor]]:
    surgeon("prune", str(source), "--repair", "none", "--out", "cut", *options, *CALIBRATION)
    return AutoConfig.from_pretrained("cut"), load_file("cut/model.safetensors")


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_uniform_folders_have_the_shapes_that_native_classes_build(
    family: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny(family)
    config, tensors = cut(source, surgeon, "--intermediate-size", "32")
    assert config.intermediate_size == 32 and config.hidden_act == "silu"
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes(config)


def test_an_uneven_folder_fails_to_load_and_is_never_cut_off(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    """vLLM gives every layer the config's one width. A wider layer would lose channels without a word, so
    that width must be the widest layer's; a narrower layer then ends the load with an error.
    """
    config, tensors = cut(save_tiny("llama"), surgeon, *UNEVEN)
    raw = json.loads(Path("cut/config.json").read_text())
    assert raw["per_layer_config"] and "AutoModelForCausalLM" in raw["auto_map"]
    built, failed = shapes(config), []
    assert {*built} == {*tensors}
    for name, tensor in tensors.items():
        try:
            taken = narrowed(built[name], tensor)
        except RuntimeError:
            failed.append(name)
            continue
        assert taken.shape == tensor.shape, name
    assert failed and all(".mlp." in name for name in failed)


def test_padded_folders_are_uniform(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    config, tensors = cut(save_tiny("llama"), surgeon, *UNEVEN, "--pad")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes(config)
