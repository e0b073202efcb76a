"""`surgeon heal` end to end on tiny models: what it writes, when it writes nothing, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from surgery.checkpoint.output_folder import MARGIN_BYTES
from surgery.engine.resume import journal_folder
from surgery.heal.train import Trainer
from surgery.pruning.verify import verify_folder

# a random teacher knows no English: plain cross-entropy is what improves perplexity
HEAL = (
    *("--tokens", "1024", "--text", "text.txt", "--block-size", "32", "--batch-tokens", "128"),
    *("--cross-entropy", "0.9"),
)


@pytest.fixture
def pruned(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> Callable[..., Path]:
    """Prune a tiny model of a family to half of its channels, beside its source."""

    def make(family: str = "llama", *more: str, **changes: Any) -> Path:
        source = save_tiny(family, name="dense", **changes)
        cut = ("--sparsity", "0.5", "--multiple-of", "4", *more)
        surgeon("prune", str(source), *cut, "--out", "cut", *CALIBRATION)
        return source.parent / "cut"

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


@pytest.mark.parametrize("train", ["lora:4", "norms", "all"])
@pytest.mark.draws
def test_a_healed_folder_is_complete_and_better(
    train: str, pruned: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    cut = pruned(dtype=torch.bfloat16)
    result = surgeon("heal", "cut", *HEAL, "--train", train, "--out", "healed", "--dtype", "float32")
    healed = cut.parent / "healed"
    assert "held-out blocks of text.txt" in result.output
    verify_folder(healed)
    before, after = tensors(cut), tensors(healed)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("embed" in name or "lm_head" in name for name in changed)
    assert (train == "norms") == all("norm" in name for name in changed)
    manifest = json.loads((healed / "surgeon.json").read_text())
    (entry,) = manifest["heals"]
    assert entry["steps"] == len(entry["losses"]) == 8
    assert entry["tokens"] == 1024
    assert entry["options"]["train"] == train
    assert all(text["after"] < text["before"] for text in entry["held_out"].values())
    assert manifest["plan"] == json.loads((cut / "surgeon.json").read_text())["plan"]
    card = (healed / "README.md").read_text()
    assert "## Healed" in card
    assert "surgeon heal cut --tokens 1024" in card
    assert "heal.png" in card and (healed / "heal.png").read_bytes().startswith(b"\x89PNG")
    assert not journal_folder(healed, "heal").exists()
    surgeon("report", "healed", "--out", "page.html")
    titles = [section["title"] for section in json.loads((cut.parent / "page.json").read_text())["sections"]]
    assert "Healed" in titles


@pytest.mark.parametrize("train", ["lora:4", "norms"])
def test_layers_without_attention_or_ffn_are_healed(
    train: str, pruned: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    pruned("llama", "--drop-ffn", "3", "--drop-attention", "1")
    surgeon("heal", "cut", *HEAL, "--train", train, "--out", "healed")
    before, after = tensors(Path("cut")), tensors(Path("healed"))
    assert before.keys() == after.keys() and not any("layers.3.mlp" in name for name in after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("layers.3." in name for name in changed) and any("layers.1." in name for name in changed)
    loaded = AutoModelForCausalLM.from_pretrained("healed")
    assert not list(loaded.model.layers[3].mlp.parameters())
    assert not list(loaded.model.layers[1].self_attn.parameters())


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "phi3", "deepseek_v3"])
def test_trained_parameters_come_back_from_the_stored_tensors(
    family: str, pruned: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    """Written and trained model are compared on logits before the folder appears: all kinds of storage."""
    cut = pruned(family)
    surgeon("heal", "cut", *HEAL, "--train", "all", "--learning-rate", "1e-3", "--out", "healed")
    assert AutoModelForCausalLM.from_pretrained(cut.parent / "healed") is not None
    verify_folder(cut.parent / "healed")


def test_the_same_seed_gives_the_same_bytes_also_after_an_interruption(
    pruned: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = pruned()
    monkeypatch.setattr("surgery.heal.train.SAVE_SECONDS", 0.0)
    surgeon("heal", "cut", *HEAL, "--out", "one")
    step = Trainer.step

    def stopping(self: Trainer, number: int) -> float:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", stopping)
    surgeon("heal", "cut", *HEAL, "--out", "two", code=1)
    steps = []
    monkeypatch.setattr(Trainer, "step", lambda self, number: steps.append(number) or step(self, number))
    result = surgeon("heal", "cut", *HEAL, "--out", "two")
    assert "Resuming" in result.stderr
    assert steps == [5, 6, 7]
    files = [(cut.parent / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_recomputed_targets_give_the_same_bytes(
    pruned: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    cut = pruned()
    surgeon("heal", "cut", *HEAL, "--out", "one")
    surgeon("heal", "cut", *HEAL, "--targets", "recompute", "--out", "two")
    files = [(cut.parent / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_plain_cross_entropy_runs_no_pass_of_the_teacher(
    pruned: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = pruned()
    heal = ("heal", "cut", *HEAL[:-1], "1", "--out", "healed")
    said = json.loads(surgeon(*heal, "--dry-run", "--json").stdout)["costs"]
    mixed = json.loads(surgeon("heal", "cut", *HEAL, "--dry-run", "--json").stdout)["costs"]
    assert (said["targets"], said["target_bytes"], said["teacher_bytes"]) == ("none", 0, 0)
    assert said["flops"] < mixed["flops"]
    assert said["read_bytes"] < mixed["read_bytes"]
    assert "targets not needed" in surgeon(*heal, "--dry-run").output
    monkeypatch.delattr("surgery.heal.targets.Teacher.targets")
    surgeon(*heal)
    [entry] = json.loads((cut.parent / "healed" / "surgeon.json").read_text())["heals"]
    assert entry["held_out"]["text.txt"]["after"] < entry["held_out"]["text.txt"]["before"]
    card = (cut.parent / "healed" / "README.md").read_text()
    assert "Loss: cross-entropy with the token that follows" in card
    assert "- distilled" not in card


def test_what_does_not_help_writes_nothing(pruned: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    cut = pruned()
    result = surgeon("heal", "cut", *HEAL, "--learning-rate", "1e-30", "--train", "norms", "--out", "healed")
    assert "did not help" in result.stderr
    assert not (cut.parent / "healed").exists()
    assert not journal_folder(cut.parent / "healed", "heal").exists()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    pruned: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    cut = pruned()
    before = sorted(cut.parent.iterdir())
    said = json.loads(surgeon("heal", "cut", *HEAL, "--dry-run", "--json").stdout)
    assert said["costs"]["target_bytes"] == 32 * 31 * 64 * 6
    assert said["options"]["train"] == "lora:16"
    assert "targets on disk" in surgeon("heal", "cut", *HEAL, "--dry-run").output
    assert sorted(cut.parent.iterdir()) == before


def test_less_than_the_least_memory_is_refused_and_the_least_puts_the_state_in_files(
    pruned: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = pruned()
    command = ("heal", "cut", *HEAL, "--train", "all", "--learning-rate", "1e-3", "--out", "healed")

    def costs(*more: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(surgeon(*command, *more, "--dry-run", "--json").stdout)["costs"]
        return found

    plenty = costs()
    least = plenty["smallest_bytes"]
    before = sorted(cut.parent.iterdir())
    assert "at least" in surgeon(*command, "--memory", str(least - 1), code=1).stderr
    scarce = costs("--memory", str(least))
    numbers = scarce["state_bytes"] // 20
    assert (plenty["state_on"], scarce["state_on"]) == ("memory", "disk")
    assert scarce["state_disk_bytes"] == 36 * numbers
    needs = 36 * numbers + scarce["target_bytes"] + MARGIN_BYTES
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needs))
    assert "the disk is too small" in surgeon(*command, "--memory", str(least), code=1).stderr
    assert sorted(cut.parent.iterdir()) == before
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needs + (1 << 20)))
    surgeon(*command, "--memory", str(least))
    verify_folder(cut.parent / "healed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", "lora:0"), "unknown --train"),
        (("--tokens", "many"), "not a number of tokens"),
        (("--tokens", "1M"), "too short"),
        (("--memory", "100KiB"), "memory budget"),
        (("--teacher", "other"), "different tokenizers"),
        (("--out", "cut"), "the destination is the source"),
    ],
)
def test_bad_input_is_refused_before_the_work(
    arguments: tuple[str, ...],
    message: str,
    pruned: Callable[..., Path],
    save_tiny: Callable[..., Path],
    surgeon: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pruned()
    other = save_tiny("llama", name="other", vocab_size=300) / "tokenizer.json"
    other.write_text(other.read_text().replace('"a":', '"aa":'))
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("it trained"))
    code = 2 if message.startswith(("unknown", "not a", "different")) else 1
    assert message in surgeon("heal", "cut", *HEAL, *arguments, code=code).stderr


def test_folders_that_cannot_be_healed(pruned: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    cut = pruned("llama", "--allocation", "score", "--pad")
    assert "padded" in surgeon("heal", "cut", *HEAL, code=1).stderr
    assert "--teacher" in surgeon("heal", "dense", *HEAL, code=2).stderr
    rounding = ("--simulate", "--per-channel", "--no-clip", "--super-weights", "none")
    surgeon("quantize", "dense", *rounding, "--out", "rounded")
    assert "quantised" in surgeon("heal", "rounded", *HEAL, code=1).stderr
    (cut.parent / "dense").rename(cut.parent / "moved")
    plan = json.loads((cut / "surgeon.json").read_text())
    plan["plan"]["padded"] = False
    (cut / "surgeon.json").write_text(json.dumps(plan))
    assert "not beside it" in surgeon("heal", "cut", *HEAL, code=2).stderr


def test_a_folder_of_another_maker_is_healed_with_a_teacher(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    save_tiny("llama", name="teacher", seed=1)
    student = save_tiny("llama", name="student", hidden_size=16, head_dim=4)
    surgeon("heal", "student", *HEAL, "--teacher", "teacher", "--out", "healed")
    card = (student.parent / "healed" / "README.md").read_text()
    assert "student, healed" in card
    assert "teacher predicts" in card
    surgeon("heal", "healed", *HEAL, "--teacher", "teacher", "--out", "again")
    assert len(json.loads((student.parent / "again" / "surgeon.json").read_text())["heals"]) == 2
