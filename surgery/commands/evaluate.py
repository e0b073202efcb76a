"""`surgeon eval`."""

from __future__ import annotations

import json
from typing import Any

import click

from surgery.commands.options import common_options
from surgery.commands.session import evaluate, open_model


@click.command("eval")
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
    checkpoint = open_model(model, options)
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
