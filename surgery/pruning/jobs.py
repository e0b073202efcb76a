"""What a plan, or only its widths, asks of the memory budget: the jobs whose cost `prune_cost` adds up."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from surgery.budget.prune_cost import PruneCost, PruneJob, prune_cost
from surgery.cut.ffn_channels import planned_cut
from surgery.cut.planned_model import check_planned
from surgery.engine.open_model import Model
from surgery.model.meta_model import MetaModel
from surgery.plan.prune_plan import MEASURED, PrunePlan
from surgery.plan.widths import WidthChange, check_layer_widths, width_changes
from surgery.repair.methods import REPAIRS
from surgery.repair.sensitivity import check_sensitivity_measurable


def prune_job(plan: PrunePlan, calibration: tuple[int, ...], written: int = 0) -> PruneJob:
    """The job of carrying out one plan, repaired on (blocks, block size) tokens, into `written` bytes."""
    repair = REPAIRS.find(plan.repair)
    blocks, block_size = calibration
    return PruneJob(
        kept_widths(plan),
        repair.changes_weights,
        repair.follows_pruned,
        blocks,
        block_size,
        written=written,
        sensitivity=plan.allocation in MEASURED,
        searches_widths=plan.allocation == "searched",
    )


def kept_widths(plan: PrunePlan) -> list[dict[str, int]]:
    """Channels kept of every FFN, by layer and name."""
    return [{name: len(ffn.kept) for name, ffn in layer.ffns.items()} for layer in plan.layers]


def comparison_job(
    kept: list[dict[str, int]],
    repairs: Iterable[str],
    calibration: tuple[int, ...],
    cuts: int,
    text_tokens: int,
    allocations: Collection[str] = (),
) -> PruneJob:
    """`cuts` of at most `kept` channels, repaired by any of `repairs`, each measured on `text_tokens`."""
    methods = [REPAIRS.find(name) for name in repairs]
    blocks, block_size = calibration
    return PruneJob(
        kept,
        any(method.changes_weights for method in methods),
        any(method.follows_pruned for method in methods),
        blocks,
        block_size,
        cuts=cuts,
        text_tokens=(cuts + 1) * text_tokens,
        preserves_layer=True,
        sensitivity=not set(allocations).isdisjoint(MEASURED),
        searches_widths="searched" in allocations,
    )


def estimated_widths(
    meta_model: MetaModel, changes: tuple[WidthChange, ...], uniform: bool = True
) -> list[dict[str, int]]:
    """Channels kept of every FFN, from the new widths alone; where layers may differ, the most it can be."""
    shares = {change.key: change.after / change.before if uniform else 1.0 for change in changes}
    return [
        {ffn.name: round(ffn.width * shares[ffn.site.width_key]) for ffn in ffns} for ffns in meta_model.ffns
    ]


def estimate_prune(
    opened: Model,
    *,
    sparsity: float | None,
    intermediate_size: int | None,
    multiple_of: int | None,
    allocation: str,
    layer_widths: Sequence[int] | None = None,
    bare: Collection[int] = (),
    repair: str,
    calibration: tuple[int, int],
) -> PruneCost:
    """The cost of a prune before there is an index, repaired on (blocks, block size) tokens.

    Layers `bare` have no FFN afterwards.

    Raises PlanError, UnsupportedModelError or MemoryBudgetError for what can't be done.
    """
    meta_model = opened.meta_model
    if allocation in MEASURED:
        check_sensitivity_measurable(meta_model)
    method = REPAIRS.find(repair)
    if layer_widths is not None:
        have = {number for number, ffns in enumerate(meta_model.ffns) if ffns} - set(bare)
        check_layer_widths(meta_model.widths(), layer_widths, len(meta_model.layers), have)
    changes = width_changes(meta_model.widths(), sparsity, intermediate_size, multiple_of)
    check_planned(meta_model, planned_cut(meta_model, changes))
    job = PruneJob(
        estimated_widths(meta_model, changes, uniform=allocation == "uniform"),
        method.changes_weights,
        method.follows_pruned,
        *calibration,
        sensitivity=allocation in MEASURED,
        searches_widths=allocation == "searched",
    )
    return prune_cost(meta_model, job, opened.run)
