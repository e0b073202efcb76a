"""What the commands share: progress bars, consoles, messages, and the index that several start from."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import CalibrationOptions
from surgery.errors import SurgeonError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from surgery.budget.budget import Cost
    from surgery.checkpoint.reader import Checkpoint
    from surgery.engine.open_model import Model
    from surgery.engine.resume import Journal
    from surgery.index.calibration import Calibration
    from surgery.index.channel_index import ChannelIndex
    from surgery.progress import Progress

LINE_SECONDS = 60.0  # between two lines of progress in a log
RESUMING = "Resuming an interrupted run (--no-resume starts over)"


def read_template(path: Path | None) -> str | None:
    """The text of --card-template. Raises UsageError when it can't be read."""
    if path is None:
        return None
    from surgery.card.publish import check_template

    try:
        text = path.read_text(encoding="utf-8")
        check_template(text)
        return text
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the card template can't be read", where=path.name, found=str(error)) from error


def local_path(model: str) -> Path | None:
    """The folder of a local model, None for one on the Hub."""
    path = Path(model).expanduser()
    return path if path.is_dir() else None


def read_index(source: str | None, checkpoint: Checkpoint) -> ChannelIndex | None:
    """The index of `--index`, where that is given: a folder or a data set. Refuses one of another model."""
    if source is None:
        return None
    from surgery.index.open_index import open_index

    index = open_index(source)
    index.check_source(checkpoint)
    return index


def calibrate_for(model: Model, text: CalibrationOptions) -> Calibration:
    """The calibration tokens that the options name. Raises UnsupportedModelError for a model without an
    index.
    """
    from surgery.index.calibration import calibrate
    from surgery.model.meta_model import check_model

    check_model(model.checkpoint)
    found = calibrate(
        model,
        text.calibration,
        blocks=text.blocks,
        spike_prompt=text.spike_prompt,
        **text.drawing,
    )
    for note in found.blocks.notes:
        say(note, quiet=False)
    return found


def make_index(
    model: Model,
    calibration: Calibration,
    *,
    destination: Path | None = None,
    resume: bool = True,
    quiet: bool = False,
    second_order: bool = False,
    save_samples: bool = False,
    broadcast_reads: bool = False,
) -> ChannelIndex:
    """Index a model, saying what that takes. The journal beside `destination` stays there: see
    `discard_journal`.
    """
    from surgery.budget.index_cost import index_cost
    from surgery.cli.costs import index_cost_lines
    from surgery.engine.resume import Journal
    from surgery.index.build import build_index, index_fingerprint

    blocks = calibration.blocks
    shape = blocks.ids.shape
    cost = index_cost(model.meta_model, shape[0], shape[1], model.run, second_order)
    say(f"Indexing {model.name} on {shape[0]} x {shape[1]} tokens of {blocks.name}", quiet)
    say("\n".join([*leftover_lines(model), *index_cost_lines(cost, len(model.meta_model.layers))]), quiet)
    journal = None
    if destination is not None:
        what = index_fingerprint(model, calibration, second_order, save_samples)
        journal = Journal(destination, what, resume=resume)
        say(RESUMING, quiet or not journal.resumed)
    try:
        return build_index(
            model,
            calibration,
            second_order=second_order,
            save_samples=save_samples,
            broadcast_reads=broadcast_reads,
            journal=journal,
            progress=bars(quiet),
        )
    except SurgeonError as error:
        if journal is not None:
            journal.fail(error)
        raise


def index_for(
    model: Model,
    found: ChannelIndex | None,
    text: CalibrationOptions,
    methods: Iterable[str] = (),
    *,
    destination: Path | None = None,
    resume: bool = True,
    quiet: bool = False,
) -> ChannelIndex:
    """The index `found`, or one made now with all that `methods` need.

    One made now keeps its journal beside `destination`, to be discarded once that is written; without one, no
    journal.
    """
    from surgery.plan.methods import METHODS

    if found is not None:
        return found
    return make_index(
        model,
        calibrate_for(model, text),
        destination=destination,
        resume=resume,
        quiet=quiet,
        second_order=any(METHODS[name].second_order for name in methods),
    )


def calibration_shape(found: ChannelIndex | None, text: CalibrationOptions) -> tuple[int, int]:
    """Blocks, and tokens of each, that the index has or will have."""
    if found is None:
        return text.blocks, text.block_size
    blocks, block_size = found.input_ids.shape
    return blocks, block_size


def show_dry_run(
    model: Model,
    cost: Cost,
    lines: list[str],
    fields: dict[str, Any],
    *,
    as_json: bool,
    passes: int = 1,
    wide: bool = False,
) -> None:
    """Print what a job takes and, from a second's look at this machine, how long; as JSON beside `fields`.

    `lines` are what there is to say about the cost but for time; `passes` are as many as the cost is of one.
    """
    from surgery.budget.machine import measure_machine
    from surgery.cli.costs import cost_json, time_line

    machine = measure_machine(model, wide=wide)
    if as_json:
        click.echo(json.dumps({**fields, **cost_json(cost, machine, passes)}, indent=1))
    else:
        click.echo("\n".join([*lines, time_line(cost, machine, passes)]))


def leftover_lines(model: Model, fates: list[dict[str, Any]] | None = None) -> list[str]:
    """What a result will not have as the source has it: tensors outside the model, and files left behind.

    `fates` is the entry `outside_model` of the manifest, by default without a cut.
    """
    from surgery.byte_units import format_bytes
    from surgery.model.leftovers import leftovers_json

    verbs = {
        "drop": "Dropped",
        "carry": "Carried unchanged",
        "cut": "Cut with the model, by weight magnitude",
    }
    fates = leftovers_json(model.meta_model.leftovers) if fates is None else fates
    lines = [
        f"{verbs[entry['fate']]}: {entry['tensors']} tensors such as {entry['example']} ({entry['reason']})"
        for entry in fates
    ]
    behind = model.checkpoint.left_behind
    if behind:
        size = format_bytes(sum(model.checkpoint.source.size(file) for file in behind))
        names = ", ".join(behind[:4]) + (f" and {len(behind) - 4} more" if len(behind) > 4 else "")
        lines.append(f"Left behind, because transformers does not load them: {names} ({size})")
    return lines


def discard_journal(destination: Path) -> None:
    """Throw away the journal of the index beside a destination that is complete now."""
    import shutil

    from surgery.engine.resume import journal_folder

    shutil.rmtree(journal_folder(destination), ignore_errors=True)


def say_resuming(journal: Journal, quiet: bool) -> None:
    """Say that a run resumes, where its journal has finished steps."""
    say(RESUMING, quiet or not journal.done)


def bars(quiet: bool) -> Progress[Any]:
    """Progress bars on stderr with the time left; without a terminal, a line a minute; or none."""
    from surgery.progress import no_progress

    if quiet:
        return no_progress
    if not sys.stderr.isatty():
        return progress_lines

    def progress(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(f"{label:<11}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            yield from bar.track(items, total=total)

    return progress


def progress_lines(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
    """The items, with a line on stderr every LINE_SECONDS that says how many are done and the time left."""
    from surgery.byte_units import format_duration

    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said >= LINE_SECONDS:
            left = (now - start) / done * (total - done)
            say(f"{label}: {done} of {total}, about {format_duration(left)} left", quiet=False)
            said = now
        yield item


def data_console() -> Console:
    """The console data is printed on: plain and 110 columns wide where stdout is no terminal."""
    from rich.console import Console

    return Console(
        width=None if sys.stdout.isatty() else 110, highlight=False, soft_wrap=not sys.stdout.isatty()
    )


def say(text: str, quiet: bool) -> None:
    """Print a message on stderr."""
    if not quiet:
        click.echo(text, err=True)


def check_prunable(model: Model) -> None:
    """Raise UnsupportedModelError for a model that can't be pruned."""
    from surgery.model.families import check_prunable as check

    check(model.checkpoint.config, model.name)


def check_index_exists(index: ChannelIndex | None) -> None:
    """Raise UsageError where several processes would each make an index before they share out the work."""
    from surgery.engine.distributed import world_size

    if world_size() > 1 and index is None:
        raise UsageError(
            "several processes measure with an index that is there",
            expected="--index",
            next_step="make it with torchrun and `surgeon index`",
        )
