"""`surgeon index` and `surgeon show`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.checkpoint.output_folder import check_destination, complete_folder
from surgery.cli.common import (
    calibrate_for,
    data_console,
    discard_journal,
    leftover_lines,
    local_path,
    make_index,
    say,
    show_dry_run,
)
from surgery.cli.help import GroupedCommand
from surgery.cli.options import (
    PATH,
    CalibrationOptions,
    ModelOptions,
    PushOptions,
    calibration_options,
    model_options,
    output_options,
    push_options,
    resume_option,
    talk_options,
)
from surgery.cli.report import present_pruned
from surgery.errors import HubError, UsageError

if TYPE_CHECKING:
    from surgery.checkpoint.push import PushTarget
    from surgery.checkpoint.reader import Checkpoint
    from surgery.engine.open_model import Model
    from surgery.index.calibration import Calibration
    from surgery.index.channel_index import ChannelIndex


@click.command(cls=GroupedCommand)
@click.argument("model")
@click.option(
    "--second-order",
    is_flag=True,
    help="Also what obs, obs-loss, lp-conditional, llm-pruner and wanda-channel rank by; takes longer.",
)
@click.option(
    "--save-samples", is_flag=True, help="Also write what `surgeon merge-index` needs: 8 KiB a channel."
)
@click.option(
    "--broadcast-reads",
    is_flag=True,
    help="With torchrun: each tensor is read by one process and sent to the others, for slow shared disks.",
)
@click.option(
    "--push",
    "push_to",
    metavar="[REPO]",
    is_flag=False,
    flag_value="auto",
    help="Publish to this data set on the Hub. [default name: NAME-index]",
)
@push_options
@calibration_options
@output_options
@resume_option
@model_options
@talk_options
def index(
    model: str,
    second_order: bool,
    save_samples: bool,
    broadcast_reads: bool,
    push_to: str | None,
    push_options: PushOptions,
    text_options: CalibrationOptions,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    resume: bool,
    how: ModelOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the index of MODEL: what every FFN channel is worth, and its super weights.

    Several --revision make one index each, in folders of --out named by revision; `surgeon show` compares
    them. With --push the index is published, for anybody's `--index` and `surgeon find`.

    \b
    surgeon index org/name --push me/name-index
    """
    from surgery.engine.distributed import barrier, destroy, rank

    revisions = how.revision
    base = out or Path(f"{Path(model).name}-index")
    folders = [base / r.replace("/", "--") for r in revisions] if len(revisions) > 1 else [base]
    quiet = quiet or rank() > 0  # of the processes torchrun started, the first talks and writes
    if not dry_run:
        for folder in folders:
            check_destination(folder, overwrite=overwrite, source=local_path(model))
    if push_to is not None and len(revisions) > 1:
        raise UsageError("--push goes with one --revision", next_step="publish each with `surgeon push`")
    made = []
    for number, folder in enumerate(folders):
        opened = replace(how, revision=revisions[number : number + 1]).open(model)
        target = index_target(opened, push_to, push_options, overwrite)
        calibration = calibrate_for(opened, text_options)
        if dry_run:
            show_index_plan(opened, calibration, second_order, as_json)
            continue
        result = make_index(
            opened,
            calibration,
            destination=folder,
            resume=resume,
            quiet=quiet,
            second_order=second_order,
            save_samples=save_samples,
            broadcast_reads=broadcast_reads,
        )
        if rank() == 0:
            with complete_folder(folder) as partial:
                result.save(partial)
            say(f"Index written to {folder}", quiet)
            if target is not None:
                publish_index(result, opened.checkpoint, target, folder, quiet)
            made.append((folder.name, result))
        barrier()
        discard_journal(folder)
    destroy()
    present(made, as_json)


def index_target(
    model: Model, push_to: str | None, options: PushOptions, overwrite: bool
) -> PushTarget | None:
    """Where --push publishes; without a name, the account's data set NAME-index. Refused before the work."""
    if push_to is None:
        return None
    from surgery.card.index_dataset import check_publishable
    from surgery.checkpoint.push import account_name

    check_publishable(model.name, model.checkpoint.revision)
    repo = f"{account_name()}/{model.short_name}-index" if push_to == "auto" else push_to
    return options.target(repo, overwrite, "dataset")


def publish_index(
    index: ChannelIndex, checkpoint: Checkpoint, target: PushTarget, folder: Path, quiet: bool
) -> None:
    """Push the index of a checkpoint, which `folder` holds already, as a data set."""
    from surgery.card.index_dataset import card_of, push_index

    try:
        report = push_index(index, target, card_of(checkpoint), lambda text: say(text, quiet))
    except HubError as error:
        error.next_step = f"the index is kept: publish it with `surgeon push {folder} {target.repo}`"
        raise
    say(f"Published: {report.url}", quiet)


def show_index_plan(model: Model, calibration: Calibration, second_order: bool, as_json: bool) -> None:
    """Print which FFNs were found, and what indexing them will take."""
    from surgery.budget.index_cost import index_cost
    from surgery.cli.costs import index_cost_lines
    from surgery.cli.tables import show_ffns
    from surgery.model.leftovers import leftovers_json

    blocks, block_size = calibration.blocks.ids.shape
    cost = index_cost(model.meta_model, blocks, block_size, model.run, second_order)
    if not as_json:
        show_ffns(model.meta_model, data_console())
        click.echo(f"Calibration: {blocks} x {block_size} tokens of {calibration.blocks.name}")
        click.echo(f"Compute: {model.run.device}, {model.run.dtype_name}")
        for line in leftover_lines(model):
            click.echo(line)
    lines = index_cost_lines(cost, len(model.meta_model.layers))
    fields = {
        "outside_model": leftovers_json(model.meta_model.leftovers),
        "left_behind": model.checkpoint.left_behind,
    }
    show_dry_run(model, cost, lines, fields, as_json=as_json)


def present(indexes: list[tuple[str, ChannelIndex]], as_json: bool) -> None:
    """Print one index in full, or several side by side."""
    from surgery.cli.tables import compare_indexes, show_comparison, show_index

    if not indexes:
        return
    if as_json:
        one = indexes[0][1].as_json() if len(indexes) == 1 else compare_indexes(indexes)
        click.echo(json.dumps(one, indent=1))
    elif len(indexes) == 1:
        show_index(indexes[0][1], data_console())
    else:
        show_comparison(indexes, data_console())


@click.command(cls=GroupedCommand)
@click.argument("folders", metavar="INDEX...", nargs=-1, required=True, type=PATH)
@click.option(
    "--json", "as_json", is_flag=True, help="Print index.json or surgeon.json; of several, the comparison."
)
def show(folders: tuple[Path, ...], as_json: bool) -> None:
    """Print an index: LP concentration, overlaps, super weights. Several, or a folder of them, are compared.

    An index is a folder, or a data set on the Hub. Of a folder that `surgeon prune` wrote: what was pruned,
    and what that cost.

    \b
    surgeon show name-index
    """
    from surgery.report.build import is_checkpoint, named_indexes

    if len(folders) == 1 and is_checkpoint(folders[0]):
        present_pruned(folders[0], as_json)
        return
    present(named_indexes(list(folders)), as_json)
