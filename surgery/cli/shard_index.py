"""`surgeon shard-index`."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli.common import say
from surgery.cli.help import GroupedCommand
from surgery.cli.options import PATH


@click.command("shard-index", cls=GroupedCommand)
@click.argument("folder", metavar="DIR", type=PATH)
def shard_index(folder: Path) -> None:
    """Write model.safetensors.index.json for the shards in DIR, from their headers.

    \b
    surgeon shard-index downloaded
    """
    from surgery.checkpoint.weight_map import write_weight_map

    count = write_weight_map(folder)
    say(f"Index of {count} tensors written to {folder / 'model.safetensors.index.json'}", False)
