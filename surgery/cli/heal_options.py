"""The options of `surgeon heal`: on what to train, what, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery import defaults
from surgery.cli.options import PATH, collected, numbers, text_column_option, text_words
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.engine.open_model import Model
    from surgery.heal.heal_text import HealText
    from surgery.heal.options import HealOptions

THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


@dataclass(frozen=True)
class HowToTrain:
    """What is trained and how, as `heal` and `prune --heal` take it."""

    loss_on: str
    train: str
    learning_rate: float | None
    batch_tokens: int
    epochs: int
    temperature: float
    cross_entropy: float
    targets: str

    @property
    def how_words(self) -> list[str]:
        """The options that say how to train, as words."""
        words = ["--loss-on", self.loss_on] if self.loss_on != defaults.LOSS_ON[0] else []
        words += ["--train", self.train]
        words += ["--learning-rate", f"{self.learning_rate:g}"] if self.learning_rate else []
        if self.cross_entropy or self.temperature != 1:
            words += ["--temperature", f"{self.temperature:g}", "--cross-entropy", f"{self.cross_entropy:g}"]
        words += ["--epochs", str(self.epochs)] if self.epochs > 1 else []
        return [*words, "--batch-tokens", str(self.batch_tokens)]


@dataclass(frozen=True)
class TrainingOptions(HowToTrain):
    """On which text to train, what, and how, as the command line says it."""

    tokens_seen: str
    heal_texts: tuple[str, ...]
    text_weights: tuple[float, ...] | None
    text_column: str | None
    save_adapter: Path | None
    block_size: int
    seed: int

    @property
    def blocks(self) -> int:
        """Distinct blocks of `--tokens`. Raises UsageError for a number that can't be."""
        return max(1, round(parse_count(self.tokens_seen) / self.block_size / self.epochs))

    def options(self) -> HealOptions:
        """These as the library takes them. Raises UsageError for values out of range or at odds."""
        from surgery.heal.adapter import check_mode
        from surgery.heal.distil_loss import DistilLoss
        from surgery.heal.options import HealOptions
        from surgery.heal.trainable import TrainMode

        mode = TrainMode.parse(self.train)
        if self.save_adapter is not None:
            check_mode(mode)
        return HealOptions(
            mode,
            DistilLoss(self.temperature, self.cross_entropy),
            self.epochs,
            self.batch_tokens,
            self.learning_rate,
            recompute=self.targets == "recompute",
            seed=self.seed,
        )

    def draw(self, model: Model) -> HealText:
        """The blocks to train on and those held out. Raises CalibrationError, UsageError."""
        from surgery.heal.heal_text import draw_heal_text

        return draw_heal_text(
            model,
            self.heal_texts,
            blocks=self.blocks,
            block_size=self.block_size,
            seed=self.seed,
            weights=self.text_weights,
            text_column=self.text_column,
            loss_on=self.loss_on,
        )

    @property
    def words(self) -> list[str]:
        """The options as words, free of paths of this machine."""
        words = ["--tokens", self.tokens_seen]
        words += text_words("--text", self.heal_texts, self.text_weights, self.text_column)
        return [*words, *self.how_words, "--block-size", str(self.block_size), "--seed", str(self.seed)]


def parse_count(text: str, option: str = "--tokens", of: str = "tokens") -> int:
    """A number as 131072, 500k, 1M or 1.5B, of what `option` counts. Raises UsageError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbg]?)", text.strip().lower())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"not a number of {of}", where=option, expected="as 500k, 1M or 1.5B", found=text)
    return round(float(found[1]) * THOUSANDS[found[2]])


how_to_train = [
    click.option(
        "--loss-on",
        type=click.Choice(defaults.LOSS_ON),
        default=defaults.LOSS_ON[0],
        show_default=True,
        help="Tokens of chat that the loss is on: those of the assistant's answers, with the token that "
        "ends each, or all.",
    ),
    click.option(
        "--train",
        default="lora:16",
        show_default=True,
        metavar="lora:R|norms|all",
        help="What is trained of the decoder layers: adapters of rank R on every linear, and norms; "
        "norms alone; or all parameters.",
    ),
    click.option(
        "--learning-rate",
        type=click.FloatRange(min=0, min_open=True),
        help="Its peak. [default: 2e-3; with --train all, 4e-4]",
    ),
    click.option(
        "--batch-tokens",
        type=click.IntRange(min=1),
        default=4096,
        show_default=True,
        help="Tokens of one step.",
    ),
    click.option(
        "--epochs",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Times that every block is seen: with 2, half as much text makes the same number of tokens.",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        show_default=True,
        help="Of both distributions.",
    ),
    click.option(
        "--cross-entropy",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        help="Share of plain cross-entropy in the loss; the rest is the divergence from the teacher. "
        "With 1 the teacher's predictions are not computed.",
    ),
    click.option(
        "--targets",
        type=click.Choice(("disk", "recompute")),
        default="disk",
        show_default=True,
        help="Keep the teacher's predictions in files until the end, or compute them in every step.",
    ),
]
training_options = collected(
    TrainingOptions,
    "training",
    [
        click.option("--tokens", "tokens_seen", metavar="N", required=True, help="Tokens to see, as 1M."),
        click.option(
            "--text",
            "heal_texts",
            multiple=True,
            default=defaults.CALIBRATION_TEXTS,
            show_default=True,
            metavar="NAME|FILE|DATASET",
            help="Text to train on, named as for --calibration. Give it several times for a mixture. The "
            "loss is on the assistant's answers of chat, and on every token of plain text.",
        ),
        click.option(
            "--text-weights",
            callback=numbers,
            metavar="W,W,...",
            help="Shares of the texts of a mixture. [default: equal]",
        ),
        text_column_option,
        *how_to_train,
        click.option(
            "--save-adapter",
            type=PATH,
            metavar="DIR",
            help="With --train lora:R, also write adapters and norms to DIR, to be loaded by peft.",
        ),
        click.option(
            "--block-size", default=defaults.BLOCK_SIZE, show_default=True, help="Tokens in a block."
        ),
        click.option(
            "--seed", default=defaults.SEED, show_default=True, help="Which blocks are drawn, in which order."
        ),
    ],
)
