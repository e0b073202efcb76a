"""plan_pruning: from a model and its index to a plan, measuring sensitivity where the allocation needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from surgery import defaults
from surgery.budget.model_size import ModelSize
from surgery.budget.sensitivity_cost import sensitivity_cost
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal, saved_once
from surgery.engine.streamed_model import StreamedModel
from surgery.index.channel_index import ChannelIndex
from surgery.model.families import check_prunable
from surgery.plan.kind_plan import KindPlan
from surgery.plan.make_plan import make_plan
from surgery.plan.prune_plan import GIVEN, MEASURED, PrunePlan
from surgery.plan.ranking import channel_orders
from surgery.progress import Progress, no_progress
from surgery.pruning.layer_widths import search_widths
from surgery.repair.methods import REPAIRS
from surgery.repair.sensitivity import measure_sensitivity


def plan_pruning(
    model: Model,
    index: ChannelIndex,
    *,
    sparsity: float | None = None,
    intermediate_size: int | None = None,
    method: str = defaults.METHOD,
    allocation: str = defaults.ALLOCATION,
    layer_widths: Sequence[int] | None = None,
    repair: str = defaults.REPAIR,
    pad: bool = False,
    protect: bool | None = None,
    multiple_of: int | None = None,
    seed: int = defaults.SEED,
    sensitivity: list[torch.Tensor] | None = None,
    cuts: tuple[KindPlan, ...] = (),
    seconds: float = defaults.SEARCH_SECONDS,
    journal: Journal | None = None,
    progress: Progress[Any] = no_progress,
    say: Callable[[str], None] = lambda _: None,
) -> PrunePlan:
    """Choose the channels that stay, as `surgeon prune` does; nothing is written.

    Half of the channels go unless `sparsity` (in [0, 1)) or `intermediate_size` says otherwise. `method`
    ranks channels, `allocation` is "uniform", "global" (widths by measured sensitivity), "searched" (which
    starts from these and measures whole configurations for about `seconds`: `search_widths`) or "score";
    `layer_widths` says the channels that each layer keeps in place of both. `repair` names how what stays is
    refitted; see `make_plan` for the others. `sensitivity`, as `sensitivity_of` returns it, is measured where
    it is needed and not given. `cuts` goes besides FFN channels. A search keeps what it measured in
    `journal`. Raises IndexMismatchError for an index of another model, PlanError for a cut that can't be
    made.
    """
    check_prunable(model.checkpoint.config, model.name)
    index.check_source(model.checkpoint)
    REPAIRS.find(repair)
    if layer_widths is not None:
        allocation, sparsity, intermediate_size = GIVEN, None, None
    elif sparsity is None and intermediate_size is None:
        sparsity = defaults.SPARSITY
    if allocation in MEASURED and sensitivity is None:
        sensitivity = saved_sensitivity(
            journal, model, index, say=say, method=method, seed=seed, protect=protect, progress=progress
        )
    build = partial(
        make_plan,
        index,
        method=method,
        sparsity=sparsity,
        width=intermediate_size,
        multiple_of=multiple_of,
        seed=seed,
        allocation=allocation,
        pad=pad,
        repair=repair,
        sensitivity=sensitivity,
        protect=protect,
        cuts=cuts,
    )
    plan = build(layer_widths=layer_widths)
    if allocation == "searched":
        widths = search_widths(
            model, index, plan, seconds=seconds, journal=journal, progress=progress, say=say
        )
        plan = build(width_search=widths)
    return plan


def saved_sensitivity(
    journal: Journal | None,
    model: Model,
    index: ChannelIndex,
    step: str = "sensitivity",
    say: Callable[[str], None] = lambda _: None,
    *,
    method: str,
    **how: Any,
) -> list[torch.Tensor]:
    """What `sensitivity_of` gives, or gave before the run was interrupted; `step` names it in the journal."""

    def measure() -> dict[str, torch.Tensor]:
        say(f"Measuring the sensitivity of each layer at five widths, channels ranked by {method}")
        found = sensitivity_of(model, index, method=method, **how)
        return {str(layer): costs for layer, costs in enumerate(found)}

    tensors = saved_once(journal, step, measure)
    return [tensors[name] for name in sorted(tensors, key=int)]


def sensitivity_of(
    model: Model,
    index: ChannelIndex,
    *,
    method: str = defaults.METHOD,
    seed: int = defaults.SEED,
    protect: bool | None = None,
    progress: Progress[Any] = no_progress,
) -> list[torch.Tensor]:
    """What pruning each layer costs at every width, [F + 1] a layer, on the index's calibration blocks."""
    orders = channel_orders(index, method, seed, protect)
    blocks, block_size = index.input_ids.shape
    size = ModelSize.of(model.meta_model, model.run.dtype, block_size)
    cost = sensitivity_cost(size, blocks, block_size, model.run)
    return measure_sensitivity(StreamedModel(model), index.input_ids.long(), orders, cost, progress)
