"""Layers of different width: how budgets are spread, and every way to load such a checkpoint, or fail to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.masking import IDS, kept_channels, mask
from helpers.tiny_models import CALIBRATION
from transformers import AutoModelForCausalLM

import surgery.loading  # noqa: F401
from surgery.checkpoint.reader import Checkpoint
from surgery.model.meta_model import MetaModel
from surgery.plan.allocation import allocate, score_damage

GLOBAL = [
    "--sparsity",
    "0.5",
    "--multiple-of",
    "4",
    "--allocation",
    "score",
    "--repair",
    "none",
    "--out",
    "cut",
]


def damage(*scores: float) -> torch.Tensor:
    return score_damage(torch.tensor(scores), torch.empty(0, dtype=torch.long))


def test_damage_is_what_the_removed_scores_sum_to() -> None:
    assert damage(3, 1, 2).tolist() == [6, 3, 1, 0]
    assert score_damage(torch.tensor([3.0, 1, 2]), torch.tensor([1])).tolist() == [6, 5, 2, 0]


def test_budget_goes_where_it_saves_most() -> None:
    assert allocate([damage(9, 8, 7, 6), damage(1, 1, 1, 1)], 1, [1, 1], 5) == [4, 1]
    assert allocate([damage(1, 1, 1, 1), damage(1, 1, 1, 1)], 1, [1, 3], 4) == [1, 3]


def test_a_saving_behind_a_plateau_is_found() -> None:
    plateau = torch.tensor([10.0, 10, 10, 10, 0])
    assert allocate([plateau, damage(1, 1, 1, 1)], 1, [1, 1], 5) == [4, 1]


def test_allocation_equals_trying_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    damages = [
        score_damage(torch.rand(6, generator=generator) ** 3, torch.empty(0, dtype=torch.long))
        for _ in range(3)
    ]
    for budget in range(3, 19):
        found = allocate(damages, 1, [1, 1, 1], budget)
        assert sum(found) <= budget
        best = min(
            float(damages[0][a] + damages[1][b] + damages[2][c])
            for a in range(1, 7)
            for b in range(1, 7)
            for c in range(1, 7)
            if a + b + c <= budget
        )
        assert sum(float(d[w]) for d, w in zip(damages, found, strict=True)) == pytest.approx(best)


def uneven(save_tiny: Callable[..., Path], variant: str) -> Path:
    """A tiny model whose layers matter unequally."""
    source = save_tiny(variant)
    model = AutoModelForCausalLM.from_pretrained(source)
    meta_model = MetaModel(Checkpoint.open(source), torch.float32)
    for number, layer in enumerate(model.get_submodule(meta_model.layers_path)):
        for site in {ffn.site for ffn in meta_model.ffns[number]}:
            parameter = site.down if site.kind == "experts" else f"{site.down}.weight"
            layer.get_parameter(parameter).data *= 0.2 + 0.4 * number
    model.save_pretrained(source)
    return source


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python in a fresh process, where surgery.loading has not been imported."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("variant", ["llama", "gpt2", "phi3", "mixtral", "deepseek_v3", "opt"])
def test_global_widths_load_and_equal_masking(
    variant: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = uneven(save_tiny, variant)
    surgeon("prune", str(source), *GLOBAL, *CALIBRATION)
    cut = source.parent / "cut"
    manifest = json.loads((cut / "surgeon.json").read_text())
    ranges = []
    for change in manifest["plan"]["widths"].values():
        widths = [w for w in change["per_layer"] if w is not None]
        assert sum(widths) <= len(widths) * round(0.5 * change["before"] / 4) * 4
        ranges.append(len(set(widths)))
    assert max(ranges) > 1
    model, info = AutoModelForCausalLM.from_pretrained(cut, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    meta_model = MetaModel(Checkpoint.open(source), torch.float32)
    masked = AutoModelForCausalLM.from_pretrained(source).eval()
    mask(masked, meta_model.family.sites, meta_model.layers_path, kept_channels(manifest))
    with torch.no_grad():
        logits = model.eval()(IDS, use_cache=False).logits
        assert (logits - masked(IDS, use_cache=False).logits).abs().max() < 1e-4
    assert model.generate(IDS[:1], max_new_tokens=4, do_sample=False).shape[1] > IDS.shape[1]
    model.save_pretrained(source.parent / "again")
    again = AutoModelForCausalLM.from_pretrained(source.parent / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS, use_cache=False).logits, logits)
    evaluated = json.loads(surgeon("eval", "cut", "--text", "text.txt", "--blocks", "1", "--json").stdout)
    assert evaluated["perplexity"] > 1


def test_without_a_loader_it_fails_loudly_and_with_remote_code_it_loads(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = uneven(save_tiny, "llama")
    surgeon("prune", str(source), *GLOBAL, *CALIBRATION)
    folder = source.parent
    (folder / "hf").mkdir()
    settings = (
        f"import os; os.environ['HF_HOME'] = {str(folder / 'hf')!r}\n"
        "from transformers import AutoModelForCausalLM as A\n"
    )
    code = f"""{settings}import torch, traceback
try:
    A.from_pretrained('cut')
except Exception:
    traceback.print_exc()
else:
    raise SystemExit('it loaded without a loader')
model = A.from_pretrained('cut', trust_remote_code=True).eval()
model.save_pretrained('again')
again = A.from_pretrained('again', trust_remote_code=True).eval()
ids = torch.arange(24)[None]
logits = model(ids).logits
assert torch.equal(again(ids).logits, logits)
torch.save(logits.detach(), 'logits.pt')
assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 24
"""
    remote = run(code, folder)
    assert remote.returncode == 0 and "mismatch" in remote.stderr.lower(), remote.stderr
    ours = AutoModelForCausalLM.from_pretrained(folder / "cut").eval()
    with torch.no_grad():
        assert torch.equal(ours(torch.arange(24)[None]).logits, torch.load(folder / "logits.pt"))
    card = (folder / "cut" / "README.md").read_text()
    assert "import surgery.loading" in card and "trust_remote_code=True" in card
    refused = surgeon("prune", "cut", "--out", "twice", *CALIBRATION, code=1)
    assert "widths of their own already" in refused.stderr


@pytest.mark.parametrize("variant", ["phi3", "gpt_oss"])
def test_padding_loads_everywhere(
    variant: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = uneven(save_tiny, variant)
    surgeon("prune", str(source), *GLOBAL, "--pad", *CALIBRATION)
    folder = source.parent
    config = json.loads((folder / "cut" / "config.json").read_text())
    assert "per_layer_config" not in config and "auto_map" not in config
    code = (
        "import torch\nfrom transformers import AutoModelForCausalLM as A\n"
        f"ids = torch.tensor({IDS.tolist()})\n"
        "torch.save(A.from_pretrained('cut').eval()(ids).logits.detach(), 'logits.pt')"
    )
    plain = run(code, folder)
    assert plain.returncode == 0, plain.stderr
    manifest = json.loads((folder / "cut" / "surgeon.json").read_text())
    meta_model = MetaModel(Checkpoint.open(source), torch.float32)
    masked = AutoModelForCausalLM.from_pretrained(source).eval()
    mask(masked, meta_model.family.sites, meta_model.layers_path, kept_channels(manifest))
    with torch.no_grad():
        assert (torch.load(folder / "logits.pt") - masked(IDS, use_cache=False).logits).abs().max() < 1e-4
    surgeon("prune", str(source), "--pad", *CALIBRATION, code=2)
