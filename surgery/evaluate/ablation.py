"""Ablation: measures a model with chosen scalars, activations or channels changed or removed.

All conditions share one pass over the layers, next to the dense model; see `surgery.engine.branches`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.budget.pass_cost import PassCost, PassJob, StreamShape, pass_cost
from surgery.engine import distributed
from surgery.engine.branches import run_branches
from surgery.engine.layer_edits import Drop, DropLargest, Edit, Remove, Restore, Scale
from surgery.engine.loss import measure_divergence
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.index.paired_bootstrap import paired_interval
from surgery.progress import Progress, no_progress
from surgery.text import TokenBlocks

__all__ = [
    "Condition",
    "Drop",
    "DropLargest",
    "Edit",
    "Outcome",
    "Remove",
    "Restore",
    "Scale",
    "run_ablations",
]


@dataclass(frozen=True)
class Condition:
    """A named set of edits by layer; `group` names its experiment, `x` is the swept quantity."""

    name: str
    group: str
    edits: dict[int, list[Edit]] = field(default_factory=dict)
    x: float | None = None

    @property
    def first(self) -> int:
        """The first edited layer."""
        return min(self.edits, default=0)


@dataclass(frozen=True)
class Outcome:
    """Measurements of a condition.

    `changed` counts scalars or channels. `factor` is its perplexity divided by that of the original model on
    the same `tokens` predicted tokens. `bits_per_byte` is per byte of text. `kl` is the mean over tokens of
    KL(dense || condition) in nats. `x` is the swept quantity. `effect` is what it adds to the loss in nats
    per token, with its 95% `interval` over blocks (null: not known, of one block).
    """

    condition: str
    group: str
    changed: int
    perplexity: float
    factor: float
    bits_per_byte: float
    kl: float
    tokens: int
    x: float | None = None
    effect: float = 0.0
    interval: tuple[float | None, ...] = (None, None)


def run_ablations(
    opened: Model,
    conditions: list[Condition],
    blocks: TokenBlocks,
    progress: Progress[Any] = no_progress,
    *,
    edit_bytes: int = 0,
) -> list[Outcome]:
    """Measure the original model and every condition on `blocks`, in one pass over the layers.

    Of several processes each measures some of the conditions, and all return the outcomes of all.
    `edit_bytes` as in `ablation_cost`. Raises MemoryBudgetError, DistributedError.
    """
    own = distributed.own_share(conditions, "conditions")
    distributed.init(opened.run.device)
    original, *outcomes = _run_own(opened, own, blocks, progress, edit_bytes)
    return [original, *distributed.of_all(outcomes)]


def _run_own(
    opened: Model, conditions: list[Condition], blocks: TokenBlocks, progress: Progress[Any], edit_bytes: int
) -> list[Outcome]:
    """The outcomes of the original model and of these conditions, measured by this process."""
    cost = ablation_cost(opened, len(conditions), *blocks.ids.shape, edit_bytes=edit_bytes)
    model, place = StreamedModel(opened), cost.hidden_on
    step = cost.blocks_together(blocks.ids.shape[1])
    dense = TokenStream(model, blocks.ids.long(), micro_batch=step, place=place)
    run = run_branches(model, dense, [condition.edits for condition in conditions], place, progress)
    measured = measure_divergence(model, dense, [dense, *run.streams()])
    outcomes = []
    for condition, count, found in zip(
        [Condition("original", "original"), *conditions], [0, *run.changed], measured, strict=True
    ):
        bits = found.nats / math.log(2) / blocks.predicted_bytes
        factor = found.perplexity / measured[0].perplexity
        row = (condition.name, condition.group, count, found.perplexity, factor, bits, found.kl, found.tokens)
        added = torch.tensor(found.block_nats) - torch.tensor(measured[0].block_nats)
        interval = paired_interval(added / (blocks.ids.shape[1] - 1))
        outcomes.append(Outcome(*row, condition.x, interval.mean, tuple(interval.as_json())))
    return outcomes


def ablation_cost(
    opened: Model, conditions: int, blocks: int, block_size: int, *, edit_bytes: int = 0
) -> PassCost:
    """Cost of measuring `conditions` conditions, whose edits take `edit_bytes` for each weight of a matrix.

    Raises MemoryBudgetError.
    """
    shapes = (StreamShape(blocks, block_size, conditions + 1),)
    job = PassJob(shapes, preserves_layer=True, compares=True, edit_bytes=edit_bytes)
    return pass_cost(opened.meta_model, job, opened.run)
