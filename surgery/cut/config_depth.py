"""Write a config.json for fewer decoder layers: every key that counts layers or says something of each."""

from __future__ import annotations

import copy
from typing import Any

from surgery.checkpoint.transformers_model import build_config, text_config
from surgery.errors import UnsupportedModelError

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# The first so many layers are of another form than the rest.
LEADING = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
# Numbers of layers.
NUMBERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "hybrid_layer_ids")
LAST = ("moe_layer_end_index",)
NOT_PER_LAYER = ("architectures", "eos_token_id", "keys_to_ignore_at_inference", "mrope_section")
# A layer's scores are scaled by its number, which changes.
BY_NUMBER = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")


def shortened_config(config: dict[str, Any], stays: list[int], where: str) -> dict[str, Any]:
    """config.json for the layers `stays` alone, in order; the content of `config` is not changed.

    Raises UnsupportedModelError for a config that computes by the number of a layer.
    """
    config = copy.deepcopy(config)
    text = text_config(config)
    before = build_config(config, where).get_text_config()
    count = before.num_hidden_layers
    for key in BY_NUMBER:
        if getattr(before, key, False):
            raise UnsupportedModelError(
                "whole layers can't go: attention is scaled by the number of the layer",
                where=f"{where}, config.json",
                found=f"{key}: true",
                next_step="leave layers out of --cuts",
            )
    wanted = {
        key: found
        for key, value in {**vars(before), **text}.items()
        if (found := _kept_value(key, value, stays, count)) is not None and found != value
    }
    text.update({key: value for key, value in wanted.items() if key in text})
    text[type(before).attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(stays)
    after = build_config(config, where).get_text_config()
    for key, value in wanted.items():  # what transformers derived from other keys and would derive otherwise
        if key not in text and key not in COUNTS and getattr(after, key, value) != value:
            text[key] = value
    return config


def _kept_value(key: str, value: Any, stays: list[int], count: int) -> Any:
    """What a key's value becomes where only the layers `stays` of `count` are left; None if it stays."""
    if key in COUNTS:
        return len(stays) if value == count else None
    if key in (*LEADING, *LAST) and isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            return None
        return sum(number < value for number in stays) if key in LEADING else _last(value, stays)
    if key == "per_layer_config" and isinstance(value, dict):
        own = {int(number): entry for number, entry in value.items()}
        return {str(place): own[number] for place, number in enumerate(stays) if number in own}
    if not isinstance(value, list) or key in NOT_PER_LAYER:
        return None
    if key in NUMBERS:
        return [stays.index(number) for number in value if number in stays]
    if key == "attention_types":  # of GPT-Neo: [[kinds, how often], ...]
        kinds = [kind for repeated, times in value for kind in repeated * times]
        return [[[kinds[number] for number in stays], 1]]
    return [value[number] for number in stays] if len(value) == count else None


def _last(value: int, stays: list[int]) -> int:
    return max((place for place, number in enumerate(stays) if number <= value), default=-1)
