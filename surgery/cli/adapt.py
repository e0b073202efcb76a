"""`surgeon adapt`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.cli.common import say
from surgery.cli.help import GroupedCommand
from surgery.cli.options import PATH, ModelOptions, model_options, output_options, talk_options

if TYPE_CHECKING:
    from surgery.adapt.adapt import Carried


@click.command(cls=GroupedCommand)
@click.argument("adapter", metavar="LORA", type=PATH)
@click.option("--onto", required=True, metavar="DIR", help="The pruned folder to carry the adapter onto.")
@output_options
@model_options
@talk_options
def adapt(
    adapter: Path,
    onto: str,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    how: ModelOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Carry LORA, a peft adapter of the dense model, onto the pruned folder DIR.

    \b
    surgeon adapt my-lora --onto smaller --out my-lora-smaller
    """
    from surgery.adapt.adapt import check_adapter, write_carried
    from surgery.adapt.peft_folder import read_adapter

    carrier = check_adapter(how.open(onto), read_adapter(adapter))
    carried = carrier.carry()
    destination = out or Path(f"{adapter.resolve().name}-{carrier.model.short_name}")
    if not dry_run:
        write_carried(carried, destination, overwrite=overwrite)
    show(carried, None if dry_run else destination, as_json=as_json, quiet=quiet)


def show(carried: Carried, destination: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Print what became of the adapter's modules, and where it was written."""
    if as_json:
        click.echo(json.dumps(carried.as_json()))
    else:
        click.echo("\n".join(carried.lines()))
    if destination is not None:
        say(f"Adapter written to {destination}", quiet)
