"""`surgeon compare`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path

import click

from surgery import defaults
from surgery.cli.common import (
    bars,
    calibration_shape,
    check_index_exists,
    check_prunable,
    data_console,
    discard_journal,
    index_for,
    local_path,
    read_index,
    say,
    say_resuming,
    show_dry_run,
)
from surgery.cli.compare_plans import Variant, check_variants, comparison_journal, estimate, plans_for
from surgery.cli.help import GroupedCommand
from surgery.cli.options import (
    ALLOCATION_NAMES,
    CalibrationOptions,
    ModelOptions,
    calibration_options,
    index_option,
    model_options,
    multiple_of_option,
    output_options,
    resume_option,
    talk_options,
)
from surgery.cli.search_options import SearchOptions, search_options
from surgery.plan.methods import METHODS
from surgery.repair.methods import REPAIRS

SPARSITIES = (0.25, 0.5)
CUT_WORDS: tuple[Collection[str], ...] = (METHODS, REPAIRS, ALLOCATION_NAMES)


def cuts(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """A callback that reads METHOD[:REPAIR[:ALLOCATION]] into (allocation, repair, method)."""
    found = []
    for value in values:
        given = value.split(":")
        if len(given) > len(CUT_WORDS):
            raise click.BadParameter(f"{value} is not METHOD[:REPAIR[:ALLOCATION]]")
        method, repair, allocation = [*given, *("none", defaults.ALLOCATION)[len(given) - 1 :]]
        for word, allowed in zip((method, repair, allocation), CUT_WORDS, strict=True):
            if word not in allowed:
                raise click.BadParameter(f"{word} is not one of {', '.join(allowed)}")
        found.append((allocation, repair, method))
    return found


def words(allowed: Collection[str]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """A callback that splits a comma-separated option and refuses words it does not know."""

    def split(_: click.Context, __: click.Parameter, value: str) -> list[str]:
        found = [word.strip() for word in value.split(",") if word.strip()]
        unknown = [word for word in found if word not in allowed]
        if unknown or not found:
            raise click.BadParameter(f"{', '.join(unknown) or 'nothing'} is not one of {', '.join(allowed)}")
        return found

    return split


@click.command(cls=GroupedCommand)
@click.argument("model")
@index_option
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    metavar="FILE|DATASET",
    help="Measure on this; repeat for several.",
)
@click.option("--text-blocks", type=int, help="Blocks of each text. [default: all]")
@click.option("--sparsity", "sparsities", multiple=True, type=float, help="[default: 0.25, 0.5]")
@search_options
@click.option("--methods", callback=words(METHODS), default="lp-hybrid,scar-prot,wanda", show_default=True)
@click.option("--repairs", callback=words(REPAIRS), default="none,lstsq-acc", show_default=True)
@click.option(
    "--allocations", callback=words(ALLOCATION_NAMES), default=defaults.ALLOCATION, show_default=True
)
@click.option(
    "--cut",
    "chosen",
    multiple=True,
    callback=cuts,
    metavar="METHOD[:REPAIR[:ALLOCATION]]",
    help="Measure only this, at every sparsity, in place of all combinations; repeat for several.",
)
@multiple_of_option
@calibration_options
@output_options
@resume_option
@model_options
@talk_options
def compare(
    model: str,
    index_folder: str | None,
    texts: tuple[str, ...],
    text_blocks: int | None,
    sparsities: tuple[float, ...],
    search: SearchOptions,
    methods: list[str],
    repairs: list[str],
    allocations: list[str],
    chosen: list[tuple[str, str, str]],
    multiple_of: int | None,
    text_options: CalibrationOptions,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    resume: bool,
    how: ModelOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure many cuts of MODEL side by side, without writing any: methods x repairs x allocations x
    sparsities; or, with a target, what each --cuts makes of it.

    \b
    surgeon compare org/name --index name-index --text wikitext-test --out name-comparison
    surgeon compare org/name --text wikitext-test --target-params 1B --cuts ffn --cuts ffn,layers
    """
    from surgery.checkpoint.output_folder import check_destination, complete_folder
    from surgery.cli.costs import prune_cost_lines
    from surgery.cli.tables import show_rows
    from surgery.engine.distributed import barrier, destroy, rank
    from surgery.evaluate.compare import Comparison, save_rows
    from surgery.evaluate.perplexity import evaluation_blocks

    quiet = quiet or rank() > 0  # of the processes torchrun started, the first talks and writes
    opened = how.open(model)
    check_prunable(opened)
    ways = chosen or list(itertools.product(allocations, repairs, methods))
    searches = any("searched" in way for way in ways)
    search.check(opened, sparsities, searches)
    sizes = [(0.0, kinds) for kinds in search.cuts(opened)] or [(one, ()) for one in sparsities or SPARSITIES]
    variants = [Variant(sparsity, *way, kinds) for sparsity, kinds in sizes for way in ways]
    check_variants(opened, variants, multiple_of)
    folder = out or Path(f"{opened.short_name}-comparison")
    if not dry_run:
        check_destination(folder, overwrite=overwrite, source=local_path(model))
    blocks = [evaluation_blocks(opened, text, text_blocks) for text in texts]
    found = read_index(index_folder, opened.checkpoint)
    check_index_exists(found)
    shape = calibration_shape(found, text_options)
    together, cost = estimate(opened, variants, blocks, shape, multiple_of)
    passes = -(-len(variants) // together)
    if dry_run:
        lines = prune_cost_lines(cost, passes)
        lines.insert(
            0, f"{len(variants)} cuts on {len(blocks)} texts, {together} in one pass over the layers"
        )
        if found is None:
            lines.insert(1, "Before that an index is made: `surgeon index --dry-run` says what it takes")
        if search.target is not None or searches:
            lines.insert(1, "Before that, not counted: the search for each cut, --search-time or longer")
        counts = {"cuts": len(variants), "texts": len(blocks), "walks": passes}
        wide = bool(cost.float64_flops)
        show_dry_run(opened, cost, lines, counts, as_json=as_json, passes=passes, wide=wide)
        return
    methods = [variant.method for variant in variants]
    index = index_for(opened, found, text_options, methods, destination=folder, resume=resume, quiet=quiet)
    comparison = Comparison(opened, index, blocks)
    journal = comparison_journal(folder, comparison, variants, search, multiple_of, text_options.seed, resume)
    say_resuming(journal, quiet)
    plans = plans_for(comparison, variants, search, multiple_of, text_options.seed, journal, quiet)
    say(f"Measuring {len(plans)} cuts on {len(texts)} texts", quiet)
    say("\n".join(prune_cost_lines(cost, passes)), quiet)
    comparison.add(plans, bars(quiet), journal)
    if rank() == 0:
        with complete_folder(folder) as partial:
            save_rows(comparison.rows, partial)
            fields = {
                "source": index.source,
                "calibration": index.calibration,
                **index.published_json(),
                "rows": [asdict(row) for row in comparison.rows],
            }
            (partial / "compare.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        if as_json:
            click.echo(json.dumps(fields))
        else:
            show_rows(comparison.rows, data_console())
        say(f"Table and plot written to {folder}", quiet)
    barrier()
    discard_journal(folder)
    journal.finish()
    destroy()
