"""`surgeon ablate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.commands.help import GroupedCommand
from surgery.commands.options import calibration_options, common_options, output_options, resume_option
from surgery.commands.planning import index_for, read_index
from surgery.commands.session import (
    bars,
    data_console,
    evaluation_blocks,
    journal_done,
    local_path,
    open_model,
    run_options,
    say,
)
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint
    from surgery.index import ChannelIndex

GROUP_NAMES = ("super-weights", "channels", "hit-rate")


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
@click.option("--index", "index_folder", metavar="DIR", help="Index to use. [default: made on the fly]")
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
@common_options
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
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure what MODEL loses without its super weights, super activations, supernodes or halos, and controls.

    \b
    surgeon ablate org/name --index name-index --text wikitext-test --scale 0:3:0.25
    """
    from surgery.ablation import run_ablations
    from surgery.calibration import read_text
    from surgery.destination import check_destination, complete_folder
    from surgery.experiments import conditions_for
    from surgery.plots import save_ablations
    from surgery.show_ablation import show_outcomes
    from surgery.stop_words import prompts_of

    checkpoint = open_model(model, options)
    folder = out or Path(f"{checkpoint.name.split('/')[-1]}-ablation")
    check_destination(folder, overwrite=overwrite, source=local_path(model))
    words, name = read_text(text)
    if not words.strip():
        raise UsageError("the text is empty", where=text)
    blocks = evaluation_blocks(checkpoint, words, name, text_blocks)
    if stop_words:
        prompts_of(words, stop_words)  # refused before anything is computed
    channels = index_for(
        checkpoint, read_index(index_folder), set(), None if plan_only or dry_run else folder, options, quiet
    )
    chosen = conditions_for(channels, conditions, scale, options["seed"])
    if plan_only or dry_run:
        for condition in chosen:
            click.echo(f"{condition.group:<14} {condition.name} (from layer {condition.first})")
        return
    if (traced or stop_words) and not channels.super_weights:
        raise UsageError(
            "the index lists no super weight to do without", where="--trace" if traced else "--stop-words"
        )
    run = run_options(checkpoint, options)
    say(f"Measuring {len(chosen)} conditions on {len(blocks.ids)} blocks of {name}", quiet)
    outcomes = run_ablations(checkpoint, chosen, blocks, run, bars(quiet))
    fields: dict[str, Any] = {
        "source": channels.source,
        "text": {**blocks.as_json()},
        "super_weights": [weight.as_json() for weight in channels.super_weights],
        "conditions": [asdict(outcome) for outcome in outcomes],
    }
    if traced:
        fields["trace"] = traces(checkpoint, channels, options)
    if stop_words:
        fields["stop_words"] = next_words(checkpoint, channels, words, stop_words, options)
    with complete_folder(folder) as partial:
        (partial / "ablation.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        save_ablations(partial, fields)
    journal_done(folder)
    if as_json:
        click.echo(json.dumps(fields))
    else:
        show_outcomes(fields, data_console())
    say(f"Results and plots written to {folder}", quiet)


def traces(checkpoint: Checkpoint, channels: ChannelIndex, options: dict[str, Any]) -> dict[str, Any]:
    """The residual stream of several prompts, with super weights and without."""
    import torch

    from surgery.calibration import load_tokenizer
    from surgery.experiments import scaled
    from surgery.super_weights import PROMPTS
    from surgery.traces import trace

    tokenizer = load_tokenizer(checkpoint)
    ids = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    weight = max(channels.super_weights, key=lambda w: abs(w.output))
    points = trace(
        checkpoint, ids, weight, scaled(channels.super_weights, 0.0), run_options(checkpoint, options)
    )
    place = {"layer": weight.layer, "row": weight.row, "column": weight.column}
    return {"prompts": list(PROMPTS), "weight": place, "points": [asdict(point) for point in points]}


def next_words(
    checkpoint: Checkpoint, channels: ChannelIndex, text: str, count: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Next-token probabilities with super weights and without."""
    from surgery.calibration import load_tokenizer
    from surgery.experiments import scaled
    from surgery.stop_words import prompts_of, stop_words

    return asdict(
        stop_words(
            checkpoint,
            load_tokenizer(checkpoint),
            prompts_of(text, count),
            scaled(channels.super_weights, 0.0),
            run_options(checkpoint, options),
        )
    )
