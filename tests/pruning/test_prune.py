"""Cutting checkpoints: against masking, against the source's bytes, and as transformers reads the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.cut.tensors import TensorEdit
from surgery.errors import CheckpointError
from surgery.pruning.verify import verify_folder


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_everything_but_weights_comes_along(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama-tied-bias", dtype=torch.bfloat16)
    (source / "NOTICE.txt").write_text("keep me")
    surgeon("prune", str(source), "--intermediate-size", "24", "--out", "cut", *CALIBRATION)
    cut = source.parent / "cut"
    for file in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "NOTICE.txt",
        "chat_template.jinja",
    ):
        assert (cut / file).read_bytes() == (source / file).read_bytes(), file
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, cut))
    assert after == {**before, "intermediate_size": 24}
    model = AutoModelForCausalLM.from_pretrained(cut)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    text = "The same ids — überall."
    assert AutoTokenizer.from_pretrained(cut)(text) == AutoTokenizer.from_pretrained(source)(text)
    assert (cut / "README.md").read_text().startswith("---\n")


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_sparsity_zero_returns_the_same_tensors(
    shard: str | None, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("qwen2", shard=shard)
    surgeon("prune", str(source), "--sparsity", "0", "--out", "cut", *CALIBRATION)
    cut = source.parent / "cut"
    tensors = [
        {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
        for folder in (source, cut)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert (cut / "config.json").read_bytes() == (source / "config.json").read_bytes()
    if shard is None:
        assert (cut / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_removing_silent_channels_changes_nothing(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    for number, layer in enumerate(model.model.layers):
        silent = torch.randperm(48, generator=torch.Generator().manual_seed(number))[:24]
        layer.mlp.down_proj.weight.data[:, silent] = 0
    model.save_pretrained(source)
    surgeon("prune", str(source), "--sparsity", "0.5", "--multiple-of", "1", "--out", "cut", *CALIBRATION)
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        dense, cut = (
            model(ids).logits,
            AutoModelForCausalLM.from_pretrained(source.parent / "cut").eval()(ids).logits,
        )
    assert (dense - cut).abs().max() < 1e-5


@pytest.mark.parametrize(
    "method", ["scar-lp", "scar-prot", "scar-conn", "magnitude", "activation", "wanda", "random"]
)
def test_same_command_same_bytes(
    method: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    for name in ("a", "b"):
        surgeon("index", str(source), "--out", f"index-{name}", *CALIBRATION)
        surgeon(
            "prune",
            str(source),
            "--index",
            f"index-{name}",
            "--method",
            method,
            "--multiple-of",
            "8",
            "--out",
            name,
        )
    folder = source.parent
    assert hashes(folder / "index-a") == hashes(folder / "index-b")
    assert hashes(folder / "a") == hashes(folder / "b")


def test_dry_run_writes_nothing(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = save_tiny("llama")
    before = sorted(p.name for p in source.parent.iterdir())
    result = surgeon("prune", str(source), "--multiple-of", "8", "--dry-run", "--out", "cut", *CALIBRATION)
    assert "48 → 24" in result.output
    surgeon("index", str(source), "--dry-run", *CALIBRATION)
    assert sorted(p.name for p in source.parent.iterdir()) == before


def test_prune_measures_before_and_after(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = save_tiny("llama")
    options = ["--multiple-of", "8", "--out", "cut", "--eval", "text.txt", "--eval-blocks", "2"]
    surgeon("prune", str(source), *options, *CALIBRATION)
    measured = json.loads((source.parent / "cut" / "surgeon.json").read_text())["measurements"]
    again = json.loads(surgeon("eval", "cut", "--text", "text.txt", "--blocks", "2", "--json").stdout)
    assert measured["pruned"] == again
    assert measured["dense"]["perplexity"] != measured["pruned"]["perplexity"]
    card = (source.parent / "cut" / "README.md").read_text()
    assert f"{measured['pruned']['perplexity']:.2f}" in card


def test_verification_refuses_a_wrong_cut(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:

    apply = TensorEdit.apply

    def shuffled(self: TensorEdit, tensor: torch.Tensor) -> torch.Tensor:
        right = apply(self, tensor)
        return right.flip(1).contiguous() if self.takes and self.takes[0].axis == 1 else right

    source = save_tiny("llama")
    monkeypatch.setattr(TensorEdit, "apply", shuffled)
    options = ["--sparsity", "0.5", "--multiple-of", "8", "--out", "cut"]
    result = surgeon("prune", str(source), *options, *CALIBRATION, code=1)
    assert "does not compute what the masked source does" in result.stderr
    assert not (source.parent / "cut").exists()


def test_verification_refuses_what_does_not_load_or_is_not_finite(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama")
    verify_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[0, 0] = float("inf")
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="finite"):
        verify_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    with pytest.raises(CheckpointError, match="tensors the model needs"):
        verify_folder(folder)
