"""The rotary embedding of a config as GGUF keys and tensors: the inverse of checkpoint/gguf_rope.py."""

from __future__ import annotations

import math
from typing import Any

import torch

from surgery.checkpoint.gguf_rope import llama3_factors
from surgery.errors import UnsupportedModelError

FACTORS = "rope_freqs.weight"
# rope type -> keys of `rope_parameters` that are written, besides rope_type and rope_theta
KNOWN: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"},
    "longrope": {"short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"},
}
# keys whose values listed here are what llama.cpp computes anyway
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1, None),
    "truncate": (True, None),
    "type": (None, "default", "linear", "llama3", "yarn", "longrope"),
    "factor": (None, 1),
}


def rope_keys(config: Any, head_dim: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(metadata keys without the architecture's name, tensors [d / 2] float32) of a config's rotation.

    llama.cpp divides the frequencies by s or by the factors in `rope_freqs.weight`; Llama 3's formula is
    written as those factors. Raises UnsupportedModelError for a scaling that llama.cpp has no form for, among
    them `dynamic`, and LongRoPE whose factors depend on the length of the text.
    """
    rope = dict(config.rope_parameters)
    kind = rope.pop("rope_type", "default")
    theta = float(rope.pop("rope_theta", 10000.0))
    if kind not in KNOWN:
        raise _unknown("rope_type", kind)
    for key, value in rope.items():
        if key not in KNOWN[kind] and value not in NEUTRAL.get(key, (None,)):
            raise _unknown(f"{key} beside rope_type {kind}", value)
    keys: dict[str, Any] = {"rope.freq_base": theta, "rope.dimension_count": head_dim}
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        keys |= _yarn(rope, config.max_position_embeddings)
    elif kind == "llama3":
        return keys, {FACTORS: _llama3(rope, theta, head_dim)}
    elif kind == "longrope":
        return keys, {FACTORS: _one_list(rope)}
    return keys, {}


def _yarn(rope: dict[str, Any], context: int) -> dict[str, Any]:
    """llama.cpp multiplies its attention factor with YaRN's own, 0.1 ln(s) + 1; transformers states both."""
    factor = float(rope["factor"])
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(rope.get("original_max_position_embeddings") or context),
    }
    if rope.get("attention_factor") is not None:
        keys["rope.scaling.attn_factor"] = float(rope["attention_factor"]) / (0.1 * math.log(factor) + 1)
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            keys[f"rope.scaling.yarn_{key}"] = float(rope[key])
    return keys


def _llama3(rope: dict[str, Any], theta: float, head_dim: int) -> torch.Tensor:
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    factors = llama3_factors(
        2 * math.pi * theta**pairs,
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope["original_max_position_embeddings"]),
    )
    return factors.float()


def _one_list(rope: dict[str, Any]) -> torch.Tensor:
    """The factors of a LongRoPE that has the same ones for every length, as surgeon reads them from GGUF."""
    if rope["short_factor"] != rope["long_factor"] or rope.get("attention_factor") not in (None, 1):
        raise _unknown("rope_type", "longrope with factors that depend on the length of the text")
    return torch.tensor(rope["short_factor"], dtype=torch.float32)


def _unknown(key: str, value: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        "llama.cpp has no form for this rotary embedding",
        where=f"config.json, rope_parameters: {key}",
        expected=", ".join(KNOWN),
        found=str(value)[:80],
        next_step="run the folder in transformers or vLLM",
    )
