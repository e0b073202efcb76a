"""From a model and options to an index and a plan: what `prune`, `compare` and `ablate` begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.commands.options import SECOND_ORDER_METHODS
from surgery.commands.session import bars, make_index, run_options, say
from surgery.errors import UsageError

if TYPE_CHECKING:
    import torch

    from surgery.checkpoint import Checkpoint
    from surgery.cut_costs import CutCosts
    from surgery.index import ChannelIndex
    from surgery.indexing import RunOptions
    from surgery.plan import ResizePlan
    from surgery.skeleton import Skeleton


def check_size_options(options: dict[str, Any]) -> None:
    """Raise UsageError when the cut's size is given twice; 50% when it is not given."""
    if options["sparsity"] is not None and options["intermediate_size"] is not None:
        raise UsageError("give --sparsity or --intermediate-size, not both")
    if options["sparsity"] is None and options["intermediate_size"] is None:
        options["sparsity"] = 0.5
    if options["pad"] and options["allocation"] == "uniform":
        raise UsageError(
            "--pad makes layers of different width alike", next_step="use it with --allocation global"
        )


def check_width(checkpoint: Checkpoint, found: ChannelIndex | None, options: dict[str, Any]) -> Skeleton:
    """Refuse a model, a width or a budget that won't do before anything is computed; returns the model's skeleton."""
    from surgery.cut_costs import CutJob, cut_costs, widths_after
    from surgery.widths import width_changes

    skeleton = prunable_skeleton(checkpoint)
    if options["allocation"] == "global":
        from surgery.curves import check_measurable

        check_measurable(skeleton)
    changes = width_changes(
        skeleton.widths(), options["sparsity"], options["intermediate_size"], options["multiple_of"]
    )
    kept = widths_after(skeleton, changes, uniform=options["allocation"] == "uniform")
    curves = options["allocation"] == "global"
    job = CutJob(kept, options["repair"], *calibration_shape(found, options), curves=curves)
    cut_costs(skeleton, job, run_options(checkpoint, options))
    return skeleton


def read_index(folder: str | None) -> ChannelIndex | None:
    """The index of `--index`, where that is given."""
    from surgery.index import ChannelIndex

    return None if folder is None else ChannelIndex.load(folder)


def calibration_shape(found: ChannelIndex | None, options: dict[str, Any]) -> tuple[int, int]:
    """Blocks, and tokens of each, that the index has or will have."""
    if found is None:
        return options["blocks"], options["block_size"]
    blocks, block_size = found.input_ids.shape
    return blocks, block_size


def prunable_skeleton(checkpoint: Checkpoint) -> Skeleton:
    """The skeleton of a model. Raises UnsupportedModelError for one that can't be pruned."""
    import torch

    from surgery.families import check_prunable
    from surgery.skeleton import Skeleton

    check_prunable(checkpoint.config, checkpoint.name)
    return Skeleton(checkpoint, torch.float32)


def index_for(
    checkpoint: Checkpoint,
    found: ChannelIndex | None,
    methods: set[str],
    destination: Path | None,
    options: dict[str, Any],
    quiet: bool,
) -> ChannelIndex:
    """The index to cut by: the one `found`, or one made now, with all that `methods` need.

    Made now, its journal is beside `destination`, to be thrown away once that is written; without one it keeps none.
    """
    if found is None:
        made = make_index(
            checkpoint,
            options,
            dry_run=False,
            quiet=quiet,
            second_order=bool(SECOND_ORDER_METHODS & methods),
            destination=destination,
        )
        assert made is not None
        return made
    found.check_source(checkpoint)
    return found


def plan_cut(
    skeleton: Skeleton, channels: ChannelIndex, options: dict[str, Any], quiet: bool
) -> tuple[ResizePlan, dict[str, int], CutCosts]:
    """The plan, parameters and bytes before and after it, and what carrying it out takes."""
    from surgery.cut_costs import cut_costs, planned
    from surgery.plan import make_plan
    from surgery.prune import planned_specs
    from surgery.resize import tensor_cuts

    checkpoint = skeleton.checkpoint
    plan = make_plan(
        channels,
        method=options["method"],
        sparsity=options["sparsity"],
        width=options["intermediate_size"],
        multiple_of=options["multiple_of"],
        seed=options["seed"],
        allocation=options["allocation"],
        pad=options["pad"],
        repair=options["repair"],
        protect=options["protect"],
        curves=curves_for(checkpoint, channels, options, quiet)
        if options["allocation"] == "global"
        else None,
    )
    specs = planned_specs(checkpoint, plan, tensor_cuts(skeleton))
    written = sum(spec.nbytes for spec in specs.values())
    job = planned(plan, channels.input_ids, written)
    costs = cut_costs(skeleton, job, run_options(checkpoint, options))
    sizes = {
        "parameters_before": checkpoint.parameters,
        "parameters_after": sum(spec.numel for spec in specs.values()),
        "bytes_before": checkpoint.nbytes,
        "bytes_after": written,
        "repair_bytes": costs.repair_bytes,
        "repair_parts": costs.repair_parts,
    }
    return plan, sizes, costs


def show_cut_costs(
    skeleton: Skeleton,
    costs: CutCosts,
    run: RunOptions,
    fields: dict[str, Any] | None = None,
    walks: int = 1,
) -> None:
    """Print what `walks` over the layers will take and, by a look at this machine, how long; as JSON beside `fields`."""
    from surgery.machine import measure_machine
    from surgery.show_costs import costs_json, cut_costs_lines

    machine = measure_machine(skeleton.checkpoint, skeleton, run, wide=bool(costs.float64_flops))
    if fields is None:
        click.echo("\n".join(cut_costs_lines(costs, machine, walks)))
    else:
        click.echo(json.dumps({**fields, **costs_json(costs, machine, walks)}))


def curves_for(
    checkpoint: Checkpoint, channels: ChannelIndex, options: dict[str, Any], quiet: bool
) -> list[torch.Tensor]:
    """What cutting each layer costs, measured on the index's own calibration blocks."""
    from surgery.curves import measure_curves
    from surgery.cut_costs import curves_need
    from surgery.devices import micro_batch
    from surgery.heap import SHARE
    from surgery.plan import keep_orders
    from surgery.sizes import Sizes
    from surgery.stream import StreamedModel

    run = run_options(checkpoint, options)
    say("Measuring what each layer loses at a few widths", quiet)
    model = StreamedModel(checkpoint, run.device, run.dtype, memory=run.memory)
    block_size = channels.input_ids.shape[1]
    need = curves_need(Sizes.of(model.skeleton, run.dtype, block_size), block_size, run)
    return measure_curves(
        model,
        channels.input_ids.long(),
        keep_orders(channels, options["method"], options["seed"], options["protect"]),
        micro_batch(channels.input_ids.shape[1], run.device),
        bars(quiet),
        max(0, run.memory - run.memory // SHARE - need),
    )
