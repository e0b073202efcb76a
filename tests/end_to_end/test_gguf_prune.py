"""Pruning GGUF files from the command line, and the refusal of what can't be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.masking import IDS, kept_channels, mask
from helpers.tiny_gguf import surgeon_model, write_gguf
from helpers.tiny_models import CALIBRATION
from safetensors import safe_open
from transformers import AutoModelForCausalLM

OPTIONS = ["--sparsity", "0.5", "--multiple-of", "8", "--repair", "none", "--dtype", "float32", *CALIBRATION]


@pytest.mark.parametrize("family", ["mixtral", "qwen2moe", "qwen3moe", "phi3"])
def test_a_cut_gguf_file_equals_masking(family: str, tmp_path: Path, surgeon: Callable[..., Any]) -> None:
    write_gguf(tmp_path / "whole.gguf", family)
    surgeon("prune", "whole.gguf", "--out", "cut", *OPTIONS)
    cut, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values())
    with safe_open(tmp_path / "cut" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    if family == "mixtral":
        assert "model.layers.3.block_sparse_moe.experts.3.w1.weight" in names
    elif "moe" in family:
        assert "model.layers.3.mlp.experts.3.gate_proj.weight" in names
    manifest = json.loads((tmp_path / "cut" / "surgeon.json").read_text())
    meta = surgeon_model(tmp_path / "whole.gguf")
    mask(meta.model, meta.family.sites, meta.layers_path, kept_channels(manifest))
    with torch.no_grad():
        assert (meta.model(IDS).logits - cut(IDS).logits).abs().max() < 1e-4


def test_a_key_that_is_not_read_stops_the_run_before_any_work(
    tmp_path: Path, surgeon: Callable[..., Any]
) -> None:
    write_gguf(tmp_path / "whole.gguf", "llama", keys={"attention.sliding_window": 64})
    refused = surgeon("prune", "whole.gguf", "--out", "cut", *OPTIONS, code=1)
    assert "llama.attention.sliding_window" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "cut").exists()
