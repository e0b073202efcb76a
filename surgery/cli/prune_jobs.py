"""`surgeon prune ... --dry-run --jobs`: the command that does it on Hugging Face Jobs, and its price."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from surgery.cli.common import say
from surgery.cli.options import collected
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.budget.prune_cost import PruneCost
    from surgery.budget.rented import JobNeeds, Offer
    from surgery.cli.options import CalibrationOptions
    from surgery.cli.prune_heal import Healing
    from surgery.engine.open_model import Model

# said by the job itself, or of this machine alone
NOT_PASSED_ON = (
    "dry_run",
    "jobs",
    "bucket",
    "as_json",
    "quiet",
    "out",
    "overwrite",
    "push_to",
    "index_folder",
)
FILES = ("calibration", "eval_text", "vocabulary_text")  # options whose values may be files of this machine
INDEX_AT, BUCKET_AT = "/surgeon/index", "/surgeon/run"


@dataclass(frozen=True)
class JobOptions:
    """Whether to print the command of a job, and the bucket that keeps its journal."""

    jobs: bool
    bucket: str | None

    def check(self, dry_run: bool, *, searches: bool) -> None:
        """Raise UsageError for a use that would run nothing, or something else than asked for."""
        if self.jobs and not dry_run:
            raise UsageError(
                "--jobs only prints a command, which may cost money",
                next_step="give --dry-run --jobs, then run what it prints",
            )
        if self.jobs and searches:
            raise UsageError(
                "a job's price does not count a search, for a target or for widths",
                where="--jobs",
                next_step="search here first, then price the cut that it names",
            )
        if self.bucket and not self.jobs:
            raise UsageError("--bucket is for jobs", next_step="give --dry-run --jobs too")
        if self.bucket and self.bucket.count("/") != 1:
            raise UsageError("not a bucket", where="--bucket", expected="ACCOUNT/NAME", found=self.bucket)


job_options = collected(
    JobOptions,
    "job",
    [
        click.option(
            "--jobs",
            is_flag=True,
            help="With --dry-run: print the `hf jobs` command that does this on a rented machine, with "
            "flavour, time and price.",
        ),
        click.option(
            "--bucket",
            metavar="ACCOUNT/NAME",
            help="With --jobs: keep the job's journal in this bucket, so that a job that ran out of time "
            "resumes.",
        ),
    ],
)


def show_job(
    model: Model,
    cost: PruneCost,
    heal: Healing | None,
    text: CalibrationOptions,
    job: JobOptions,
    as_json: bool,
) -> None:
    """Print the command of the cheapest flavour that the job fits; messages, with its price, on stderr."""
    import torch

    from surgery import __version__
    from surgery.budget.machine import measure_machine
    from surgery.budget.rented import job_words, offers, read_flavors

    context = click.get_current_context()
    command, volumes = job_command(context, model, job)
    needs = job_needs(model, cost, heal, text, indexed=context.params["index_folder"] is not None)
    made = offers(needs, measure_machine(model, wide=True), torch.get_num_threads())
    best = made[0]
    if best.lacks is not None:
        raise UsageError(
            "no flavour of Hugging Face Jobs is large enough",
            expected=f"{needs.memory / 1e9:.0f} GB of memory and {needs.disk / 1e9:.0f} GB of disk",
            next_step="use fewer blocks, or a smaller --block-size",
        )
    words = job_words(best.flavor.name, best.timeout, f"ffn-surgeon=={__version__}", command, volumes)
    if as_json:
        table, _ = read_flavors()
        fields = {"command": words, "best": best.as_json(), "offers": [one.as_json() for one in made]}
        click.echo(json.dumps({**fields, "prices": table}, indent=1))
        return
    say("\n".join(offer_lines(made)), quiet=False)
    click.echo(shlex.join(words))


def job_needs(
    model: Model, cost: PruneCost, heal: Healing | None, text: CalibrationOptions, *, indexed: bool
) -> JobNeeds:
    """What the index (unless there is one), the cut and the heal take, and what moves over the network."""
    from surgery.budget.index_cost import index_cost
    from surgery.budget.rented import JobNeeds

    parts: list[Any] = [cost]
    if not indexed:
        parts.append(index_cost(model.meta_model, text.blocks, text.block_size, model.run))
    if heal is not None:
        parts.append(heal.cost)
    size = model.checkpoint.nbytes
    return JobNeeds(tuple(parts), downloaded=size, uploaded=size)  # the result is no larger than the source


def job_command(context: click.Context, model: Model, job: JobOptions) -> tuple[list[str], list[str]]:
    """(Words of the command that the job runs, volumes it mounts), from the options that were given here.

    A local index is mounted, a published one is read by the job itself. Raises UsageError for other things
    that only this machine has.
    """
    from surgery.index.open_index import published_address

    if model.folder is not None or "/" not in model.name:
        raise UsageError(
            "a job can't see a local model",
            where=model.name,
            expected="a model on the Hub, as org/name",
            next_step="push it with `surgeon push`, or with `hf upload`",
        )
    words, volumes = ["surgeon", "prune", model.name, *given_options(context)], []
    if model.checkpoint.revision and "--revision" not in words:
        words += ["--revision", model.checkpoint.revision]
    index = context.params["index_folder"]
    if index is not None and published_address(index) is not None:
        words += ["--index", index]
    elif index is not None:
        volumes.append(f"{Path(index).as_posix()}:{INDEX_AT}")
        words += ["--index", INDEX_AT]
    if job.bucket is not None:
        volumes.append(f"hf://buckets/{job.bucket}:{BUCKET_AT}")
        name = context.params["out"]
        words += ["--out", f"{BUCKET_AT}/{name.name if name else 'result'}"]
    words.append("--push")  # last: its value may be left out
    repo = context.params["push_to"]
    return words + ([repo] if repo not in (None, "auto") else []), volumes


def given_options(context: click.Context) -> Iterator[str]:
    """The options of the command line as words, but those that a job does without."""
    for parameter in context.command.params:
        name, value = parameter.name or "", context.params.get(parameter.name or "")
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if not given or name in NOT_PASSED_ON or not isinstance(parameter, click.Option):
            continue
        for one in value or () if parameter.multiple else (value,):
            if name in FILES and Path(str(one)).expanduser().exists():
                raise UsageError(
                    "a job can't see a local file",
                    where=parameter.opts[0],
                    found=str(one),
                    next_step="put the text on the Hub, and name it as ID[:CONFIG[:SPLIT]]",
                )
            if name == "card_template":
                raise UsageError("a job can't see a local file", where=parameter.opts[0], found=str(one))
            if parameter.is_flag:
                yield (parameter.opts if one else parameter.secondary_opts or parameter.opts)[0]
            elif isinstance(one, tuple):
                yield from (parameter.opts[0], ",".join(f"{number:.12g}" for number in one))
            else:
                yield from (parameter.opts[0], str(one))


def offer_lines(made: list[Offer]) -> list[str]:
    """The job on every flavour that it fits, the chosen one first, for people."""
    from surgery.budget.rented import SUSTAINED, read_flavors, timeout_word
    from surgery.byte_units import format_duration

    table, _ = read_flavors()
    lines = [f"{'flavour':<16} {'time':>10} {'price':>8} {'timeout':>10} {'at most':>8}"]
    for one in made:
        if one.lacks is not None:
            lines.append(f"{one.flavor.name:<16} too little {one.lacks}")
            continue
        times = f"{format_duration(one.seconds):>10} {_dollars(one.dollars):>8}"
        lines.append(
            f"{one.flavor.name:<16} {times} {timeout_word(one.timeout):>10} {_dollars(one.most_dollars):>8}"
        )
    lines.append(
        f"Times are estimates from rates of this machine's threads (CPUs) or {100 * SUSTAINED:.0f}% of the "
        f"maker's (GPUs); prices as read on {table['read']} from {table['source']}."
    )
    return lines


def _dollars(amount: float) -> str:
    return f"${amount:.2f}" if amount >= 0.1 else f"${amount:.3f}"
