"""The rotary embedding of a GGUF file as transformers' `rope_parameters`.

llama.cpp turns the pair i of a head by position * theta^(-2i/d) / (f_i * s): f_i from a tensor (rope_freqs,
or rope_factors_short and _long), s the factor in the metadata, d the rotated part of the head. YaRN blends s
in over the pairs. In transformers, llama3 is a formula for f_i, which is recovered from the tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from surgery.checkpoint.gguf_metadata import Metadata
from surgery.errors import CheckpointError

TOLERANCE = 1e-4  # largest relative difference between a tensor's factors and those of a formula
LLAMA3_LENGTHS = (8192, 4096, 2048, 16384, 32768, 65536, 131072)  # tried where the factors leave it open


def rope_parameters(
    meta: Metadata, factors: dict[str, torch.Tensor], head_dim: int, context: int
) -> dict[str, Any]:
    """`rope_parameters` of transformers for heads of `head_dim`.

    `factors` holds the file's tensors by name: rope_freqs, rope_factors_short, rope_factors_long, each
    [d / 2] float32. `context` is the file's context length. Raises CheckpointError for what transformers has
    no form for.
    """
    theta = float(meta.number("rope.freq_base", 10000.0))
    rotated = meta.count("rope.dimension_count", head_dim)
    if rotated > head_dim or rotated % 2 or not theta > 1:
        meta.refuse("rope.dimension_count", f"an even number up to {head_dim}, with a rope.freq_base above 1")
    result: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if rotated != head_dim:
        result["partial_rotary_factor"] = _fraction(rotated, head_dim)
    _check_lengths(meta, factors, rotated)
    kind = meta.get("rope.scaling.type", "linear")
    factor = float(meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 0.0)) or 1.0)
    attention = float(meta.number("rope.scaling.attn_factor", 1.0))
    original = meta.count("rope.scaling.original_context_length", context)
    beta_fast = float(meta.number("rope.scaling.yarn_beta_fast", 32.0))
    beta_slow = float(meta.number("rope.scaling.yarn_beta_slow", 1.0))
    if factor <= 0 or attention <= 0:
        meta.refuse("rope.scaling.factor", "factors above 0")
    if kind not in ("none", "linear", "yarn", "longrope"):
        meta.refuse("rope.scaling.type", "none, linear, yarn or longrope")
    if kind == "none":
        factor = 1.0
    if kind == "longrope" or not {"rope_factors_short", "rope_factors_long"}.isdisjoint(factors):
        if kind == "yarn":  # no type is as good as longrope: Phi-3's converter writes none
            meta.refuse("rope.scaling.type", "longrope beside the tensors rope_factors_*.weight")
        return result | _longrope(meta, factors, factor, attention, original, rotated)
    if "rope_freqs" in factors and not torch.all(factors["rope_freqs"] == 1):
        if kind == "yarn" or factor != 1:
            meta.refuse("rope.scaling.type", "none beside the tensor rope_freqs.weight")
        frequencies = _from_frequencies(factors["rope_freqs"].double(), theta, rotated, original, meta)
        return result | frequencies | ({"attention_factor": attention} if attention != 1 else {})
    if kind == "yarn" and factor != 1:
        yarn = {"factor": factor, "beta_fast": beta_fast, "beta_slow": beta_slow}
        if attention != 1:
            yarn["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
        return result | {"rope_type": "yarn", "original_max_position_embeddings": original} | yarn
    if attention != 1:
        meta.refuse("rope.scaling.attn_factor", "1 where the scaling is not yarn or longrope")
    if factor != 1:
        return result | {"rope_type": "linear", "factor": factor}
    return result


def _check_lengths(meta: Metadata, factors: dict[str, torch.Tensor], rotated: int) -> None:
    for name, tensor in factors.items():
        if tensor.numel() != rotated // 2:
            raise CheckpointError(
                "a tensor of rotary factors has the wrong length",
                where=f"{meta.file.path.name}: {name}.weight",
                expected=f"{rotated // 2}",
                found=f"{tensor.numel()}",
            )


def _fraction(rotated: int, head_dim: int) -> float:
    fraction = rotated / head_dim
    # transformers takes int(head_dim * fraction), which may round down
    return fraction if int(head_dim * fraction) == rotated else math.nextafter(fraction, 2.0)


def _longrope(
    meta: Metadata,
    factors: dict[str, torch.Tensor],
    factor: float,
    attention: float,
    original: int,
    rotated: int,
) -> dict[str, Any]:
    """LongRoPE: short factors up to the original length and long ones beyond it.

    llama.cpp chooses between them by the length of its context, transformers by that of the text.
    """
    if "rope_freqs" in factors:
        meta.refuse("rope.scaling.type", "none beside the tensor rope_freqs.weight")
    ones = torch.ones(rotated // 2)
    short, long = (factors.get(f"rope_factors_{name}", ones) * factor for name in ("short", "long"))
    return {
        "rope_type": "longrope",
        "short_factor": [float(f) for f in short],
        "long_factor": [float(f) for f in long],
        "attention_factor": attention,
        "original_max_position_embeddings": original,
    }


def _from_frequencies(
    found: torch.Tensor, theta: float, rotated: int, original: int, meta: Metadata
) -> dict[str, Any]:
    """llama3 where its formula gives the factors `found` [d / 2] float64, else LongRoPE with them alone."""
    if not torch.all(torch.isfinite(found) & (found > 0)):
        raise CheckpointError(
            "the rotary factors are not positive numbers", where=f"{meta.file.path.name}: rope_freqs.weight"
        )
    wavelengths = 2 * math.pi * theta ** (torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    scale = float(found.max())
    for low, high, length in _llama3_candidates(found, wavelengths, scale, original):
        made = llama3_factors(wavelengths, scale, low, high, length)
        if bool(((made - found).abs() <= TOLERANCE * found).all()):
            return {
                "rope_type": "llama3",
                "factor": round(scale, 6),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    same = [float(f) for f in found]
    return {
        "rope_type": "longrope",
        "short_factor": same,
        "long_factor": same,
        "attention_factor": 1.0,
        "original_max_position_embeddings": original,
    }


def llama3_factors(
    wavelengths: torch.Tensor, scale: float, low: float, high: float, length: int
) -> torch.Tensor:
    """Llama 3.1's divisors of the frequencies, [d / 2].

    1 for wavelengths below length / high, `scale` for those above length / low, and between them
    1 / ((1 - t) / scale + t) with t = (length / wavelength - low) / (high - low).
    """
    t = ((length / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - t) / scale + t)


def _llama3_candidates(
    found: torch.Tensor, wavelengths: torch.Tensor, scale: float, original: int
) -> list[tuple[float, float, int]]:
    """(low_freq_factor, high_freq_factor, original length) that may have made the factors.

    Only length / low and length / high show in the factors, so low is 1, as in every published Llama. Two
    pairs between the bounds give both: t is linear in 1 / wavelength. With fewer, the usual ones are tried.
    """
    candidates = []
    if scale > 1:
        t = (1 / found - 1 / scale) / (1 - 1 / scale)
        between = (t > TOLERANCE) & (t < 1 - TOLERANCE)
        if int(between.sum()) >= 2:
            x, y = 1 / wavelengths[between], t[between]
            slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
            intercept = float(-(y.mean() - slope * x.mean()))  # low / (high - low)
            if slope > 0 and intercept > 0:
                high = 1 + 1 / intercept
                candidates += [
                    (1.0, round(high, 3), round(slope * (round(high, 3) - 1))),
                    (1.0, high, round(slope * (high - 1))),
                ]
    return candidates + [(1.0, 4.0, length) for length in (original, *LLAMA3_LENGTHS)]
