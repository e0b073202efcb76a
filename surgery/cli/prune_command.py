"""The command that makes a pruned folder again, for manifest and card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.cli.options import CalibrationOptions, ModelOptions, text_words
from surgery.cli.prune_options import CutOptions

if TYPE_CHECKING:
    from surgery.engine.open_model import Model
    from surgery.index.channel_index import ChannelIndex
    from surgery.plan.prune_plan import PrunePlan


def canonical_command(
    model: Model,
    index: ChannelIndex,
    plan: PrunePlan,
    options: CutOptions,
    how: ModelOptions,
    text: CalibrationOptions,
) -> list[str]:
    """The words of the command that makes the same checkpoint again, free of paths of this machine."""
    from surgery.plan.kind_plan import removed_attention, removed_ffns, removed_layers
    from surgery.plan.prune_plan import GIVEN

    checkpoint, calibration = model.checkpoint, index.calibration
    words = ["surgeon", "prune", checkpoint.name]
    if checkpoint.revision:
        words += ["--revision", checkpoint.revision]
    found = plan.search.size if plan.search is not None else {}
    if plan.allocation in ("searched", GIVEN):  # what was found, so that it is not searched for again
        words += ["--layer-widths", ",".join(str(width or 0) for width in plan.widths[0].per_layer)]
    elif len(plan.widths) == 1 and plan.allocation == "uniform" and plan.width_after < plan.width_before:
        words += ["--intermediate-size", str(plan.width_after)]
    else:
        size = found.get("width", options.intermediate_size)
        sparsity = found.get("sparsity", options.sparsity)
        words += ["--sparsity", str(sparsity)] if size is None else ["--intermediate-size", str(size)]
        words += ["--multiple-of", str(options.multiple_of)] if options.multiple_of else []
        words += ["--allocation", plan.allocation] if plan.allocation != "uniform" else []
    words += ["--pad"] if plan.padded else []
    for option, gone in (
        ("--drop-layers", removed_layers(plan.cuts)),
        ("--drop-attention", removed_attention(plan.cuts)),
        ("--drop-ffn", removed_ffns(plan.cuts)),
    ):
        words += [option, ",".join(map(str, sorted(gone)))] if gone else []
    words += [
        word for part in plan.cuts if part.kind == "kv" for word in ("--kv-heads", str(part.facts["heads"]))
    ]
    seed = plan.seed if plan.method == "random" else calibration["seed"]
    words += ["--method", plan.method, "--repair", plan.repair, "--seed", str(seed)]
    words += ["--spike-prompt", text.spike_prompt] if text.spike_prompt else []
    words += ["--memory", how.memory] if how.memory else []
    if options.protect is not None:
        words.append("--protect" if plan.protect else "--no-protect")
    if index.published:
        words += ["--index", f"{index.published['repo']}@{index.published['revision']}"]
    else:
        words += [*calibration_words(calibration), "--blocks", str(calibration["blocks"])]
        words += ["--block-size", str(calibration["block_size"])]
    return [*words, "--dtype", index.run["dtype"]]


def calibration_words(calibration: dict[str, Any]) -> list[str]:
    """The options that name the calibration texts of an index again."""
    parts = calibration.get("parts") or [{"name": calibration["name"], "share": 1.0}]
    counts = [part.get("blocks", 1) for part in parts]
    uneven = max(counts) - min(counts) > 1
    return text_words("--calibration", [part["name"] for part in parts], counts if uneven else None)
