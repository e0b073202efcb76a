"""What the commands share: opening a model, calibrating, measuring, talking."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.errors import SurgeonError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from surgery.calibration import TokenBlocks
    from surgery.checkpoint import Checkpoint
    from surgery.costs import IndexCosts
    from surgery.index import ChannelIndex
    from surgery.indexing import RunOptions
    from surgery.skeleton import Skeleton
    from surgery.stream import LayerEdit

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def open_model(model: str, options: dict[str, Any]) -> Checkpoint:
    """The checkpoint MODEL names: a local folder, or `org/name` on the Hub at one `--revision`."""
    from surgery.checkpoint import Checkpoint
    from surgery.errors import CheckpointError

    revisions = options["revision"]
    if len(revisions) > 1:
        raise UsageError("one --revision at a time", where=model, next_step="`surgeon index` takes several")
    if Path(model).is_dir():
        if revisions:
            raise UsageError("--revision is for models on the Hub", where=model)
        return Checkpoint.open(model)
    if Path(model).is_file() and Path(model).suffix == ".gguf":
        return open_gguf(Path(model), options)
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(
            "no such model folder",
            where=model,
            next_step="give a folder holding config.json, a .gguf file, or a Hub id as org/name",
        )
    from surgery.hub import open_hub

    return open_hub(model, revisions[0] if revisions else None, ranges=options["no_cache"])


def open_gguf(file: Path, options: dict[str, Any]) -> Checkpoint:
    """A GGUF file, to be dequantised to --dtype; bfloat16 unless that is given."""
    from surgery.devices import DTYPE_OPTIONS, check_dtype
    from surgery.gguf_checkpoint import GgufCheckpoint

    check_dtype(options["dtype"])
    return GgufCheckpoint(file, DTYPE_OPTIONS.get(options["dtype"], DTYPE_OPTIONS["bfloat16"]))


def read_template(path: Path | None) -> str | None:
    """The text of --card-template. Raises UsageError when it can't be read."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the card template can't be read", where=path.name, found=str(error)) from error


def local_path(model: str) -> Path | None:
    """The folder of a local model, None for one on the Hub."""
    return Path(model) if Path(model).is_dir() else None


def run_options(checkpoint: Checkpoint, options: dict[str, Any]) -> RunOptions:
    """Device, dtype and memory from the command line."""
    from surgery.devices import default_memory, parse_bytes, pick_device, pick_dtype
    from surgery.indexing import RunOptions

    device = pick_device(options["device"])
    memory = parse_bytes(options["memory"]) if options["memory"] else default_memory()
    return RunOptions(device, pick_dtype(options["dtype"], checkpoint, device), memory)


def make_index(
    checkpoint: Checkpoint,
    options: dict[str, Any],
    *,
    dry_run: bool,
    quiet: bool,
    second_order: bool = False,
    keep_sample: bool = False,
    share_reads: bool = False,
    destination: Path | None = None,
    as_json: bool = False,
) -> ChannelIndex | None:
    """Calibrate and index; with `dry_run` only say what would be done.

    The journal beside `destination` is gone on with, and left there: `journal_done` throws it away.
    """
    from surgery.skeleton import Skeleton, check_model

    check_model(checkpoint)
    from surgery.calibration import load_tokenizer, read_text, token_blocks
    from surgery.costs import index_costs
    from surgery.indexing import build_index, index_fingerprint
    from surgery.journal import Journal
    from surgery.show import show_ffns
    from surgery.show_costs import costs_lines
    from surgery.super_weights import PROMPTS, prompt_ids

    run = run_options(checkpoint, options)
    skeleton = Skeleton(checkpoint, run.dtype)
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
    costs = index_costs(skeleton, len(blocks.ids), blocks.ids.shape[1], run, second_order)
    if dry_run:
        if not as_json:
            show_ffns(skeleton, data_console())
            click.echo(f"Calibration: {options['blocks']} x {options['block_size']} tokens of {name}")
            click.echo(f"Compute: {run.device}, {str(run.dtype).removeprefix('torch.')}")
        show_costs(skeleton, costs, run, as_json)
        return None
    lines = costs_lines(costs, len(skeleton.layers))
    say(f"Indexing {checkpoint.name} on {len(blocks.ids)} x {options['block_size']} tokens of {name}", quiet)
    say("\n".join(lines), quiet)
    prompts = prompt_ids(
        tokenizer, (*PROMPTS, *([options["prompt"]] if options["prompt"] else [])), blocks.ids
    )
    journal = None
    if destination is not None:
        what = index_fingerprint(checkpoint, blocks, prompts, run, second_order, keep_sample)
        journal = Journal(destination, what, resume=options["resume"])
        if journal.resumed:
            say("Going on where an earlier run stopped (--no-resume starts over)", quiet)
    try:
        return build_index(
            checkpoint,
            blocks,
            prompts,
            run,
            bars(quiet),
            second_order=second_order,
            keep_sample=keep_sample,
            share_reads=share_reads,
            journal=journal,
        )
    except SurgeonError as error:
        if journal is not None:
            journal.fail(error)
        raise


def show_costs(skeleton: Skeleton, costs: IndexCosts, run: RunOptions, as_json: bool) -> None:
    """Print what an index will take, with the time that a look at this machine foretells."""
    from surgery.machine import measure_machine
    from surgery.show_costs import costs_json, costs_lines

    machine = measure_machine(skeleton.checkpoint, skeleton, run)
    if as_json:
        click.echo(json.dumps(costs_json(costs, machine), indent=1))
    else:
        click.echo("\n".join(costs_lines(costs, len(skeleton.layers), machine)))


def journal_done(destination: Path) -> None:
    """Throw a destination's journal away, now that what it was for is there."""
    import shutil

    from surgery.journal import journal_folder

    shutil.rmtree(journal_folder(destination), ignore_errors=True)


def evaluate(
    checkpoint: Checkpoint,
    text_spec: str,
    blocks: int | None,
    block_size: int | None,
    options: dict[str, Any],
    quiet: bool,
    edit: LayerEdit | None = None,
) -> dict[str, Any]:
    """Perplexity on a text, as JSON fields; `edit` may change each layer as it comes in."""
    from surgery.calibration import read_text
    from surgery.perplexity import measure_perplexity

    cut = evaluation_blocks(checkpoint, *read_text(text_spec), blocks, block_size)
    run = run_options(checkpoint, options)
    return measure_perplexity(checkpoint, cut, run, edit=edit, track=bars(quiet)).as_json()


def evaluation_blocks(
    checkpoint: Checkpoint, text: str, name: str, blocks: int | None, block_size: int | None = None
) -> TokenBlocks:
    """The first blocks of a text, in the checkpoint's tokens, as long as the model takes unless `block_size` is given."""
    from surgery.calibration import load_tokenizer, token_blocks
    from surgery.perplexity import default_block_size

    size = block_size or default_block_size(checkpoint.config)
    return token_blocks(load_tokenizer(checkpoint), text, name, block_size=size, blocks=blocks)


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
