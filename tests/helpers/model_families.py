"""Tiny configs of every family the tests cover: the README's table is made from this list (`python
tests/helpers/model_families.py`).
"""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
WINDOW = {"sliding_window": 8}
# Families that reject one of the common keys, or call it otherwise.
GPT = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 128, "n_inner": 48}
NO_HEAD_DIM = {"head_dim": None}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": None,
}
HYBRID = ["linear_attention", "linear_attention", "full_attention"] * 2
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # name of the variant -> config; model_type is the name unless given
    "llama": {"tie_word_embeddings": False},
    "llama-tied-bias": {"model_type": "llama", "tie_word_embeddings": True, "mlp_bias": True},
    "mistral": WINDOW,
    "ministral": WINDOW,
    "ministral3": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_5_text": {**LINEAR, "layer_types": HYBRID},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmo_hybrid": {**LINEAR, "layer_types": HYBRID, "linear_num_value_heads": 2},
    "gemma": {},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 8},
    "vaultgemma": WINDOW,
    "smollm3": {},
    "granite": {},
    "cohere": {},
    "cohere2": WINDOW,
    "stablelm": {},
    "exaone4": WINDOW,
    "seed_oss": {},
    "helium": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "diffllama": {},
    "cwm": WINDOW,
    "minicpm3": LATENT,
    "youtu": LATENT,
    "falcon_h1": MAMBA,
    "lfm2": {
        "layer_types": ["conv", "conv", "full_attention"] * 2,
        "block_multiple_of": 8,
        "block_auto_adjust_ff_dim": True,
        "head_dim": None,
    },
    "phi3": {"head_dim": None},
    "glm": {},
    "glm4": {},
    "apertus": {},
    "arcee": {},
    "biogpt": NO_HEAD_DIM,
    "codegen": {**GPT, "rotary_dim": 4, "n_ctx": 128},
    "falcon": {**NO_HEAD_DIM, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
    "falcon-alibi": {
        "model_type": "falcon",
        **NO_HEAD_DIM,
        "new_decoder_architecture": False,
        "alibi": True,
        "multi_query": False,
        "ffn_hidden_size": 48,
    },
    "gpt2": GPT,
    "gpt_bigcode": {**GPT, "multi_query": True},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 3]],
        "num_layers": 6,
        "num_heads": 4,
        "window_size": 8,
    },
    "gpt_neox": NO_HEAD_DIM,
    "gptj": {**GPT, "rotary_dim": 4},
    "nanochat": {},
    "nemotron": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "head_dim": None},
    "persimmon": {},
    "phi": NO_HEAD_DIM,
    "starcoder2": {**WINDOW},
    "xglm": {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 6, "pad_token_id": 1},
    # mixtures of experts
    "mixtral": LOCAL_MOE,
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    "qwen3_moe": MOE,
    "qwen3_next": {**MOE, **LINEAR, "shared_expert_intermediate_size": 40, "layer_types": HYBRID},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**DEEPSEEK, **LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**DEEPSEEK, **LATENT},
    "glm4_moe": DEEPSEEK,
    "dots1": DEEPSEEK,
    "solar_open": DEEPSEEK,
    "gpt_oss": {**LOCAL_MOE, **WINDOW},
    "phimoe": LOCAL_MOE,
    "minimax": {**LOCAL_MOE, "block_size": 8},
    "minimax_m2": LOCAL_MOE,
    "ernie4_5_moe": {
        **MOE,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
    },
    "exaone_moe": {**MOE, "num_shared_experts": 1},
    "afmoe": {**MOE, "num_shared_experts": 1, "num_dense_layers": 2, **WINDOW},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2},
    "granitemoe": LOCAL_MOE,
    "granitemoeshared": {**LOCAL_MOE, "shared_intermediate_size": 40},
    "granitemoehybrid": {
        **LOCAL_MOE,
        **MAMBA,
        "shared_intermediate_size": 40,
        "layer_types": ["mamba", "attention"] * 3,
    },
    "granitemoehybrid-dense": {
        "model_type": "granitemoehybrid",
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        **MAMBA,
        "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention"] * 3,
    },
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 40,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
    },
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "lfm2_moe": {
        **MOE,
        "num_dense_layers": 2,
        "layer_types": ["conv", "conv", "full_attention"] * 2,
        "head_dim": None,
    },
}


# Families whose config has no width to change.
INDEX_ONLY: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 6, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 6, "max_seq_len": 128},
}


def config_fields(name: str) -> dict[str, Any]:
    """All fields of a variant's config; a head_dim of None is left to the family."""
    fields = {"model_type": name, **TINY, **{**CONFIGS, **INDEX_ONLY}[name]}
    return {key: value for key, value in fields.items() if (key, value) != ("head_dim", None)}


def readme_table() -> str:
    """The README's table of tested families, by the shape of their FFN and the config keys that hold its
    width.
    """
    from surgery.model.families import FAMILIES, FfnSite

    def shape(site: FfnSite) -> str:
        rows = (
            "gate and up fused" if site.fused else "gate, up" if len(site.in_projections) == 2 else "no gate"
        )
        return f"experts, {rows}" if site.kind == "experts" else rows

    groups: dict[tuple[str, str], list[str]] = {}
    for name in [*CONFIGS, *INDEX_ONLY]:
        family = {**CONFIGS, **INDEX_ONLY}[name].get("model_type", name)
        sites = FAMILIES[family].sites
        kinds = {site.kind for site in sites}
        shapes = " + ".join(
            dict.fromkeys(
                shape(s) + (" (shared)" if s.kind == "shared" and "experts" in kinds else "") for s in sites
            )
        )
        keys = ", ".join(dict.fromkeys(f"`{site.width_key}`" for site in sites))
        if FAMILIES[family].not_prunable:
            keys = "none: index only"
        members = groups.setdefault((shapes, keys), [])
        if family not in members:
            members.append(family)
    rows = [f"| {shapes} | {keys} | {', '.join(sorted(names))} |" for (shapes, keys), names in groups.items()]
    return "\n".join(["| FFN | width in the config | model types |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(readme_table())  # noqa: T201
