"""Zero-shot and few-shot tasks, run by lm-eval (extra `tasks`) through the streamed engine."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery import defaults
from surgery.budget.pass_cost import PassCost, merged_cost
from surgery.engine.open_model import Model
from surgery.errors import CalibrationError, SurgeonError, UsageError, one_line
from surgery.evaluate.perplexity import perplexity_cost
from surgery.evaluate.text_tasks import TEXT_TASKS, text_task
from surgery.progress import Progress, no_progress
from surgery.text import open_text

SCORED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")  # output types of tasks that are run
BOOTSTRAPS = 1000  # resamplings for the standard error of a metric that is no mean, as perplexity


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval has loaded, and how many examples of each are evaluated.

    `loaded` are names that `manager` knows, and tasks made here. `fewshot` examples come before each
    question, by default the task's own number; `limit` keeps the first examples only.
    """

    loaded: list[Any]
    manager: Any
    fewshot: int | None
    limit: int | None

    @property
    def names(self) -> list[str]:
        """The tasks' names, groups by their own."""
        return [task if isinstance(task, str) else str(task.config.task) for task in self.loaded]


@dataclass(frozen=True)
class Answer:
    """One example of a task: `metrics` by name, each in the task's own unit, and the `chosen` option.

    `chosen` and `right` are indices of options, None for tasks without options. `question` is the context.
    """

    number: int
    question: str
    options: tuple[str, ...]
    chosen: int | None
    right: int | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class TaskResults:
    """What tasks measured: `table` as `surgeon eval --json` prints it, and the `answers` of each task."""

    table: dict[str, Any]
    answers: dict[str, list[Answer]]


def load_tasks(
    model: Model,
    names: list[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    include: Path | None = None,
    text: str = defaults.EVALUATION_TEXT,
) -> Tasks:
    """Load tasks for a model, so that what can't be run is refused before any work.

    `include` is a folder with more task files; the tasks of TEXT_TASKS are made from `text`. Raises
    UsageError where lm-eval is not installed, does not know a task, or a task generates text;
    CalibrationError where a task's data can't be loaded; MemoryBudgetError where one layer exceeds the
    budget.
    """
    check_installed()
    perplexity_cost(model, 1, 2)
    listed = [name for name in names if name not in TEXT_TASKS]
    manager, loaded = _load_listed(listed, include)
    with _task_errors(text):
        made = {name: text_task(name, open_text(text)) for name in names if name in TEXT_TASKS}
    found = [*loaded, *made.values()]
    generating = {str(task.config.task) for task in found if task.OUTPUT_TYPE not in SCORED}
    if generating:
        from surgery.evaluate.harness_model import no_generation

        raise no_generation(generating)
    # Groups are kept as names, because lm-eval averages over their tasks.
    return Tasks([made.get(name, name) for name in dict.fromkeys(names)], manager, fewshot, limit)


def run_tasks(model: Model, tasks: Tasks, progress: Progress[Any] = no_progress) -> TaskResults:
    """Run tasks on a model, one decoder layer in memory at a time.

    The `table` is {"harness": version, "settings": {task: {"fewshot", "limit"}}, "results": {task: {metric:
    value, ..., "samples": count}}}. Raises MemoryBudgetError, NumericsError, CheckpointError.
    """
    import lm_eval

    from surgery.evaluate.harness_model import SurgeonLM

    found = _evaluate(SurgeonLM(model, progress=progress), tasks)
    counts = found.get("n-samples", {})
    results = {}
    for task, metrics in found["results"].items():
        values = {
            key.removesuffix(",none"): value
            for key, value in metrics.items()
            if isinstance(value, (int, float))
        }
        values.pop("sample_len", None)
        results[task] = values | {"samples": counts.get(task, {}).get("effective")}
    table = {
        "harness": f"lm-eval {lm_eval.__version__}",
        "settings": {task: {"fewshot": tasks.fewshot, "limit": tasks.limit} for task in results},
        "results": results,
    }
    return TaskResults(table, {task: _answers(samples) for task, samples in found["samples"].items()})


def tasks_cost(model: Model, tasks: Tasks) -> PassCost:
    """Cost of `run_tasks`: every request is made and tokenised, none is scored. Raises MemoryBudgetError."""
    from surgery.evaluate.harness_model import CostLM

    counting = CostLM(model)
    _evaluate(counting, tasks)
    return merged_cost(counting.costs)


def _evaluate(lm: Any, tasks: Tasks) -> dict[str, Any]:
    """lm-eval's results of tasks, with every sample."""
    import lm_eval

    # lm-eval prints on stdout, which is for data.
    with _task_errors("a task"), contextlib.redirect_stdout(sys.stderr):
        found: dict[str, Any] | None = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks.loaded),
            num_fewshot=tasks.fewshot,
            limit=tasks.limit,
            task_manager=tasks.manager,
            log_samples=True,
            bootstrap_iters=BOOTSTRAPS,
        )
    assert found is not None
    return found


def check_installed() -> None:
    """Raise UsageError where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "tasks are run by lm-eval, which is not installed",
            found=str(error),
            next_step="pip install 'ffn-surgeon[tasks]'",
        ) from error


def _load_listed(names: list[str], include: Path | None) -> tuple[Any, list[Any]]:
    """lm-eval's task manager and the tasks that `names` name, groups as their tasks.

    lm-eval's own list of thousands of tasks, which takes seconds to read, is read only for names that the
    folder `include` does not have. Raises as `load_tasks`.
    """
    from lm_eval.tasks import TaskManager

    path = None if include is None else str(include)
    for defaults_too in (False, True):
        manager = TaskManager(include_path=path, include_defaults=defaults_too)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if not unknown:
            try:
                with _task_errors(", ".join(names)):
                    return manager, _tasks_of(manager, names) if names else []
            except CalibrationError:
                if defaults_too:  # a group of the folder may name lm-eval's own tasks
                    raise
    raise UsageError(
        "lm-eval knows no such task",
        found=", ".join(unknown),
        next_step="`lm-eval ls tasks` lists them; --include-path adds a folder of your own",
    )


def _tasks_of(manager: Any, names: list[str]) -> list[Any]:
    """The tasks that names name, groups as their tasks; older lm-eval has no `load`."""
    if hasattr(manager, "load"):
        return list(manager.load(names)["tasks"].values())
    return _leaves(manager.load_task_or_group(names))


def _leaves(tasks: dict[Any, Any]) -> list[Any]:
    """The tasks of a nested dict of groups and tasks."""
    each = (_leaves(value) if isinstance(value, dict) else [value] for value in tasks.values())
    return [task for group in each for task in group]


@contextlib.contextmanager
def _task_errors(names: str) -> Iterator[None]:
    """Translate what lm-eval and datasets raise into CalibrationError; lm-eval's own messages are dropped."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except (SurgeonError, MemoryError):
        raise
    except Exception as error:  # a task's data and templates may raise anything
        raise CalibrationError(
            "the tasks can't be loaded or run",
            where=names,
            found=f"{type(error).__name__}: {one_line(error)}",
            next_step="check the network and the task's files; a Hub data set that was loaded once is cached",
        ) from error
    finally:
        logger.setLevel(level)


def _answers(samples: list[dict[str, Any]]) -> list[Answer]:
    """Examples as lm-eval logs them, by number; of tasks with several filters, the first filter's."""
    answers: dict[int, Answer] = {}
    for sample in samples:
        if sample["doc_id"] in answers:
            continue
        contexts, options = zip(*[(*map(str, pair), "")[:2] for pair in sample["arguments"]], strict=True)
        nats = [response[0] for response in sample["filtered_resps"] if isinstance(response, (tuple, list))]
        several = len(nats) == len(options) > 1
        metrics = {
            name: float(value)
            for name in sample["metrics"]
            if isinstance(value := sample[name], (bool, int, float))
        }
        target = sample["target"]
        answers[sample["doc_id"]] = Answer(
            number=sample["doc_id"],
            question=contexts[0],
            options=options,
            chosen=max(range(len(nats)), key=nats.__getitem__) if several else None,
            right=target if several and isinstance(target, int) else None,
            metrics=metrics,
        )
    return [answers[number] for number in sorted(answers)]
