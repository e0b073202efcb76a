"""Two models on the same examples of a task: paired differences, and the answers that flip."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from surgery.errors import UsageError
from surgery.evaluate.lm_eval import Answer, TaskResults

QUESTION_END = 200  # characters of a question that a flip shows


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a metric over `samples` examples, of a model and of the one it is compared `against`.

    `difference` is model - against; `stderr` its standard error over the paired examples,
    std(d_i) / sqrt(samples) with d_i the difference at example i, None for one example.
    """

    task: str
    metric: str
    model: float
    against: float
    difference: float
    stderr: float | None
    samples: int


@dataclass(frozen=True)
class Flip:
    """An example that one model answers rightly and the other wrongly.

    `lost` says that the model is the wrong one. `chosen` and `chosen_against` are the options that either
    model takes, `right` the right one; None for tasks without options. `question` is the end of the context.
    """

    task: str
    number: int
    lost: bool
    question: str
    chosen: str | None
    chosen_against: str | None
    right: str | None


@dataclass(frozen=True)
class PairedTask:
    """A task's paired differences and flips.

    `changed` counts examples at which the models take different options, right or wrong; None for tasks
    without options.
    """

    task: str
    differences: list[PairedDifference]
    flips: list[Flip]
    changed: int | None

    def as_json(self) -> dict[str, Any]:
        """An entry of `against.tasks` in the output of `surgeon eval --json`."""
        samples = self.differences[0].samples if self.differences else 0
        return {
            **asdict(self),
            "flipped": len(self.flips) / samples if samples else None,
            "lost": sum(flip.lost for flip in self.flips),
            "won": sum(not flip.lost for flip in self.flips),
        }


def compare_tasks(model: TaskResults, against: TaskResults) -> list[PairedTask]:
    """Compare two models' answers to the same examples. Raises UsageError where the examples differ."""
    return [
        _compare(task, answers, against.answers[task], model.table["results"][task])
        for task, answers in model.answers.items()
    ]


def _compare(task: str, ours: list[Answer], theirs: list[Answer], table: dict[str, Any]) -> PairedTask:
    asked = [[(one.number, one.question, one.options) for one in answers] for answers in (ours, theirs)]
    if asked[0] != asked[1]:
        raise UsageError("the two models were not asked the same", where=task)
    pairs = list(zip(ours, theirs, strict=True))
    names = [name for name in ours[0].metrics if _is_mean(name, ours, table)] if ours else []
    chosen = [(one.chosen, other.chosen) for one, other in pairs if one.chosen is not None]
    verdict = next((name for name in names if {one.metrics[name] for one in ours} <= {0.0, 1.0}), None)
    return PairedTask(
        task,
        [_difference(task, name, pairs) for name in names],
        []
        if verdict is None
        else [_flip(task, *pair, verdict) for pair in pairs if _differs(*pair, verdict)],
        sum(one != other for one, other in chosen) if chosen else None,
    )


def _is_mean(name: str, answers: list[Answer], table: dict[str, Any]) -> bool:
    """Whether a task's value of a metric is the mean of its examples, as accuracies are."""
    mean = statistics.fmean(answer.metrics[name] for answer in answers)
    value = table.get(name)
    return isinstance(value, float) and math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9)


def _difference(task: str, name: str, pairs: list[tuple[Answer, Answer]]) -> PairedDifference:
    ours, theirs = ([pair[place].metrics[name] for pair in pairs] for place in (0, 1))
    each = [one - other for one, other in zip(ours, theirs, strict=True)]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
    means = (statistics.fmean(ours), statistics.fmean(theirs), statistics.fmean(each))
    return PairedDifference(task, name, *means, error, len(each))


def _differs(ours: Answer, theirs: Answer, verdict: str) -> bool:
    """Whether one of two answers is right by the metric `verdict` and the other is wrong."""
    return ours.metrics[verdict] != theirs.metrics[verdict]


def _flip(task: str, ours: Answer, theirs: Answer, verdict: str) -> Flip:
    options = [None if i is None else ours.options[i] for i in (ours.chosen, theirs.chosen, ours.right)]
    lost = ours.metrics[verdict] < theirs.metrics[verdict]
    return Flip(task, ours.number, lost, ours.question[-QUESTION_END:], *options)
