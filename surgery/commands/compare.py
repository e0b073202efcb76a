"""`surgeon compare`."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.commands.help import GroupedCommand
from surgery.commands.options import (
    ALLOCATION_NAMES,
    METHOD_NAMES,
    REPAIR_NAMES,
    calibration_options,
    common_options,
    output_options,
    resume_option,
)
from surgery.commands.planning import (
    calibration_shape,
    curves_for,
    index_for,
    prunable_skeleton,
    read_index,
    show_cut_costs,
)
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
    from surgery.calibration import TokenBlocks
    from surgery.compare import Comparison
    from surgery.cut_costs import CutCosts
    from surgery.index import ChannelIndex
    from surgery.indexing import RunOptions
    from surgery.journal import Journal
    from surgery.plan import ResizePlan
    from surgery.skeleton import Skeleton


CUT_WORDS = {"method": METHOD_NAMES, "repair": REPAIR_NAMES, "allocation": ALLOCATION_NAMES}


def cuts(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """A callback that reads METHOD[:REPAIR[:ALLOCATION]] into (allocation, repair, method)."""
    found = []
    for value in values:
        given = value.split(":")
        if len(given) > len(CUT_WORDS):
            raise click.BadParameter(f"{value} is not METHOD[:REPAIR[:ALLOCATION]]")
        method, repair, allocation = [*given, *("none", "uniform")[len(given) - 1 :]]
        for word, allowed in zip((method, repair, allocation), CUT_WORDS.values(), strict=True):
            if word not in allowed:
                raise click.BadParameter(f"{word} is not of {', '.join(allowed)}")
        found.append((allocation, repair, method))
    return found


def words(allowed: tuple[str, ...]) -> Any:
    """A callback that splits a comma-separated option and refuses words it does not know."""

    def split(_: click.Context, __: click.Parameter, value: str) -> list[str]:
        found = [word.strip() for word in value.split(",") if word.strip()]
        unknown = [word for word in found if word not in allowed]
        if unknown or not found:
            raise click.BadParameter(f"{', '.join(unknown) or 'nothing'} is not of {', '.join(allowed)}")
        return found

    return split


@click.command(cls=GroupedCommand)
@click.argument("model")
@click.option("--index", "index_folder", metavar="DIR", help="Index to use. [default: made on the fly]")
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    metavar="FILE|DATASET",
    help="Measure on this; repeat for several.",
)
@click.option("--text-blocks", type=int, help="Blocks of each text. [default: all]")
@click.option("--sparsity", "sparsities", multiple=True, type=float, default=(0.25, 0.5), show_default=True)
@click.option(
    "--methods", callback=words(METHOD_NAMES), default="lp-hybrid,scar-prot,wanda", show_default=True
)
@click.option("--repairs", callback=words(REPAIR_NAMES), default="none,lstsq-acc", show_default=True)
@click.option("--allocations", callback=words(ALLOCATION_NAMES), default="uniform", show_default=True)
@click.option(
    "--cut",
    "chosen",
    multiple=True,
    callback=cuts,
    metavar="METHOD[:REPAIR[:ALLOCATION]]",
    help="Measure just this, at every sparsity, in place of all combinations; repeat for several.",
)
@click.option("--multiple-of", type=int, help="Round widths to this. [default: 128, 64 below 4096]")
@calibration_options
@output_options
@resume_option
@common_options
def compare(
    model: str,
    index_folder: str | None,
    texts: tuple[str, ...],
    text_blocks: int | None,
    sparsities: tuple[float, ...],
    methods: list[str],
    repairs: list[str],
    allocations: list[str],
    chosen: list[tuple[str, str, str]],
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure many cuts of MODEL side by side, without writing any: methods x repairs x allocations x sparsities.

    \b
    surgeon compare org/name --index name-index --text wikitext-test --out name-comparison
    """
    from surgery.calibration import read_text
    from surgery.compare import Comparison, save_rows
    from surgery.curves import check_measurable
    from surgery.destination import check_destination, complete_folder
    from surgery.show import show_rows
    from surgery.show_costs import cut_costs_lines
    from surgery.widths import width_changes

    checkpoint = open_model(model, options)
    skeleton = prunable_skeleton(checkpoint)
    widths = skeleton.widths()
    for sparsity in sparsities:
        width_changes(widths, sparsity, None, options["multiple_of"])
    variants = chosen or list(itertools.product(allocations, repairs, methods))
    if any(allocation == "global" for allocation, *_ in variants):
        check_measurable(skeleton)
    combinations = [(sparsity, *variant) for sparsity in sparsities for variant in variants]
    folder = out or Path(f"{checkpoint.name.split('/')[-1]}-comparison")
    if not dry_run:
        check_destination(folder, overwrite=overwrite, source=local_path(model))
    blocks = []
    for spec in texts:
        text, name = read_text(spec)
        if not text.strip():
            raise UsageError("the text is empty", where=spec)
        blocks.append(evaluation_blocks(checkpoint, text, name, text_blocks))
    run = run_options(checkpoint, options)
    found = read_index(index_folder)
    together, costs = foreseen(skeleton, combinations, blocks, found, run, options)
    if dry_run:
        walks = -(-len(combinations) // together)
        counts = {"cuts": len(combinations), "texts": len(blocks), "walks": walks}
        if not as_json:
            click.echo(
                f"{len(combinations)} cuts on {len(blocks)} texts, {together} in one walk over the layers"
            )
            if found is None:
                click.echo("Before that an index is made: `surgeon index --dry-run` says what it takes")
        show_cut_costs(skeleton, costs, run, counts if as_json else None, walks)
        return
    channels = index_for(checkpoint, found, {method for *_, method in variants}, folder, options, quiet)
    comparison = Comparison(checkpoint, channels, blocks, run)
    journal = comparison_journal(folder, comparison, combinations, options)
    if journal.done:
        say("Going on where an earlier run stopped (--no-resume starts over)", quiet)
    plans = planned(comparison, combinations, options, quiet, journal)
    say(f"Measuring {len(plans)} cuts on {len(texts)} texts", quiet)
    say("\n".join(cut_costs_lines(costs, walks=-(-len(plans) // together))), quiet)
    comparison.add(plans, bars(quiet), journal)
    with complete_folder(folder) as partial:
        save_rows(comparison.rows, partial)
        fields = {
            "source": channels.source,
            "calibration": channels.calibration,
            "rows": [asdict(row) for row in comparison.rows],
        }
        (partial / "compare.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    journal_done(folder)
    journal.finish()
    if as_json:
        click.echo(json.dumps(fields))
    else:
        show_rows(comparison.rows, data_console())
    say(f"Table and plot written to {folder}", quiet)


def foreseen(
    skeleton: Skeleton,
    combinations: list[tuple[float, str, str, str]],
    blocks: list[TokenBlocks],
    found: ChannelIndex | None,
    run: RunOptions,
    options: dict[str, Any],
) -> tuple[int, CutCosts]:
    """Cuts made in one walk and what it takes, from the widths alone. Raises MemoryBudgetError."""
    from surgery.compare import comparison_job, share_walks
    from surgery.cut_costs import widths_after
    from surgery.widths import width_changes

    shape = calibration_shape(found, options)
    least = min(sparsity for sparsity, *_ in combinations)
    changes = width_changes(skeleton.widths(), least, None, options["multiple_of"])
    repairs = {repair for *_, repair, _ in combinations}
    curves = any(allocation == "global" for _, allocation, *_ in combinations)
    uniform = all(allocation == "uniform" for _, allocation, *_ in combinations)
    kept = widths_after(skeleton, changes, uniform)
    job = comparison_job(kept, repairs, shape, len(combinations), blocks, curves)
    return share_walks(skeleton, job, run)


def comparison_journal(
    folder: Path,
    comparison: Comparison,
    combinations: list[tuple[float, str, str, str]],
    options: dict[str, Any],
) -> Journal:
    """The journal of a comparison: of these cuts of these weights on these texts, by this index."""
    from surgery.cutting import use_fingerprint
    from surgery.journal import Journal

    checkpoint, run = comparison.checkpoint, comparison.options
    fingerprint = {
        **use_fingerprint(checkpoint, comparison.index, run),
        "cuts": combinations,
        "multiple_of": options["multiple_of"],
        "seed": options["seed"],
        "texts": [[blocks.name, blocks.digest] for blocks in comparison.texts],
    }
    return Journal(folder, fingerprint, resume=options["resume"], kind="compare")


def planned(
    comparison: Comparison,
    combinations: list[tuple[float, str, str, str]],
    options: dict[str, Any],
    quiet: bool,
    journal: Journal,
) -> list[ResizePlan]:
    """A plan for every (sparsity, allocation, repair, method); curves are measured once a method, and put by."""
    from surgery.plan import make_plan

    curves: dict[str, Any] = {}
    plans = []
    for sparsity, allocation, repair, method in combinations:
        if allocation == "global" and method not in curves:
            how = {**options, "method": method, "protect": None}
            if f"curves {method}" in journal:
                tensors = journal.load(f"curves-{method}")[1]
                curves[method] = [tensors[str(number)] for number in range(len(tensors))]
            else:
                curves[method] = curves_for(comparison.checkpoint, comparison.index, how, quiet)
                journal.save(f"curves-{method}", {}, {str(n): c for n, c in enumerate(curves[method])})
                journal.mark(f"curves {method}")
        plans.append(
            make_plan(
                comparison.index,
                method=method,
                sparsity=sparsity,
                multiple_of=options["multiple_of"],
                seed=options["seed"],
                allocation=allocation,
                repair=repair,
                curves=curves.get(method) if allocation == "global" else None,
            )
        )
    return plans
