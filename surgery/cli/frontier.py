"""`surgeon frontier`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from surgery.cli.common import (
    bars,
    data_console,
    discard_journal,
    index_for,
    local_path,
    read_index,
    say,
    say_resuming,
)
from surgery.cli.frontier_options import MeasureOptions, PointOptions, measure_options, point_options
from surgery.cli.frontier_plan import FrontierJob, show_plan
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

JOURNAL = "frontier"  # kind of the journal


@click.command(cls=GroupedCommand)
@click.argument("model")
@index_option
@point_options
@measure_options
@calibration_options
@output_options
@resume_option
@model_options
@talk_options
def frontier(
    model: str,
    index_folder: str | None,
    chosen: PointOptions,
    measured: MeasureOptions,
    text_options: CalibrationOptions,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    resume: bool,
    how: ModelOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure MODEL as it is, rounded, cut and healed: quality against bytes, memory in use and speed; and
    say whether to cut at all.

    \b
    surgeon frontier org/name --text wikitext-test --target-size 2GiB --out name-frontier
    """
    from surgery.checkpoint.output_folder import check_destination, check_temporary, complete_folder
    from surgery.engine.resume import Journal, journal_folder
    from surgery.frontier.decide import as_row, sentence
    from surgery.frontier.page import document, write_page
    from surgery.frontier.run import Frontier, FrontierOptions, frontier_fingerprint

    check_targets(measured)
    job = FrontierJob.prepare(how, model, chosen, measured, text_options)
    folder = out or Path(f"{job.model.short_name}-frontier")
    found = read_index(index_folder, job.model.checkpoint)
    plan = job.plan(found, text_options)
    if dry_run:
        show_plan(plan, as_json)
        return
    held = sum(file.stat().st_size for file in journal_folder(folder, JOURNAL).rglob("*") if file.is_file())
    needs = max(0, plan.disk_bytes - held)
    check_destination(folder, overwrite=overwrite, source=local_path(model), needs_bytes=needs)
    check_temporary(folder, needs, plan.temporary_bytes)
    say("\n".join(plan.lines()), quiet)
    index = index_for(
        job.model, found, text_options, [chosen.method], destination=folder, resume=resume, quiet=quiet
    )
    options = FrontierOptions(
        chosen.method,
        chosen.repair,
        chosen.multiple_of,
        measured.context,
        measured.text_blocks,
        measured.text_block_size,
        not measured.no_speed,
    )
    fingerprint = frontier_fingerprint(job.model, index, job.texts, options)
    journal = Journal(folder, fingerprint, resume=resume, kind=JOURNAL)
    say_resuming(journal, quiet)
    work = Frontier(
        job.model,
        index,
        job.points,
        measured.texts,
        job.texts,
        journal,
        options,
        other=job.other,
        healing=job.healing,
        progress=bars(quiet),
    )
    fields = work.run()
    rows = [as_row(point) for point in fields["points"]]
    fields["target"] = {"size": measured.size, "speed": measured.target_speed}
    fields["answer"] = sentence(rows, measured.size, measured.target_speed)
    with complete_folder(folder) as partial:
        write_page(fields, partial)
    work.discard()
    journal.finish()
    discard_journal(folder)
    if as_json:
        click.echo(json.dumps(fields))
    else:
        from surgery.cli.document_table import show_document

        show_document(document(fields), data_console())
    say(f"Page, table, plot and numbers written to {folder}", quiet)


def check_targets(measured: MeasureOptions) -> None:
    """Refuse targets that can't be judged."""
    if measured.no_speed and measured.target_speed is not None:
        raise UsageError("--target-speed needs measured speeds", next_step="leave out --no-speed")
    if measured.size is not None and measured.size < 1:
        raise UsageError("a size needs a byte at least", where="--target-size", found=str(measured.size))
