"""What a heal is said to take, against the tensors that are alive while it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.live_memory import Live
from helpers.tiny_models import PLENTY, opened

from surgery.budget.heal_cost import HealCost
from surgery.engine.open_model import Model
from surgery.heal.distil_loss import DistilLoss
from surgery.heal.heal import heal
from surgery.heal.heal_text import HealText
from surgery.heal.options import HealOptions, estimate_heal
from surgery.heal.train import HeldOut
from surgery.heal.trainable import TrainMode

WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
IDS = torch.randint(0, 256, (24, 64), generator=torch.Generator().manual_seed(1))


def text() -> HealText:
    held_out = HeldOut({"a": IDS[16:20], "b": IDS[20:]})
    parts = ({"name": "a", "blocks": 16},)
    return HealText(IDS[:16], torch.ones(16, IDS.shape[1], dtype=torch.bool), held_out, parts)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "mixtral", "phi3"])
@pytest.mark.parametrize("train", ["lora:8", "all"])
@pytest.mark.parametrize("scarce", [False, True])
def test_memory_of_a_heal_is_estimated(
    scarce: bool, train: str, variant: str, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    changes = {"n_layer": 3} if variant == "gpt2" else WIDE
    folders = [save_tiny(variant, name=name, seed=seed, **changes) for name, seed in (("a", 0), ("b", 1))]
    options = HealOptions(TrainMode.parse(train), DistilLoss(1.0, 0.9), batch_tokens=512)

    def pair(memory: int) -> tuple[Model, Model]:
        student, teacher = (opened(folder, memory=memory) for folder in folders)
        return student, teacher

    least = estimate_heal(*pair(PLENTY), tuple(IDS[:16].shape), 8, options).smallest_bytes
    memory = least if scarce else PLENTY
    cost = estimate_heal(*pair(memory), tuple(IDS[:16].shape), 8, options)
    assert cost.host_bytes <= memory
    assert ((cost.hidden_on, cost.state_on) == ("disk", "disk")) == scarce
    student, teacher = pair(memory)
    assert student.meta_model and teacher.meta_model
    with Live() as live:
        heal(student, teacher, text(), tmp_path / "healed", options)
    assert live.peak <= cost.host_bytes


def test_less_memory_means_recomputing_reading_again_and_files(save_tiny: Callable[..., Path]) -> None:
    folders = [save_tiny("llama", name=name, **WIDE) for name in ("a", "b")]

    def cost(memory: int):  # type: ignore[no-untyped-def]
        student, teacher = (opened(folder, memory=memory) for folder in folders)
        return estimate_heal(student, teacher, (16, 64), 8, HealOptions(batch_tokens=512))

    plenty = cost(PLENTY)
    found = [cost(memory) for memory in range(plenty.smallest_bytes, 2 * plenty.host_bytes, 1 << 20)]
    assert found[0].hidden_on == "disk"
    assert (found[0].keep_bytes, found[0].graph_bytes) == (0, 0)
    assert found[-1].read_bytes < found[0].read_bytes
    assert found[-1].flops < found[0].flops


def test_state_goes_to_files_where_memory_does_not_hold_it(save_tiny: Callable[..., Path]) -> None:
    folders = [save_tiny("llama", name=name, **WIDE) for name in ("a", "b")]
    options = HealOptions(TrainMode("all"), batch_tokens=512)

    def cost(memory: int) -> HealCost:
        student, teacher = (opened(folder, memory=memory) for folder in folders)
        return estimate_heal(student, teacher, (16, 64), 8, options)

    plenty = cost(PLENTY)
    budgets = range(plenty.smallest_bytes, 3 * plenty.state_bytes, plenty.state_bytes // 20)
    found = [cost(memory) for memory in budgets]
    places = [one.state_on for one in found]
    assert places == sorted(places) and set(places) == {"disk", "memory"}
    first = found[places.index("memory")]
    assert first.host_bytes - found[0].host_bytes > 0.8 * plenty.state_bytes
    assert found[0].state_disk_bytes > first.state_disk_bytes == plenty.state_disk_bytes
    assert found[0].write_bytes - first.write_bytes > 2 * 16 * plenty.state_bytes // 20
