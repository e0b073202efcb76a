"""What `surgeon prune` prints: the plan with its sizes, a dry run, and the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.common import data_console, leftover_lines, say, show_dry_run
from surgery.cli.prune_heal import Healing, show_heal_dry_run

if TYPE_CHECKING:
    from surgery.budget.prune_cost import PruneCost
    from surgery.cut.tensors import TensorEdit
    from surgery.engine.open_model import Model
    from surgery.index.channel_index import ChannelIndex
    from surgery.plan.prune_plan import PrunePlan


def show_prune_plan(
    model: Model, plan: PrunePlan, sizes: dict[str, int], edits: dict[str, TensorEdit], as_json: bool
) -> list[dict[str, Any]]:
    """Print a plan, unless JSON is asked for; returns what becomes of tensors outside the model."""
    from surgery.cli.tables import show_plan
    from surgery.cut.ffn_channels import fates_json

    fates = fates_json(model.meta_model, edits)
    if not as_json:
        show_plan(plan, sizes, data_console())
        for line in leftover_lines(model, fates):
            click.echo(line)
    return fates


def show_prune_dry_run(
    model: Model,
    plan: PrunePlan,
    sizes: dict[str, int],
    cost: PruneCost,
    fates: list[dict[str, Any]],
    as_json: bool,
    heal: Healing | None = None,
) -> None:
    """Print what carrying out a plan takes, and healing the result."""
    from surgery.cli.costs import prune_cost_lines

    fields = {
        "plan": plan.as_json(),
        "sizes": sizes,
        "outside_model": fates,
        "left_behind": model.checkpoint.left_behind,
    }
    if heal is not None:
        show_heal_dry_run(model, heal, cost, prune_cost_lines(cost), fields, as_json)
        return
    wide = bool(cost.float64_flops)
    show_dry_run(model, cost, prune_cost_lines(cost), fields, as_json=as_json, wide=wide)


def show_result(manifest: dict[str, Any], destination: Path, as_json: bool, quiet: bool) -> None:
    """Print the manifest, or what pruning cost where it was measured."""
    measured = manifest["measurements"]
    if as_json:
        click.echo(json.dumps(manifest))
    elif "pruned" in measured:
        dense, pruned = measured["dense"], measured["pruned"]
        found = [dense["perplexity"], pruned["perplexity"]]
        found += [
            heal["evaluation"]["after"]["perplexity"] for heal in manifest.get("heals", [])[-1:] if measured
        ]
        click.echo(f"Perplexity {' → '.join(f'{value:.2f}' for value in found)} on {dense['text']}")
    say(f"Checkpoint written to {destination}", quiet)


def sizes_and_cost(
    model: Model, index: ChannelIndex, plan: PrunePlan, edits: dict[str, TensorEdit]
) -> tuple[dict[str, int], PruneCost]:
    """Parameters and bytes before and after a plan, and what carrying it out takes."""
    from surgery.budget.prune_cost import prune_cost
    from surgery.cut.tensors import edited_specs
    from surgery.pruning.jobs import prune_job

    checkpoint = model.checkpoint
    specs = edited_specs(checkpoint, edits)
    written = sum(spec.nbytes for spec in specs.values())
    cost = prune_cost(model.meta_model, prune_job(plan, index.input_ids.shape, written), model.run)
    sizes = {
        "parameters_before": checkpoint.parameters,
        "parameters_after": sum(spec.numel for spec in specs.values()),
        "bytes_before": checkpoint.nbytes,
        "bytes_after": written,
        "repair_bytes": cost.repair_bytes,
        "repair_parts": cost.repair_parts,
    }
    return sizes, cost
