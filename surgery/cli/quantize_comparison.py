"""`surgeon quantize --compare`: many schemes side by side, without writing a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from surgery.cli.common import bars, say, show_dry_run
from surgery.cli.options import CalibrationOptions
from surgery.cli.quantize_inputs import calibration_blocks, known_super_weights

if TYPE_CHECKING:
    from surgery.engine.open_model import Model
    from surgery.index.channel_index import ChannelIndex
    from surgery.quantize.rounding import Scheme

WAYS = (
    ("RTN", "none", False),
    ("RTN, super weights put back", "restore", False),
    ("RTN, clipped", "none", True),
    ("RTN, clipped, super weights put back", "restore", True),
    ("RTN, their module left whole", "module", False),
)


def compared(
    model: Model,
    schemes: list[Scheme],
    on: tuple[str, int | None],
    index: ChannelIndex | None,
    text: CalibrationOptions,
    quiet: bool,
) -> dict[str, Any]:
    """Every scheme in every one of WAYS, measured on a text (spec, blocks)."""
    from surgery.budget.pass_cost import ROUNDING_BYTES
    from surgery.evaluate.ablation import Condition, ablation_cost, run_ablations
    from surgery.evaluate.perplexity import evaluation_blocks
    from surgery.quantize.plan import plan_quantization
    from surgery.quantize.write import input_power, rounding_edits

    blocks = evaluation_blocks(model, *on)
    ablation_cost(
        model, len(schemes) * len(WAYS), *blocks.ids.shape, edit_bytes=ROUNDING_BYTES
    )  # refused early
    weights = known_super_weights(model, index, text, quiet)
    power = input_power(model, calibration_blocks(model, text), bars(quiet))
    conditions = []
    for scheme in schemes:
        for way, handling, clipping in WAYS:
            plan = plan_quantization(model.meta_model, weights, scheme, handling, clipping)
            edits = rounding_edits(model.meta_model, plan, power)
            conditions.append(Condition(f"{scheme.name}: {way}", scheme.name, edits))
    say(f"Measuring {len(conditions)} ways on {len(blocks.ids)} blocks of {blocks.name}", quiet)
    outcomes = run_ablations(model, conditions, blocks, bars(quiet), edit_bytes=ROUNDING_BYTES)
    return {
        "text": blocks.as_json(),
        **(index.published_json() if index else {}),
        "super_weights": weights,
        "conditions": [asdict(outcome) for outcome in outcomes],
    }


def show_comparison_cost(
    model: Model, schemes: list[Scheme], on: tuple[str, int | None], as_json: bool
) -> None:
    """Print what a comparison takes."""
    from surgery.budget.pass_cost import ROUNDING_BYTES
    from surgery.cli.costs import pass_cost_lines
    from surgery.evaluate.ablation import ablation_cost
    from surgery.evaluate.perplexity import evaluation_blocks

    blocks = evaluation_blocks(model, *on)
    names = [f"{scheme.name}: {way}" for scheme in schemes for way, *_ in WAYS]
    cost = ablation_cost(model, len(names), *blocks.ids.shape, edit_bytes=ROUNDING_BYTES)
    show_dry_run(model, cost, [*names, *pass_cost_lines(cost)], {"conditions": names}, as_json=as_json)
