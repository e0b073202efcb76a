"""`surgeon index` and `surgeon show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.commands.help import GroupedCommand
from surgery.commands.options import calibration_options, common_options, output_options, resume_option
from surgery.commands.report import present_cut
from surgery.commands.session import data_console, journal_done, local_path, make_index, open_model, say
from surgery.destination import check_destination, complete_folder

if TYPE_CHECKING:
    from surgery.index import ChannelIndex


@click.command(cls=GroupedCommand)
@click.argument("model")
@click.option(
    "--second-order",
    is_flag=True,
    help="Also what the methods obs, obs-loss, lp-conditional, llm-pruner and wanda-channel rank by; takes longer.",
)
@click.option(
    "--keep-sample", is_flag=True, help="Also write what `surgeon merge-index` needs: 8 KiB a channel."
)
@click.option(
    "--share-reads",
    is_flag=True,
    help="With torchrun: each tensor is read by one process and sent to the others, for slow shared disks.",
)
@calibration_options
@output_options
@resume_option
@common_options
def index(
    model: str,
    second_order: bool,
    keep_sample: bool,
    share_reads: bool,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Write the index of MODEL: what every FFN channel is worth, and its super weights.

    Several --revision make one index each, in folders of --out named by revision; `surgeon show` compares them.

    \b
    surgeon index org/name --out name-index
    """
    revisions = options["revision"]
    from surgery.distributed import leave, rank, wait

    base = out or Path(f"{Path(model).name}-index")
    folders = [base / r.replace("/", "--") for r in revisions] if len(revisions) > 1 else [base]
    quiet = quiet or rank() > 0  # of the processes torchrun started, the first talks and writes
    if not dry_run:
        for folder in folders:
            check_destination(folder, overwrite=overwrite, source=local_path(model))
    made = []
    for number, folder in enumerate(folders):
        one = {**options, "revision": revisions[number : number + 1]}
        result = make_index(
            open_model(model, one),
            one,
            dry_run=dry_run,
            quiet=quiet,
            second_order=second_order,
            keep_sample=keep_sample,
            share_reads=share_reads,
            destination=folder,
            as_json=as_json,
        )
        if result is not None and rank() == 0:
            with complete_folder(folder) as partial:
                result.save(partial)
            say(f"Index written to {folder}", quiet)
            made.append((folder.name, result))
        if result is not None:
            wait()
            journal_done(folder)
    leave()
    present(made, as_json)


def present(indexes: list[tuple[str, ChannelIndex]], as_json: bool) -> None:
    """Print one index in full, or several side by side."""
    from surgery.show import compare_indexes, show_comparison, show_index

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
@click.argument("folders", metavar="INDEX...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--json", "as_json", is_flag=True, help="Print index.json or surgeon.json; of several, the comparison."
)
def show(folders: tuple[Path, ...], as_json: bool) -> None:
    """Read an index: LP concentration, overlaps, super weights. Several, or a folder of them, are compared.

    Of a folder that `surgeon prune` wrote: what was cut, and what that cost.

    \b
    surgeon show name-index
    """
    from surgery.index import JSON_FILE, ChannelIndex

    if len(folders) == 1 and (folders[0] / "surgeon.json").exists():
        present_cut(folders[0], as_json)
        return
    found: list[Path] = []
    for folder in folders:
        # Sub-folders keep the order they were made in: that of training, when revisions were named so.
        inside = sorted(folder.glob(f"*/{JSON_FILE}"), key=lambda p: p.stat().st_mtime_ns)
        found += (
            [path.parent for path in inside] if inside and not (folder / JSON_FILE).exists() else [folder]
        )
    present([(folder.name, ChannelIndex.load(folder)) for folder in found], as_json)
