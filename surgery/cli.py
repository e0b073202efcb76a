"""The `surgeon` command: parse, call the library, print. Data goes to stdout, talk to stderr.

torch and transformers are imported inside the commands, so that `surgeon --help` answers at once.
"""

from __future__ import annotations

import atexit
import gc
import os
from typing import Any

import click

from surgery import __version__
from surgery.commands.ablate import ablate
from surgery.commands.compare import compare
from surgery.commands.evaluate import eval_command
from surgery.commands.help import GroupedCommands
from surgery.commands.index import index, show
from surgery.commands.merge import merge_index
from surgery.commands.prune import prune
from surgery.commands.publish import card, push
from surgery.commands.quantize import quantize
from surgery.commands.report import report
from surgery.errors import SurgeonError, UsageError

COLLECT_AFTER = 20_000  # objects made and not freed, between two searches for cycles among the young ones


class SurgeonGroup(GroupedCommands):
    """Prints a SurgeonError as one line and its next step, and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return self._invoke(ctx)
        except SurgeonError as error:
            click.echo(f"Error: {error.message}", err=True)
            if error.next_step:
                click.echo(f"Next: {error.next_step}", err=True)
            ctx.exit(error.exit_code)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            from surgery.faults import storage_error

            told = storage_error(error)
            if told is None:
                raise
            raise told from error


@click.group(
    cls=SurgeonGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="surgeon")
def main() -> None:
    """Surgery on language-model checkpoints, one decoder layer in memory at a time.

    \b
    surgeon index MODEL --out model-index
    surgeon prune MODEL --index model-index --sparsity 0.25 --out smaller
    surgeon eval smaller --text text.txt
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # The hundred thousands of objects that torch and transformers make stay to the end: searching them for
    # garbage as they come, and once more at the exit, takes a third of the start-up.
    gc.set_threshold(COLLECT_AFTER)
    atexit.register(gc.freeze)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
    if several and click.get_current_context().invoked_subcommand not in ("index", "show"):
        raise UsageError(
            "only `surgeon index` spreads over several processes",
            expected="one process",
            found=f"{os.environ['WORLD_SIZE']} of torchrun's",
            next_step="index with torchrun, then run this command alone with --index",
        )


for command in (index, show, merge_index, report, prune, compare, eval_command, ablate, quantize, push, card):
    main.add_command(command)
