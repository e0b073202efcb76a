"""`surgeon quantize`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery import defaults
from surgery.cli.common import bars, leftover_lines, local_path, read_index, say, show_dry_run
from surgery.cli.help import GroupedCommand
from surgery.cli.options import (
    CalibrationOptions,
    ModelOptions,
    calibration_options,
    model_options,
    output_options,
    super_weights_index_option,
    talk_options,
)
from surgery.cli.quantize_comparison import compared, show_comparison_cost
from surgery.cli.quantize_inputs import (
    POWER_BLOCKS,
    SchemeOptions,
    calibration_blocks,
    known_super_weights,
    scheme_options,
)
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.budget.pass_cost import PassCost
    from surgery.checkpoint.shard_writer import TensorSpec
    from surgery.engine.open_model import Model
    from surgery.index.channel_index import ChannelIndex
    from surgery.quantize.autoround import TunedMatrices
    from surgery.quantize.plan import QuantizePlan
    from surgery.quantize.rounding import Scheme

HANDLING_NAMES = ("restore", "module", "none")


@click.command(cls=GroupedCommand)
@click.argument("model")
@scheme_options
@click.option(
    "--clip/--no-clip",
    default=None,
    help="Clip outliers, each matrix by the z-score with the smallest error on calibration text. "
    "[default: with --simulate]",
)
@click.option(
    "--super-weights",
    "handling",
    type=click.Choice(HANDLING_NAMES),
    help="Hold them out and put them back, leave their module whole, or round them too. "
    "[default: module; with --simulate, restore]",
)
@super_weights_index_option
@click.option(
    "--simulate", is_flag=True, help="Write the rounded values in the source's dtype, for measuring."
)
@click.option(
    "--compare",
    is_flag=True,
    help="Write no checkpoint: measure each scheme given with and without handling.",
)
@click.option(
    "--text", metavar="FILE|DATASET", help="With --compare, measure on this. [default: wikitext-test]"
)
@click.option("--text-blocks", type=int, help="Blocks of it. [default: all]")
@calibration_options
@output_options
@model_options
@talk_options
def quantize(
    model: str,
    scheme: SchemeOptions,
    clip: bool | None,
    handling: str | None,
    index_folder: str | None,
    simulate: bool,
    compare: bool,
    text: str | None,
    text_blocks: int | None,
    text_options: CalibrationOptions,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    how: ModelOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Round MODEL's weights, to nearest or by AutoRound, and keep its super weights: packed for use, or
    simulated for measuring.

    \b
    surgeon quantize org/name --bits 4 --group-size 128 --out name-int4
    """
    from surgery.checkpoint.output_folder import check_destination, check_temporary
    from surgery.cli.ablation_table import save_outcomes
    from surgery.model.meta_model import check_model
    from surgery.quantize.autoround import check_autoround, tuned_matrices
    from surgery.quantize.write import kept_tensors, quantized_specs

    if scheme.tuned and (simulate or compare or clip):
        raise UsageError("AutoRound writes packed checkpoints: leave out --simulate, --compare and --clip")
    if compare and (simulate or clip is not None or handling is not None):
        raise UsageError("--compare tries every handling: leave out --simulate, --clip and --super-weights")
    if not compare and (text is not None or text_blocks is not None):
        raise UsageError("--text is what --compare measures on", next_step="add --compare, or leave it out")
    schemes = scheme.schemes(symmetric=not (simulate or compare))
    if len(schemes) > 1 and not compare:
        raise UsageError(
            "one granularity at a time", next_step="add --compare to measure several side by side"
        )
    opened = how.open(model)
    check_model(opened.checkpoint)
    check_autoround(opened, schemes[0])
    folder = out or Path(f"{opened.short_name}-int{scheme.bits}")
    check_destination(folder, overwrite=overwrite, source=local_path(model))
    index = read_index(index_folder, opened.checkpoint)
    if compare:
        on = (text or defaults.EVALUATION_TEXT, text_blocks)
        if dry_run:
            show_comparison_cost(opened, schemes, on, as_json)
            return
        fields = compared(opened, schemes, on, index, text_options, quiet)
        save_outcomes(folder, "quantization.json", fields, as_json)
        say(f"Table and plot written to {folder}", quiet)
        return
    handling = handling or ("restore" if simulate else "module")
    clipping = simulate if clip is None else clip
    cost = quantization_cost(opened, clipping, text_options, scheme)
    kept = kept_tensors(opened.meta_model)
    if not dry_run:
        plan = checked_plan(opened, [], schemes[0], handling, clipping, packed=not simulate)
        size = sum(spec.nbytes for spec in quantized_specs(kept, plan, packed=not simulate).values())
        check_destination(folder, overwrite=overwrite, needs_bytes=size)
        check_temporary(folder, size, size if scheme.tuned else 0)
    weights = known_super_weights(opened, index, text_options, quiet) if handling != "none" else []
    plan = checked_plan(opened, weights, schemes[0], handling, clipping, packed=not simulate)
    specs = quantized_specs(kept, plan, packed=not simulate)
    show_plan(opened, plan, specs, to_stderr=as_json)
    if dry_run:
        show_quantize_dry_run(opened, plan, specs, cost, as_json)
        return
    command = canonical_command(opened, plan, simulate, how, text_options, scheme.tuning_steps)
    ids = text_options.draw(opened, text_options.blocks).ids if scheme.tuned else None
    with tuned_matrices(opened, plan, ids, scheme.tuning_steps, quiet=quiet) as tuned:
        manifest = run_quantize(
            opened,
            plan,
            weights,
            index,
            folder,
            command,
            text_options,
            quiet,
            tuned=tuned,
            packed=not simulate,
        )
    if as_json:
        click.echo(json.dumps(manifest))
    say(f"Checkpoint written to {folder}", quiet)


def checked_plan(
    model: Model,
    weights: list[dict[str, Any]],
    scheme: Scheme,
    handling: str,
    clipping: bool,
    *,
    packed: bool,
) -> QuantizePlan:
    """What is rounded, and how; refused where the packed format can't hold it."""
    from surgery.quantize.compressed_tensors import check_packable
    from surgery.quantize.plan import plan_quantization

    plan = plan_quantization(model.meta_model, weights, scheme, handling, clipping)
    if packed:
        check_packable(plan)
    return plan


def show_quantize_dry_run(
    model: Model, plan: QuantizePlan, specs: dict[str, TensorSpec], cost: PassCost, as_json: bool
) -> None:
    """Print what rounding takes."""
    from surgery.cli.costs import pass_cost_lines

    after = sum(spec.nbytes for spec in specs.values())
    fields = {"matrices": len(plan.tensors), "bytes_after": after}
    show_dry_run(model, cost, pass_cost_lines(cost), fields, as_json=as_json)


def run_quantize(
    model: Model,
    plan: QuantizePlan,
    weights: list[dict[str, Any]],
    index: ChannelIndex | None,
    folder: Path,
    command: str,
    text: CalibrationOptions,
    quiet: bool,
    *,
    packed: bool,
    tuned: TunedMatrices | None = None,
) -> dict[str, Any]:
    """Write the quantized folder and return its manifest."""
    from surgery.quantize.write import input_power, write_quantized

    power = input_power(model, calibration_blocks(model, text), bars(quiet)) if plan.clipping else {}
    return write_quantized(
        model,
        plan,
        power,
        folder,
        packed=packed,
        weights=weights,
        tuned=tuned,
        index=index.published_json() if index else None,
        command=command,
        progress=bars(quiet),
    )


def quantization_cost(
    model: Model, clipping: bool, text: CalibrationOptions, scheme: SchemeOptions
) -> PassCost:
    """What rounding takes, with the pass that measures inputs where outliers are clipped, or the training of
    AutoRound. Raises MemoryBudgetError.
    """
    from surgery.budget.pass_cost import merged_cost, rounding_cost
    from surgery.quantize.autoround import autoround_cost
    from surgery.quantize.write import input_power_cost

    costs = [rounding_cost(model.meta_model, model.run)]
    if scheme.tuned:
        shape = (text.blocks, text.block_size)
        costs.append(autoround_cost(model, shape, scheme.tuning_steps))
    if clipping:
        costs.append(input_power_cost(model, min(text.blocks, POWER_BLOCKS), text.block_size))
    return merged_cost(costs)


def show_plan(
    model: Model, plan: QuantizePlan, specs: dict[str, TensorSpec], to_stderr: bool = False
) -> None:
    """Say what will be rounded and what it weighs."""
    after = sum(spec.nbytes for spec in specs.values())
    lines = [
        f"{plan.scheme.name}: {len(plan.tensors)} matrices, {plan.scheme.bits_per_weight:.3g} bits a weight",
        f"Bytes {model.checkpoint.nbytes / 2**20:,.1f} MiB → {after / 2**20:,.1f} MiB",
    ]
    if model.checkpoint.stored_form:
        lines.append(f"Rounded a second time: the source is {model.checkpoint.stored_form}")
    for name, places in plan.places.items():
        lines.append(f"Super weights put back in {name}: {', '.join(map(str, places))}")
    lines += [f"Left as it is, for its super weight: {name}" for name in plan.whole]
    for line in [*lines, *leftover_lines(model)]:
        click.echo(line, err=to_stderr)


def canonical_command(
    model: Model,
    plan: QuantizePlan,
    simulate: bool,
    how: ModelOptions,
    text: CalibrationOptions,
    tuning_steps: int | None = None,
) -> str:
    """The command that makes the same checkpoint again."""
    checkpoint, scheme = model.checkpoint, plan.scheme
    words = ["surgeon", "quantize", checkpoint.name, "--bits", str(scheme.bits)]
    words += ["--revision", checkpoint.revision] if checkpoint.revision else []
    words.append("--symmetric" if scheme.symmetric else "--asymmetric")
    size = {"group": "--group-size", "block": "--flat-block"}.get(scheme.granularity)
    words += [size, str(scheme.size)] if size else [f"--per-{scheme.granularity}"]
    words += ["--clip" if plan.clipping else "--no-clip", "--super-weights", plan.handling]
    if scheme.rounding != "nearest":
        words += ["--rounding", scheme.rounding]
        words += ["--tuning-steps", str(tuning_steps)] if tuning_steps else []
    if plan.clipping or scheme.rounding != "nearest":
        words += text.words
        words += ["--blocks", str(text.blocks), "--block-size", str(text.block_size)]
        words += ["--seed", str(text.seed), "--dtype", how.dtype]
    words += ["--spike-prompt", text.spike_prompt] if text.spike_prompt else []
    return shlex.join([*words, *(["--simulate"] if simulate else [])])
