"""`surgeon heal --save-adapter`: what peft computes with the folder is what the healed model computes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_heal import HEAL
from transformers import AutoModelForCausalLM

from surgery.errors import CheckpointError
from surgery.heal.adapter import CONFIG, TENSORS
from surgery.heal.train import Trainer

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
LORA = (*HEAL, "--teacher", "teacher", "--train", "lora:3", "--save-adapter", "adapter", "--out", "healed")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(IDS, use_cache=False).logits.float()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "gemma2"])
def test_peft_computes_with_the_adapter_what_the_healed_model_computes(
    family: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder = save_tiny(family, name="student").parent
    save_tiny(family, name="teacher", seed=1)
    surgeon("heal", "student", *LORA, "--learning-rate", "1e-2")
    assert (folder / "healed").exists()
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    before = logits(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of keys that are missing or not used
        warnings.simplefilter("ignore", FutureWarning)  # it asks transformers by an old name
        adapted = logits(peft.PeftModel.from_pretrained(student, folder / "adapter"))
    healed = logits(AutoModelForCausalLM.from_pretrained(folder / "healed"))
    torch.testing.assert_close(adapted, healed, atol=2e-4, rtol=1e-4)
    assert (adapted - before).abs().max() > 100 * (adapted - healed).abs().max()


def test_the_folder_holds_every_trained_tensor_and_no_path(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    folder = save_tiny("llama", name="student", dtype=torch.bfloat16).parent
    save_tiny("llama", name="teacher", seed=1)
    surgeon("heal", "student", *LORA, "--dtype", "float32")
    config = json.loads((folder / "adapter" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "student"
    assert str(folder) not in (folder / "adapter" / CONFIG).read_text()
    tensors = load_file(folder / "adapter" / TENSORS)
    modules = {name.removeprefix("base_model.model.") for name in tensors}
    assert {name.split(".lora_")[0] for name in modules if ".lora_" in name} == set(config["target_modules"])
    norms = {name.rpartition(".")[0] for name in modules if ".lora_" not in name}
    assert norms == set(config["modules_to_save"])
    dtypes = {".lora_" in name: tensor.dtype for name, tensor in tensors.items()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--train", "all"), 2, "--save-adapter"),
        (("--train", "norms", "--dry-run"), 2, "--save-adapter"),
        (("--save-adapter", "teacher"), 1, "name another with --save-adapter"),
        (("--save-adapter", "student/adapter"), 1, "inside the source"),
        (("--save-adapter", "healed"), 1, "one lies in the other"),
        (("--save-adapter", "healed/adapter"), 1, "one lies in the other"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    save_tiny: Callable[..., Path],
    surgeon: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_tiny("llama", name="student")
    save_tiny("llama", name="teacher", seed=1)
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("it trained"))
    assert message in surgeon("heal", "student", *LORA, *arguments, code=code).stderr


def test_linears_that_peft_takes_for_experts_are_refused(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    save_tiny("deepseek_v3", name="student")
    save_tiny("deepseek_v3", name="teacher", seed=1)
    assert "stacked experts" in surgeon("heal", "student", *LORA, code=1).stderr


def test_an_adapter_of_a_failed_heal_does_not_appear(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", name="student").parent
    save_tiny("llama", name="teacher", seed=1)
    before = sorted(folder.iterdir())

    def failing(*_: Any, **__: Any) -> None:
        assert list(folder.glob(".adapter*"))  # it is written, and hidden
        raise CheckpointError("logits differ")

    monkeypatch.setattr("surgery.heal.heal.check_logits", failing)
    surgeon("heal", "student", *LORA, code=1)
    assert sorted(folder.iterdir()) == before
