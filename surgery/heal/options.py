"""HealOptions: what is trained, on how many tokens a step, towards what; and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from surgery.budget.heal_cost import HealCost, HealJob, heal_cost
from surgery.engine.distributed import shard
from surgery.engine.open_model import Model
from surgery.heal.distil_loss import DistilLoss
from surgery.heal.processes import check_shares
from surgery.heal.targets import TOP, target_bytes
from surgery.heal.train import MEASURES, Schedule
from surgery.heal.trainable import TrainMode, trained_numbers

BATCH_TOKENS = 4096
DEFAULT_MODE = TrainMode("lora", 16)
PLAIN_KL = DistilLoss()


@dataclass(frozen=True)
class HealOptions:
    """How to train.

    `epochs`: times every block is seen; `batch_tokens` of one step; `top`: the teacher's tokens kept of a
    position; `recompute`: targets anew in every step; `learning_rate`: its peak, None for the mode's.
    """

    train: TrainMode = DEFAULT_MODE
    loss: DistilLoss = PLAIN_KL
    epochs: int = 1
    batch_tokens: int = BATCH_TOKENS
    learning_rate: float | None = None
    top: int = TOP
    recompute: bool = False
    seed: int = 42

    @property
    def targets(self) -> str:
        """Where the teacher's predictions come from: "disk", "recompute", or "none" where none are needed."""
        if not self.loss.needs_teacher:
            return "none"
        return "recompute" if self.recompute else "disk"

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return self.train.learning_rate if self.learning_rate is None else self.learning_rate

    def batch(self, block_size: int) -> int:
        """Blocks of a step."""
        return max(1, self.batch_tokens // block_size)

    def schedule(self, blocks: int, block_size: int) -> Schedule:
        """The order of blocks: every epoch a permutation of all, drawn with the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.cat([torch.randperm(blocks, generator=generator) for _ in range(self.epochs)])
        return Schedule(order, self.batch(block_size))

    def as_json(self) -> dict[str, Any]:
        """The `options` entry of a heal in surgeon.json."""
        return {
            "train": str(self.train),
            "temperature": self.loss.temperature,
            "cross_entropy": self.loss.cross_entropy,
            "epochs": self.epochs,
            "batch_tokens": self.batch_tokens,
            "learning_rate": self.peak,
            "top": self.top,
            "seed": self.seed,
        }


def estimate_heal(
    student: Model, teacher: Model, shape: tuple[int, ...], held_out: int, options: HealOptions
) -> HealCost:
    """The cost of a heal on blocks of ids of `shape` [N, T], with `held_out` blocks measured along the way.

    Of several processes it is that of this one's share. Raises MemoryBudgetError for a budget that is too
    small, UsageError for more processes than blocks in a step.
    """
    blocks, block_size = shape
    schedule = options.schedule(blocks, block_size)
    check_shares(min(blocks, schedule.batch), block_size)
    own = schedule.own
    job = HealJob(
        trained=trained_numbers(student.meta_model, options.train),
        steps=schedule.steps,
        batch=schedule.own_batch,
        block_size=block_size,
        distinct=len(own),
        held_out=len(range(held_out)[shard(held_out)]),
        measures=1 + min(MEASURES, schedule.steps),
        target_bytes=target_bytes(len(own), block_size, options.top) * (options.targets == "disk"),
        targets=options.targets,
        adapters=options.train.kind != "all",
        top=options.top,
        written=student.checkpoint.nbytes,
    )
    return heal_cost(student.meta_model, teacher.meta_model, job, student.run)
