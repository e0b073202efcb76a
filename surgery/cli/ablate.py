"""`surgeon ablate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.common import (
    bars,
    check_index_exists,
    discard_journal,
    index_for,
    local_path,
    read_index,
    say,
    show_dry_run,
)
from surgery.cli.help import GroupedCommand
from surgery.cli.options import (
    CalibrationOptions,
    ModelOptions,
    calibration_options,
    index_option,
    model_options,
    output_options,
    resume_option,
    talk_options,
)
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.engine.open_model import Model
    from surgery.evaluate.ablation import Condition
    from surgery.index.channel_index import ChannelIndex
    from surgery.text import TokenBlocks

STOP_WORD_TEXT = 1 << 20  # characters of the text that sentences are taken from
GROUP_NAMES = ("super-weights", "structures", "channels", "hit-rate")


def groups(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    """A callback that splits --conditions."""
    found = [word.strip() for word in value.split(",") if word.strip() and word.strip() != "none"]
    unknown = [word for word in found if word not in GROUP_NAMES]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)} is not of {', '.join(GROUP_NAMES)}, none")
    return found


def sweep(_: click.Context, __: click.Parameter, value: str | None) -> list[float]:
    """A callback that reads START:STOP:STEP, both ends included."""
    if value is None:
        return []
    try:
        start, stop, step = (float(part) for part in value.split(":"))
    except ValueError as error:
        raise click.BadParameter("give START:STOP:STEP, as 0:3:0.25") from error
    if step <= 0 or stop < start or (stop - start) / step > 1000:
        raise click.BadParameter("give START:STOP:STEP with STEP above 0 and STOP not below START")
    return [start + i * step for i in range(int((stop - start) / step + 1e-9) + 1)]


@click.command(cls=GroupedCommand)
@click.argument("model")
@index_option
@click.option(
    "--text",
    default="wikitext-test",
    show_default=True,
    metavar="FILE|DATASET",
    help="Measure on this; sentences of --stop-words are taken from it too.",
)
@click.option("--text-blocks", type=int, help="Blocks of it. [default: all]")
@click.option(
    "--conditions",
    callback=groups,
    default="super-weights",
    show_default=True,
    help=f"What to try: {', '.join(GROUP_NAMES)}, or none.",
)
@click.option(
    "--scale", callback=sweep, metavar="START:STOP:STEP", help="Also multiply super weights by each of these."
)
@click.option(
    "--trace", "traced", is_flag=True, help="Also follow the super activation through the residual stream."
)
@click.option(
    "--stop-words",
    type=int,
    metavar="N",
    help="Also compare what N sentences without their last word go on with.",
)
@click.option("--plan", "plan_only", is_flag=True, help="List the conditions; measure nothing.")
@calibration_options
@output_options
@resume_option
@model_options
@talk_options
def ablate(
    model: str,
    index_folder: str | None,
    text: str,
    text_blocks: int | None,
    conditions: list[str],
    scale: list[float],
    traced: bool,
    stop_words: int | None,
    plan_only: bool,
    text_options: CalibrationOptions,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    resume: bool,
    how: ModelOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure what MODEL loses without its super weights, super activations, supernodes or halos, and
    controls.

    \b
    surgeon ablate org/name --index name-index --text wikitext-test --scale 0:3:0.25
    """
    from surgery.checkpoint.output_folder import check_destination
    from surgery.cli.ablation_table import save_outcomes
    from surgery.engine.distributed import barrier, destroy, rank
    from surgery.evaluate.ablation import ablation_cost, run_ablations
    from surgery.evaluate.experiments import conditions_for
    from surgery.evaluate.next_token import prompts_of
    from surgery.evaluate.perplexity import evaluation_blocks
    from surgery.text import open_text

    quiet = quiet or rank() > 0  # of the processes torchrun started, the first talks and writes
    opened = how.open(model)
    folder = out or Path(f"{opened.short_name}-ablation")
    check_destination(folder, overwrite=overwrite, source=local_path(model))
    found = read_index(index_folder, opened.checkpoint)
    check_index_exists(found)
    blocks = evaluation_blocks(opened, text, text_blocks)
    sentences = (
        prompts_of(open_text(text).start(STOP_WORD_TEXT), stop_words) if stop_words else []
    )  # refused before any work
    ablation_cost(opened, 1, *blocks.ids.shape)  # a budget too small is refused before an index is made
    index = index_for(
        opened,
        found,
        text_options,
        destination=None if plan_only or dry_run else folder,
        resume=resume,
        quiet=quiet,
    )
    chosen = conditions_for(index, conditions, scale, text_options.seed)
    if plan_only or dry_run:
        show_conditions(opened, chosen, blocks, dry_run, as_json)
        return
    if (traced or sentences) and not index.super_weights:
        raise UsageError(
            "the index lists no super weight to do without", where="--trace" if traced else "--stop-words"
        )
    say(f"Measuring {len(chosen)} conditions on {len(blocks.ids)} blocks of {blocks.name}", quiet)
    outcomes = run_ablations(opened, chosen, blocks, bars(quiet))
    if rank() == 0:
        fields: dict[str, Any] = {
            "source": index.source,
            **index.published_json(),
            "text": {**blocks.as_json()},
            "super_weights": [weight.as_json() for weight in index.super_weights],
            "structures": [finding.as_json() for finding in index.structures],
            "conditions": [asdict(outcome) for outcome in outcomes],
        }
        if traced:
            fields["trace"] = traces(opened, index)
        if sentences:
            fields["stop_words"] = next_words(opened, index, sentences)
        save_outcomes(folder, "ablation.json", fields, as_json)
        say(f"Results and plots written to {folder}", quiet)
    barrier()
    discard_journal(folder)
    destroy()


def show_conditions(
    model: Model, conditions: list[Condition], blocks: TokenBlocks, dry_run: bool, as_json: bool
) -> None:
    """List the conditions and, for a dry run, what measuring them takes."""
    from surgery.cli.costs import pass_cost_lines
    from surgery.evaluate.ablation import ablation_cost

    lines = [f"{one.group:<14} {one.name} (from layer {one.first})" for one in conditions]
    if not dry_run:
        click.echo("\n".join(lines))
        return
    cost = ablation_cost(model, len(conditions), *blocks.ids.shape)
    named = [{"group": one.group, "name": one.name, "first_layer": one.first} for one in conditions]
    lines += pass_cost_lines(cost)
    show_dry_run(model, cost, lines, {"conditions": named}, as_json=as_json)


def traces(model: Model, index: ChannelIndex) -> dict[str, Any]:
    """The residual stream of several prompts, with super weights and without."""
    import torch

    from surgery.checkpoint.transformers_model import load_tokenizer
    from surgery.evaluate.experiments import scaled
    from surgery.evaluate.residual_trace import trace
    from surgery.index.spike_detector import PROMPTS

    tokenizer = load_tokenizer(model.checkpoint)
    ids = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    weight = max(index.super_weights, key=lambda w: abs(w.output))
    points = trace(model, ids, weight, scaled(index.super_weights, 0.0))
    place = {"layer": weight.layer, "row": weight.row, "column": weight.column}
    return {"prompts": list(PROMPTS), "weight": place, "points": [asdict(point) for point in points]}


def next_words(model: Model, index: ChannelIndex, sentences: list[str]) -> dict[str, Any]:
    """Next-token probabilities with super weights and without."""
    from surgery.checkpoint.transformers_model import load_tokenizer
    from surgery.evaluate.experiments import scaled
    from surgery.evaluate.next_token import stop_words

    tokenizer = load_tokenizer(model.checkpoint)
    return asdict(stop_words(model, tokenizer, sentences, scaled(index.super_weights, 0.0)))
