"""plan_to_target: from a size to the mixture of cuts that reaches it at the least measured cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch

from surgery import defaults
from surgery.budget.model_size import ModelSize
from surgery.budget.sensitivity_cost import sensitivity_cost
from surgery.budget.target import PARAMS, SPEED, Target
from surgery.cut.groups import Cut
from surgery.cut.kinds import KINDS
from surgery.cut.tensors import TensorEdit, edited_specs
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal, saved_once
from surgery.engine.streamed_model import StreamedModel
from surgery.errors import PlanError, UnsupportedModelError, UsageError
from surgery.index.channel_index import ChannelIndex
from surgery.model.families import check_prunable
from surgery.plan.kind_plan import KindPlan
from surgery.plan.make_plan import make_plan
from surgery.plan.prune_plan import MEASURED, PrunePlan
from surgery.plan.search_plan import SearchPlan, WidthSearch
from surgery.plan.widths import default_multiple
from surgery.progress import Progress, no_progress
from surgery.pruning.layer_widths import search_widths
from surgery.pruning.plan_pruning import saved_sensitivity
from surgery.quantize.packed_size import GROUP
from surgery.repair.methods import REPAIRS
from surgery.search.levels import expert_levels, head_levels
from surgery.search.mixtures import COUNTS, Search
from surgery.search.single_costs import Item, measure_single_costs
from surgery.search.sizes import Fitter, amount_of
from surgery.search.trials import Trials


def plan_to_target(
    model: Model,
    index: ChannelIndex,
    target: Target,
    *,
    cuts: Collection[str] = defaults.TARGET_CUTS,
    method: str = defaults.METHOD,
    allocation: str = defaults.ALLOCATION,
    repair: str = defaults.REPAIR,
    pad: bool = False,
    protect: bool | None = None,
    multiple_of: int | None = None,
    seed: int = defaults.SEED,
    seconds: float = defaults.SEARCH_SECONDS,
    fixed: tuple[KindPlan, ...] = (),
    expert_score: str = "reap",
    sensitivity: list[torch.Tensor] | None = None,
    journal: Journal | None = None,
    progress: Progress[Any] = no_progress,
    say: Callable[[str], None] = lambda _: None,
) -> PrunePlan:
    """The plan that meets `target` by cuts of the kinds `cuts` with the least KL to the dense model.

    What single cuts cost is measured first; then whole configurations are cut, repaired and measured on
    held-out calibration blocks, for about `seconds` in all. `fixed` goes in any case. Experts go by
    `expert_score`, as of `plan_experts`. `sensitivity` of layers is measured unless given. What was measured
    stays in `journal`, so that an interrupted search goes on. Other arguments are as of `plan_pruning`. The
    plan's `search` says what was tried. Raises PlanError for a target that can't be met,
    UnsupportedModelError for a kind that the model can't be cut by.
    """
    check_prunable(model.checkpoint.config, model.name)
    index.check_source(model.checkpoint)
    REPAIRS.find(repair)
    check_target(model, target, cuts)
    widths = model.meta_model.widths()
    if multiple_of is None and target.packed and len(widths) == 1:
        multiple_of = max(default_multiple(*widths.values()), GROUP)
    if allocation in MEASURED and sensitivity is None:
        sensitivity = saved_sensitivity(
            journal, model, index, say=say, method=method, seed=seed, protect=protect, progress=progress
        )

    def build(
        parts: tuple[KindPlan, ...], size: dict[str, Any], width_search: WidthSearch | None = None
    ) -> PrunePlan:
        return make_plan(
            index,
            method=method,
            **size,
            multiple_of=multiple_of,
            seed=seed,
            allocation=allocation,
            pad=pad,
            repair=repair,
            sensitivity=sensitivity,
            protect=protect,
            cuts=parts,
            width_search=width_search,
        )

    fitter = Fitter(model, target, build, "ffn" in cuts, multiple_of, allocation != "uniform")
    trials = Trials(model, index, progress, journal)
    costs: dict[Item, float] = {}
    single = [kind for kind in cuts if kind in COUNTS]
    if single:
        say(f"Measuring what single {' and '.join(KINDS[kind].label for kind in single)} cost")
        tensors = saved_once(journal, "costs", lambda: _single_costs(model, trials, single, progress))
        costs = {_item(name): float(kl) for name, kl in tensors.items()}
    search = Search(fitter, trials.measure, costs, len(model.meta_model.layers), fixed)
    if "kv" in cuts:
        say("Measuring what each key/value head adds")
        search.levels["kv"] = head_levels(model, index, journal, progress)
    if "experts" in cuts and not any(part.kind == "experts" for part in fixed):
        say("Measuring what each expert adds")
        search.levels["experts"] = expert_levels(model, index, expert_score, protect, journal, progress)
    say(f"Trying mixtures of cuts that come to {target.text(target.amount)}")
    finished = journal.numbers("tried") if journal is not None else []
    started = time.monotonic()
    share = 0.5 if allocation == "searched" else 1.0  # the widths of the best mixture take the other half
    plan = search.run(share * seconds, finished[0] if finished else None)
    if journal is not None and not finished:
        journal.mark(f"tried {len(search.steps)}")
    if allocation == "searched":
        left = seconds - (time.monotonic() - started)
        tried = search_widths(model, index, plan, seconds=left, journal=journal, progress=progress, say=say)
        better = build(plan.cuts, search.size_of(search.best), tried)
        if fitter.amount(better) <= target.amount:
            plan = better
        else:  # the widest layer says more than its own size: that of padding, or of layers beside the model
            say("The widths found exceed the target as they are written: the mixture's own are kept")
    found = SearchPlan(
        target,
        fitter.amount(plan),
        tuple(cuts),
        {kind: {number: kl for (of, number), kl in costs.items() if of == kind} for kind in single},
        trials.tokens,
        tuple(search.steps),
        search.size_of(search.best),
    )
    return replace(plan, search=found)


def usable_kinds(model: Model, kinds: Collection[str]) -> dict[str, str]:
    """Kind -> why the model can't be cut by it, "" where it can."""
    found = {}
    for name in kinds:
        try:
            KINDS.find(name).check_model(model.meta_model)
            found[name] = ""
        except UnsupportedModelError as error:
            found[name] = error.found or str(error)
    return found


def check_target(model: Model, target: Target, cuts: Collection[str]) -> None:
    """Raise PlanError, UsageError or UnsupportedModelError, before anything is measured, for kinds that the
    model can't be cut by, a target that it meets as it is, and one below what no cut removes.
    """
    meta_model, checkpoint = model.meta_model, model.checkpoint
    for name in cuts:
        KINDS.find(name).check_model(meta_model)
    if target.unit == SPEED:
        _check_speed(model, target, cuts)
        return
    dense = amount_of(model, Cut((), {}, {}, checkpoint.config), target)
    if dense <= target.amount:
        raise PlanError(
            "the model meets the target already",
            where=target.option,
            expected=f"less than {target.text(dense)}",
            found=target.text(target.amount),
        )
    layers = {name for layer in meta_model.layer_parameters for one in layer for name in one.stored}
    beside = edited_specs(checkpoint, {name: TensorEdit(None) for name in (*layers, *meta_model.dropped)})
    least = sum(spec.numel if target.unit == PARAMS else spec.nbytes for spec in beside.values())
    if least >= target.amount and "vocab" not in cuts:
        raise PlanError(
            "embeddings and head alone exceed the target",
            where=target.option,
            expected=f"more than {target.text(least)}",
            found=target.text(target.amount),
        )


def _check_speed(model: Model, target: Target, cuts: Collection[str]) -> None:
    """Raise UsageError for kinds whose speed is not measured, PlanError for a time below that of embeddings
    and head.
    """
    for kind in ("attention", "whole-ffn", "experts", "vocab"):
        if kind in cuts:
            raise UsageError(
                "how fast a model without some of these is, is not measured",
                where="--target-speed, --cuts",
                found=kind,
                next_step="leave it out of --cuts, or use --target-params",
            )
    if target.speed is not None and 1e9 * target.speed.ends >= target.amount:
        raise PlanError(
            "embeddings and head alone take longer",
            where=target.option,
            expected=f"less than {target.text(round(1e9 * target.speed.ends))}",
            found=f"{model.name}: {target.text(target.amount)}",
        )


def _single_costs(
    model: Model, trials: Trials, kinds: Collection[str], progress: Progress[Any]
) -> dict[str, torch.Tensor]:
    """KL without each layer, attention and FFN, on the held-out blocks of `trials`, by "kind number"."""
    ids = trials.held_out.ids
    size = ModelSize.of(model.meta_model, model.run.dtype, ids.shape[1])
    cost = sensitivity_cost(size, 4 * len(ids), ids.shape[1], model.run)
    streamed = StreamedModel(model)
    found = measure_single_costs(streamed, ids, kinds, cost.micro_batch, cost.branches_on, progress)
    return {f"{kind} {number}": torch.tensor(kl, dtype=torch.float64) for (kind, number), kl in found.items()}


def _item(name: str) -> Item:
    kind, _, number = name.partition(" ")
    return kind, int(number)
