"""GGUF files as llama.cpp computes them and as surgeon reads them: the same next-token log-probabilities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_gguf import HEAD, TINY, TOKENS, llama_cpp_logprobs, surgeon_logprobs, write_gguf

from surgery.checkpoint.gguf import GgufCheckpoint

# llama.cpp takes GELU from a table of float16 numbers
GELU = {"gemma", "gemma2", "gemma3", "starcoder2", "gpt2", "falcon", "falcon with two norms"}


def assert_agree(path: Path, tolerance: float = 1e-4) -> torch.Tensor:
    """Compare llama.cpp's log-probabilities with surgeon's; returns llama.cpp's."""
    expected = llama_cpp_logprobs(path)
    assert (surgeon_logprobs(path)[:TOKENS] - expected).abs().max() < tolerance
    return expected


def rope(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = GgufCheckpoint(path, torch.float32).config["rope_parameters"]
    return found


def llama3(scale: float = 8.0, low: float = 1.0, high: float = 4.0, length: int = 64) -> np.ndarray:
    """Llama 3.1's factors, written as its authors do: three cases of the wavelength."""
    factors = []
    for i in range(0, HEAD, 2):
        wavelength = 2 * math.pi * 10000.0 ** (i / HEAD)
        smooth = (length / wavelength - low) / (high - low)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(scale)
        else:
            factors.append(1 / ((1 - smooth) / scale + smooth))
    return np.array(factors)


@pytest.mark.parametrize("family", TINY)
def test_every_architecture(family: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", family, tied="gemma" in family)
    assert_agree(path, 5e-3 if family in GELU else 1e-4)


def test_llama31_has_its_scaling_in_a_tensor(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "l.gguf", "llama", extra={"rope_freqs.weight": llama3()})
    expected = assert_agree(path)
    assert rope(path) == {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    without = surgeon_logprobs(write_gguf(tmp_path / "without.gguf", "llama"))
    assert (without - expected).abs().max() > 0.1  # so the comparison sees the scaling


def test_other_factors_become_longrope(tmp_path: Path) -> None:
    factors = np.array([1.0, 1.5, 2.0, 1.0, 3.0, 7.0, 1e30, 1e30])
    path = write_gguf(tmp_path / "l.gguf", "llama", extra={"rope_freqs.weight": factors})
    assert_agree(path)
    assert rope(path)["rope_type"] == "longrope"


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ("llama", {"rope.scale_linear": 4.0}),
        ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
        ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.freq_base": 500.0}),
        ("qwen3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 0.8}),
        ("phi3", {"rope.dimension_count": 12}),
        ("gemma3", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base": 500.0}),
        ("gemma3", {"rope.freq_base_swa": 50.0, "attention.sliding_window_pattern": 2}),
        ("gemma3", {"final_logit_softcapping": 2.0}),
        ("gemma3", {"attention.sliding_window": None, "rope.freq_base": 500.0}),
        ("gemma2", {"attn_logit_softcapping": 0.5}),
        ("qwen2moe", {"expert_used_count": 3}),
    ],
)
def test_metadata(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    keys = {"rope.scaling.original_context_length": 64, **keys}
    path = write_gguf(tmp_path / "m.gguf", family, keys=keys, tied="gemma" in family)
    expected = assert_agree(path, 5e-3 if family in GELU else 1e-4)
    if keys.get("rope.scaling.type") != "none":
        plain = write_gguf(tmp_path / "plain.gguf", family, tied="gemma" in family)
        changed = "rope.dimension_count" not in keys
        assert (surgeon_logprobs(plain)[:TOKENS] - expected).abs().max() > (0.02 if changed else 0.01)


@pytest.mark.parametrize(
    ("original", "chosen", "kind"),
    [(128, "long", "longrope"), (512, "short", "longrope"), (128, "long", None)],
)
def test_longrope_with_partial_rotary(original: int, chosen: str, kind: str | None, tmp_path: Path) -> None:
    factors = {"short": np.linspace(1, 1.4, 6), "long": np.linspace(1, 9, 6)}
    path = write_gguf(
        tmp_path / "phi.gguf",
        "phi3",
        keys={
            "context_length": 1024,
            "rope.dimension_count": 12,
            "rope.scaling.type": kind,
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": 1.19,
        },
        extra={f"rope_factors_{name}.weight": values for name, values in factors.items()},
    )
    assert_agree(path)
    found = rope(path)
    assert found["attention_factor"] == 1.19 and int(HEAD * found["partial_rotary_factor"]) == 12
    assert found[f"{chosen}_factor"] == pytest.approx(factors[chosen])


@pytest.mark.parametrize(
    ("parts", "model_type"),
    [
        ("attn_q attn_k attn_v", "qwen2"),
        ("attn_q attn_k attn_v attn_output", "llama"),
        ("ffn_gate ffn_up ffn_down", "llama"),
    ],
)
def test_biases_of_llama(parts: str, model_type: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shapes = TINY["llama"].weights
    extra = {
        f"blk.{layer}.{part}.bias": 0.3 * random.standard_normal(shapes[part][0])
        for layer in range(4)
        for part in parts.split()
    }
    path = write_gguf(tmp_path / "b.gguf", "llama", extra=extra)
    assert_agree(path)
    assert GgufCheckpoint(path, torch.float32).config["model_type"] == model_type


def test_tied_head(tmp_path: Path) -> None:
    assert_agree(write_gguf(tmp_path / "t.gguf", "llama", tied=True))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0"])
def test_quantised_weights(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "q.gguf", "qwen3moe", quantise=lambda _: kind)
    # llama.cpp rounds what goes into a product with such weights, to 8 bits for blocks
    assert_agree(path, 0.05 if kind.endswith("16") else 0.6)
