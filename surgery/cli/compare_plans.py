"""The cuts that `surgeon compare` measures: what is asked for, what measuring takes, and a plan for each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.cli.common import bars, say
from surgery.cli.search_options import SearchOptions

if TYPE_CHECKING:
    from surgery.budget.prune_cost import PruneCost
    from surgery.engine.open_model import Model
    from surgery.engine.resume import Journal
    from surgery.evaluate.compare import Comparison
    from surgery.plan.prune_plan import PrunePlan
    from surgery.text import TokenBlocks


@dataclass(frozen=True)
class Variant:
    """One way of cutting."""

    sparsity: float
    allocation: str
    repair: str
    method: str
    kinds: tuple[str, ...] = ()  # that may go for a target


def check_variants(model: Model, variants: list[Variant], multiple_of: int | None) -> None:
    """Raise PlanError for a cut that can't be made of this model."""
    from surgery.plan.prune_plan import MEASURED
    from surgery.plan.widths import width_changes
    from surgery.repair.sensitivity import check_sensitivity_measurable

    for sparsity in {variant.sparsity for variant in variants if not variant.kinds}:
        width_changes(model.meta_model.widths(), sparsity, None, multiple_of)
    if any(variant.allocation in MEASURED for variant in variants):
        check_sensitivity_measurable(model.meta_model)


def estimate(
    model: Model,
    variants: list[Variant],
    blocks: list[TokenBlocks],
    calibration: tuple[int, int],
    multiple_of: int | None,
) -> tuple[int, PruneCost]:
    """Cuts made in one pass and what it takes, from the widths alone. Raises MemoryBudgetError."""
    from surgery.evaluate.compare import share_passes, text_tokens
    from surgery.plan.widths import WidthChange, width_changes
    from surgery.pruning.jobs import comparison_job, estimated_widths

    least, widths = min(variant.sparsity for variant in variants), model.meta_model.widths()
    if least > 0:
        changes = width_changes(widths, least, None, multiple_of)
    else:  # what goes for a target is not known yet: at most nothing
        changes = tuple(WidthChange(key, width, width) for key, width in widths.items())
    allocations = {variant.allocation for variant in variants}
    job = comparison_job(
        estimated_widths(model.meta_model, changes, uniform=allocations == {"uniform"}),
        {variant.repair for variant in variants},
        calibration,
        len(variants),
        text_tokens(blocks),
        allocations,
    )
    return share_passes(model, job)


def comparison_journal(
    folder: Path,
    comparison: Comparison,
    variants: list[Variant],
    search: SearchOptions,
    multiple_of: int | None,
    seed: int,
    resume: bool,
) -> Journal:
    """The journal of a comparison: of these cuts of these weights on these texts, by this index."""
    from surgery.engine.distributed import rank, world_size
    from surgery.engine.resume import Journal
    from surgery.pruning.prune_pass import index_use_fingerprint

    fingerprint = {
        **index_use_fingerprint(comparison.opened, comparison.index),
        "cuts": [asdict(variant) for variant in variants],
        "search": vars(search),
        "multiple_of": multiple_of,
        "seed": seed,
        "texts": [[blocks.name, blocks.digest] for blocks in comparison.texts],
        "processes": [rank(), world_size()],
    }
    return Journal(folder, fingerprint, resume=resume, kind="compare")


def plans_for(
    comparison: Comparison,
    variants: list[Variant],
    search: SearchOptions,
    multiple_of: int | None,
    seed: int,
    journal: Journal,
    quiet: bool,
) -> list[PrunePlan]:
    """A plan for every variant; sensitivity is measured once a method, and saved in the journal."""
    from surgery.plan.prune_plan import MEASURED
    from surgery.pruning.plan_pruning import plan_pruning, saved_sensitivity
    from surgery.search.plan_to_target import plan_to_target

    measured: dict[str, Any] = {}
    plans: list[PrunePlan] = []
    for variant in variants:
        sensitivity = None
        if variant.allocation in MEASURED:
            if variant.method not in measured:
                step, what = f"sensitivity-{variant.method}", (comparison.opened, comparison.index)
                measured[variant.method] = saved_sensitivity(
                    journal,
                    *what,
                    step,
                    lambda line: say(line, quiet),
                    method=variant.method,
                    seed=seed,
                    progress=bars(quiet),
                )
            sensitivity = measured[variant.method]
        how: dict[str, Any] = {**asdict(variant), "seed": seed, "multiple_of": multiple_of}
        kinds, model, index = how.pop("kinds"), comparison.opened, comparison.index
        if not kinds:
            if variant.allocation == "searched":
                how |= {"journal": journal.part(f"search-{len(plans)}"), "seconds": search.seconds}
                how |= {"progress": bars(quiet), "say": lambda line: say(line, quiet)}
            plans.append(plan_pruning(model, index, sensitivity=sensitivity, **how))
            continue
        target = search.target
        assert target is not None
        del how["sparsity"]
        say(f"Searching with {', '.join(kinds)}: {variant.method}, {variant.repair}", quiet)
        plans.append(
            plan_to_target(
                model,
                index,
                target,
                cuts=kinds,
                seconds=search.seconds,
                sensitivity=sensitivity,
                journal=journal.part(f"search-{len(plans)}"),
                progress=bars(quiet),
                say=lambda line: say(line, quiet),
                **how,
            )
        )
    return plans
