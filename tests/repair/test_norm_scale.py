"""The scale of the final norm: against the least KL of whole models, and in the files that are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from surgery.budget.repair_cost import HELD_OUT
from surgery.index.channel_index import ChannelIndex
from surgery.repair.norm_scale import NormScale, least

NORM = "model.norm.weight"


def logits(folder: str, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(ids, use_cache=False).logits.double()


def divergence(dense: torch.Tensor, pruned: torch.Tensor) -> float:
    log_p, log_q = dense.log_softmax(-1), pruned.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def sharp(folder: Path) -> None:
    """Make the predictions of a random model sharp, so that a cut makes it too sure of itself."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data *= 2
    model.save_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_written_norm_has_the_scale_of_the_least_divergence(
    dtype: torch.dtype, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama", dtype=dtype)
    sharp(source)
    computed = ["--dtype", "float32", "--quiet"]
    surgeon("index", "tiny", *CALIBRATION, *computed, "--out", "index")
    cut = ["prune", "tiny", "--index", "index", "--sparsity", "0.5", "--multiple-of", "8", *computed]
    surgeon(*cut, "--repair", "lstsq-acc", "--out", "cut")
    surgeon(*cut, "--repair", "lstsq", "--out", "unscaled")
    found = NormScale(**json.loads(Path("cut/surgeon.json").read_text())["final_norm"])
    before, after = (load_file(f"{folder}/model.safetensors") for folder in ("tiny", "cut"))
    assert 0.7 < found.scale < 0.99 and found.after < found.before
    assert torch.equal(after[NORM], (before[NORM].double() * found.scale).to(dtype))
    assert after[NORM].dtype == dtype
    assert torch.equal(load_file("unscaled/model.safetensors")[NORM], before[NORM])
    assert json.loads(Path("unscaled/surgeon.json").read_text())["final_norm"] is None
    assert f"the final norm, times {found.scale:.3f}" in Path("cut/README.md").read_text()
    surgeon("report", "cut", "--out", "cut.html")
    assert f"times {found.scale:.3f}" in Path("cut.html").read_text()

    ids = ChannelIndex.load("index").input_ids.long()
    held = ids[-max(1, len(ids) // HELD_OUT) :]
    assert found.tokens == held.numel()
    dense, pruned = logits("tiny", held), logits("cut", held)
    assert divergence(dense, pruned) == pytest.approx(found.after, rel=1e-4)
    assert divergence(dense, pruned / found.scale) == pytest.approx(found.before, rel=0.01)
    grid = [0.6 + 0.005 * step for step in range(100)]
    best = min(grid, key=lambda scale: divergence(dense, pruned * (scale / found.scale)))
    assert found.scale == pytest.approx(best, abs=0.02)


def test_the_vertex_is_that_of_the_parabola() -> None:
    def kl(scale: float) -> float:
        return 0.3 + 2 * (scale - 0.886) ** 2

    assert least([kl(1.05 - 0.05 * step) for step in range(8)]) == pytest.approx(0.886)
    assert least([float(step) for step in range(8)]) == 1.05
    assert least([-float(step) for step in range(8)]) == 0.7


def test_a_norm_without_parameters_is_left(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    save_tiny("olmo")
    surgeon("index", "tiny", *CALIBRATION, "--out", "index")
    surgeon("prune", "tiny", "--index", "index", "--sparsity", "0.5", "--multiple-of", "8", "--out", "cut")
    assert json.loads(Path("cut/surgeon.json").read_text())["final_norm"] is None
    assert "final norm" not in Path("cut/README.md").read_text()
