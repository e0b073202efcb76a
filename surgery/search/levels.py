"""Kinds of cut that go by one number in every layer: key/value heads and routed experts."""

from __future__ import annotations

from typing import Any

import torch

from surgery.cut.experts import expert_counts
from surgery.cut.kv_heads import possible_heads
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal, saved_once
from surgery.errors import PlanError
from surgery.index.channel_index import ChannelIndex
from surgery.plan.kind_plan import KV_HEADS, KindPlan
from surgery.progress import Progress, no_progress
from surgery.pruning.experts import expert_outputs_norms, experts_plan
from surgery.search.head_scores import head_scores, heads_plan
from surgery.search.mixtures import Levels

EXPERT_STEPS = 16  # numbers of experts that are tried at most


def head_levels(
    model: Model, index: ChannelIndex, journal: Journal | None, progress: Progress[Any] = no_progress
) -> Levels:
    """Fewer key/value heads, those that add the least going first; scores stay in `journal`."""

    def measure() -> dict[str, torch.Tensor]:
        return {str(layer): score for (layer, _), score in head_scores(model, index, progress).items()}

    tensors = saved_once(journal, "heads", measure)
    scores = {(int(layer), KV_HEADS): score for layer, score in tensors.items()}
    (count,) = {len(score) for score in scores.values()}
    steps = [count - heads for heads in possible_heads(model.meta_model)]
    return Levels(steps, lambda fewer: heads_plan(scores, count - fewer))


def expert_levels(
    model: Model,
    index: ChannelIndex,
    score: str,
    protect: bool | None,
    journal: Journal | None,
    progress: Progress[Any] = no_progress,
) -> Levels:
    """Fewer routed experts, by `score` as of `plan_experts`; what was measured stays in `journal`."""

    def measure() -> dict[str, torch.Tensor]:
        norms, tokens = expert_outputs_norms(model, index.input_ids.long(), progress)
        named = {f"tokens {layer}": found for layer, found in tokens.items()}
        return named | {f"norms {layer}": found for layer, found in norms.items()}

    tensors = saved_once(journal, "experts", measure)
    norms, tokens = (
        {int(name.split()[1]): found for name, found in tensors.items() if name.startswith(what)}
        for what in ("norms", "tokens")
    )
    (count,) = set(expert_counts(model.meta_model).values())

    def plan(fewer: int) -> KindPlan:
        keep, guarded = count - fewer, protect is not False
        return experts_plan(model.meta_model, index, keep, (norms, tokens), score, protect=guarded)

    steps = []
    for fewer in range(1, count):
        try:
            plan(fewer)
            steps.append(fewer)
        except PlanError:  # not a number that the router can choose from, or that holds what is protected
            continue
    return Levels(steps[:: -(-len(steps) // EXPERT_STEPS) or 1], plan)
