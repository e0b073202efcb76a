"""`surgeon eval --against`: two models on the same texts and examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from surgery.engine.open_model import Model
    from surgery.evaluate.agreement import Agreement
    from surgery.evaluate.lm_eval import Tasks
    from surgery.evaluate.paired import PairedTask
    from surgery.progress import Progress
    from surgery.text import TokenBlocks

SHOWN_FLIPS = 3  # of each task, in the terminal; --json has all
QUESTION_SHOWN = 60  # characters


@dataclass(frozen=True)
class ComparedModels:
    """What `surgeon eval --against` measured: `result` is what --json prints."""

    name: str
    texts: list[Agreement]
    tasks: list[PairedTask]
    result: dict[str, Any]


def compare_models(
    model: Model,
    against: Model,
    texts: list[TokenBlocks],
    tasks: Tasks | None,
    progress: Progress[Any],
) -> ComparedModels:
    """Compare two models. Raises what `compare_on_text`, `run_tasks` and `compare_tasks` raise."""
    from surgery.evaluate.agreement import compare_on_text
    from surgery.evaluate.lm_eval import run_tasks
    from surgery.evaluate.paired import compare_tasks

    agreements = [compare_on_text(model, against, blocks, progress) for blocks in texts]
    found = [agreement.model.as_json() for agreement in agreements]
    result = {**(found[0] if found else {}), **({"texts": found} if len(found) > 1 else {})}
    other: dict[str, Any] = {"model": against.name, "texts": [one.as_json() for one in agreements]}
    pairs = []
    if tasks is not None:
        ours, theirs = (run_tasks(one, tasks, progress) for one in (model, against))
        pairs = compare_tasks(ours, theirs)
        result["tasks"] = ours.table
        other |= {"tasks": theirs.table, "paired": [pair.as_json() for pair in pairs]}
    return ComparedModels(against.name, agreements, pairs, {**result, "against": other})


def show_comparison(compared: ComparedModels) -> None:
    """Print what the comparison adds to the model's own figures."""
    click.echo(f"against        {compared.name}")
    for text in compared.texts:
        click.echo(
            f"{text.model.text}: bits per byte {text.against.bits_per_byte:.4f} -> "
            f"{text.model.bits_per_byte:.4f} ({_plus(text.bits_per_byte.mean, text.bits_per_byte.stderr)}), "
            f"KL {text.kl.mean:.4f}{_spread(text.kl.stderr)} nats, "
            f"same likeliest token {text.top1.mean:.1%}"
        )
    for task in compared.tasks:
        for row in task.differences:
            click.echo(
                f"{task.task}: {row.metric} {row.against:.4f} -> {row.model:.4f} "
                f"({_plus(row.difference, row.stderr)}, paired, {row.samples} examples)"
            )
        lost = sum(flip.lost for flip in task.flips)
        changed = "" if task.changed is None else f"; another option taken in {task.changed}"
        click.echo(f"{task.task}: {lost} answers lost, {len(task.flips) - lost} won{changed}")
        for flip in task.flips[:SHOWN_FLIPS]:
            question = " ".join(flip.question[-QUESTION_SHOWN:].split())
            answers = ""
            if flip.chosen is not None:
                options = (flip.right or "", flip.chosen_against or "", flip.chosen)
                answers = f": {options[1].strip()!r} -> {options[2].strip()!r}"
            click.echo(f"  {'lost' if flip.lost else 'won '} {flip.number}: ...{question}{answers}")
        if len(task.flips) > SHOWN_FLIPS:
            click.echo(f"  and {len(task.flips) - SHOWN_FLIPS} more; --json lists all")


def _plus(value: float, error: float | None) -> str:
    return f"{value:+.4f}{_spread(error)}"


def _spread(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"
