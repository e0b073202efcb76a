"""`surgeon export`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.common import bars, local_path, read_index, say
from surgery.cli.help import GroupedCommand
from surgery.cli.options import output_options, super_weights_index_option, talk_options
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.checkpoint.reader import Checkpoint
    from surgery.export.write import GgufPlan


@click.command(cls=GroupedCommand)
@click.argument("model")
@click.option(
    "--gguf", "as_gguf", is_flag=True, help="Write GGUF, which llama.cpp, Ollama and LM Studio load."
)
@click.option(
    "--type",
    "type_name",
    default="f16",
    show_default=True,
    metavar="TYPE",
    help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, iq4_xs, ... ; an unknown one lists them all.",
)
@click.option(
    "--super-weights",
    "handling",
    type=click.Choice(("module", "none")),
    default="module",
    show_default=True,
    help="Leave the matrix of a super weight in its stored type, or round it like the others.",
)
@super_weights_index_option
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@output_options
@talk_options
def export(
    model: str,
    as_gguf: bool,
    type_name: str,
    handling: str,
    index_folder: str | None,
    revision: str | None,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a checkpoint in the format of another runtime: GGUF for llama.cpp.

    Llama, Mistral, Qwen2 and Qwen3 go out, pruned or not; layers of their own widths as llama.cpp's `deci`
    architecture. --out is a folder, which gets a card too, or a path that ends in .gguf.

    \b
    surgeon export smaller --gguf --type q4_k_m
    """
    from surgery.engine.open_model import open_checkpoint
    from surgery.export.file_types import file_type
    from surgery.export.folder import check_gguf_destination, export_gguf
    from surgery.export.write import plan_gguf

    if not as_gguf:
        raise UsageError("no format was named", where="surgeon export", next_step="give --gguf")
    chosen = file_type(type_name)
    checkpoint = open_checkpoint(model, revision=revision)
    destination = out or Path(f"{checkpoint.name.rpartition('/')[2]}-GGUF")
    weights = _super_weights(checkpoint, index_folder, quiet) if handling != "none" else None
    plan = plan_gguf(checkpoint, chosen, weights)
    if not dry_run:
        source = local_path(model)
        check_gguf_destination(destination, overwrite=overwrite, source=source, needs_bytes=plan.nbytes)
    for line in _lines(plan):
        click.echo(line, err=as_json)
    if dry_run:
        if as_json:
            click.echo(json.dumps({"types": plan.types, "bytes": plan.nbytes, "notes": plan.notes}))
        return
    command = _command(checkpoint, chosen.name, handling)
    manifest = export_gguf(plan, destination, super_weights=weights, command=command, progress=bars(quiet))
    if as_json:
        click.echo(json.dumps(manifest))
    say(f"Written to {destination}", quiet)


def _super_weights(
    checkpoint: Checkpoint, index_folder: str | None, quiet: bool
) -> list[dict[str, Any]] | None:
    """Super weights of an index or of the folder's surgeon.json; says where nobody has looked for them."""
    from surgery.export.write import known_super_weights

    index = read_index(index_folder, checkpoint)
    if index is not None:
        return [weight.as_json() for weight in index.super_weights]
    found = known_super_weights(checkpoint)
    if found is None:
        say("Super weights are not known: no surgeon.json. Give --index to keep them.", quiet)
    return found


def _lines(plan: GgufPlan) -> list[str]:
    """What will be written, for the terminal."""
    from collections import Counter

    from surgery.byte_units import format_bytes

    counts = Counter(plan.types.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    before = format_bytes(plan.checkpoint.nbytes)
    return [
        f"GGUF {plan.chosen.name}, architecture {plan.model.architecture}: tensors {kinds}",
        f"Bytes {before} → {format_bytes(plan.nbytes)}, rounded by {plan.by.name}",
        *(f"Note: {note}" for note in plan.notes),
    ]


def _command(checkpoint: Checkpoint, type_name: str, handling: str) -> str:
    """The command that makes the same file again."""
    words = ["surgeon", "export", checkpoint.name, "--gguf", "--type", type_name, "--super-weights", handling]
    words += ["--revision", checkpoint.revision] if checkpoint.revision else []
    return shlex.join(words)
