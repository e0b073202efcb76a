"""The `surgeon` command: parse, call the library, print. Data goes to stdout, messages to stderr.

torch and transformers are imported inside the commands, to keep `surgeon --help` fast.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
import warnings
from typing import Any

import click

from surgery import __version__
from surgery.cli.ablate import ablate
from surgery.cli.adapt import adapt
from surgery.cli.atlas import atlas
from surgery.cli.bench import bench
from surgery.cli.compare import compare
from surgery.cli.evaluate import eval_command
from surgery.cli.export import export
from surgery.cli.find import find
from surgery.cli.frontier import frontier
from surgery.cli.heal import heal
from surgery.cli.help import GroupedCommands
from surgery.cli.index import index, show
from surgery.cli.merge import merge_index
from surgery.cli.prune import prune
from surgery.cli.publish import card, push
from surgery.cli.quantize import quantize
from surgery.cli.report import report
from surgery.cli.shard_index import shard_index
from surgery.errors import SurgeonError, SurgeonWarning, UsageError

SEVERAL = ("index", "prune", "heal", "compare", "ablate", "show")  # what torchrun may start
COLLECT_AFTER = 20_000  # new objects between two collections of the youngest generation


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
            from surgery.engine.disk_errors import storage_error

            explained = storage_error(error)
            if explained is None:
                raise
            raise explained from error


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print a warning of surgeon as one line; those of other libraries are for their developers."""
    if issubclass(category, SurgeonWarning):
        click.echo(f"Warning: {message}", err=True)


@click.group(
    cls=SurgeonGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="surgeon")
def main() -> None:
    """Index, prune and quantise language-model checkpoints, with one decoder layer in memory at a time.

    \b
    surgeon index MODEL --out model-index
    surgeon prune MODEL --index model-index --sparsity 0.25 --out smaller
    surgeon eval smaller --text text.txt
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that can't print an arrow shows a question mark
    warnings.showwarning = show_warning
    warnings.simplefilter("always", SurgeonWarning)
    # torch and transformers make hundreds of thousands of objects that live until exit. Searching them for
    # garbage during import and at exit takes a third of the start-up time.
    gc.set_threshold(COLLECT_AFTER)
    atexit.register(gc.freeze)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
    if several and click.get_current_context().invoked_subcommand not in SEVERAL:
        raise UsageError(
            f"this command runs alone; several processes run {', '.join(SEVERAL)}",
            expected="one process",
            found=f"{os.environ['WORLD_SIZE']} of torchrun's",
            next_step="index with torchrun, then run this command alone with --index",
        )


for command in (
    index,
    show,
    merge_index,
    report,
    find,
    atlas,
    prune,
    compare,
    heal,
    adapt,
    eval_command,
    frontier,
    ablate,
    bench,
    quantize,
    export,
    push,
    card,
    shard_index,
):
    main.add_command(command)
