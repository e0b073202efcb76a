"""GGUF architectures: under which names and with which config transformers has the same model.

Tensors and keys that are not in an architecture's tables are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from surgery.checkpoint.gguf_layouts import Change, by_group, row, transpose, unpermute
from surgery.checkpoint.gguf_metadata import Metadata
from surgery.checkpoint.gguf_names import (
    ATTENTION,
    EXPERTS,
    FALCON,
    FFN_NORM,
    GATED,
    HEAD_NORMS,
    MIXTRAL_EXPERTS,
    OUTSIDE,
    SANDWICH,
    SHARED_EXPERT,
)

Configure = Callable[[Metadata, dict[str, Any]], None]  # completes the config fields

RMS_EPS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
ROPE_TYPES = ("default", "linear", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class GgufFamily:
    """How an architecture of llama.cpp is told to transformers.

    - `names`: stored name -> name in transformers; `keys`: metadata key -> config key, numbers.
    - `changes`: stored name -> what makes transformers' layout of it; `norms_less_one`: norms are stored
      plus 1.
    - `rope_types`: what the model class computes; `partial_rotary`: whether it turns a part of a head only.
    """

    model_type: str
    names: dict[str, str]
    keys: dict[str, str]
    configure: Configure | None = None
    changes: dict[str, Change] = field(default_factory=dict)
    norms_less_one: bool = False
    rope_types: tuple[str, ...] = ROPE_TYPES
    partial_rotary: bool = False


def _layer_biases(meta: Metadata, *parts: str) -> list[bool]:
    return [f"blk.0.{part}.bias" in meta.file.tensors for part in parts]


def _llama(meta: Metadata, config: dict[str, Any]) -> None:
    q, _, _, output = _layer_biases(meta, "attn_q", "attn_k", "attn_v", "attn_output")
    if q and not output:
        config["model_type"] = "qwen2"  # the same model, with biases of queries, keys and values only
    else:
        config["attention_bias"] = q
        config["mlp_bias"] = any(_layer_biases(meta, "ffn_gate", "ffn_up", "ffn_down"))


def _experts(meta: Metadata, config: dict[str, Any], count_key: str, width_key: str) -> None:
    stacked = meta.file.tensors.get("blk.0.ffn_down_exps.weight")
    config[count_key] = meta.count("expert_count")
    config["num_experts_per_tok"] = meta.count("expert_used_count")
    if config["num_experts_per_tok"] > config[count_key]:
        meta.refuse("expert_used_count", f"at most {config[count_key]}, the number of experts")
    config[width_key] = stacked.shape[-1] if stacked else config["intermediate_size"]
    stated = meta.get("expert_feed_forward_length")
    if stated not in (None, 0, config[width_key]):
        meta.refuse("expert_feed_forward_length", f"{config[width_key]}, as blk.0.ffn_down_exps.weight has")


def _mixtral(meta: Metadata, config: dict[str, Any]) -> None:
    _experts(meta, config, "num_local_experts", "intermediate_size")
    if meta.get("expert_weights_norm", True) is not True:
        meta.refuse("expert_weights_norm", "true")


def _qwen_moe(meta: Metadata, config: dict[str, Any]) -> None:
    _experts(meta, config, "num_experts", "moe_intermediate_size")
    config["norm_topk_prob"] = bool(meta.get("expert_weights_norm", config["model_type"] == "qwen3_moe"))
    shared = meta.file.tensors.get("blk.0.ffn_down_shexp.weight")
    stated = meta.get("expert_shared_feed_forward_length")
    if config["model_type"] == "qwen2_moe" and shared:
        config["shared_expert_intermediate_size"] = shared.shape[-1]
        if stated not in (None, 0, shared.shape[-1]):
            meta.refuse("expert_shared_feed_forward_length", f"{shared.shape[-1]}")


def _phi3(meta: Metadata, config: dict[str, Any]) -> None:
    config["sliding_window"] = meta.number("attention.sliding_window", 0) or None
    rope = config["rope_parameters"]
    if rope["rope_type"] == "longrope":
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]


def _layer_types(meta: Metadata, config: dict[str, Any], period: int) -> None:
    """layer_types and sliding_window: of every `period` layers, the last one has no window."""
    layers = config["num_hidden_layers"]
    pattern = meta.file.metadata.get(meta.prefix + "attention.sliding_window_pattern", period)
    meta.read.add("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        sliding = [bool(value) for value in pattern]
    else:
        sliding = [bool(pattern) and i % pattern < pattern - 1 for i in range(layers)]
    if len(sliding) != layers:
        meta.refuse("attention.sliding_window_pattern", f"{layers} values")
    window = meta.number("attention.sliding_window", 4096 if config["model_type"] == "gemma2" else 0)
    config["sliding_window"] = window or config["max_position_embeddings"]  # transformers wants a number
    config["layer_types"] = [
        "sliding_attention" if window and is_sliding else "full_attention" for is_sliding in sliding
    ]


def _gemma(meta: Metadata, config: dict[str, Any]) -> None:
    """Gemma 2 and 3: windows, soft caps, and the attention's scale s as query_pre_attn_scalar = 1 / s^2.

    Without a scale in the file llama.cpp takes the head's width, but hidden size / heads for the 27B models,
    which it knows by their number of layers.
    """
    gemma3 = config["model_type"] == "gemma3_text"
    _layer_types(meta, config, 6 if gemma3 else 2)
    config["attn_logit_softcapping"] = meta.number("attn_logit_softcapping", 0 if gemma3 else 50.0) or None
    config["final_logit_softcapping"] = meta.number("final_logit_softcapping", 0 if gemma3 else 30.0) or None
    published = config["num_hidden_layers"] == (62 if gemma3 else 46)
    width = config["hidden_size"] / config["num_attention_heads"] if published else config["head_dim"]
    scale = meta.number("attention.scale", 0.0)
    scalar = 1 / scale**2 if scale else width
    config["query_pre_attn_scalar"] = round(scalar) if abs(scalar - round(scalar)) < 1e-3 else scalar
    if gemma3:
        config["rope_parameters"] = {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": float(meta.number("rope.freq_base_swa", 10000.0)),
            },
        }


def _stablelm(meta: Metadata, config: dict[str, Any]) -> None:
    config["use_qkv_bias"] = _layer_biases(meta, "attn_q")[0]
    config["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in meta.file.tensors
    meta.get("use_parallel_residual")  # converters write true where the config has none; llama.cpp ignores it


def _starcoder2(_: Metadata, config: dict[str, Any]) -> None:
    config |= {"use_bias": True, "sliding_window": None}


def _gpt2(meta: Metadata, config: dict[str, Any]) -> None:
    config["n_inner"] = config.pop("intermediate_size")
    if config.pop("num_key_value_heads") != config["num_attention_heads"]:
        meta.refuse("attention.head_count_kv", f"{config['num_attention_heads']}, as attention.head_count")


def _falcon(meta: Metadata, config: dict[str, Any]) -> None:
    groups = config.pop("num_key_value_heads")
    two_norms = "blk.0.attn_norm_2.weight" in meta.file.tensors
    if groups != 1 and not two_norms:
        meta.refuse("attention.head_count_kv", "1, or the tensors blk.*.attn_norm_2.weight")
    config |= {"num_kv_heads": groups, "multi_query": groups == 1, "new_decoder_architecture": two_norms}
    config["ffn_hidden_size"] = config.pop("intermediate_size")


QUERY_KEY = {
    "blk.{}.attn_q": unpermute("num_attention_heads"),
    "blk.{}.attn_k": unpermute("num_key_value_heads"),
}
LAYERNORM_EPS = "attention.layer_norm_epsilon"
FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama", OUTSIDE | ATTENTION | FFN_NORM | GATED, RMS_EPS, _llama, changes=QUERY_KEY),
    "llama with experts": GgufFamily(
        "mixtral", OUTSIDE | ATTENTION | FFN_NORM | MIXTRAL_EXPERTS, RMS_EPS, _mixtral, changes=QUERY_KEY
    ),
    "qwen2": GgufFamily("qwen2", OUTSIDE | ATTENTION | FFN_NORM | GATED, RMS_EPS),
    "qwen3": GgufFamily("qwen3", OUTSIDE | ATTENTION | HEAD_NORMS | FFN_NORM | GATED, RMS_EPS),
    "qwen2moe": GgufFamily(
        "qwen2_moe",
        OUTSIDE | ATTENTION | FFN_NORM | EXPERTS | SHARED_EXPERT,
        RMS_EPS,
        _qwen_moe,
        changes={"blk.{}.ffn_gate_inp_shexp": row},
    ),
    "qwen3moe": GgufFamily(
        "qwen3_moe", OUTSIDE | ATTENTION | HEAD_NORMS | FFN_NORM | EXPERTS, RMS_EPS, _qwen_moe
    ),
    "phi3": GgufFamily(
        "phi3",
        OUTSIDE
        | FFN_NORM
        | {
            "blk.{}.attn_qkv": "model.layers.{}.self_attn.qkv_proj",
            "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
            "blk.{}.ffn_up": "model.layers.{}.mlp.gate_up_proj",
            "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
        },
        RMS_EPS,
        _phi3,
        rope_types=("default", "longrope"),
        partial_rotary=True,
    ),
    "gemma": GgufFamily("gemma", OUTSIDE | ATTENTION | FFN_NORM | GATED, RMS_EPS, norms_less_one=True),
    "gemma2": GgufFamily(
        "gemma2", OUTSIDE | ATTENTION | SANDWICH | GATED, RMS_EPS, _gemma, norms_less_one=True
    ),
    "gemma3": GgufFamily(
        "gemma3_text",
        OUTSIDE | ATTENTION | HEAD_NORMS | SANDWICH | GATED,
        RMS_EPS,
        _gemma,
        norms_less_one=True,
    ),
    "stablelm": GgufFamily(
        "stablelm",
        OUTSIDE | ATTENTION | FFN_NORM | GATED,
        {LAYERNORM_EPS: "layer_norm_eps"},
        _stablelm,
        partial_rotary=True,
    ),
    "starcoder2": GgufFamily(
        "starcoder2",
        OUTSIDE
        | ATTENTION
        | FFN_NORM
        | {"blk.{}.ffn_up": "model.layers.{}.mlp.c_fc", "blk.{}.ffn_down": "model.layers.{}.mlp.c_proj"},
        {LAYERNORM_EPS: "norm_epsilon"},
        _starcoder2,
    ),
    "nemotron": GgufFamily(
        "nemotron",
        OUTSIDE
        | ATTENTION
        | FFN_NORM
        | {
            "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
            "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
        },
        {LAYERNORM_EPS: "norm_eps"},
        norms_less_one=True,
        partial_rotary=True,
    ),
    "gpt2": GgufFamily(
        "gpt2",
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
            "blk.{}.attn_norm": "transformer.h.{}.ln_1",
            "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
            "blk.{}.attn_output": "transformer.h.{}.attn.c_proj",
            "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
            "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc",
            "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
        },
        {LAYERNORM_EPS: "layer_norm_epsilon"},
        _gpt2,
        changes={f"blk.{{}}.{n}": transpose for n in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")},
        rope_types=(),
    ),
    "falcon": GgufFamily(
        "falcon",
        FALCON | {"blk.{}.attn_norm": "transformer.h.{}.input_layernorm"},
        {LAYERNORM_EPS: "layer_norm_epsilon"},
        _falcon,
        rope_types=("default", "linear", "yarn", "longrope"),
    ),
    "falcon with two norms": GgufFamily(
        "falcon",
        FALCON
        | {
            "blk.{}.attn_norm": "transformer.h.{}.ln_mlp",
            "blk.{}.attn_norm_2": "transformer.h.{}.ln_attn",
        },
        {LAYERNORM_EPS: "layer_norm_epsilon"},
        _falcon,
        changes={"blk.{}.attn_qkv": by_group},
        rope_types=("default", "linear", "yarn", "longrope"),
    ),
}
