"""`surgeon merge-index`."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.checkpoint.output_folder import check_destination, complete_folder
from surgery.cli.common import bars, local_path, say, show_dry_run
from surgery.cli.help import GroupedCommand
from surgery.cli.index import present
from surgery.cli.options import PATH, ModelOptions, model_options, output_options, talk_options


@click.command("merge-index", cls=GroupedCommand)
@click.argument("folders", metavar="INDEX...", nargs=-1, required=True, type=PATH)
@click.option("--model", required=True, help="The model they are of, whose weights the halo is found from.")
@output_options
@model_options
@talk_options
def merge_index(
    folders: tuple[Path, ...],
    model: str,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    how: ModelOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make one index of several, of one model on disjoint calibration blocks, as if computed together.

    Each must have been made with --save-samples. Machines that share no network can so share the work.

    \b
    surgeon merge-index part-1 part-2 --model org/name --out name-index
    """
    from surgery.index.merge import merge_cost, merge_indexes, mergeable

    destination = out or Path(f"{Path(model).name}-index")
    opened = how.open(model)
    cost = merge_cost(list(folders), opened)
    if dry_run:
        from surgery.cli.costs import pass_cost_lines

        blocks = sum(len(index.input_ids) for index in mergeable(list(folders), opened.checkpoint))
        lines = [f"{len(folders)} indexes of {opened.name}, {blocks} blocks together", *pass_cost_lines(cost)]
        show_dry_run(opened, cost, lines, {"blocks": blocks}, as_json=as_json)
        return
    check_destination(destination, overwrite=overwrite, source=local_path(model))
    merged = merge_indexes(list(folders), opened, bars(quiet))
    with complete_folder(destination) as partial:
        merged.save(partial)
    say(f"Index written to {destination}", quiet)
    present([(destination.name, merged)], as_json)
