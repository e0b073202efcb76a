"""`surgeon find`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from surgery.cli.common import data_console
from surgery.cli.help import GroupedCommand

if TYPE_CHECKING:
    from surgery.card.index_dataset import PublishedIndex


@click.command(cls=GroupedCommand)
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def find(model: str, as_json: bool) -> None:
    """List the published indexes of MODEL on the Hub, newest first, for `--index`.

    \b
    surgeon find org/name
    """
    from surgery.card.index_dataset import find_indexes
    from surgery.engine.open_model import hub_id

    found = find_indexes(hub_id(model))
    if as_json:
        click.echo(json.dumps([index.as_json() for index in found], indent=1))
    elif not found:
        click.echo(f"No published index of {model}: make one with `surgeon index {model} --push`", err=True)
    else:
        show_found(found)


def show_found(found: list[PublishedIndex]) -> None:
    """Print published indexes as a table; the model's commit is what --revision takes."""
    from surgery.cli.terminal import bare_table

    table = bare_table(
        ("index", "changed", "model's commit", "text", "tokens", "statistics", "computed in"),
        left=("index", "changed", "model's commit", "text", "statistics", "computed in"),
    )
    for index in found:
        table.add_row(
            index.repo + (" (private)" if index.private else ""),
            index.changed[:10],
            index.commit[:12],
            index.calibration,
            f"{index.tokens:,}",
            "first and second order" if index.second_order else "first order",
            index.dtype,
        )
    data_console().print(table)
