"""`surgeon prune`."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.common import (
    bars,
    calibration_shape,
    check_index_exists,
    check_prunable,
    discard_journal,
    index_for,
    local_path,
    read_index,
    read_template,
    say,
    say_resuming,
)
from surgery.cli.help import GroupedCommand
from surgery.cli.kind_options import KindOptions, kind_options
from surgery.cli.options import (
    PATH,
    CalibrationOptions,
    ModelOptions,
    PushOptions,
    calibration_options,
    index_option,
    model_options,
    output_options,
    push_options,
    resume_option,
    talk_options,
)
from surgery.cli.prune_command import canonical_command
from surgery.cli.prune_heal import Healing, HealingOptions, healing_options
from surgery.cli.prune_jobs import JobOptions, job_options, show_job
from surgery.cli.prune_options import CutOptions, EvalOptions, cut_options, eval_options, measure
from surgery.cli.prune_output import show_prune_dry_run, show_prune_plan, show_result, sizes_and_cost
from surgery.cli.prune_push import publish, push_target
from surgery.cli.target_options import TargetOptions, target_options
from surgery.errors import UsageError
from surgery.repair.methods import REPAIRS

if TYPE_CHECKING:
    from collections.abc import Callable

    from surgery.budget.prune_cost import PruneCost
    from surgery.cut.tensors import TensorEdit
    from surgery.engine.open_model import Model
    from surgery.engine.resume import Journal
    from surgery.index.channel_index import ChannelIndex
    from surgery.plan.kind_plan import KindPlan
    from surgery.plan.prune_plan import PrunePlan
    from surgery.pruning.prune import Provenance


@click.command(cls=GroupedCommand)
@click.argument("model")
@index_option
@cut_options
@target_options
@kind_options
@healing_options
@eval_options
@click.option("--card-template", type=PATH, help="jinja2 text for the card.")
@click.option(
    "--push",
    "push_to",
    metavar="[REPO]",
    is_flag=False,
    flag_value="auto",
    help="Publish to this Hub repo. [default name: from the source and the cut]",
)
@push_options
@job_options
@calibration_options
@output_options
@resume_option
@model_options
@talk_options
def prune(
    model: str,
    index_folder: str | None,
    cut: CutOptions,
    target: TargetOptions,
    kinds: KindOptions,
    healing: HealingOptions,
    evaluation: EvalOptions,
    card_template: Path | None,
    push_to: str | None,
    push_options: PushOptions,
    job: JobOptions,
    text_options: CalibrationOptions,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    resume: bool,
    how: ModelOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prune MODEL: choose what goes, remove it, write a smaller checkpoint; with --heal, train it too.

    \b
    surgeon prune org/name --sparsity 0.5 --push me/name-scar-50
    surgeon prune org/name --sparsity 0.5 --heal 1M --rounds 2
    surgeon prune org/name --target-params 1B --cuts ffn,layers
    """
    from surgery.checkpoint.manifest import read_manifest
    from surgery.checkpoint.output_folder import check_destination
    from surgery.cli.costs import prune_cost_lines
    from surgery.engine.distributed import destroy, rank
    from surgery.pruning.prune import Provenance, check_shares

    first, quiet = rank() == 0, quiet or rank() > 0  # of torchrun's processes, the first talks and writes
    kinds.check(healing.heal_tokens is not None, healing.rounds, target.cuts)
    cut = target.check(
        kinds.sized(cut, elsewhere=target.target is not None or target.explicit), rounds=healing.rounds
    )
    searches = target.target is not None or cut.allocation == "searched"
    job.check(dry_run, searches=searches)
    check_alone(searches=searches, heals=healing.heal_tokens is not None)
    template = read_template(card_template)
    opened = how.open(model)
    found = read_index(index_folder, opened.checkpoint)
    check_index_exists(found)
    shape = calibration_shape(found, text_options)
    cost_at_most = check_feasible(opened, cut, shape, {*target.drop_layers, *target.drop_ffn})
    check_shares(shape[0], REPAIRS.find(cut.repair).changes_weights)
    target.check_model(opened)
    kinds.check_model(opened)
    heal = Healing.prepare(opened, healing, cut, text_options)
    if job.jobs:
        show_job(opened, cost_at_most, heal, text_options, job, as_json)
        return
    chosen = evaluation.chosen(published=push_to is not None)
    destination = out or Path(kinds.name(target.name_for(opened, cut)))
    published = blocks = None
    if not dry_run:
        needs = opened.checkpoint.nbytes
        source = local_path(model)
        check_destination(destination, overwrite=overwrite, source=source, needs_bytes=needs)
        published = push_target(push_to, destination, push_options, overwrite) if first else None
        blocks = None if chosen is None else chosen.read(opened)
    parts = kinds.vocabulary(opened, text_options, quiet)
    index = index_for(
        opened,
        found,
        text_options,
        [cut.method],
        destination=None if dry_run else destination,
        resume=resume,
        quiet=quiet,
    )
    parts = (*kinds.experts(opened, index, cut.protect is not False, quiet), *parts)
    score, seed = kinds.expert_score, text_options.seed
    search = None if dry_run else target.journal(opened, index, cut, parts, score, seed, destination, resume)
    plan = plan_for(opened, index, cut, target, parts, score, seed, search, quiet)
    edits = planned_edits(opened, plan)
    sizes, cost = sizes_and_cost(opened, index, plan, edits)
    fates = show_prune_plan(opened, plan, sizes, edits, as_json or not first)
    if dry_run:
        if first:
            show_prune_dry_run(opened, plan, sizes, cost, fates, as_json, heal)
        return
    check_destination(destination, overwrite=overwrite, needs_bytes=sizes["bytes_after"])
    say(f"Pruning {opened.name}, repair {plan.repair}", quiet)
    say("\n".join(prune_cost_lines(cost)), quiet)
    words = canonical_command(opened, index, plan, cut, how, text_options)
    words += kinds.words(plan)
    provenance = Provenance(
        command=shlex.join([*words, *healing.words]),
        repo=published.repo if published else None,
        dense=measure(opened, blocks, quiet) if blocks is not None and first else None,
        card_template=template,
    )
    measured = None if blocks is None else lambda written: measure(written, blocks, quiet)
    if heal is None:
        run_prune(opened, index, plan, destination, measured, provenance, resume, quiet)
    else:
        heal.run(opened, index, plan, destination, measured, provenance, cut, resume, quiet)
    discard_journal(destination)
    if search is not None:
        search.finish()
    destroy()
    if first:
        show_result(read_manifest(destination), destination, as_json, quiet)
        publish(destination, published, plan, quiet)


def check_alone(*, searches: bool, heals: bool) -> None:
    """Raise UsageError for what several processes can't do in one command."""
    from surgery.engine.distributed import world_size

    if world_size() > 1 and (searches or heals):
        raise UsageError(
            "several processes repair one cut; they neither search nor heal in the same command",
            where="--heal" if heals else "a target, or --allocation searched",
            next_step="run `surgeon heal` with torchrun after it" if heals else "run the search alone",
        )


def check_feasible(
    model: Model, cut: CutOptions, calibration: tuple[int, int], bare: Collection[int] = ()
) -> PruneCost:
    """The cost of the cut, after which layers `bare` have no FFN; refuses a model, a width or a budget that
    won't do before anything is computed.
    """
    from surgery.pruning.jobs import estimate_prune

    check_prunable(model)
    return estimate_prune(
        model,
        sparsity=cut.sparsity,
        intermediate_size=cut.intermediate_size,
        multiple_of=cut.multiple_of,
        allocation=cut.allocation,
        layer_widths=cut.layer_widths,
        bare=bare,
        repair=cut.repair,
        calibration=calibration,
    )


def plan_for(
    model: Model,
    index: ChannelIndex,
    options: CutOptions,
    target: TargetOptions,
    fixed: tuple[KindPlan, ...],
    expert_score: str,
    seed: int,
    search: Journal | None,
    quiet: bool,
) -> PrunePlan:
    """The plan that the options ask for; `fixed` goes in any case, experts by `expert_score` for a target."""
    from surgery.pruning.plan_pruning import plan_pruning

    if target.target is not None:
        return target.plan(model, index, options, fixed, expert_score, seed, search, quiet)
    parts = (*target.parts(model, index, quiet), *fixed)
    return plan_pruning(
        model,
        index,
        seed=seed,
        cuts=parts,
        seconds=target.seconds,
        journal=search,
        progress=bars(quiet),
        say=lambda line: say(line, quiet),
        **vars(options),
    )


def planned_edits(model: Model, plan: PrunePlan) -> dict[str, TensorEdit]:
    """The edits of a plan with the right shapes, which is enough for sizes; no weight is read."""
    from surgery.cut.model_cut import model_cut

    return model_cut(model.meta_model, plan, widths_only=True).edits


def run_prune(
    model: Model,
    index: ChannelIndex,
    plan: PrunePlan,
    destination: Path,
    measured: Callable[[Model], dict[str, Any]] | None,
    provenance: Provenance,
    resume: bool,
    quiet: bool,
) -> None:
    """Write the pruned folder; says so when it resumes."""
    from surgery.pruning.prune import open_journal
    from surgery.pruning.prune import prune as write

    journal = open_journal(model, index, plan, destination, resume=resume)
    say_resuming(journal, quiet)
    write(
        model,
        index,
        plan,
        destination,
        overwrite=True,  # checked before anything was computed
        measure=measured,
        provenance=provenance,
        journal=journal,
        progress=bars(quiet),
    )
