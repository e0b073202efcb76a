"""What becomes of stored tensors that are not part of the model transformers builds.

Three kinds are met. Layers beside the model, which other runtimes use for speculative decoding (multi-token
prediction), and single weights that transformers ignores: they are carried. Buffers that old versions stored,
layers beyond the configured depth, and scales of weights that are not quantised: they are dropped. All are
told from headers and config alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from surgery.checkpoint.safetensors_header import TensorEntry
from surgery.checkpoint.transformers_model import text_config

CARRY, DROP = "carry", "drop"
# Buffers under names that transformers' models no longer have.
OLD_BUFFERS = {"inv_freq", "masked_bias", "causal_mask", "cos_cached", "sin_cached", "position_ids"}
SCALE = re.compile(r"[._](weight_scale_inv|weight_scale|weight_scale_2)$")
ACTIVATION_SCALE = re.compile(
    r"[._](input_scale|input_scale_ub|input_zero_point|output_scale|activation_scale|qscale_act"
    r"|[qkv]_scale|[kv]_zero_point|prob_scale)$"
)
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Leftover:
    """A stored tensor outside the model: its `fate`, "carry" or "drop", and the `reason`, a phrase.

    `target` is the parameter that transformers would make of it, under which it reports it as unexpected.
    """

    name: str
    fate: str
    reason: str
    target: str


def find_leftovers(
    targets: dict[str, str], tensors: dict[str, TensorEntry], config: dict[str, Any], model: Any, layers: str
) -> list[Leftover]:
    """The fate of each stored tensor in `targets`, which no parameter of `model` is made of.

    `targets` is stored name -> the name transformers gives it, `layers` the path of the decoder layers
    ("model.layers"), `config` the content of config.json.
    """
    count, extra = len(model.get_submodule(layers)), extra_layers(config)
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()} | OLD_BUFFERS
    found = []
    for name, target in targets.items():
        number = layer_number(name, layers)
        if _is_buffer(tensors[name], buffers):
            fate, reason = DROP, "mask or position buffers, which transformers computes"
        elif SCALE.search(name):
            fate, reason = DROP, "scales of weights that are not quantised"
        elif ACTIVATION_SCALE.search(name):
            fate, reason = DROP, "scales of quantised activations and caches, which the model runs without"
        elif number is not None and number >= count + extra:
            fate, reason = DROP, f"layers beyond the model's {count}"
        else:
            fate, reason = CARRY, "weights that transformers does not load"
        found.append(Leftover(name, fate, reason, target))
    return found


def extra_layers(config: dict[str, Any]) -> int:
    """Layers of multi-token prediction that a config counts behind the model's own."""
    keys = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
    counts = [text_config(config).get(key) for key in keys]
    return max([count for count in counts if isinstance(count, int)], default=0)


def layer_number(name: str, layers: str) -> int | None:
    """The number of the decoder layer that a stored name seems to belong to, None for other names."""
    last = layers.rpartition(".")[2]
    found = re.search(rf"(?:^|\.){re.escape(last)}\.(\d+)\.", name)
    prefix = name[: found.start()] if found else ""
    if found is None or "mtp" in prefix or prefix.rpartition(".")[2] not in ("", *layers.split(".")):
        return None
    return int(found[1])


def _is_buffer(entry: TensorEntry, buffers: set[str]) -> bool:
    leaf = entry.name.rpartition(".")[2]
    if entry.dtype not in FLOATING:  # e.g. a causal mask
        return True
    if leaf in buffers and not entry.name.endswith("_proj.bias"):
        return leaf != "bias" or len(entry.shape) == 4
    return leaf == "bias" and len(entry.shape) == 4


def leftovers_json(leftovers: list[Leftover], cut: Collection[str] = ()) -> list[dict[str, Any]]:
    """One entry for each fate and reason: {"fate", "reason", "tensors": their number, "example": a name}.

    `cut` are the names of carried tensors whose FFN channels are cut with the model's; their fate is "cut".
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for one in leftovers:
        key = ("cut", "FFNs of layers beside the model") if one.name in cut else (one.fate, one.reason)
        entry = found.setdefault(key, {"fate": key[0], "reason": key[1], "tensors": 0, "example": one.name})
        entry["tensors"] += 1
    return list(found.values())
