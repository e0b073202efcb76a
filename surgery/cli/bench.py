"""`surgeon bench`."""

from __future__ import annotations

import json
from typing import Any

import click

from surgery.bench.settings import RUNTIMES, BenchSettings
from surgery.cli.common import data_console, local_path, say
from surgery.cli.help import GroupedCommand
from surgery.cli.options import talk_options

POSITIVE = click.IntRange(min=1)


@click.command(cls=GroupedCommand)
@click.argument("model")
@click.option("--against", metavar="MODEL", help="Measure this model too, as the dense one.")
@click.option(
    "--runtime",
    "runtimes",
    type=click.Choice(RUNTIMES),
    multiple=True,
    help="Measure in this runtime; several times for several. [default: all that are installed]",
)
@click.option(
    "--gguf-type",
    "gguf_types",
    multiple=True,
    default=("f16",),
    show_default=True,
    metavar="TYPE",
    help="For llama.cpp: the type the model is exported in.",
)
@click.option("--prompt-tokens", type=POSITIVE, default=512, show_default=True, help="Tokens in a prompt.")
@click.option("--new-tokens", type=POSITIVE, default=64, show_default=True, help="Tokens generated after it.")
@click.option(
    "--batch",
    "batches",
    type=POSITIVE,
    multiple=True,
    default=(1, 8),
    show_default=True,
    help="Sequences at once; several times for several.",
)
@click.option("--repeats", type=POSITIVE, default=5, show_default=True, help="Timed runs after one warm-up.")
@click.option("--threads", type=POSITIVE, help="Threads of a CPU. [default: as torch chooses]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--dtype", default="auto", show_default=True, help="float32, bfloat16 or float16; auto: the checkpoint's."
)
@click.option(
    "--record/--no-record",
    default=True,
    show_default=True,
    help="Write the figures into MODEL's surgeon.json and card.",
)
@talk_options
def bench(
    model: str,
    against: str | None,
    runtimes: tuple[str, ...],
    gguf_types: tuple[str, ...],
    record: bool,
    as_json: bool,
    quiet: bool,
    device: str,
    dtype: str,
    threads: int | None,
    **sizes: Any,
) -> None:
    """Measure load time, memory and tokens a second of a model in transformers, llama.cpp and vLLM.

    Every runtime runs in a process of its own. Speeds are medians, with the smallest and the largest run.

    \b
    surgeon bench smaller --against org/dense
    """
    import torch

    from surgery.bench.bench import bench as run_bench
    from surgery.bench.bench import subject
    from surgery.engine.device import pick_device
    from surgery.engine.run_options import check_dtype
    from surgery.export.file_types import file_type

    kinds = tuple(file_type(name) for name in gguf_types)
    check_dtype(dtype)
    chosen = str(pick_device(device))
    models = [subject(name) for name in (model, against) if name is not None]
    settings = BenchSettings(threads=threads or torch.get_num_threads(), dtype=dtype, device=chosen, **sizes)
    found = run_bench(models, settings, runtimes or RUNTIMES, kinds, lambda text: say(text, quiet))
    folder = local_path(model)
    if record and folder is not None and (folder / "surgeon.json").exists():
        from surgery.card.publish import record_bench

        record_bench(folder, found)
        say(f"Recorded in {folder / 'surgeon.json'} and the card", quiet)
    if as_json:
        click.echo(json.dumps(found))
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    from surgery.card.speed import speed_rows

    table = Table(box=None)
    for name in ("model", "runtime", "batch", "load", "memory", "prefill, tokens/s", "decode, tokens/s"):
        table.add_column(name, overflow="fold")
    for row in speed_rows(found):
        table.add_row(*row)
    data_console().print(table)
    for one in found["results"]:
        if "failed" in one:
            label = one["runtime"] + (f", {one['type']}" if one["type"] else "")
            click.echo(f"{one['model']}, {label}: not measured ({one['failed']})")
