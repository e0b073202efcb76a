"""The table of model families: which modules of a decoder layer form its FFNs.

Family-specific entries belong here only.

A *channel* is one index of an FFN's intermediate width. Paths are relative to a decoder layer and use
transformers' module names. A family that is not in the table is inferred from the model
(`surgery.model.infer_family`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from surgery.checkpoint.transformers_model import text_config
from surgery.errors import UnsupportedModelError

DENSE, EXPERT = "dense", "expert."  # FFN names; an expert's name ends in its number


@dataclass(frozen=True)
class FfnSite:
    """Where one FFN is in a decoder layer.

    A layer without these modules does not have the FFN (hybrids, dense layers of an MoE).

    - `in_projections` compute the channel activation u [T, F], which is the input of `down`. Two are gate and
      up. One is an FFN without gate or, with `fused`, gate and up in one tensor.
    - `kind` is "dense", "shared" or "experts". For "experts" the names are stacked parameters [E, ...] of one
      module, otherwise linears (or Conv1D, which stores its weight transposed).
    - `width_key` is the config key of the width. `width_multiplier_key`, for shared experts, is the config
      key of a factor: the FFN's width is the product.
    """

    in_projections: tuple[str, ...]
    down: str
    width_key: str = "intermediate_size"
    kind: str = "dense"
    fused: bool = False
    width_multiplier_key: str | None = None


@dataclass(frozen=True)
class Family:
    """FFN sites of a family.

    `config_changes` are config keys and values to set when a width changes. `not_prunable` is the reason why
    the family can't be pruned, None when it can.
    """

    sites: tuple[FfnSite, ...]
    config_changes: tuple[tuple[str, Any], ...] = ()
    not_prunable: str | None = None


def dense(
    *in_projections: str,
    down: str,
    prefix: str = "mlp.",
    width_key: str = "intermediate_size",
    fused: bool = False,
) -> FfnSite:
    """A dense FFN below `prefix`."""
    return FfnSite(tuple(prefix + name for name in in_projections), prefix + down, width_key, fused=fused)


def gated(prefix: str = "mlp.", width_key: str = "intermediate_size") -> FfnSite:
    """A dense FFN of gate_proj, up_proj and down_proj below `prefix`."""
    return dense("gate_proj", "up_proj", down="down_proj", prefix=prefix, width_key=width_key)


def experts(
    path: str = "mlp.experts", width_key: str = "moe_intermediate_size", row: str = "gate_up_proj"
) -> FfnSite:
    """Routed experts, stacked in parameters of the module at `path`; `row` names the input projection."""
    return FfnSite((f"{path}.{row}",), f"{path}.down_proj", width_key, "experts", fused=row == "gate_up_proj")


def shared(
    prefix: str = "mlp.shared_experts.",
    width_key: str = "moe_intermediate_size",
    width_multiplier_key: str | None = None,
) -> FfnSite:
    """The gated FFN of every token, in addition to the routed experts."""
    return replace(gated(prefix, width_key), kind="shared", width_multiplier_key=width_multiplier_key)


GATED = gated()
FUSED = dense("gate_up_proj", down="down_proj", fused=True)
UNGATED = dense("up_proj", down="down_proj")
GATED_FEED_FORWARD = gated("feed_forward.")
LFM_FEED_FORWARD = dense("w1", "w3", down="w2", prefix="feed_forward.")
DENSE_4H = dense("dense_h_to_4h", down="dense_4h_to_h")
FOUR_TIMES_HIDDEN = "transformers fixes its width at 4 x hidden_size: its config has no key for the width"
GPT2 = Family((dense("c_fc", down="c_proj", width_key="n_inner"),))
GPTJ = Family((dense("fc_in", down="fc_out", width_key="n_inner"),))
QWEN_MOE = Family(
    (GATED, experts(), shared("mlp.shared_expert.", "shared_expert_intermediate_size")),
)
DEEPSEEK = Family((GATED, experts(), shared(width_multiplier_key="n_shared_experts")))
LLAMA4 = Family(
    (
        gated("feed_forward.", "intermediate_size_mlp"),
        experts("feed_forward.experts", "intermediate_size"),
        shared("feed_forward.shared_expert.", "intermediate_size"),
    )
)
GRANITE_MOE = Family(
    (
        experts("block_sparse_moe.experts", "intermediate_size"),
        replace(
            dense(
                "input_linear",
                down="output_linear",
                prefix="shared_mlp.",
                width_key="shared_intermediate_size",
                fused=True,
            ),
            kind="shared",
        ),
    )
)
FAMILIES: dict[str, Family] = {
    # gate, up and down projections
    **dict.fromkeys(
        [
            "cohere",
            "cohere2",
            "cwm",
            "diffllama",
            "ernie4_5",
            "exaone4",
            "gemma",
            "gemma2",
            "gemma3",
            "gemma3_text",
            "granite",
            "granite_swa",
            "helium",
            "hunyuan_v1_dense",
            "hyperclovax",
            "llama",
            "minicpm3",
            "ministral",
            "ministral3",
            "mistral",
            "mistral3",
            "olmo",
            "olmo2",
            "olmo3",
            "olmo_hybrid",
            "qwen2",
            "qwen2_5_vl",
            "qwen2_5_vl_text",
            "qwen2_vl",
            "qwen2_vl_text",
            "qwen3",
            "qwen3_5",
            "qwen3_5_text",
            "qwen3_vl",
            "qwen3_vl_text",
            "seed_oss",
            "smollm3",
            "stablelm",
            "vaultgemma",
            "youtu",
        ],
        Family((GATED,)),
    ),
    "falcon_h1": Family((GATED_FEED_FORWARD,)),
    "lfm2": Family((LFM_FEED_FORWARD,), config_changes=(("block_auto_adjust_ff_dim", False),)),
    # gate and up in one matrix
    "glm": Family((FUSED,)),
    "glm4": Family((FUSED,)),
    "phi3": Family((FUSED,)),
    # no gate
    "apertus": Family((UNGATED,)),
    "arcee": Family((UNGATED,)),
    "biogpt": Family((dense("fc1", down="fc2", prefix=""),)),
    "codegen": GPTJ,
    "falcon": Family((dense("dense_h_to_4h", down="dense_4h_to_h", width_key="ffn_hidden_size"),)),
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": Family((dense("c_fc", down="c_proj"),)),
    "gpt_neox": Family((DENSE_4H,)),
    "gptj": GPTJ,
    "jais2": Family((UNGATED,)),
    "nanochat": Family((dense("fc1", down="fc2"),)),
    "nemotron": Family((UNGATED,)),
    "opt": Family((dense("fc1", down="fc2", prefix="", width_key="ffn_dim"),)),
    "persimmon": Family((DENSE_4H,)),
    "phi": Family((dense("fc1", down="fc2"),)),
    "starcoder2": Family((dense("c_fc", down="c_proj"),)),
    "xglm": Family((dense("fc1", down="fc2", prefix="", width_key="ffn_dim"),)),
    # the width is not in the config
    "bloom": Family((DENSE_4H,), not_prunable=FOUR_TIMES_HIDDEN),
    "mpt": Family((dense("up_proj", down="down_proj", prefix="ffn."),), not_prunable=FOUR_TIMES_HIDDEN),
    # mixtures of experts
    "afmoe": Family((GATED, experts(), shared(width_multiplier_key="num_shared_experts"))),
    "aria_text": Family(
        (
            experts(width_key="intermediate_size"),
            shared(width_key="intermediate_size", width_multiplier_key="moe_num_shared_experts"),
        )
    ),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "dots1": DEEPSEEK,
    "ernie4_5_moe": Family((GATED, experts(), shared(width_multiplier_key="moe_num_shared_experts"))),
    "exaone_moe": Family((GATED, experts(), shared(width_multiplier_key="num_shared_experts"))),
    "flex_olmo": Family((experts(width_key="intermediate_size"),)),
    "glm4_moe": DEEPSEEK,
    "gpt_oss": Family((experts(width_key="intermediate_size"),)),
    "granitemoe": GRANITE_MOE,
    "granitemoehybrid": GRANITE_MOE,
    "granitemoeshared": GRANITE_MOE,
    "jamba": Family((GATED_FEED_FORWARD, experts("feed_forward.experts", "intermediate_size"))),
    "llama4": LLAMA4,
    "llama4_text": LLAMA4,
    "lfm2_moe": Family((LFM_FEED_FORWARD, experts("feed_forward.experts"))),
    "minimax": Family((experts(width_key="intermediate_size"),)),
    "minimax_m2": Family((experts(width_key="intermediate_size"),)),
    "mixtral": Family((experts(width_key="intermediate_size"),)),
    "olmoe": Family((experts(width_key="intermediate_size"),)),
    "phimoe": Family((experts(width_key="intermediate_size"),)),
    "qwen2_moe": QWEN_MOE,
    "qwen3_5_moe": QWEN_MOE,
    "qwen3_5_moe_text": QWEN_MOE,
    "qwen3_moe": QWEN_MOE,
    "qwen3_next": QWEN_MOE,
    "qwen3_vl_moe": QWEN_MOE,
    "solar_open": DEEPSEEK,
}
NO_FFN = {
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "xlstm", "rwkv"),
        "its layers are state-space or recurrent blocks without an FFN",
    ),
    **dict.fromkeys(
        ("zamba", "zamba2"), "its layers share one block's weights, so a layer can't be processed alone"
    ),
    **dict.fromkeys(
        (
            "bert",
            "roberta",
            "electra",
            "xlm-roberta",
            "camembert",
            "modernbert",
            "deberta",
            "deberta-v2",
            "albert",
        ),
        "it is an encoder",
    ),
    "recurrent_gemma": "its recurrent layers are not supported",
    "bitnet": "a norm over its FFN channels mixes them, so removing one changes all others",
}


def family_of(config: dict[str, Any], where: str) -> Family | None:
    """The table's entry for a config.json; None for a family that has to be inferred.

    Raises UnsupportedModelError, from the config alone, for models known to be unsupported.
    """
    name = str(config.get("model_type") or "")
    text = text_config(config)
    if not name:
        raise UnsupportedModelError("the config names no model_type", where=where)
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(
            "encoder-decoder models are not supported",
            where=where,
            expected="a decoder-only model",
            found=name,
            next_step="use a decoder-only model, such as Llama, Qwen or Gemma",
        )
    if name in NO_FFN:
        raise UnsupportedModelError(
            f"{name} can't be indexed: {NO_FFN[name]}",
            where=where,
            next_step="use a decoder-only transformer; docs/models.md lists the families",
        )
    if text.get("num_kv_shared_layers"):
        raise UnsupportedModelError(
            f"{name} shares keys and values across layers, so the backward pass can't run layer by layer",
            where=where,
            expected="num_kv_shared_layers 0",
            found=str(text["num_kv_shared_layers"]),
            next_step="use a family without shared keys and values, such as Gemma 3",
        )
    return FAMILIES.get(name) or FAMILIES.get(str(text.get("model_type")))


def check_prunable(config: dict[str, Any], where: str) -> None:
    """Raise UnsupportedModelError for a checkpoint with per-layer widths or a family without a width key."""
    family = family_of(config, where)
    if text_config(config).get("per_layer_config"):
        raise UnsupportedModelError(
            "this checkpoint's layers have widths of their own already",
            where=where,
            found="per_layer_config",
            next_step="prune the checkpoint it was pruned from, to the size you want",
        )
    if family is not None and family.not_prunable:
        raise UnsupportedModelError(
            f"{config['model_type']} can be indexed but not pruned: {family.not_prunable}",
            where=where,
            next_step="use `surgeon index` to analyse it, or prune a family with a width key in its config",
        )
