"""`surgeon heal`."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.common import bars, say, say_resuming, show_dry_run
from surgery.cli.heal_options import TrainingOptions, training_options
from surgery.cli.help import GroupedCommand
from surgery.cli.options import ModelOptions, model_options, output_options, resume_option, talk_options
from surgery.cli.prune_options import EvalOptions, eval_options, measure

if TYPE_CHECKING:
    from surgery.engine.open_model import Model
    from surgery.heal.heal import HealResult
    from surgery.heal.heal_text import HealText


@click.command(cls=GroupedCommand)
@click.argument("student", metavar="DIR")
@click.option("--teacher", metavar="MODEL", help="The dense model. [default: what DIR was made from]")
@training_options
@eval_options
@output_options
@resume_option
@model_options
@talk_options
def heal(
    student: str,
    teacher: str | None,
    training: TrainingOptions,
    evaluation: EvalOptions,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    resume: bool,
    how: ModelOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train the pruned model in DIR towards the dense one, streamed, and write the result to a new folder.

    \b
    surgeon heal name-lp-hybrid-50 --tokens 1M --text web --text code
    """
    from surgery.cli.costs import heal_cost_lines
    from surgery.engine.distributed import destroy, rank
    from surgery.heal.heal import check_outputs, open_heal_journal
    from surgery.heal.heal import heal as run
    from surgery.heal.options import estimate_heal
    from surgery.heal.pair import shared_tokens
    from surgery.pruning.prune import Provenance

    quiet = quiet or rank() > 0  # of the processes torchrun started, the first talks and writes
    options = training.options()
    opened = how.open(student)
    dense = open_teacher(opened, teacher, how)
    shared_tokens(opened, dense)
    text = training.draw(opened)
    for note in text.notes:
        say(note, quiet)
    cost = estimate_heal(opened, dense, tuple(text.ids.shape), len(text.held_out.ids), options)
    if dry_run:
        fields = {"text": text.as_json(), "options": options.as_json()}
        if rank() == 0:
            show_dry_run(opened, cost, heal_cost_lines(cost), fields, as_json=as_json)
        return
    destination = out or Path(f"{opened.short_name}-healed")
    check_outputs(opened, options, cost, destination, training.save_adapter, overwrite=overwrite)
    chosen = evaluation.chosen(published=False)
    blocks = None if chosen is None else chosen.read(opened)
    say_plan(opened, dense, text, options.train, quiet)
    say("\n".join(heal_cost_lines(cost)), quiet)
    journal = open_heal_journal(opened, dense, text, options, destination, resume=resume)
    say_resuming(journal, quiet)
    result = run(
        opened,
        dense,
        text,
        destination,
        options,
        overwrite=True,  # checked above
        adapter=training.save_adapter,
        measure=None if blocks is None else lambda model: measure(model, blocks, quiet),
        provenance=Provenance(shlex.join(canonical_command(opened, teacher, dense, training, how))),
        journal=journal,
        progress=bars(quiet),
    )
    destroy()
    if rank() == 0:
        show_result(result, destination, training.save_adapter, as_json, quiet)


def open_teacher(student: Model, named: str | None, how: ModelOptions) -> Model:
    """The model named with --teacher, else the source of a folder surgeon wrote; run as the student is."""
    from surgery.engine.open_model import Model, open_checkpoint
    from surgery.heal.pair import student_manifest, teacher_name

    manifest = student_manifest(student)
    source, revision = (named, None) if named is not None else teacher_name(student, manifest)
    checkpoint = open_checkpoint(source, revision=revision, range_reads=how.range_reads)
    checkpoint.trust_remote_code = how.trust_remote_code
    return Model(checkpoint, student.run)


def canonical_command(
    student: Model, named: str | None, teacher: Model, training: TrainingOptions, how: ModelOptions
) -> list[str]:
    """The words of the command that makes the same checkpoint again, free of paths of this machine."""
    words = ["surgeon", "heal", student.name, *(["--teacher", teacher.name] if named else [])]
    words += [*training.words, "--dtype", student.run.dtype_name]
    return words + (["--memory", how.memory] if how.memory else [])


def say_plan(student: Model, teacher: Model, text: HealText, train: Any, quiet: bool) -> None:
    """Say what is trained towards what, and on how much text."""
    from surgery.engine.distributed import world_size

    blocks, size = text.ids.shape
    say(
        f"Healing {student.name} towards {teacher.name}: {train} on {blocks} x {size} tokens of {text.name}, "
        f"of which the loss counts {text.tokens_counted:,}; {len(text.held_out.ids)} blocks held out",
        quiet,
    )
    if world_size() > 1:
        say(f"{world_size()} processes share the blocks of every step; the costs are those of one", quiet)


def show_result(
    result: HealResult, destination: Path, adapter: Path | None, as_json: bool, quiet: bool
) -> None:
    """Print what healing changed, or that it did not help and nothing was written."""
    history, entry = result.history, result.entry
    if as_json:
        click.echo(json.dumps({**entry, "written": result.written is not None}))
    elif result.written is not None:
        for name, text in entry["held_out"].items():
            click.echo(f"Perplexity {text['before']:.2f} → {text['after']:.2f} on held-out blocks of {name}")
        if "evaluation" in entry:
            before, after = entry["evaluation"]["before"], entry["evaluation"]["after"]
            click.echo(
                f"Perplexity {before['perplexity']:.2f} → {after['perplexity']:.2f} on {after['text']}"
            )
    if result.written is None:
        first, last = (math.exp(history.mean(place)) for place in (0, -1))
        say(
            f"Healing did not help (perplexity on held-out blocks {first:.2f} → {last:.2f}): "
            "nothing was written",
            quiet=False,
        )
        return
    rate = entry["tokens"] / max(1e-9, entry["seconds"])
    say(f"{entry['steps']} steps, {entry['tokens']:,} tokens, {rate:,.0f} tokens a second", quiet)
    say(f"Checkpoint written to {destination}", quiet)
    if adapter is not None:
        say(f"Adapter written to {adapter}", quiet)
