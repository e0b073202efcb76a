"""`surgeon eval`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery import defaults
from surgery.cli.common import bars, local_path, say, show_dry_run
from surgery.cli.help import GroupedCommand
from surgery.cli.options import FilePath, ModelOptions, model_options, talk_options
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.engine.open_model import Model
    from surgery.quantize.w8a8 import ActivationRounding
    from surgery.text import TokenBlocks

SMOOTHING_BLOCKS = 8


@click.command("eval", cls=GroupedCommand)
@click.argument("model")
@click.option(
    "--text",
    "text",
    metavar="FILE|DATASET",
    help=f"Text to measure perplexity on. [default: {defaults.EVALUATION_TEXT}; with --tasks, none]",
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
    type=FilePath(path_type=Path, exists=True, file_okay=False),
    help="Folder of task files besides lm-eval's own.",
)
@click.option(
    "--record/--no-record",
    default=True,
    show_default=True,
    help="Write task results into surgeon.json and the card, where MODEL is a folder surgeon wrote.",
)
@click.option("--dry-run", is_flag=True, help="Say what it takes; measure nothing.")
@model_options
@talk_options
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
    dry_run: bool,
    how: ModelOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure the perplexity of MODEL, streamed, whatever its size; or run tasks on it, held in memory.

    \b
    surgeon eval smaller --tasks hellaswag,arc_easy
    """
    from surgery.evaluate.perplexity import evaluation_blocks, perplexity

    if activations is not None and text is None and tasks is not None:
        raise UsageError(
            "--activations goes with perplexity, not with tasks", next_step="add --text, or leave it out"
        )
    opened = how.open(model)
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if names:
        check_fits(opened, model)
    blocks = None
    if text is not None or tasks is None:
        blocks = evaluation_blocks(opened, text or defaults.EVALUATION_TEXT, text_blocks, text_block_size)
    if dry_run:
        show_eval_cost(opened, blocks, activations is not None, names, as_json)
        return
    result: dict[str, Any] = {}
    if blocks is not None:
        with contextlib.ExitStack() as stack:
            edit = None
            if activations is not None:
                rounding = activation_rounding(opened, activations, calibration, quiet)
                edit = stack.enter_context(rounding)
            result = perplexity(opened, blocks, edit=edit, progress=bars(quiet)).as_json()
        result |= {"activations": activations} if activations else {}
    if names:
        from surgery.evaluate.lm_eval import run_tasks

        result["tasks"] = run_tasks(
            model,
            names,
            revision=opened.checkpoint.revision,
            fewshot=fewshot,
            limit=limit,
            include=include_path,
            device=str(opened.run.device),
            dtype=opened.run.dtype_name,
        )
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        show(result)
    folder = local_path(model)
    if names and record and folder is not None and (folder / "surgeon.json").exists():
        from surgery.card.publish import record_tasks

        record_tasks(folder, result["tasks"])
        say(f"Results written into surgeon.json and the card of {folder}", quiet)


def check_fits(model: Model, source: str) -> None:
    """Refuse tasks on a GGUF file, or on a model that --memory can't hold whole: lm-eval loads it."""
    from surgery.budget.budget import refuse_below

    if Path(source).suffix == ".gguf":
        raise UsageError("lm-eval is given folders and Hub models, not GGUF files", where=source)
    if model.run.device.type == "cpu":
        refuse_below(model.checkpoint.parameters * model.run.dtype.itemsize, model.run.memory, "host")


def show_eval_cost(
    model: Model, blocks: TokenBlocks | None, edits: bool, tasks: list[str], as_json: bool
) -> None:
    """Print what measuring perplexity takes, and what tasks do."""
    from surgery.byte_units import format_bytes
    from surgery.cli.costs import pass_cost_lines
    from surgery.evaluate.perplexity import perplexity_cost

    whole = model.checkpoint.parameters * model.run.dtype.itemsize
    lines = [f"Tasks hold the whole model in memory: {format_bytes(whole)}"] if tasks else []
    fields: dict[str, Any] = {"tasks": tasks}
    if blocks is None:
        click.echo(json.dumps({**fields, "bytes": whole}) if as_json else "\n".join(lines))
        return
    cost = perplexity_cost(model, *blocks.ids.shape, edits=edits)
    text = f"Text: {blocks.ids.shape[0]} x {blocks.ids.shape[1]} tokens of {blocks.name}"
    lines = [text, *lines, *pass_cost_lines(cost)]
    show_dry_run(model, cost, lines, {**fields, "text": blocks.as_json()}, as_json=as_json)


def activation_rounding(model: Model, mode: str, calibration: str, quiet: bool) -> ActivationRounding:
    """What rounds weights and activations; smoothquant looks at a few calibration blocks first."""
    from surgery.evaluate.perplexity import evaluation_blocks
    from surgery.quantize.w8a8 import ActivationRounding
    from surgery.quantize.write import input_power

    if mode != "smoothquant":
        return ActivationRounding(mode)
    blocks = evaluation_blocks(model, calibration, SMOOTHING_BLOCKS, 512)
    largest = input_power(model, blocks, bars(quiet), largest=True)
    return ActivationRounding(mode, model.meta_model.layers_path, largest)


def show(result: dict[str, Any]) -> None:
    """Print what was measured."""
    if "perplexity" in result:
        click.echo(
            f"perplexity     {result['perplexity']:.4f}  "
            f"({result['nats']:.2f} nats over {result['tokens']:,} tokens)"
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
