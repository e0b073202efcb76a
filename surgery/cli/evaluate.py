"""`surgeon eval`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery import defaults
from surgery.cli.common import bars, local_path, say, show_dry_run
from surgery.cli.eval_against import compare_models, show_comparison
from surgery.cli.help import GroupedCommand
from surgery.cli.options import FilePath, ModelOptions, model_options, talk_options
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.engine.open_model import Model
    from surgery.evaluate.lm_eval import Tasks
    from surgery.model.meta_model import LayerEdit
    from surgery.progress import Progress
    from surgery.quantize.w8a8 import ActivationRounding
    from surgery.text import TokenBlocks

SMOOTHING_BLOCKS = 8


@click.command("eval", cls=GroupedCommand)
@click.argument("model")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="FILE|DATASET",
    help=f"Text to measure perplexity on; several times for several. [default: {defaults.EVALUATION_TEXT}; "
    "with --tasks, none]",
)
@click.option(
    "--against",
    metavar="MODEL",
    help="Another model, as the dense one, to compare with on the same texts and examples: KL divergence, "
    "agreement, paired differences, answers that flip.",
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
@click.option(
    "--tasks",
    metavar="TASK,...",
    help="Run these lm-eval tasks too, or surgeon_continuation and surgeon_cloze, made from --task-text; "
    "takes the extra `tasks`.",
)
@click.option(
    "--task-text",
    default=defaults.EVALUATION_TEXT,
    show_default=True,
    metavar="FILE|DATASET",
    help="Text that surgeon_continuation and surgeon_cloze are made from.",
)
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
    texts: tuple[str, ...],
    text_blocks: int | None,
    text_block_size: int | None,
    against: str | None,
    activations: str | None,
    calibration: str,
    tasks: str | None,
    task_text: str,
    fewshot: int | None,
    limit: int | None,
    include_path: Path | None,
    record: bool,
    dry_run: bool,
    how: ModelOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure the perplexity of MODEL, or run tasks on it, streamed, whatever its size.

    \b
    surgeon eval smaller --tasks hellaswag,arc_easy
    surgeon eval smaller --against dense --text text.txt --tasks surgeon_continuation --task-text text.txt
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    check_options(activations, against, bool(texts), bool(names))
    opened = how.open(model)
    other = None if against is None else replace(how, revision=()).open(against)
    loaded = given_tasks(opened, names, task_text, fewshot, limit, include_path)
    if not texts and not names:
        texts = (defaults.EVALUATION_TEXT,)
    drawn = draw_texts(opened, other, texts, text_blocks, text_block_size)
    if dry_run:
        show_eval_cost(opened, other, drawn, activations is not None, loaded, as_json)
        return
    result: dict[str, Any] = {}
    compared = None
    if other is not None:
        compared = compare_models(opened, other, drawn, loaded, bars(quiet))
        result = compared.result
    else:
        with contextlib.ExitStack() as stack:
            edit = None
            if activations is not None:
                edit = stack.enter_context(activation_rounding(opened, activations, calibration, quiet))
            result = measure_texts(opened, drawn, edit, bars(quiet))
        result |= {"activations": activations} if activations else {}
        if loaded is not None:
            from surgery.evaluate.lm_eval import run_tasks

            result["tasks"] = run_tasks(opened, loaded, bars(quiet)).table
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        show(result)
        if compared is not None:
            show_comparison(compared)
    folder = local_path(model)
    if names and record and folder is not None and (folder / "surgeon.json").exists():
        from surgery.card.publish import record_tasks

        record_tasks(folder, result["tasks"])
        say(f"Results written into surgeon.json and the card of {folder}", quiet)


def check_options(activations: str | None, against: str | None, texts: bool, tasks: bool) -> None:
    """Refuse options that do not go together."""
    if activations is not None and not texts and tasks:
        raise UsageError(
            "--activations goes with perplexity, not with tasks", next_step="add --text, or leave it out"
        )
    if activations is not None and against is not None:
        raise UsageError("--activations does not go with --against", next_step="leave one of them out")


def given_tasks(
    model: Model,
    names: list[str],
    task_text: str,
    fewshot: int | None,
    limit: int | None,
    include: Path | None,
) -> Tasks | None:
    """The tasks that `--tasks` names; None without."""
    if not names:
        return None
    from surgery.evaluate.lm_eval import load_tasks

    return load_tasks(model, names, text=task_text, fewshot=fewshot, limit=limit, include=include)


def draw_texts(
    model: Model, against: Model | None, texts: Sequence[str], blocks: int | None, size: int | None
) -> list[TokenBlocks]:
    """The blocks of every text. Raises UsageError for two models that can't be compared on them."""
    if not texts:
        return []
    from surgery.evaluate.agreement import check_same_tokens
    from surgery.evaluate.perplexity import default_block_size, evaluation_blocks

    if against is not None:
        check_same_tokens(model, against)
        lengths = [default_block_size(one.checkpoint.config) for one in (model, against)]
        size = size or min(lengths)
    return [evaluation_blocks(model, text, blocks, size) for text in texts]


def measure_texts(
    model: Model, texts: list[TokenBlocks], edit: LayerEdit | None, progress: Progress[Any]
) -> dict[str, Any]:
    """Perplexity on the first text, and under `texts` on all where there are several."""
    from surgery.evaluate.perplexity import perplexity

    found = [perplexity(model, blocks, edit=edit, progress=progress).as_json() for blocks in texts]
    return {**(found[0] if found else {}), **({"texts": found} if len(found) > 1 else {})}


def show_eval_cost(
    model: Model,
    against: Model | None,
    texts: list[TokenBlocks],
    edits: bool,
    tasks: Tasks | None,
    as_json: bool,
) -> None:
    """Print what measuring perplexity and running tasks take."""
    from surgery.budget.pass_cost import merged_cost
    from surgery.cli.costs import pass_cost_lines
    from surgery.evaluate.agreement import agreement_cost
    from surgery.evaluate.lm_eval import tasks_cost
    from surgery.evaluate.perplexity import perplexity_cost

    lines, costs = [], []
    fields: dict[str, Any] = {}
    for blocks in texts:
        shape = blocks.ids.shape
        lines.append(f"Text: {shape[0]} x {shape[1]} tokens of {blocks.name}")
        alone = perplexity_cost(model, *shape, edits=edits)
        costs.append(alone if against is None else agreement_cost(model, against, [shape]))
    if texts:
        fields["text"] = texts[0].as_json()
    if tasks is not None:
        lines.append(f"Tasks: {', '.join(tasks.names)}")
        fields["tasks"] = tasks.names
        costs += [tasks_cost(one, tasks) for one in (model, against) if one is not None]
    cost = merged_cost(costs)
    show_dry_run(model, cost, [*lines, *pass_cost_lines(cost)], fields, as_json=as_json)


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
    for text in result.get("texts", [result] if "perplexity" in result else []):
        click.echo(
            f"perplexity     {text['perplexity']:.4f}  "
            f"({text['nats']:.2f} nats over {text['tokens']:,} tokens)"
        )
        click.echo(f"bits per byte  {text['bits_per_byte']:.4f}  ({text['bytes']:,} bytes of {text['text']})")
    if "convention" in result:
        click.echo(f"convention     {result['convention']}")
    for task, values in result.get("tasks", {}).get("results", {}).items():
        for metric, value in values.items():
            if metric != "samples" and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr")
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                click.echo(f"{task:<14} {metric} {value:.4f}{spread}  ({values['samples']} examples)")
