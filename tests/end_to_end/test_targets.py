"""A size in the user's units: what goes for it, and that the result has it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.masking import IDS, kept_channels, mask
from helpers.tiny_models import CALIBRATION, opened
from transformers import AutoModelForCausalLM

from surgery.budget.target import MEMORY, Target, cached_values
from surgery.cut.tensors import edited_specs
from surgery.errors import UnsupportedModelError


def cut_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "surgeon.json").read_text())
    return manifest


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_dropped_layers_and_channels(
    family: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny(family)
    options = ["--drop-layers", "4,1", "--sparsity", "0.5", "--multiple-of", "8", "--out", "cut"]
    surgeon("prune", str(source), *options, "--repair", "none", *CALIBRATION)
    manifest = cut_manifest(source.parent / "cut")
    assert manifest["plan"]["cuts"] == {"layers": {"removed": [1, 4], "kept": [0, 2, 3, 5]}}
    assert "--drop-layers 1,4" in manifest["command"]
    model = AutoModelForCausalLM.from_pretrained(source.parent / "cut").eval()
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    meta_model = opened(source).meta_model
    mask(dense, meta_model.family.sites, meta_model.layers_path, kept_channels(manifest))
    for number in (1, 4):
        dense.get_submodule(meta_model.layers_path)[number].forward = lambda hidden, *_, **__: hidden
    with torch.no_grad():
        expected = dense(IDS, use_cache=False).logits
        assert torch.allclose(model(IDS, use_cache=False).logits, expected, atol=1e-4)


def test_repair_and_resume_go_past_a_layer_that_is_gone(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    options = ["--drop-layers", "2", "--out", "cut", "--json", "--eval", "text.txt", "--eval-blocks", "1"]
    found = json.loads(surgeon("prune", str(source), *options, *CALIBRATION, "--quiet").stdout)
    assert found["plan"]["sparsity"] == pytest.approx(1 / 6)
    assert [bool(entry["ffns"]) for entry in found["repair"]] == [True, True, False, True, True, True]
    assert found["measurements"]["verification"]["relative_difference"] < 1e-3
    assert found["measurements"]["pruned"]["perplexity"] > 1


@pytest.mark.parametrize(
    ("target", "unit"),
    [
        (["--target-params", "45k"], "parameters"),
        (["--target-size", "180kB", "--cuts", "ffn,layers,attention"], "bytes"),
        (["--target-size", "200kB", "--cuts", "layers"], "bytes"),
        (["--target-params", "45k", "--cuts", "ffn,whole-ffn"], "parameters"),
        (["--target-params", "50k", "--cuts", "ffn", "--allocation", "global"], "parameters"),
    ],
)
def test_a_target_is_met_and_the_search_told(
    target: list[str], unit: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    options = [*target, "--multiple-of", "4", "--search-time", "0s", "--out", "cut", "--json", "--quiet"]
    found = json.loads(surgeon("prune", str(source), *options, *CALIBRATION).stdout)
    search = found["plan"]["search"]
    wanted, result = search["target"]["amount"], found["result"][unit]
    assert result == search["predicted"] and 0.85 * wanted < result <= wanted
    assert all(step["kl"] >= 0 for step in search["steps"])
    model = AutoModelForCausalLM.from_pretrained(source.parent / "cut")
    assert sum(one.numel() for one in model.parameters()) == found["result"]["parameters"]


def test_experts_go_for_a_target(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    """The search tries fewer experts in every layer, and the command of the card makes the same cut again."""
    source = save_tiny("mixtral", num_local_experts=6)
    surgeon("index", "tiny", *CALIBRATION, "--out", "index", "--quiet")
    size = sum(one.numel() for one in AutoModelForCausalLM.from_pretrained(source).parameters())
    target = ["--target-params", str(int(0.7 * size)), "--search-time", "0s", "--multiple-of", "4"]
    surgeon("prune", "tiny", *target, "--cuts", "experts", "--index", "index", "--out", "cut", "--quiet")
    manifest = cut_manifest(Path("cut"))
    tried = [step["removed"]["experts"] for step in manifest["plan"]["search"]["steps"]]
    assert tried and all(len(one) == 1 for one in tried)
    assert manifest["plan"]["cuts"]["experts"]["after"] < 6
    assert manifest["result"]["parameters"] == manifest["plan"]["search"]["predicted"] <= 0.7 * size
    words = shlex.split(manifest["command"])
    surgeon("prune", "tiny", *words[3:], "--index", "index", "--out", "again", "--quiet")
    assert Path("again/model.safetensors").read_bytes() == Path("cut/model.safetensors").read_bytes()
    tries = ["--target-params", str(int(0.7 * size)), "--search-time", "0s", "--multiple-of", "4"]
    surgeon("prune", "tiny", *tries, "--cuts", "ffn,experts", "--index", "index", "--out", "both", "--quiet")
    steps = cut_manifest(Path("both"))["plan"]["search"]["steps"]
    assert [] in [step["removed"]["experts"] for step in steps] and len(steps) > 1


def test_a_packed_size_is_that_of_the_quantised_result(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama", hidden_size=128, intermediate_size=512, head_dim=32)
    target = ["--target-size", "750kB", "--packed-int4", "--cuts", "ffn,layers", "--search-time", "0s"]
    surgeon("prune", str(source), *target, *CALIBRATION, "--out", "cut", "--quiet")
    surgeon("quantize", "cut", "--super-weights", "none", "--out", "packed", "--quiet")
    search = cut_manifest(Path("cut"))["plan"]["search"]
    assert search["target"]["packed"] and search["predicted"] <= 750_000
    assert cut_manifest(Path("packed"))["result"]["bytes"] == search["predicted"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--target-params", "40k", "--target-size", "1MB"], 2, "one target"),
        (["--target-params", "40k", "--sparsity", "0.5"], 2, "takes the place"),
        (["--cuts", "layers"], 2, "is for a target"),
        (["--target-memory", "1MB"], 2, "go together"),
        (["--target-params", "40k", "--cuts", "ffn,heads"], 2, "not one of"),
        (["--target-params", "40k", "--packed-int4"], 2, "--packed-int4 is for"),
        (["--target-params", "1G"], 1, "already"),
        (["--target-params", "1k"], 1, "embeddings and head alone"),
        (["--drop-layers", "0,1,2,3,4,5"], 1, "can't go"),
        (["--drop-layers", "6"], 1, "can't go"),
        (["--target-params", "40k", "--drop-layers", "1"], 2, "chooses what goes"),
        (["--target-params", "40k", "--cuts", "ffn,vocab"], 2, "not searched for"),
        (["--drop-ffn", "6"], 1, "no dense FFN that could go"),
        (["--drop-attention", "1,2", "--drop-ffn", "2"], 1, "neither attention nor FFN"),
    ],
)
def test_what_does_not_make_sense_is_refused_before_any_work(
    options: list[str], code: int, message: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    result = surgeon("prune", str(save_tiny("llama")), *options, *CALIBRATION, "--out", "cut", code=code)
    assert message in result.output and not Path("cut").exists()
    assert "Indexing" not in result.output


@pytest.mark.parametrize("family", ["falcon-alibi", "deepseek_v3", "jamba", "lfm2"])
def test_a_cache_of_another_form_is_refused(family: str, save_tiny: Callable[..., Path]) -> None:
    config = opened(save_tiny(family)).checkpoint.config
    with pytest.raises(UnsupportedModelError, match="can't be predicted"):
        cached_values(config, 24, "tiny")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "qwen3"])
def test_the_cache_is_as_large_as_predicted(family: str, save_tiny: Callable[..., Path]) -> None:
    source = save_tiny(family)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        cache = model(IDS[:1], use_cache=True).past_key_values
    found = sum(one.keys.numel() + one.values.numel() for one in cache.layers)
    # transformers keeps one token less of a window than the window has
    config = opened(source).checkpoint.config
    predicted = cached_values(config, IDS.shape[1], "tiny")
    assert found <= predicted <= found * 8 / 7
    checkpoint = opened(source).checkpoint
    amount = Target(MEMORY, 1, IDS.shape[1]).measure(edited_specs(checkpoint, {}), config, "tiny")
    assert amount == checkpoint.nbytes + 4 * predicted


def test_card_report_and_later_steps_know_what_went(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama", num_attention_heads=8, num_key_value_heads=4)
    surgeon("index", str(source), *CALIBRATION, "--out", "index", "--quiet")
    what = ["--drop-layers", "2", "--drop-attention", "4", "--drop-ffn", "3", "--kv-heads", "2"]
    what += ["--intermediate-size", "24"]
    printed = surgeon("prune", str(source), *what, "--index", "index", "--out", "cut").output
    lines = [
        "Whole layers removed: 2",
        "Attention removed in layers 4",
        "FFN removed in layers 3",
        "Key/value heads kept in each layer: 2",
    ]
    card = Path("cut/README.md").read_text()
    assert all(line in printed and f"{line}." in card for line in lines)
    assert "import surgery.loading" in card
    manifest = cut_manifest(Path("cut"))
    words = shlex.split(manifest["command"])
    surgeon("prune", str(source), *words[3:], "--index", "index", "--out", "again", "--quiet")
    for name in ("model.safetensors", "config.json", "modeling_per_layer.py"):
        assert Path("again", name).read_bytes() == Path("cut", name).read_bytes()
    surgeon("report", "cut", "--index", "index", "--out", "page.html", "--quiet")
    page = Path("page.html").read_text()
    assert "What stays of each layer" in page and "2 key/value heads" in page
    surgeon("eval", "cut", "--text", "text.txt", "--blocks", "1", "--quiet")
    surgeon("index", "cut", *CALIBRATION, "--out", "cut-index", "--quiet")
