"""The `surgeon` command: parse, call the library, print. Data goes to stdout, talk to stderr.

torch and transformers are imported inside the commands, so that `surgeon --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from surgery import __version__
from surgery.errors import SurgeonError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from surgery.checkpoint import Checkpoint
    from surgery.index import ChannelIndex
    from surgery.indexing import RunOptions

Command = TypeVar("Command", bound=Callable[..., Any])
METHOD_NAMES = ("scar-lp", "scar-prot", "scar-conn", "magnitude", "activation", "wanda", "random")


class SurgeonGroup(click.Group):
    """Prints a SurgeonError as one line and its next step, and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SurgeonError as error:
            click.echo(f"Error: {error.message}", err=True)
            if error.next_step:
                click.echo(f"Next: {error.next_step}", err=True)
            ctx.exit(error.exit_code)


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


def common_options(command: Command) -> Command:
    """Options every computing command has."""
    for option in reversed(
        [
            click.option("--revision", help="Branch, tag or commit of a Hub model."),
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
                help="Budget for hidden states, as 8GiB; beyond it they go to disk. [default: half of this machine's]",
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
            click.option("--prompt", help="Text that rides along to find super weights."),
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


@main.command()
@click.argument("model")
@calibration_options
@output_options
@common_options
def index(
    model: str, out: Path | None, overwrite: bool, dry_run: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Write the index of MODEL: what every FFN channel is worth, and its super weights."""
    from surgery.destination import check_destination, complete_folder
    from surgery.show import show_index

    checkpoint = open_model(model, options["revision"])
    destination = out or Path(f"{checkpoint.name.split('/')[-1]}-index")
    if not dry_run:
        check_destination(destination, overwrite=overwrite, source=local_path(model))
    result = make_index(checkpoint, options, dry_run=dry_run, quiet=quiet)
    if result is None:
        return
    with complete_folder(destination) as folder:
        result.save(folder)
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=1))
    else:
        show_index(result, data_console())
    say(f"Index written to {destination}", quiet)


@main.command()
@click.argument("folder", metavar="INDEX")
@click.option("--json", "as_json", is_flag=True, help="Print index.json.")
def show(folder: str, as_json: bool) -> None:
    """Read an index: LP concentration, overlaps, super weights."""
    from surgery.index import ChannelIndex
    from surgery.show import show_index

    result = ChannelIndex.load(folder)
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=1))
    else:
        show_index(result, data_console())


@main.command()
@click.argument("model")
@click.option("--index", "index_folder", metavar="DIR", help="Index to use. [default: made on the fly]")
@click.option("--sparsity", type=float, help="Fraction of FFN channels to remove, 0 to 1. [default: 0.5]")
@click.option("--intermediate-size", type=int, help="Exact width to keep, in place of --sparsity.")
@click.option("--method", type=click.Choice(METHOD_NAMES), default="scar-prot", show_default=True)
@click.option("--allocation", type=click.Choice(["uniform"]), default="uniform", show_default=True)
@click.option("--repair", type=click.Choice(["none"]), default="none", show_default=True)
@click.option(
    "--multiple-of", type=int, help="Round the width to this multiple. [default: 128, 64 below 4096]"
)
@click.option(
    "--eval", "eval_text", metavar="FILE|DATASET", help="Measure perplexity before and after on this text."
)
@click.option("--eval-blocks", type=int, help="Blocks of it to use. [default: all]")
@calibration_options
@output_options
@common_options
def prune(
    model: str,
    index_folder: str | None,
    sparsity: float | None,
    intermediate_size: int | None,
    method: str,
    multiple_of: int | None,
    eval_text: str | None,
    eval_blocks: int | None,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    allocation: str,  # noqa: ARG001
    repair: str,  # noqa: ARG001
    **options: Any,
) -> None:
    """Shrink MODEL: choose channels, cut them out, write a smaller checkpoint."""
    from surgery.destination import check_destination
    from surgery.index import ChannelIndex
    from surgery.plan import default_multiple, make_plan, rounded_width
    from surgery.prune import planned_specs, write_pruned
    from surgery.resize import checkpoint_cuts
    from surgery.show import show_plan

    if sparsity is not None and intermediate_size is not None:
        raise UsageError("give --sparsity or --intermediate-size, not both")
    if sparsity is None and intermediate_size is None:
        sparsity = 0.5
    checkpoint = open_model(model, options["revision"])
    if sparsity is not None:  # a bad request is refused before any computing
        width = model_width(checkpoint)
        rounded_width(width, sparsity, default_multiple(width) if multiple_of is None else multiple_of)
    stem = f"{checkpoint.name.split('/')[-1]}-{method}"
    destination = out or Path(
        f"{stem}-{round(100 * sparsity)}" if sparsity is not None else f"{stem}-w{intermediate_size}"
    )
    if not dry_run:
        check_destination(
            destination, overwrite=overwrite, source=local_path(model), needs_bytes=checkpoint.nbytes
        )
    if index_folder is not None:
        channels = ChannelIndex.load(index_folder)
        channels.check_source(checkpoint)
    else:
        made = make_index(checkpoint, options, dry_run=False, quiet=quiet)
        assert made is not None
        channels = made
    plan = make_plan(
        channels,
        method=method,
        sparsity=sparsity,
        width=intermediate_size,
        multiple_of=multiple_of,
        seed=options["seed"],
    )
    specs = planned_specs(checkpoint, plan, checkpoint_cuts(checkpoint))
    sizes = {
        "parameters_before": checkpoint.parameters,
        "parameters_after": sum(_numel(spec.shape) for spec in specs.values()),
        "bytes_before": checkpoint.nbytes,
        "bytes_after": sum(spec.nbytes for spec in specs.values()),
    }
    if not as_json:
        show_plan(plan, sizes, data_console())
    if dry_run:
        if as_json:
            click.echo(json.dumps({"plan": plan.as_json(), "sizes": sizes}))
        return
    check_destination(destination, overwrite=overwrite, needs_bytes=sizes["bytes_after"])
    dense, measure = None, None
    if eval_text is not None:
        say("Measuring the dense model", quiet)
        dense = evaluate(checkpoint, eval_text, eval_blocks, None, options, quiet)

        def measure(written: Checkpoint) -> dict[str, Any]:
            say("Measuring the shrunk model", quiet)
            return evaluate(written, eval_text, eval_blocks, None, options, quiet)

    manifest = write_pruned(
        checkpoint,
        channels,
        plan,
        destination,
        options=run_options(checkpoint, options),
        dense=dense,
        measure=measure,
        track=bars(quiet),
    )
    if as_json:
        click.echo(json.dumps(manifest))
    elif dense:
        shrunk = manifest["measurements"]["shrunk"]
        click.echo(f"Perplexity {dense['perplexity']:.2f} → {shrunk['perplexity']:.2f} on {dense['text']}")
    say(f"Checkpoint written to {destination}", quiet)


@main.command("eval")
@click.argument("model")
@click.option(
    "--text",
    "text",
    default="wikitext-test",
    show_default=True,
    metavar="FILE|DATASET",
    help="Text to measure on.",
)
@click.option("--blocks", type=int, help="Use only the first so many blocks. [default: all]")
@click.option("--block-size", type=int, help="Tokens in a block. [default: 2048 or the context length]")
@common_options
def eval_command(
    model: str,
    text: str,
    blocks: int | None,
    block_size: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure the perplexity of MODEL, streamed, whatever its size."""
    checkpoint = open_model(model, options["revision"])
    result = evaluate(checkpoint, text, blocks, block_size, options, quiet)
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(
        f"perplexity     {result['perplexity']:.4f}  ({result['nats']:.2f} nats over {result['tokens']:,} tokens)"
    )
    click.echo(
        f"bits per byte  {result['bits_per_byte']:.4f}  ({result['bytes']:,} bytes of {result['text']})"
    )
    click.echo(f"convention     {result['convention']}")


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--stdout", is_flag=True, help="Print the card; write nothing.")
def card(folder: str, stdout: bool) -> None:
    """(Re)write the model card of DIR from its surgeon.json."""
    from cards import render_card
    from surgery.errors import CheckpointError

    path = Path(folder)
    try:
        manifest = json.loads((path / "surgeon.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("no readable surgeon.json", where=path.name, found=str(error)) from error
    existing = path / "README.md"
    text = render_card(manifest, existing.read_text(encoding="utf-8") if existing.exists() else None)
    if stdout:
        click.echo(text, nl=False)
    else:
        existing.write_text(text, encoding="utf-8")
        say(f"Card written to {existing}", False)


# -- what the commands share ----------------------------------------------------------------------------------------


def open_model(model: str, revision: str | None) -> Checkpoint:
    """The checkpoint MODEL names: a local folder."""
    from surgery.checkpoint import Checkpoint

    if revision is not None:
        raise UsageError("--revision is for models on the Hub", where=model)
    return Checkpoint.open(model)


def local_path(model: str) -> Path | None:
    """The folder of a local model, None for one on the Hub."""
    return Path(model) if Path(model).is_dir() else None


def model_width(checkpoint: Checkpoint) -> int:
    """Width of the model's FFNs, from its config."""
    from surgery.families import layout_of

    return int(checkpoint.config[layout_of(checkpoint.config, checkpoint.name).width_key])


def run_options(checkpoint: Checkpoint, options: dict[str, Any]) -> RunOptions:
    """Device, dtype and memory from the command line."""
    from surgery.devices import default_memory, parse_bytes, pick_device, pick_dtype
    from surgery.indexing import RunOptions

    device = pick_device(options["device"])
    memory = parse_bytes(options["memory"]) if options["memory"] else default_memory()
    return RunOptions(device, pick_dtype(options["dtype"], checkpoint, device), memory)


def make_index(
    checkpoint: Checkpoint, options: dict[str, Any], *, dry_run: bool, quiet: bool
) -> ChannelIndex | None:
    """Calibrate and index; with `dry_run` only say what would be done."""
    import torch

    from surgery.calibration import load_tokenizer, read_text, token_blocks
    from surgery.families import layout_of
    from surgery.indexing import build_index
    from surgery.super_weights import PROMPT

    layout = layout_of(checkpoint.config, checkpoint.name)
    run = run_options(checkpoint, options)
    tokenizer = load_tokenizer(checkpoint)
    text, name = read_text(options["calibration"])
    blocks = token_blocks(
        tokenizer,
        text,
        name,
        block_size=options["block_size"],
        blocks=options["blocks"],
        seed=options["seed"],
    )
    if dry_run:
        click.echo(
            f"{checkpoint.name}: {checkpoint.parameters / 1e6:,.1f} M parameters, {checkpoint.nbytes / 2**20:,.0f} MiB"
        )
        click.echo(
            f"FFN: {', '.join(layout.rows)}, {layout.down}; width {checkpoint.config[layout.width_key]} ({layout.width_key})"
        )
        click.echo(f"Calibration: {options['blocks']} x {options['block_size']} tokens of {name}")
        click.echo(f"Compute: {run.device}, {str(run.dtype).removeprefix('torch.')}")
        return None
    say(f"Indexing {checkpoint.name} on {len(blocks.ids)} x {options['block_size']} tokens of {name}", quiet)
    prompt_ids = torch.tensor(tokenizer(options["prompt"] or PROMPT)["input_ids"])
    return build_index(checkpoint, blocks, prompt_ids, run, bars(quiet))


def evaluate(
    checkpoint: Checkpoint,
    text_spec: str,
    blocks: int | None,
    block_size: int | None,
    options: dict[str, Any],
    quiet: bool,
) -> dict[str, Any]:
    """Perplexity on a text, as JSON fields."""
    from surgery.calibration import load_tokenizer, read_text, token_blocks
    from surgery.perplexity import default_block_size, measure_perplexity

    text, name = read_text(text_spec)
    size = block_size or default_block_size(checkpoint.config)
    cut = token_blocks(load_tokenizer(checkpoint), text, name, block_size=size, blocks=blocks)
    return measure_perplexity(checkpoint, cut, run_options(checkpoint, options), track=bars(quiet)).as_json()


def bars(quiet: bool) -> Any:
    """Progress bars on stderr with the time left, or none."""
    from surgery.index import untracked

    if quiet or not sys.stderr.isatty():
        return untracked

    def track(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(f"{label:<9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            yield from progress.track(items, total=total)

    return track


def data_console() -> Console:
    """The console data is printed on: plain and 110 columns wide where stdout is no terminal."""
    from rich.console import Console

    return Console(
        width=None if sys.stdout.isatty() else 110, highlight=False, soft_wrap=not sys.stdout.isatty()
    )


def say(text: str, quiet: bool) -> None:
    """Talk, on stderr."""
    if not quiet:
        click.echo(text, err=True)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
