"""`surgeon prune`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.common import (
    bars,
    calibration_shape,
    data_console,
    discard_journal,
    index_for,
    leftover_lines,
    local_path,
    read_index,
    read_template,
    say,
    say_resuming,
    show_dry_run,
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
    text_words,
)
from surgery.cli.prune_heal import Healing, HealingOptions, healing_options, show_heal_dry_run
from surgery.cli.prune_jobs import JobOptions, job_options, show_job
from surgery.cli.prune_options import CutOptions, EvalOptions, cut_options, eval_options, measure
from surgery.cli.target_options import TargetOptions, target_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from surgery.budget.prune_cost import PruneCost
    from surgery.checkpoint.push import PushTarget
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
    from surgery.pruning.prune import Provenance

    kinds.check(healing.heal_tokens is not None, healing.rounds, target.cuts)
    cut = target.check(
        kinds.sized(cut, elsewhere=target.target is not None or target.explicit), rounds=healing.rounds
    )
    job.check(dry_run, searches=target.target is not None)
    template = read_template(card_template)
    opened = how.open(model)
    found = read_index(index_folder, opened.checkpoint)
    cost_at_most = check_feasible(opened, cut, calibration_shape(found, text_options))
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
        published = push_target(push_to, destination, push_options, overwrite)
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
    search = None if dry_run else target.journal(opened, index, cut, parts, destination, resume)
    plan = plan_for(opened, index, cut, target, parts, text_options.seed, search, quiet)
    edits = planned_edits(opened, plan)
    sizes, cost = sizes_and_cost(opened, index, plan, edits)
    fates = show_prune_plan(opened, plan, sizes, edits, as_json)
    if dry_run:
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
        dense=None if blocks is None else measure(opened, blocks, quiet),
        card_template=template,
    )
    measured = None if blocks is None else lambda written: measure(written, blocks, quiet)
    if heal is None:
        run_prune(opened, index, plan, destination, measured, provenance, resume, quiet)
    else:
        heal.run(opened, index, plan, destination, measured, provenance, cut, resume, quiet)
    manifest = read_manifest(destination)
    discard_journal(destination)
    if search is not None:
        search.finish()
    show_result(manifest, destination, as_json, quiet)
    publish(destination, published, plan, quiet)


def check_prunable(model: Model) -> None:
    """Raise UnsupportedModelError for a model that can't be pruned."""
    from surgery.model.families import check_prunable as check

    check(model.checkpoint.config, model.name)


def check_feasible(model: Model, cut: CutOptions, calibration: tuple[int, int]) -> PruneCost:
    """The cost of the cut; refuses a model, a width or a budget that won't do before anything is computed."""
    from surgery.pruning.jobs import estimate_prune

    check_prunable(model)
    return estimate_prune(
        model,
        sparsity=cut.sparsity,
        intermediate_size=cut.intermediate_size,
        multiple_of=cut.multiple_of,
        allocation=cut.allocation,
        repair=cut.repair,
        calibration=calibration,
    )


def plan_for(
    model: Model,
    index: ChannelIndex,
    options: CutOptions,
    target: TargetOptions,
    fixed: tuple[KindPlan, ...],
    seed: int,
    search: Journal | None,
    quiet: bool,
) -> PrunePlan:
    """The plan that the options ask for; `fixed` goes in any case."""
    from surgery.pruning.plan_pruning import plan_pruning

    if target.target is not None:
        return target.plan(model, index, options, fixed, seed, search, quiet)
    if options.allocation == "global":
        say("Measuring the sensitivity of each layer at five widths", quiet)
    parts = (*target.parts(model, index, quiet), *fixed)
    return plan_pruning(model, index, seed=seed, cuts=parts, progress=bars(quiet), **vars(options))


def planned_edits(model: Model, plan: PrunePlan) -> dict[str, TensorEdit]:
    """The edits of a plan with the right shapes, which is enough for sizes; no weight is read."""
    from surgery.cut.model_cut import model_cut

    return model_cut(model.meta_model, plan, widths_only=True).edits


def sizes_and_cost(
    model: Model, index: ChannelIndex, plan: PrunePlan, edits: dict[str, TensorEdit]
) -> tuple[dict[str, int], PruneCost]:
    """Parameters and bytes before and after a plan, and what carrying it out takes."""
    from surgery.budget.prune_cost import prune_cost
    from surgery.cut.tensors import edited_specs
    from surgery.pruning.jobs import prune_job

    checkpoint = model.checkpoint
    specs = edited_specs(checkpoint, edits)
    written = sum(spec.nbytes for spec in specs.values())
    cost = prune_cost(model.meta_model, prune_job(plan, index.input_ids.shape, written), model.run)
    sizes = {
        "parameters_before": checkpoint.parameters,
        "parameters_after": sum(spec.numel for spec in specs.values()),
        "bytes_before": checkpoint.nbytes,
        "bytes_after": written,
        "repair_bytes": cost.repair_bytes,
        "repair_parts": cost.repair_parts,
    }
    return sizes, cost


def show_prune_plan(
    model: Model, plan: PrunePlan, sizes: dict[str, int], edits: dict[str, TensorEdit], as_json: bool
) -> list[dict[str, Any]]:
    """Print a plan, unless JSON is asked for; returns what becomes of tensors outside the model."""
    from surgery.cli.tables import show_plan
    from surgery.cut.ffn_channels import fates_json

    fates = fates_json(model.meta_model, edits)
    if not as_json:
        show_plan(plan, sizes, data_console())
        for line in leftover_lines(model, fates):
            click.echo(line)
    return fates


def show_prune_dry_run(
    model: Model,
    plan: PrunePlan,
    sizes: dict[str, int],
    cost: PruneCost,
    fates: list[dict[str, Any]],
    as_json: bool,
    heal: Healing | None = None,
) -> None:
    """Print what carrying out a plan takes, and healing the result."""
    from surgery.cli.costs import prune_cost_lines

    fields = {
        "plan": plan.as_json(),
        "sizes": sizes,
        "outside_model": fates,
        "left_behind": model.checkpoint.left_behind,
    }
    if heal is not None:
        show_heal_dry_run(model, heal, cost, prune_cost_lines(cost), fields, as_json)
        return
    wide = bool(cost.float64_flops)
    show_dry_run(model, cost, prune_cost_lines(cost), fields, as_json=as_json, wide=wide)


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


def push_target(
    push_to: str | None, destination: Path, options: PushOptions, overwrite: bool
) -> PushTarget | None:
    """Where --push goes; without a name, the account's repo named as the folder."""
    if push_to is None:
        return None
    from surgery.checkpoint.push import account_name

    repo = f"{account_name()}/{destination.name}" if push_to == "auto" else push_to
    return options.target(repo, overwrite)


def publish(destination: Path, target: PushTarget | None, plan: PrunePlan, quiet: bool) -> None:
    """Push the folder, where that was asked for."""
    if target is not None:
        from surgery.checkpoint.push import push_folder

        report = push_folder(destination, target, f"surgeon {plan.method}, FFN width {plan.width_after}")
        say(f"Published: {report.url}", quiet)
        if report.collection is not None:
            say(f"In the collection {report.collection}", quiet)


def show_result(manifest: dict[str, Any], destination: Path, as_json: bool, quiet: bool) -> None:
    """Print the manifest, or what pruning cost where it was measured."""
    measured = manifest["measurements"]
    if as_json:
        click.echo(json.dumps(manifest))
    elif "pruned" in measured:
        dense, pruned = measured["dense"], measured["pruned"]
        found = [dense["perplexity"], pruned["perplexity"]]
        found += [
            heal["evaluation"]["after"]["perplexity"] for heal in manifest.get("heals", [])[-1:] if measured
        ]
        click.echo(f"Perplexity {' → '.join(f'{value:.2f}' for value in found)} on {dense['text']}")
    say(f"Checkpoint written to {destination}", quiet)


def canonical_command(
    model: Model,
    index: ChannelIndex,
    plan: PrunePlan,
    options: CutOptions,
    how: ModelOptions,
    text: CalibrationOptions,
) -> list[str]:
    """The words of the command that makes the same checkpoint again, free of paths of this machine."""
    from surgery.plan.kind_plan import removed_attention, removed_layers

    checkpoint, calibration = model.checkpoint, index.calibration
    words = ["surgeon", "prune", checkpoint.name]
    if checkpoint.revision:
        words += ["--revision", checkpoint.revision]
    found = plan.search.size if plan.search is not None else {}
    if len(plan.widths) == 1 and plan.allocation == "uniform" and plan.width_after < plan.width_before:
        words += ["--intermediate-size", str(plan.width_after)]
    else:
        size = found.get("width", options.intermediate_size)
        sparsity = found.get("sparsity", options.sparsity)
        words += ["--sparsity", str(sparsity)] if size is None else ["--intermediate-size", str(size)]
        words += ["--multiple-of", str(options.multiple_of)] if options.multiple_of else []
    for option, gone in (
        ("--drop-layers", removed_layers(plan.cuts)),
        ("--drop-attention", removed_attention(plan.cuts)),
    ):
        words += [option, ",".join(map(str, sorted(gone)))] if gone else []
    words += [
        word for part in plan.cuts if part.kind == "kv" for word in ("--kv-heads", str(part.facts["heads"]))
    ]
    if plan.allocation != "uniform":
        words += ["--allocation", plan.allocation, *(["--pad"] if plan.padded else [])]
    seed = plan.seed if plan.method == "random" else calibration["seed"]
    words += ["--method", plan.method, "--repair", plan.repair, "--seed", str(seed)]
    words += ["--spike-prompt", text.spike_prompt] if text.spike_prompt else []
    words += ["--memory", how.memory] if how.memory else []
    if options.protect is not None:
        words.append("--protect" if plan.protect else "--no-protect")
    if index.published:
        words += ["--index", f"{index.published['repo']}@{index.published['revision']}"]
    else:
        words += [*calibration_words(calibration), "--blocks", str(calibration["blocks"])]
        words += ["--block-size", str(calibration["block_size"])]
    return [*words, "--dtype", index.run["dtype"]]


def calibration_words(calibration: dict[str, Any]) -> list[str]:
    """The options that name the calibration texts of an index again."""
    parts = calibration.get("parts") or [{"name": calibration["name"], "share": 1.0}]
    counts = [part.get("blocks", 1) for part in parts]
    uneven = max(counts) - min(counts) > 1
    return text_words("--calibration", [part["name"] for part in parts], counts if uneven else None)
