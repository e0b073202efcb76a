"""Where each model family keeps its feed-forward networks: one table, and nothing about families anywhere else.

A *channel* is one index of an FFN's intermediate width. Paths are relative to a decoder layer, in the module names of
transformers. A family that is not in the table is worked out from the model itself (`surgery.inference`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from surgery.errors import UnsupportedModelError


@dataclass(frozen=True)
class FfnSite:
    """One FFN of a decoder layer; layers that lack its modules (hybrids, dense layers of an MoE) just don't have it.

    `rows` produce the channel activation u [T, F], `down` takes it in. Two rows are gate and up; one is an FFN without
    gate, or with `fused` gate and up in one tensor. Of `kind` "experts" the names are stacked parameters [E, ...] of
    one module, otherwise linears (or Conv1D, which stores its weight transposed). `width_key` is the config key that
    holds the width, `times` the one holding how many times that width this FFN is wide (shared experts).
    """

    rows: tuple[str, ...]
    down: str
    width_key: str = "intermediate_size"
    kind: str = "dense"
    fused: bool = False
    times: str | None = None


@dataclass(frozen=True)
class Family:
    """FFN sites of a family; `config_changes` are keys that must change along with a width; `fixed` says why not to cut."""

    sites: tuple[FfnSite, ...]
    config_changes: tuple[tuple[str, Any], ...] = ()
    fixed: str | None = None


def dense(
    *rows: str, down: str, prefix: str = "mlp.", width_key: str = "intermediate_size", fused: bool = False
) -> FfnSite:
    """A dense FFN below `prefix`."""
    return FfnSite(tuple(prefix + row for row in rows), prefix + down, width_key, fused=fused)


def gated(prefix: str = "mlp.", width_key: str = "intermediate_size") -> FfnSite:
    """gate_proj, up_proj and down_proj below `prefix`."""
    return dense("gate_proj", "up_proj", down="down_proj", prefix=prefix, width_key=width_key)


def experts(
    path: str = "mlp.experts", width_key: str = "moe_intermediate_size", row: str = "gate_up_proj"
) -> FfnSite:
    """Routed experts: stacked parameters of the module at `path`."""
    return FfnSite((f"{path}.{row}",), f"{path}.down_proj", width_key, "experts", fused=row == "gate_up_proj")


def shared(
    prefix: str = "mlp.shared_experts.", width_key: str = "moe_intermediate_size", times: str | None = None
) -> FfnSite:
    """The gated FFN every token passes beside the routed experts."""
    return replace(gated(prefix, width_key), kind="shared", times=times)


GATED = gated()
FUSED = dense("gate_up_proj", down="down_proj", fused=True)
UNGATED = dense("up_proj", down="down_proj")
GATED_FEED_FORWARD = gated("feed_forward.")
LFM_FEED_FORWARD = dense("w1", "w3", down="w2", prefix="feed_forward.")
DENSE_4H = dense("dense_h_to_4h", down="dense_4h_to_h")
FOUR_TIMES_HIDDEN = "transformers builds it 4 x hidden_size wide: its config has no width to change"
GPT2 = Family((dense("c_fc", down="c_proj", width_key="n_inner"),))
GPTJ = Family((dense("fc_in", down="fc_out", width_key="n_inner"),))
QWEN_MOE = Family(
    (GATED, experts(), shared("mlp.shared_expert.", "shared_expert_intermediate_size")),
)
DEEPSEEK = Family((GATED, experts(), shared(times="n_shared_experts")))
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
    "bloom": Family((DENSE_4H,), fixed=FOUR_TIMES_HIDDEN),
    "mpt": Family((dense("up_proj", down="down_proj", prefix="ffn."),), fixed=FOUR_TIMES_HIDDEN),
    # mixtures of experts
    "afmoe": Family((GATED, experts(), shared(times="num_shared_experts"))),
    "aria_text": Family(
        (
            experts(width_key="intermediate_size"),
            shared(width_key="intermediate_size", times="moe_num_shared_experts"),
        )
    ),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "dots1": DEEPSEEK,
    "ernie4_5_moe": Family((GATED, experts(), shared(times="moe_num_shared_experts"))),
    "exaone_moe": Family((GATED, experts(), shared(times="num_shared_experts"))),
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
        ("zamba", "zamba2"), "its layers share one block's weights, so that no layer stands alone"
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
    "bitnet": "a norm over its FFN channels mixes them, so that removing one changes all others",
}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model: a multimodal one nests it."""
    for key in ("text_config", "llm_config", "language_config"):
        nested = config.get(key)
        if isinstance(nested, dict):
            return nested
    return config


def family_of(config: dict[str, Any], where: str) -> Family | None:
    """The table's entry for a config.json; None for a family to be inferred.

    Raises UnsupportedModelError, from the config alone, for what is known not to work.
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
            next_step="use a decoder-only transformer; `surgeon index --help` and the README list families",
        )
    if text.get("num_kv_shared_layers"):
        raise UnsupportedModelError(
            f"{name} shares keys and values across layers, so that no layer's gradient stands alone",
            where=where,
            expected="num_kv_shared_layers 0",
            found=str(text["num_kv_shared_layers"]),
            next_step="use a family without shared keys and values, such as Gemma 3",
        )
    return FAMILIES.get(name) or FAMILIES.get(str(text.get("model_type")))


def check_prunable(config: dict[str, Any], where: str) -> None:
    """Raise UnsupportedModelError for a family whose width no config key controls."""
    family = family_of(config, where)
    if text_config(config).get("per_layer_config"):
        raise UnsupportedModelError(
            "this checkpoint's layers have widths of their own already",
            where=where,
            found="per_layer_config",
            next_step="prune the checkpoint it was made from, at the size you want",
        )
    if family is not None and family.fixed:
        raise UnsupportedModelError(
            f"{config['model_type']} can be indexed but not pruned: {family.fixed}",
            where=where,
            next_step="use `surgeon index` to study it; prune a family with a width in its config",
        )
