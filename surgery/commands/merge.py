"""`surgeon merge-index`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery.commands.help import GroupedCommand
from surgery.commands.index import present
from surgery.commands.options import common_options, output_options
from surgery.commands.session import bars, local_path, open_model, say
from surgery.destination import check_destination, complete_folder


@click.command("merge-index", cls=GroupedCommand)
@click.argument("folders", metavar="INDEX...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The model they are of, whose weights the halo is found from.")
@output_options
@common_options
def merge_index(
    folders: tuple[Path, ...],
    model: str,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Make one index of several, of one model on disjoint calibration blocks, as if computed together.

    Each must have been made with --keep-sample. Machines that share no network can so share the work.

    \b
    surgeon merge-index part-1 part-2 --model org/name --out name-index
    """
    from surgery.merge import merge_indexes, mergeable

    destination = out or Path(f"{Path(model).name}-index")
    checkpoint = open_model(model, options)
    if dry_run:
        blocks = sum(len(index.input_ids) for index in mergeable(list(folders), checkpoint))
        click.echo(f"{len(folders)} indexes of {checkpoint.name}, {blocks} blocks together")
        return
    check_destination(destination, overwrite=overwrite, source=local_path(model))
    merged = merge_indexes(list(folders), checkpoint, bars(quiet))
    with complete_folder(destination) as partial:
        merged.save(partial)
    say(f"Index written to {destination}", quiet)
    present([(destination.name, merged)], as_json)
