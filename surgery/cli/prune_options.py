"""The options of `surgeon prune`: what to prune, and what to measure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from surgery import defaults
from surgery.cli.common import bars
from surgery.cli.options import ALLOCATION_NAMES, collected, method_option, multiple_of_option, repair_option
from surgery.cli.target_values import widths
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.engine.open_model import Model
    from surgery.text import TokenBlocks

PUSH_EVAL_BLOCKS = 16


@dataclass(frozen=True)
class CutOptions:
    """What to prune, as the command line says it."""

    sparsity: float | None
    intermediate_size: int | None
    multiple_of: int | None
    method: str
    allocation: str
    layer_widths: tuple[int, ...] | None
    pad: bool
    repair: str
    protect: bool | None

    @property
    def sized(self) -> bool:
        """Whether the options say how many channels go."""
        given = (self.sparsity, self.intermediate_size, self.layer_widths)
        return any(one is not None for one in given)

    def check(self) -> CutOptions:
        """These options, 50% where no size is given. Raises UsageError when they contradict each other."""
        if self.layer_widths is not None:
            if (self.sparsity, self.intermediate_size, self.allocation) != (None, None, defaults.ALLOCATION):
                raise UsageError(
                    "--layer-widths takes the place of --sparsity, --intermediate-size and --allocation"
                )
            return replace(self, intermediate_size=max(self.layer_widths), allocation="given")
        if self.sparsity is not None and self.intermediate_size is not None:
            raise UsageError("give --sparsity or --intermediate-size, not both")
        if self.pad and self.allocation == "uniform":
            raise UsageError(
                "--pad makes layers of different width alike", next_step="use it with --allocation global"
            )
        return self if self.sized else replace(self, sparsity=defaults.SPARSITY)

    def name_for(self, model: Model) -> str:
        """Folder and repo name: source, method, percent removed or width kept, the mean of given ones."""
        if self.layer_widths is not None:
            mean = sum(self.layer_widths) / len(self.layer_widths)
            return f"{model.short_name}-{self.method}-w{mean:.0f}-mean"
        size = f"w{self.intermediate_size}" if self.sparsity is None else str(round(100 * self.sparsity))
        return f"{model.short_name}-{self.method}-{size}"


@dataclass(frozen=True)
class EvalOptions:
    """Which text to measure on before and after, and how much of it; "none" for not at all."""

    eval_text: str | None
    eval_blocks: int | None

    def chosen(self, published: bool) -> EvalOptions | None:
        """What to measure on, None for nothing: a published card must say what pruning cost."""
        if self.eval_text is None and published:
            return EvalOptions(defaults.EVALUATION_TEXT, self.eval_blocks or PUSH_EVAL_BLOCKS)
        return None if self.eval_text in (None, "none") else self

    def read(self, model: Model) -> TokenBlocks:
        """The tokens to measure on. Raises CalibrationError for a text that can't be read or is too short."""
        from surgery.evaluate.perplexity import evaluation_blocks

        return evaluation_blocks(model, self.eval_text or defaults.EVALUATION_TEXT, self.eval_blocks)


def measure(model: Model, blocks: TokenBlocks, quiet: bool) -> dict[str, Any]:
    """Perplexity of a model on `blocks`, for the manifest."""
    from surgery.evaluate.perplexity import perplexity

    return perplexity(model, blocks, progress=bars(quiet)).as_json()


cut_options = collected(
    CutOptions,
    "cut",
    [
        click.option(
            "--sparsity", type=float, help="Fraction of FFN channels to remove, 0 to 1. [default: 0.5]"
        ),
        click.option("--intermediate-size", type=int, help="Exact width to keep, in place of --sparsity."),
        method_option,
        click.option(
            "--allocation",
            type=click.Choice(ALLOCATION_NAMES),
            default=defaults.ALLOCATION,
            show_default=True,
            help="One width for all layers, which loads everywhere; or one width each, which needs a "
            "loader: by the measured sensitivity of layers (global), by measuring "
            "all widths together (searched), or by the scores alone (score).",
        ),
        click.option(
            "--layer-widths",
            metavar="NUMBERS",
            callback=widths,
            help="Channels to keep in each layer, as 512,640,…, in place of --sparsity and --allocation; 0 "
            "for a layer that goes or whose FFN goes.",
        ),
        click.option(
            "--pad",
            is_flag=True,
            help="With widths per layer: zero-pad to the widest, which loads everywhere.",
        ),
        repair_option,
        click.option(
            "--protect/--no-protect",
            default=None,
            help="Never remove supernodes and super-weight columns. "
            "[default: for the scar, lp and obs-loss methods]",
        ),
        multiple_of_option,
    ],
)
eval_options = collected(
    EvalOptions,
    "evaluation",
    [
        click.option(
            "--eval",
            "eval_text",
            metavar="FILE|DATASET|none",
            help="Measure before and after on this text. "
            "[default: none; with --push, 16 blocks of wikitext-test]",
        ),
        click.option("--eval-blocks", type=int, help="Blocks of it to use. [default: all]"),
    ],
)
