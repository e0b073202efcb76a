"""How many numbers a model keeps in its KV cache, from its config alone."""

from __future__ import annotations

from typing import Any

from surgery.checkpoint.transformers_model import build_config
from surgery.errors import UnsupportedModelError

CACHED = ("full_attention", "sliding_attention", "chunked_attention", "attention")
RECURRENT = ("mamba_d_state", "mamba_n_heads", "ssm_state_size")  # config keys of recurrent states


def cached_numbers(config: dict[str, Any], context: int, where: str) -> int:
    """Numbers that a model of this config.json caches for `context` tokens of one sequence.

    Per layer: 2 x tokens x key-value heads x dimensions of a head. A layer with a sliding window, or with
    attention in chunks, has at most the tokens of a window or chunk. Of multi-head latent attention, the
    latent and the rotary key are cached. Raises UnsupportedModelError for a model with recurrent states.
    """
    text = build_config(config, where).get_text_config()
    count = int(text.num_hidden_layers)
    kinds = list(getattr(text, "layer_types", None) or [])
    other = next((kind for kind in kinds if kind not in CACHED), None)
    other = other or next((key for key in RECURRENT if getattr(text, key, None) is not None), None)
    if other is not None:
        raise unpredictable(where, other)
    window = getattr(text, "sliding_window", None)
    if not kinds:
        slides = window and getattr(text, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * count
    most = {"sliding_attention": window, "chunked_attention": getattr(text, "attention_chunk_size", None)}
    tokens = sum(min(context, most.get(kind) or context) for kind in kinds)
    return tokens * _numbers_per_token(text)


def _numbers_per_token(text: Any) -> int:
    """Numbers that one layer caches for one token."""
    if getattr(text, "kv_lora_rank", None):
        return int(text.kv_lora_rank) + int(text.qk_rope_head_dim)
    heads = int(text.num_attention_heads)
    shared = 1 if getattr(text, "multi_query", False) else heads
    grouped = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return 2 * int(grouped or shared) * width


def unpredictable(where: str, found: str) -> UnsupportedModelError:
    """The error for a model whose cache is of another form."""
    return UnsupportedModelError(
        "the memory of this model's cache is not that of keys and values, and can't be predicted",
        where=f"{where}, config.json",
        found=found,
        next_step="use --target-params or --target-size",
    )
