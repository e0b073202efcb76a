"""`surgeon index` and `surgeon show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from surgery.commands.options import calibration_options, common_options, output_options
from surgery.commands.session import data_console, local_path, make_index, open_model, say


@click.command()
@click.argument("model")
@calibration_options
@output_options
@common_options
def index(
    model: str, out: Path | None, overwrite: bool, dry_run: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Write the index of MODEL: what every FFN channel is worth, and its super weights."""
    from surgery.destination import check_destination, complete_folder
    from surgery.show import show_index

    checkpoint = open_model(model, options)
    destination = out or Path(f"{checkpoint.name.split('/')[-1]}-index")
    if not dry_run:
        check_destination(destination, overwrite=overwrite, source=local_path(model))
    result = make_index(checkpoint, options, dry_run=dry_run, quiet=quiet)
    if result is None:
        return
    with complete_folder(destination) as folder:
        result.save(folder)
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=1))
    else:
        show_index(result, data_console())
    say(f"Index written to {destination}", quiet)


@click.command()
@click.argument("folder", metavar="INDEX")
@click.option("--json", "as_json", is_flag=True, help="Print index.json.")
def show(folder: str, as_json: bool) -> None:
    """Read an index: LP concentration, overlaps, super weights."""
    from surgery.index import ChannelIndex
    from surgery.show import show_index

    result = ChannelIndex.load(folder)
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=1))
    else:
        show_index(result, data_console())
