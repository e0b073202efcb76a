"""`surgeon adapt`: an adapter does on the cut model what it does on the dense one with channels masked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.masking import IDS, kept_channels
from helpers.tiny_models import CALIBRATION
from transformers import AutoModelForCausalLM

import surgery.loading  # noqa: F401
from surgery.heal.adapter import CONFIG

peft = pytest.importorskip("peft", reason="peft is not installed")
# peft asks transformers by an old name; its warnings of keys that are missing or not used stay errors
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

CUT = ("--sparsity", "0.5", "--multiple-of", "4", "--out", "cut", *CALIBRATION)
PATHS = {
    "llama": ("model.layers", ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "mlp.down_proj"),
    "gpt2": ("transformer.h", ["c_attn", "c_fc", "c_proj"], "mlp.c_proj"),
    "phi3": ("model.layers", ["qkv_proj", "gate_up_proj", "down_proj"], "mlp.down_proj"),
}


def save_lora(folder: Path, modules: list[str], name: str = "lora", **options: Any) -> Path:
    """A random adapter of the model in `folder`, beside it."""
    torch.manual_seed(5)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=modules, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    for key, parameter in model.named_parameters():
        if "lora_B" in key or "lora_embedding_A" in key:
            torch.nn.init.normal_(parameter, 0, 0.1)
    model.save_pretrained(folder.parent / name)
    return folder.parent / name


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None, watch: Callable[[Any], None] | None = None) -> Any:
    """Logits of a folder with an adapter, through peft; `watch` gets the model before it runs."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    if watch is not None:
        watch(model)
    return model.eval()(IDS, use_cache=False).logits


def masking(cut: Path, family: str) -> Callable[[Any], None]:
    """Zeroes the removed channels where the down projection reads them."""
    kept = kept_channels(json.loads((cut / "surgeon.json").read_text()))
    layers, _, down = PATHS[family]

    def watch(model: Any) -> None:
        for layer, channels in zip(model.get_base_model().get_submodule(layers), kept, strict=True):

            def hook(_: Any, inputs: tuple[torch.Tensor], here: torch.Tensor = channels["dense"]) -> Any:
                kept_only = torch.zeros_like(inputs[0])
                kept_only[..., here] = inputs[0][..., here]
                return (kept_only,)

            layer.get_submodule(down).register_forward_pre_hook(hook)

    return watch


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", ()),
        ("gpt2", ()),
        ("phi3", ()),
        ("llama", ("--allocation", "score")),
        ("llama", ("--allocation", "score", "--pad")),
    ],
)
def test_the_adapter_does_on_the_cut_what_it_does_on_the_masked_dense_model(
    family: str, more: tuple[str, ...], save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    dense = save_tiny(family, name="dense")
    cut = dense.parent / "cut"
    surgeon("prune", "dense", *CUT, "--repair", "none", *more)
    lora = save_lora(dense, PATHS[family][1], fan_in_fan_out=family == "gpt2")
    surgeon("adapt", "lora", "--onto", "cut", "--out", "carried")
    expected = logits(dense, lora, masking(cut, family))
    found = logits(cut, dense.parent / "carried")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(cut)).abs().max() > 0.1  # the adapter does something
    config = json.loads((dense.parent / "carried" / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("cut", 3, 6)


def test_without_adapt_peft_fails_on_the_shapes(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    dense = save_tiny("llama", name="dense")
    surgeon("prune", "dense", *CUT)
    lora = save_lora(dense, PATHS["llama"][1])
    with pytest.raises(RuntimeError, match="size mismatch"):
        logits(dense.parent / "cut", lora)
