"""The options of `surgeon frontier`: which points are measured, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from surgery import defaults
from surgery.byte_units import parse_bytes
from surgery.cli.options import collected, method_option, multiple_of_option, repair_option
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.engine.open_model import Model
    from surgery.quantize.rounding import Scheme


@dataclass(frozen=True)
class PointOptions:
    """Which points are measured, as the command line says it."""

    sparsities: tuple[float, ...]
    roundings: tuple[str, ...]
    no_round: bool
    heal_tokens: str | None
    against: str | None
    method: str
    repair: str
    multiple_of: int | None

    def schemes(self, model: Model) -> list[Scheme]:
        """How weights are rounded. Raises UsageError for a group size that does not fit the model."""
        from surgery.frontier.points import check_schemes, default_schemes
        from surgery.quantize.autoround import check_autoround
        from surgery.quantize.rounding import NEAREST, ROUNDINGS, Scheme

        if self.no_round:
            return []
        if not self.roundings:
            return default_schemes(model, self.sparsities, self.multiple_of)
        found = []
        for words in self.roundings:
            bits, _, rest = words.partition(":")
            size, _, rounding = rest.partition(":")
            if not bits.isdigit() or not size.isdigit() or rounding not in ("", *ROUNDINGS):
                raise UsageError(
                    "not BITS:GROUP or BITS:GROUP:autoround",
                    where="--round",
                    expected="as 4:64",
                    found=words,
                )
            scheme = Scheme(int(bits), symmetric=True, size=int(size), rounding=rounding or NEAREST)
            check_autoround(model, scheme)
            found.append(scheme)
        check_schemes(model, found, self.sparsities, self.multiple_of)
        return found


point_options = collected(
    PointOptions,
    "chosen",
    [
        click.option(
            "--sparsity",
            "sparsities",
            multiple=True,
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            default=(0.125, 0.25, 0.5),
            show_default=True,
            help="Fraction of FFN channels to cut; several times for several.",
        ),
        click.option(
            "--round",
            "roundings",
            multiple=True,
            metavar="BITS:GROUP[:autoround]",
            help="Round to nearest, as 4:64, or by AutoRound, as 4:64:autoround; several times for several. "
            "[default: 8 and 4 bits at the largest group size that divides all rows, and 4:32]",
        ),
        click.option("--no-round", is_flag=True, help="Round nothing."),
        click.option(
            "--heal",
            "heal_tokens",
            metavar="TOKENS",
            help="Also heal every cut on so many tokens of the calibration texts, as 1M.",
        ),
        click.option("--against", metavar="MODEL", help="Another model, as the next smaller one."),
        method_option,
        repair_option,
        multiple_of_option,
    ],
)


@dataclass(frozen=True)
class MeasureOptions:
    """What quality and speed are measured on."""

    texts: tuple[str, ...]
    text_blocks: int | None
    text_block_size: int | None
    context: int
    no_speed: bool
    target_size: str | None
    target_speed: float | None

    @property
    def size(self) -> int | None:
        """The target size in bytes."""
        return None if self.target_size is None else parse_bytes(self.target_size)


measure_options = collected(
    MeasureOptions,
    "measured",
    [
        click.option(
            "--text",
            "texts",
            multiple=True,
            default=(defaults.EVALUATION_TEXT,),
            show_default=True,
            metavar="FILE|DATASET",
            help="Text to measure bits per byte and KL on, none of it calibrated on; several times for "
            "several kinds.",
        ),
        click.option("--text-blocks", type=int, help="Blocks of each text. [default: all]"),
        click.option(
            "--text-block-size", type=int, help="Tokens in a block. [default: 2048 or the context length]"
        ),
        click.option(
            "--context",
            type=click.IntRange(1),
            default=4096,
            show_default=True,
            help="Tokens of the KV cache that memory in use counts.",
        ),
        click.option("--no-speed", is_flag=True, help="Measure no tokens a second."),
        click.option(
            "--target-size",
            metavar="SIZE",
            help="Say which point is best of at most so many bytes, as 80MiB.",
        ),
        click.option(
            "--target-speed",
            type=float,
            metavar="TOKENS",
            help="Say which point is best that decodes so many tokens a second.",
        ),
    ],
)
