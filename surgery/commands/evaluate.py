"""`surgeon eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.commands.help import GroupedCommand
from surgery.commands.options import common_options
from surgery.commands.session import (
    bars,
    evaluate,
    evaluation_blocks,
    local_path,
    open_model,
    run_options,
    say,
)
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.activations import ActivationRounding
    from surgery.checkpoint import Checkpoint

SMOOTHING_BLOCKS = 8
DEFAULT_TEXT = "wikitext-test"


@click.command("eval", cls=GroupedCommand)
@click.argument("model")
@click.option(
    "--text",
    "text",
    metavar="FILE|DATASET",
    help=f"Text to measure perplexity on. [default: {DEFAULT_TEXT}; with --tasks, none]",
)
@click.option(
    "--text-blocks",
    "--blocks",
    "text_blocks",
    type=int,
    help="Use only the first so many blocks. [default: all]",
)
@click.option(
    "--text-block-size",
    "--block-size",
    "text_block_size",
    type=int,
    help="Tokens in a block. [default: 2048 or the context length]",
)
@click.option(
    "--activations",
    type=click.Choice(("w8a8", "w8a8-sa", "smoothquant")),
    help="Simulate 8-bit weights and activations: plainly, with super activations put back, or smoothed.",
)
@click.option(
    "--calibration",
    default="wikitext",
    show_default=True,
    metavar="FILE|DATASET",
    help="With smoothquant: text to see the activations' size on.",
)
@click.option("--tasks", metavar="TASK,...", help="Run these lm-eval tasks too; takes the extra `tasks`.")
@click.option("--fewshot", type=int, help="Examples in each prompt. [default: the task's own]")
@click.option("--limit", type=int, help="Only the first so many examples of each task.")
@click.option(
    "--include-path",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of task files besides lm-eval's own.",
)
@click.option(
    "--record/--no-record",
    default=True,
    show_default=True,
    help="Write task results into surgeon.json and the card, where MODEL is a folder surgeon wrote.",
)
@common_options
def eval_command(
    model: str,
    text: str | None,
    text_blocks: int | None,
    text_block_size: int | None,
    activations: str | None,
    calibration: str,
    tasks: str | None,
    fewshot: int | None,
    limit: int | None,
    include_path: Path | None,
    record: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure the perplexity of MODEL, streamed, whatever its size; or run tasks on it, held in memory.

    \b
    surgeon eval smaller --tasks hellaswag,arc_easy
    """
    if activations is not None and text is None and tasks is not None:
        raise UsageError(
            "--activations goes with perplexity, not with tasks", next_step="add --text, or leave it out"
        )
    checkpoint = open_model(model, options)
    result: dict[str, Any] = {}
    if text is not None or tasks is None:
        edit = None
        if activations is not None:
            edit = activation_edit(checkpoint, activations, calibration, options, quiet)
        size = (text_blocks, text_block_size)
        result = evaluate(checkpoint, text or DEFAULT_TEXT, *size, options, quiet, edit)
        result |= {"activations": activations} if activations else {}
    if tasks is not None:
        if Path(model).suffix == ".gguf":
            raise UsageError("lm-eval is given folders and Hub models, not GGUF files", where=model)
        from surgery.tasks import run_tasks

        run = run_options(checkpoint, options)
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        result["tasks"] = run_tasks(
            model,
            names,
            revision=checkpoint.revision,
            fewshot=fewshot,
            limit=limit,
            include=include_path,
            device=str(run.device),
            dtype=str(run.dtype).removeprefix("torch."),
        )
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        show(result)
    folder = local_path(model)
    if tasks is not None and record and folder is not None and (folder / "surgeon.json").exists():
        record_tasks(folder, result["tasks"])
        say(f"Results written into surgeon.json and the card of {folder}", quiet)


def activation_edit(
    checkpoint: Checkpoint, mode: str, calibration: str, options: dict[str, Any], quiet: bool
) -> ActivationRounding:
    """What rounds weights and activations; smoothquant looks at a few calibration blocks first."""
    import torch

    from surgery.activations import ActivationRounding
    from surgery.calibration import read_text
    from surgery.quantize import input_power
    from surgery.skeleton import Skeleton

    if mode != "smoothquant":
        return ActivationRounding(mode)
    blocks = evaluation_blocks(checkpoint, *read_text(calibration), SMOOTHING_BLOCKS, 512)
    run = run_options(checkpoint, options)
    largest = input_power(checkpoint, blocks, run, bars(quiet), largest=True)
    return ActivationRounding(mode, Skeleton(checkpoint, torch.float32).layers_path, largest)


def record_tasks(folder: Path, found: dict[str, Any]) -> None:
    """Put task results into surgeon.json, beside those of other tasks, and into the card."""
    from cards import render_card
    from surgery.commands.publish import read_manifest
    from surgery.destination import replace_text
    from surgery.prune import MANIFEST, dump_manifest

    manifest = read_manifest(folder)
    measurements = manifest.setdefault("measurements", {})
    earlier = measurements.get("tasks", {})
    merged = {key: {**earlier.get(key, {}), **found[key]} for key in ("settings", "results")}
    measurements["tasks"] = {**found, **merged}
    card = folder / "README.md"
    text = render_card(manifest, card.read_text(encoding="utf-8") if card.exists() else None)
    replace_text(folder / MANIFEST, dump_manifest(manifest))
    replace_text(card, text)


def show(result: dict[str, Any]) -> None:
    """Print what was measured."""
    if "perplexity" in result:
        click.echo(
            f"perplexity     {result['perplexity']:.4f}  ({result['nats']:.2f} nats over {result['tokens']:,} tokens)"
        )
        click.echo(
            f"bits per byte  {result['bits_per_byte']:.4f}  ({result['bytes']:,} bytes of {result['text']})"
        )
        click.echo(f"convention     {result['convention']}")
    for task, values in result.get("tasks", {}).get("results", {}).items():
        for metric, value in values.items():
            if metric != "samples" and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr")
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                click.echo(f"{task:<14} {metric} {value:.4f}{spread}  ({values['samples']} examples)")
