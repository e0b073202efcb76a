"""`surgeon prune`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.commands.help import GroupedCommand
from surgery.commands.options import (
    ALLOCATION_NAMES,
    METHOD_NAMES,
    REPAIR_NAMES,
    calibration_options,
    common_options,
    output_options,
    push_options,
    resume_option,
)
from surgery.commands.planning import (
    check_size_options,
    check_width,
    index_for,
    plan_cut,
    read_index,
    show_cut_costs,
)
from surgery.commands.session import (
    bars,
    data_console,
    evaluate,
    journal_done,
    local_path,
    open_model,
    read_template,
    run_options,
    say,
)
from surgery.errors import SurgeonError

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint
    from surgery.index import ChannelIndex
    from surgery.plan import ResizePlan
    from surgery.push import PushTarget

PUSH_EVAL_BLOCKS = 16


@click.command(cls=GroupedCommand)
@click.argument("model")
@click.option("--index", "index_folder", metavar="DIR", help="Index to use. [default: made on the fly]")
@click.option("--sparsity", type=float, help="Fraction of FFN channels to remove, 0 to 1. [default: 0.5]")
@click.option("--intermediate-size", type=int, help="Exact width to keep, in place of --sparsity.")
@click.option(
    "--method",
    type=click.Choice(METHOD_NAMES),
    default="lp-hybrid",
    show_default=True,
    metavar="NAME",
    help=f"How channels are ranked: {', '.join(METHOD_NAMES)}.",
)
@click.option(
    "--allocation",
    type=click.Choice(ALLOCATION_NAMES),
    default="uniform",
    show_default=True,
    help="One width for all layers, which loads everywhere; or each its own, which needs a loader, from what cutting it "
    "costs as measured (global) or from the scores alone (score).",
)
@click.option(
    "--pad", is_flag=True, help="With layers of their own width: zero-pad to one, which loads everywhere."
)
@click.option(
    "--repair",
    type=click.Choice(REPAIR_NAMES),
    default="lstsq-acc",
    show_default=True,
    help="Refit what stays by least squares on the calibration text, each layer by itself (lstsq) or making up for "
    "the layers before it too (lstsq-acc); or put back only the mean of what goes (bias).",
)
@click.option(
    "--protect/--no-protect",
    default=None,
    help="Never remove supernodes and super-weight columns. [default: for the scar, lp and obs-loss methods]",
)
@click.option("--multiple-of", type=int, help="Round the width to this. [default: 128, 64 below 4096]")
@click.option(
    "--eval",
    "eval_text",
    metavar="FILE|DATASET|none",
    help="Measure before and after on this text. [default: none; with --push, 16 blocks of wikitext-test]",
)
@click.option("--eval-blocks", type=int, help="Blocks of it to use. [default: all]")
@click.option("--card-template", type=click.Path(path_type=Path), help="jinja2 text for the card.")
@click.option(
    "--push",
    "push_to",
    metavar="[REPO]",
    is_flag=False,
    flag_value="auto",
    help="Publish to this Hub repo. [default name: from the source and the cut]",
)
@push_options
@calibration_options
@output_options
@resume_option
@common_options
def prune(
    model: str,
    index_folder: str | None,
    eval_text: str | None,
    eval_blocks: int | None,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    push_to: str | None,
    card_template: Path | None,
    **options: Any,
) -> None:
    """Shrink MODEL: choose channels, cut them out, write a smaller checkpoint.

    \b
    surgeon prune org/name --sparsity 0.5 --push me/name-scar-50
    """
    from surgery.calibration import read_text
    from surgery.destination import check_destination
    from surgery.show_costs import cut_costs_lines

    check_size_options(options)
    template = read_template(card_template)
    checkpoint = open_model(model, options)
    found = read_index(index_folder)
    skeleton = check_width(checkpoint, found, options)
    if eval_text is None and push_to is not None:  # a published card must say how bad it got
        eval_text, eval_blocks = "wikitext-test", eval_blocks or PUSH_EVAL_BLOCKS
    measured = eval_text not in (None, "none")
    destination = out or Path(default_name(checkpoint, options))
    target = None
    if not dry_run:
        source = local_path(model)
        check_destination(destination, overwrite=overwrite, source=source, needs_bytes=checkpoint.nbytes)
        target = push_target(push_to, destination, options, overwrite)
        if measured:
            read_text(str(eval_text))  # a text that can't be had is refused before anything is computed
    channels = index_for(
        checkpoint, found, {options["method"]}, None if dry_run else destination, options, quiet
    )
    plan, sizes, costs = plan_cut(skeleton, channels, options, quiet)
    if not as_json:
        from surgery.show import show_plan

        show_plan(plan, sizes, data_console())
    if dry_run:
        fields = {"plan": plan.as_json(), "sizes": sizes}
        show_cut_costs(skeleton, costs, run_options(checkpoint, options), fields if as_json else None)
        return
    check_destination(destination, overwrite=overwrite, needs_bytes=sizes["bytes_after"])

    say(f"Cutting {checkpoint.name}, repair {plan.repair}", quiet)
    say("\n".join(cut_costs_lines(costs)), quiet)
    text = (str(eval_text), eval_blocks) if measured else None
    manifest = carry_out(checkpoint, channels, plan, destination, text, target, template, options, quiet)
    journal_done(destination)
    if as_json:
        click.echo(json.dumps(manifest))
    elif measured:
        dense, shrunk = manifest["measurements"]["dense"], manifest["measurements"]["shrunk"]
        click.echo(f"Perplexity {dense['perplexity']:.2f} → {shrunk['perplexity']:.2f} on {dense['text']}")
    say(f"Checkpoint written to {destination}", quiet)
    if target is not None:
        from surgery.push import push_folder

        report = push_folder(destination, target, f"surgeon {plan.method}, FFN width {plan.width_after}")
        say(f"Published: {report.url}", quiet)


def carry_out(
    checkpoint: Checkpoint,
    channels: ChannelIndex,
    plan: ResizePlan,
    destination: Path,
    text: tuple[str, int | None] | None,
    target: PushTarget | None,
    template: str | None,
    options: dict[str, Any],
    quiet: bool,
) -> dict[str, Any]:
    """Write the cut and return its manifest; with `text` (what to measure on, blocks), measured before and after."""
    from surgery.cutting import cut_fingerprint
    from surgery.journal import Journal
    from surgery.prune import write_pruned

    def measure(which: Checkpoint) -> dict[str, Any]:
        assert text is not None
        return evaluate(which, *text, None, options, quiet)

    run = run_options(checkpoint, options)
    journal = Journal(
        destination, cut_fingerprint(checkpoint, channels, plan, run), resume=options["resume"], kind="cut"
    )
    if journal.done:
        say("Going on where an earlier run stopped (--no-resume starts over)", quiet)
    try:
        manifest = write_pruned(
            checkpoint,
            channels,
            plan,
            destination,
            options=run,
            journal=journal,
            dense=measure(checkpoint) if text else None,
            measure=measure if text else None,
            command=canonical_command(checkpoint, channels, plan, options),
            repo=target.repo if target else None,
            card_template=template,
            track=bars(quiet),
        )
    except SurgeonError as error:
        journal.fail(error)
        raise
    journal.finish()
    return manifest


def default_name(checkpoint: Checkpoint, options: dict[str, Any]) -> str:
    """Folder and repo name: source, method, percent removed or width kept."""
    sparsity = options["sparsity"]
    size = f"w{options['intermediate_size']}" if sparsity is None else str(round(100 * sparsity))
    return f"{checkpoint.name.split('/')[-1]}-{options['method']}-{size}"


def push_target(
    push_to: str | None, destination: Path, options: dict[str, Any], overwrite: bool
) -> PushTarget | None:
    """Where --push goes, checked to be writable; without a name, the account's repo named as the folder."""
    if push_to is None:
        return None
    from surgery.push import PushTarget, account_name, check_push

    repo = f"{account_name()}/{destination.name}" if push_to == "auto" else push_to
    target = PushTarget(repo, options["private"], options["push_revision"], options["create_pr"], overwrite)
    check_push(target)
    return target


def canonical_command(
    checkpoint: Checkpoint, channels: ChannelIndex, plan: ResizePlan, options: dict[str, Any]
) -> str:
    """The command that makes the same checkpoint again, free of paths of this machine."""
    calibration = channels.calibration
    words = ["surgeon", "prune", checkpoint.name]
    if checkpoint.revision:
        words += ["--revision", checkpoint.revision]
    if len(plan.widths) == 1 and plan.allocation == "uniform":
        words += ["--intermediate-size", str(plan.width_after)]
    else:
        size = options["intermediate_size"]
        words += (
            ["--sparsity", str(options["sparsity"])] if size is None else ["--intermediate-size", str(size)]
        )
        words += ["--multiple-of", str(options["multiple_of"])] if options["multiple_of"] else []
    if plan.allocation != "uniform":
        words += ["--allocation", plan.allocation, *(["--pad"] if plan.padded else [])]
    seed = plan.seed if plan.method == "random" else calibration["seed"]
    words += ["--method", plan.method, "--repair", plan.repair, "--seed", str(seed)]
    words += ["--prompt", options["prompt"]] if options.get("prompt") else []
    words += ["--memory", options["memory"]] if options.get("memory") else []
    if options.get("protect") is not None:
        words.append("--protect" if plan.protect else "--no-protect")
    words += ["--calibration", calibration["name"], "--blocks", str(calibration["blocks"])]
    words += ["--block-size", str(calibration["block_size"]), "--dtype", channels.run["dtype"]]
    return shlex.join(words)
