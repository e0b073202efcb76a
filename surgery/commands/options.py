"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

ALLOCATION_NAMES = ("uniform", "global", "score")
REPAIR_NAMES = ("none", "bias", "lstsq", "lstsq-acc")
SECOND_ORDER_METHODS = {"lp-conditional", "obs-loss", "obs", "wanda-channel", "llm-pruner"}
METHOD_NAMES = (
    *(
        "scar-lp",
        "scar-prot",
        "scar-prot-published",
        "scar-conn",
        "lp-hybrid",
        "lp-conditional",
        "obs-loss",
        "obs",
        "flap",
    ),
    *("wanda", "wanda-channel", "taylor", "llm-pruner", "optipfair", "magnitude", "activation", "random"),
)

Command = TypeVar("Command", bound=Callable[..., Any])


def common_options(command: Command) -> Command:
    """Options every computing command has."""
    for option in reversed(
        [
            click.option("--revision", multiple=True, help="Branch, tag or commit of a Hub model."),
            click.option(
                "--no-cache", is_flag=True, help="Read byte ranges from the Hub; store no weight file."
            ),
            click.option(
                "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
            ),
            click.option(
                "--dtype",
                default="auto",
                show_default=True,
                help="Compute in float32, bfloat16 or float16; auto: the checkpoint's where it is fast.",
            ),
            click.option(
                "--memory",
                help="Budget for hidden states and for the matrices of a repair, as 8GiB; beyond it the one go to disk, "
                "the others are solved in parts. [default: half of this machine's]",
            ),
            click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
            click.option("--quiet", is_flag=True, help="No progress, no talk."),
        ]
    ):
        command = option(command)
    return command


def calibration_options(command: Command) -> Command:
    """Options of commands that calibrate."""
    for option in reversed(
        [
            click.option(
                "--calibration",
                default="wikitext",
                show_default=True,
                metavar="NAME|FILE|DATASET",
                help="Text to calibrate on: wikitext, a text file, or a dataset as ID[:CONFIG[:SPLIT]].",
            ),
            click.option("--blocks", default=64, show_default=True, help="Calibration blocks."),
            click.option("--block-size", default=512, show_default=True, help="Tokens in a block."),
            click.option("--seed", default=42, show_default=True, help="Which blocks are drawn."),
            click.option(
                "--prompt", help="Text that rides along to find super weights, besides five of surgeon's."
            ),
        ]
    ):
        command = option(command)
    return command


def output_options(command: Command) -> Command:
    """Options of commands that write a folder."""
    for option in reversed(
        [
            click.option("--out", type=click.Path(path_type=Path), help="Folder to write."),
            click.option("--overwrite", is_flag=True, help="Replace the folder if it exists."),
            click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing."),
        ]
    ):
        command = option(command)
    return command


def resume_option(command: Command) -> Command:
    """The option of commands that keep a journal."""
    return click.option(
        "--resume/--no-resume",
        default=True,
        show_default=True,
        help="Go on where a run of the same command was cut short, or start over.",
    )(command)


def push_options(command: Command) -> Command:
    """Options of commands that publish."""
    for option in reversed(
        [
            click.option("--private", is_flag=True, help="Make the repo private."),
            click.option("--push-revision", metavar="BRANCH", help="Branch to push to. [default: main]"),
            click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing."),
        ]
    ):
        command = option(command)
    return command
