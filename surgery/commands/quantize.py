"""`surgeon quantize`."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.commands.help import GroupedCommand
from surgery.commands.options import calibration_options, common_options, output_options
from surgery.commands.session import (
    bars,
    data_console,
    evaluation_blocks,
    local_path,
    open_model,
    run_options,
    say,
)
from surgery.errors import UsageError

if TYPE_CHECKING:
    import torch

    from surgery.checkpoint import Checkpoint
    from surgery.quantize import QuantizePlan
    from surgery.rounding import Scheme
    from surgery.skeleton import Skeleton

POWER_BLOCKS = 8  # calibration blocks that inputs are measured on
HANDLING_NAMES = ("restore", "module", "none")


@click.command(cls=GroupedCommand)
@click.argument("model")
@click.option("--bits", type=click.IntRange(2, 8), default=4, show_default=True)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Without zero point, or with. [default: symmetric; with --simulate or --compare, asymmetric]",
)
@click.option(
    "--group-size",
    "groups",
    type=int,
    multiple=True,
    help="One scale for so many neighbours of a row. [default: 128]",
)
@click.option(
    "--flat-block",
    "flat",
    type=int,
    multiple=True,
    help="One scale for so many neighbours of the flattened matrix.",
)
@click.option("--per-channel", is_flag=True, help="One scale a row.")
@click.option("--per-tensor", is_flag=True, help="One scale a matrix.")
@click.option(
    "--clip/--no-clip",
    default=None,
    help="Clip outliers, each matrix by the z-score with the smallest error on calibration text. [default: with --simulate]",
)
@click.option(
    "--super-weights",
    "handling",
    type=click.Choice(HANDLING_NAMES),
    help="Hold them out and put them back, leave their module whole, or round them too. [default: module; with --simulate, "
    "restore]",
)
@click.option("--index", "index_folder", metavar="DIR", help="Take super weights from this index.")
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
@common_options
def quantize(
    model: str,
    groups: tuple[int, ...],
    flat: tuple[int, ...],
    per_channel: bool,
    per_tensor: bool,
    clip: bool | None,
    handling: str | None,
    index_folder: str | None,
    simulate: bool,
    compare: bool,
    text: str | None,
    text_blocks: int | None,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Round MODEL's weights to nearest and keep its super weights: packed for use, or simulated for measuring.

    \b
    surgeon quantize org/name --bits 4 --group-size 128 --out name-int4
    """
    from surgery.destination import check_destination
    from surgery.packing import check_packable
    from surgery.quantize import (
        input_power,
        plan_quantization,
        quantized_specs,
        write_quantized,
    )
    from surgery.rounding import Scheme

    cuts = [("group", size) for size in groups] + [("block", size) for size in flat]
    cuts += [("channel", 0)] * per_channel + [("tensor", 0)] * per_tensor
    if compare and (simulate or clip is not None or handling is not None):
        raise UsageError("--compare tries every handling: leave out --simulate, --clip and --super-weights")
    if not compare and (text is not None or text_blocks is not None):
        raise UsageError("--text is what --compare measures on", next_step="add --compare, or leave it out")
    symmetric = options["symmetric"]
    symmetric = not (simulate or compare) if symmetric is None else symmetric
    schemes = [Scheme(options["bits"], symmetric, *cut) for cut in cuts or [("group", 128)]]
    if len(schemes) > 1 and not compare:
        raise UsageError(
            "one granularity at a time", next_step="add --compare to measure several side by side"
        )
    checkpoint = open_model(model, options)
    skeleton = quantizable_skeleton(checkpoint)
    folder = out or Path(f"{checkpoint.name.split('/')[-1]}-int{options['bits']}")
    check_destination(folder, overwrite=overwrite, source=local_path(model), needs_bytes=0)
    if compare:
        fields = compared(checkpoint, skeleton, schemes, (text, text_blocks), index_folder, options, quiet)
        save_comparison(folder, fields, as_json, quiet)
        return
    handling = handling or ("restore" if simulate else "module")
    weights = known_super_weights(checkpoint, index_folder, options, quiet) if handling != "none" else []
    clipping = simulate if clip is None else clip
    plan = plan_quantization(skeleton, weights, schemes[0], handling, clipping)
    if not simulate:
        check_packable(plan)
    show_plan(checkpoint, plan, quantized_specs(checkpoint, plan, packed=not simulate), to_stderr=as_json)
    if dry_run:
        return
    power: dict[str, torch.Tensor] = {}
    if clipping:
        power = input_power(
            checkpoint, calibration(checkpoint, options), run_options(checkpoint, options), bars(quiet)
        )
    manifest = write_quantized(
        checkpoint,
        plan,
        power,
        folder,
        packed=not simulate,
        weights=weights,
        command=canonical_command(checkpoint, plan, simulate, options),
        track=bars(quiet),
    )
    if as_json:
        click.echo(json.dumps(manifest))
    say(f"Checkpoint written to {folder}", quiet)


def quantizable_skeleton(checkpoint: Checkpoint) -> Skeleton:
    """The skeleton of a model. Raises UnsupportedModelError for one that surgeon can't read."""
    import torch

    from surgery.skeleton import Skeleton, check_model

    check_model(checkpoint)
    return Skeleton(checkpoint, torch.float32)


def calibration(checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    """A few blocks of the calibration text."""
    from surgery.calibration import load_tokenizer, read_text, token_blocks

    return token_blocks(
        load_tokenizer(checkpoint),
        *read_text(options["calibration"]),
        block_size=options["block_size"],
        blocks=min(options["blocks"], POWER_BLOCKS),
        seed=options["seed"],
    )


def known_super_weights(
    checkpoint: Checkpoint, index_folder: str | None, options: dict[str, Any], quiet: bool
) -> list[dict[str, Any]]:
    """Super weights from an index, from the surgeon.json of a pruned checkpoint (under their new columns), or found now."""
    import torch

    from surgery.calibration import load_tokenizer
    from surgery.index import ChannelIndex
    from surgery.prune import MANIFEST
    from surgery.super_weights import PROMPTS, find_super_weights, prompt_ids

    if index_folder is not None:
        channels = ChannelIndex.load(index_folder)
        channels.check_source(checkpoint)
        return [weight.as_json() for weight in channels.super_weights]
    if MANIFEST in checkpoint.other_files:
        size = checkpoint.source.size(MANIFEST)
        fields = json.loads(bytes(checkpoint.source.read(MANIFEST, 0, size)))
        return [weight for weight in fields.get("super_weights", []) if weight["column"] is not None]
    say("Looking for super weights", quiet)
    prompts = (*PROMPTS, *([options["prompt"]] if options["prompt"] else []))
    ids = prompt_ids(load_tokenizer(checkpoint), prompts, torch.zeros(1, 0))
    found = find_super_weights(checkpoint, ids, run_options(checkpoint, options))
    return [weight.as_json() for weight in found]


def show_plan(
    checkpoint: Checkpoint, plan: QuantizePlan, specs: dict[str, Any], to_stderr: bool = False
) -> None:
    """Say what will be rounded and what it weighs."""
    after = sum(spec.nbytes for spec in specs.values())
    lines = [
        f"{plan.scheme.name}: {len(plan.tensors)} matrices, {plan.scheme.bits_per_weight:.3g} bits a weight",
        f"Bytes {checkpoint.nbytes / 2**20:,.1f} MiB → {after / 2**20:,.1f} MiB",
    ]
    for name, places in plan.places.items():
        lines.append(f"Super weights put back in {name}: {', '.join(map(str, places))}")
    lines += [f"Left as it is, for its super weight: {name}" for name in plan.whole]
    for line in lines:
        click.echo(line, err=to_stderr)


def compared(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    schemes: list[Scheme],
    text: tuple[str | None, int | None],
    index_folder: str | None,
    options: dict[str, Any],
    quiet: bool,
) -> dict[str, Any]:
    """Every scheme rounded plainly, with super weights put back, with clipping too, and with their module left whole."""
    from surgery.ablation import Condition, run_ablations
    from surgery.calibration import read_text
    from surgery.quantize import input_power, plan_quantization, rounding_edits

    weights = known_super_weights(checkpoint, index_folder, options, quiet)
    words, name = read_text(text[0] or "wikitext-test")
    blocks = evaluation_blocks(checkpoint, words, name, text[1])
    run = run_options(checkpoint, options)
    power = input_power(checkpoint, calibration(checkpoint, options), run, bars(quiet))
    ways = (
        ("RTN", "none", False),
        ("RTN, super weights put back", "restore", False),
        ("RTN, clipped", "none", True),
        ("RTN, clipped, super weights put back", "restore", True),
        ("RTN, their module left whole", "module", False),
    )
    conditions = []
    for scheme in schemes:
        for way, handling, clipping in ways:
            plan = plan_quantization(skeleton, weights, scheme, handling, clipping)
            edits = rounding_edits(skeleton, plan, power)
            conditions.append(Condition(f"{scheme.name}: {way}", scheme.name, edits))
    say(f"Measuring {len(conditions)} ways on {len(blocks.ids)} blocks of {name}", quiet)
    outcomes = run_ablations(checkpoint, conditions, blocks, run, bars(quiet))
    return {
        "text": blocks.as_json(),
        "super_weights": weights,
        "conditions": [asdict(outcome) for outcome in outcomes],
    }


def save_comparison(folder: Path, fields: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Write and print a comparison."""
    from surgery.destination import complete_folder
    from surgery.plots import save_ablations
    from surgery.show_ablation import show_outcomes

    with complete_folder(folder) as partial:
        text = json.dumps(fields, indent=1) + "\n"
        (partial / "quantization.json").write_text(text, encoding="utf-8")
        save_ablations(partial, fields)
    if as_json:
        click.echo(json.dumps(fields))
    else:
        show_outcomes(fields, data_console())
    say(f"Table and plot written to {folder}", quiet)


def canonical_command(
    checkpoint: Checkpoint, plan: QuantizePlan, simulate: bool, options: dict[str, Any]
) -> str:
    """The command that makes the same checkpoint again."""
    scheme = plan.scheme
    words = ["surgeon", "quantize", checkpoint.name, "--bits", str(scheme.bits)]
    words += ["--revision", checkpoint.revision] if checkpoint.revision else []
    words.append("--symmetric" if scheme.symmetric else "--asymmetric")
    size = {"group": "--group-size", "block": "--flat-block"}.get(scheme.granularity)
    words += [size, str(scheme.size)] if size else [f"--per-{scheme.granularity}"]
    words += ["--clip" if plan.clipping else "--no-clip", "--super-weights", plan.handling]
    if plan.clipping:
        text = options["calibration"]
        words += ["--calibration", Path(text).name if Path(text).exists() else text]
        words += ["--blocks", str(options["blocks"]), "--block-size", str(options["block_size"])]
        words += ["--seed", str(options["seed"]), "--dtype", options["dtype"]]
    words += ["--prompt", options["prompt"]] if options.get("prompt") else []
    return shlex.join([*words, *(["--simulate"] if simulate else [])])
