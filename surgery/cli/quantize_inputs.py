"""What `surgeon quantize` needs besides the weights: a scheme, calibration text and super weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.common import say
from surgery.cli.options import CalibrationOptions, collected
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.engine.open_model import Model
    from surgery.index.channel_index import ChannelIndex
    from surgery.quantize.rounding import Scheme
    from surgery.text import TokenBlocks

POWER_BLOCKS = 8  # calibration blocks that inputs are measured on


@dataclass(frozen=True)
class SchemeOptions:
    """How weights are rounded, as the command line says it."""

    bits: int
    symmetric: bool | None
    groups: tuple[int, ...]
    flat: tuple[int, ...]
    per_channel: bool
    per_tensor: bool
    rounding: str
    tuning_steps: int | None

    @property
    def tuned(self) -> bool:
        """Whether the rounding is trained on calibration text."""
        return self.rounding != "nearest"

    def schemes(self, symmetric: bool) -> list[Scheme]:
        """One scheme for each granularity given, groups of 128 where none is.

        `symmetric` is the default. Raises SurgeonError for a size that can't be.
        """
        from surgery.quantize.rounding import Scheme

        if self.tuning_steps is not None and not self.tuned:
            raise UsageError("--tuning-steps are those of AutoRound", next_step="add --rounding autoround")
        grains = [("group", size) for size in self.groups] + [("block", size) for size in self.flat]
        grains += [("channel", 0)] * self.per_channel + [("tensor", 0)] * self.per_tensor
        symmetric = symmetric if self.symmetric is None else self.symmetric
        return [
            Scheme(self.bits, symmetric, *grain, rounding=self.rounding)
            for grain in grains or [("group", 128)]
        ]


scheme_options = collected(
    SchemeOptions,
    "scheme",
    [
        click.option("--bits", type=click.IntRange(2, 8), default=4, show_default=True),
        click.option(
            "--symmetric/--asymmetric",
            default=None,
            help="Without zero point, or with. "
            "[default: symmetric; with --simulate or --compare, asymmetric]",
        ),
        click.option(
            "--group-size",
            "groups",
            type=int,
            multiple=True,
            help="One scale for so many neighbours of a row. [default: 128]",
        ),
        click.option(
            "--flat-block",
            "flat",
            type=int,
            multiple=True,
            help="One scale for so many neighbours of the flattened matrix.",
        ),
        click.option("--per-channel", is_flag=True, help="One scale a row."),
        click.option("--per-tensor", is_flag=True, help="One scale a matrix."),
        click.option(
            "--rounding",
            type=click.Choice(["nearest", "autoround"]),
            default="nearest",
            show_default=True,
            help="To nearest, or by AutoRound, which trains the rounding on calibration text, layer by "
            "layer, with the whole model in memory (pip install 'ffn-surgeon[autoround]').",
        ),
        click.option(
            "--tuning-steps",
            type=click.IntRange(1),
            help="With --rounding autoround, steps of training a layer. [default: 200]",
        ),
    ],
)


def calibration_blocks(model: Model, text: CalibrationOptions) -> TokenBlocks:
    """A few blocks of the calibration text."""
    return text.draw(model, min(text.blocks, POWER_BLOCKS))


def known_super_weights(
    model: Model, index: ChannelIndex | None, text: CalibrationOptions, quiet: bool
) -> list[dict[str, Any]]:
    """Super weights from an index, from the surgeon.json of a pruned checkpoint (under new columns), or found
    now.
    """
    import torch

    from surgery.checkpoint.manifest import MANIFEST
    from surgery.checkpoint.transformers_model import load_tokenizer
    from surgery.index.spike_detector import PROMPTS, find_super_weights, prompt_ids

    if index is not None:
        return [weight.as_json() for weight in index.super_weights]
    if MANIFEST in model.checkpoint.other_files:
        fields = model.checkpoint.read_json(MANIFEST)
        return [weight for weight in fields.get("super_weights", []) if weight["column"] is not None]
    say("Looking for super weights", quiet)
    prompts = (*PROMPTS, *([text.spike_prompt] if text.spike_prompt else []))
    ids = prompt_ids(load_tokenizer(model.checkpoint), prompts, torch.zeros(1, 0))
    return [weight.as_json() for weight in find_super_weights(model, ids)]
