"""`surgeon compare`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from surgery.budget.prune_cost import PruneCost
    from surgery.engine.open_model import Model
    from surgery.engine.resume import Journal
    from surgery.evaluate.compare import Comparison
    from surgery.index.channel_index import ChannelIndex
    from surgery.plan.prune_plan import PrunePlan
    from surgery.text import TokenBlocks


@dataclass(frozen=True)
class Variant:
    """One way of cutting."""

    sparsity: float
    allocation: str
    repair: str
    method: str
    kinds: tuple[str, ...] = ()  # that may go for a target


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
    search.check(opened, sparsities)
    sizes = [(0.0, kinds) for kinds in search.cuts] or [(one, ()) for one in sparsities or SPARSITIES]
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
        if search.target is not None:
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


def check_variants(model: Model, variants: list[Variant], multiple_of: int | None) -> None:
    """Raise PlanError for a cut that can't be made of this model."""
    from surgery.plan.widths import width_changes
    from surgery.repair.sensitivity import check_sensitivity_measurable

    for sparsity in {variant.sparsity for variant in variants if not variant.kinds}:
        width_changes(model.meta_model.widths(), sparsity, None, multiple_of)
    if any(variant.allocation == "global" for variant in variants):
        check_sensitivity_measurable(model.meta_model)


def estimate(
    model: Model,
    variants: list[Variant],
    blocks: list[TokenBlocks],
    calibration: tuple[int, int],
    multiple_of: int | None,
) -> tuple[int, PruneCost]:
    """Cuts made in one pass and what it takes, from the widths alone. Raises MemoryBudgetError."""
    from surgery.evaluate.compare import share_passes, text_tokens
    from surgery.plan.widths import WidthChange, width_changes
    from surgery.pruning.jobs import comparison_job, estimated_widths

    least, widths = min(variant.sparsity for variant in variants), model.meta_model.widths()
    if least > 0:
        changes = width_changes(widths, least, None, multiple_of)
    else:  # what goes for a target is not known yet: at most nothing
        changes = tuple(WidthChange(key, width, width) for key, width in widths.items())
    allocations = {variant.allocation for variant in variants}
    job = comparison_job(
        estimated_widths(model.meta_model, changes, uniform=allocations == {"uniform"}),
        {variant.repair for variant in variants},
        calibration,
        len(variants),
        text_tokens(blocks),
        "global" in allocations,
    )
    return share_passes(model, job)


def comparison_journal(
    folder: Path,
    comparison: Comparison,
    variants: list[Variant],
    search: SearchOptions,
    multiple_of: int | None,
    seed: int,
    resume: bool,
) -> Journal:
    """The journal of a comparison: of these cuts of these weights on these texts, by this index."""
    from surgery.engine.distributed import rank, world_size
    from surgery.engine.resume import Journal
    from surgery.pruning.prune_pass import index_use_fingerprint

    fingerprint = {
        **index_use_fingerprint(comparison.opened, comparison.index),
        "cuts": [asdict(variant) for variant in variants],
        "search": vars(search),
        "multiple_of": multiple_of,
        "seed": seed,
        "texts": [[blocks.name, blocks.digest] for blocks in comparison.texts],
        "processes": [rank(), world_size()],
    }
    return Journal(folder, fingerprint, resume=resume, kind="compare")


def plans_for(
    comparison: Comparison,
    variants: list[Variant],
    search: SearchOptions,
    multiple_of: int | None,
    seed: int,
    journal: Journal,
    quiet: bool,
) -> list[PrunePlan]:
    """A plan for every variant; sensitivity is measured once a method, and saved in the journal."""
    from surgery.pruning.plan_pruning import plan_pruning
    from surgery.search.plan_to_target import plan_to_target

    measured: dict[str, Any] = {}
    plans = []
    for variant in variants:
        sensitivity = None
        if variant.allocation == "global":
            if variant.method not in measured:
                measured[variant.method] = saved_sensitivity(
                    comparison.opened, comparison.index, variant.method, seed, journal, quiet
                )
            sensitivity = measured[variant.method]
        how: dict[str, Any] = {**asdict(variant), "seed": seed, "multiple_of": multiple_of}
        kinds, model, index = how.pop("kinds"), comparison.opened, comparison.index
        if not kinds:
            plans.append(plan_pruning(model, index, sensitivity=sensitivity, **how))
            continue
        target = search.target
        assert target is not None
        del how["sparsity"]
        say(f"Searching with {', '.join(kinds)}: {variant.method}, {variant.repair}", quiet)
        plans.append(
            plan_to_target(
                model,
                index,
                target,
                cuts=kinds,
                seconds=search.seconds,
                sensitivity=sensitivity,
                journal=journal.part(f"search-{len(plans)}"),
                progress=bars(quiet),
                say=lambda line: say(line, quiet),
                **how,
            )
        )
    return plans


def saved_sensitivity(
    model: Model, index: ChannelIndex, method: str, seed: int, journal: Journal, quiet: bool
) -> list[Any]:
    """The sensitivity of layers under a method's ranking, from the journal or measured now."""
    from surgery.pruning.plan_pruning import sensitivity_of

    step, name = f"sensitivity {method}", f"sensitivity-{method}"
    if step in journal:
        tensors = journal.load(name)[1]
        return [tensors[str(number)] for number in range(len(tensors))]
    say(f"Measuring the sensitivity of each layer at five widths, channels ranked by {method}", quiet)
    found = sensitivity_of(model, index, method=method, seed=seed, progress=bars(quiet))
    journal.save(name, {}, {str(number): one for number, one in enumerate(found)})
    journal.mark(step)
    return found
