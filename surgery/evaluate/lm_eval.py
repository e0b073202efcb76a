"""Zero-shot and few-shot tasks, run by lm-eval (extra `tasks`), which holds the whole model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.errors import UsageError


def run_tasks(
    model: str,
    names: list[str],
    *,
    revision: str | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    include: Path | None = None,
    device: str = "cpu",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Results of lm-eval tasks for a local folder or Hub id.

    Returns {"harness": version, "settings": {task: {"fewshot", "limit"}}, "results": {task: {metric: value,
    ..., "samples": count}}}. `limit` evaluates only the first examples of each task. `include` is a folder
    with more task files. Raises UsageError where lm-eval is not installed or does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(
            "tasks are run by lm-eval, which is not installed",
            found=str(error),
            next_step="pip install 'ffn-surgeon[tasks]'",
        ) from error
    import surgery.loading  # noqa: F401  (so that per-layer widths load)

    manager = TaskManager(include_path=None if include is None else str(include))
    known = {name: manager.match_tasks([name]) for name in names}
    unknown = [name for name, matches in known.items() if not matches]
    if unknown:
        raise UsageError(
            "lm-eval knows no such task",
            found=", ".join(unknown),
            next_step="`lm-eval ls tasks` lists them; --include-path adds a folder of your own",
        )
    arguments = {"pretrained": model, "dtype": dtype, **({"revision": revision} if revision else {})}
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=names,
        num_fewshot=fewshot,
        limit=limit,
        device=device,
        task_manager=manager,
        log_samples=False,
    )
    assert found is not None
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
    return {
        "harness": f"lm-eval {lm_eval.__version__}",
        "settings": {task: {"fewshot": fewshot, "limit": limit} for task in results},
        "results": results,
    }
