"""`surgeon adapt`."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery import defaults
from surgery.cli.common import bars, say
from surgery.cli.help import GroupedCommand
from surgery.cli.options import (
    PATH,
    ModelOptions,
    collected,
    drawing_options,
    model_options,
    output_options,
    talk_options,
    text_words,
)

if TYPE_CHECKING:
    from surgery.adapt.adapt import Carried, Carrier
    from surgery.engine.open_model import Model


@dataclass(frozen=True)
class RefitOptions:
    """Whether down projections are refitted (None: where a repair changed them), and on what text."""

    refit: bool | None
    dense: str | None
    calibration: tuple[str, ...]
    blocks: int
    block_size: int
    seed: int

    def wanted(self, carrier: Carrier) -> bool:
        """Whether to refit."""
        return bool(carrier.down) and (carrier.repaired if self.refit is None else self.refit)

    @property
    def words(self) -> list[str]:
        """These options again, free of paths of this machine."""
        if self.refit is False:
            return ["--no-refit"]
        words = ["--refit"] if self.refit else []
        if self.dense:
            words += ["--dense", Path(self.dense).name if Path(self.dense).exists() else self.dense]
        words += [*text_words("--calibration", self.calibration, None), "--blocks", str(self.blocks)]
        return [*words, "--block-size", str(self.block_size), "--seed", str(self.seed)]


refit_options = collected(
    RefitOptions,
    "refitting",
    [
        click.option(
            "--refit/--no-refit",
            default=None,
            help="Refit what the adapter's down projections read, on calibration text. [default: where a "
            "repair changed the weights]",
        ),
        click.option("--dense", metavar="MODEL", help="The dense model. [default: what DIR was made from]"),
        click.option(
            "--calibration",
            multiple=True,
            default=defaults.CALIBRATION_TEXTS,
            show_default=True,
            metavar="NAME|FILE|DATASET",
            help="Text to refit on; best the adapter's own. Give it several times for a mixture.",
        ),
        *drawing_options,
    ],
)


@click.command(cls=GroupedCommand)
@click.argument("adapter", metavar="LORA", type=PATH)
@click.option("--onto", required=True, metavar="DIR", help="The pruned folder to carry the adapter onto.")
@refit_options
@output_options
@model_options
@talk_options
def adapt(
    adapter: Path,
    onto: str,
    refitting: RefitOptions,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    how: ModelOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Carry LORA, a peft adapter of the dense model, onto the pruned folder DIR.

    \b
    surgeon adapt my-lora --onto smaller --calibration my-text.txt --out my-lora-smaller
    """
    from surgery.adapt.adapt import check_adapter, write_carried
    from surgery.adapt.peft_folder import read_adapter
    from surgery.checkpoint.output_folder import check_destination

    carrier = check_adapter(how.open(onto), read_adapter(adapter))
    destination = out or Path(f"{carrier.adapter.name}-{carrier.model.short_name}")
    if not dry_run:
        check_destination(destination, overwrite=overwrite, source=adapter, needs_bytes=carrier.nbytes)
    for note in carrier.notes:
        say(note, quiet)
    refits: dict[str, Any] = {}
    entry = None
    if refitting.wanted(carrier):
        refits, entry = run_refit(carrier, refitting, how, dry_run, quiet)
    carried = carrier.carry(refits)
    words = ["surgeon", "adapt", carrier.adapter.name, "--onto", carrier.model.name]
    if not dry_run:
        command = shlex.join([*words, *refitting.words])
        write_carried(carrier, carried, destination, overwrite=True, refit=entry, command=command)
    show(carried, entry, as_json)
    if not dry_run:
        say(f"Adapter written to {destination}", quiet)


def run_refit(
    carrier: Carrier, options: RefitOptions, how: ModelOptions, dry_run: bool, quiet: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(Module -> A', the entry `refit` of the adapter's surgeon.json); of a dry run, only what it takes."""
    from surgery.adapt.refit import check_dense, refit_cost, refit_down, refit_json
    from surgery.cli.costs import memory_line
    from surgery.index.calibration import draw_calibration

    dense = open_dense(carrier.model, options.dense, how)
    check_dense(carrier, dense)
    cost = refit_cost(carrier, dense, options.blocks, options.block_size)
    say(memory_line(cost), quiet)
    if dry_run:
        return {}, None
    text = draw_calibration(
        dense, options.calibration, blocks=options.blocks, block_size=options.block_size, seed=options.seed
    )
    say(f"Refitting {len(carrier.down)} down projections on {text.name}", quiet)
    found = refit_down(carrier, dense, text.ids.long(), bars(quiet))
    return {module: one.a for module, one in found.items()}, refit_json(found, text)


def open_dense(cut: Model, named: str | None, how: ModelOptions) -> Model:
    """The model named with --dense, else the source of the cut folder; run as the cut one is."""
    from surgery.checkpoint.manifest import MANIFEST
    from surgery.engine.open_model import Model, open_checkpoint
    from surgery.heal.pair import teacher_name

    manifest = cut.checkpoint.read_json(MANIFEST)
    source, revision = (named, None) if named is not None else teacher_name(cut, manifest, "--dense")
    checkpoint = open_checkpoint(source, revision=revision, range_reads=how.range_reads)
    checkpoint.trust_remote_code = how.trust_remote_code
    return Model(checkpoint, cut.run)


def show(carried: Carried, refit: dict[str, Any] | None, as_json: bool) -> None:
    """Print what became of the adapter's modules."""
    if as_json:
        click.echo(json.dumps({**carried.as_json(), "refit": refit}))
        return
    click.echo("\n".join(carried.lines()))
    if refit is not None:
        before, after = (
            sum(one[key] for one in refit["modules"].values()) / max(1, len(refit["modules"]))
            for key in ("held_out_before", "held_out_after")
        )
        click.echo(
            f"Of what their A reads of the dense channels, {100 * before:.1f}% is missing in the kept ones, "
            f"{100 * after:.1f}% after the refit (held-out blocks, mean)"
        )
