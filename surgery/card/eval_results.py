"""Results of benchmarks that the Hub keeps leaderboards of, as files `.eval_results/*.yaml` of the repo.

The Hub reads them for data sets that are registered as benchmarks; anything else stays on the card. Only
whole tasks count: a run with a limit is no result of the benchmark. The form is that of
huggingface.co/docs/hub/eval-results.
"""

from __future__ import annotations

from typing import Any

# task of lm-eval -> data set of the benchmark, its task there, and the metric that the leaderboard shows
BENCHMARKS = {
    "gsm8k": ("openai/gsm8k", "gsm8k", "exact_match,strict-match"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro", "exact_match,custom-extract"),
    "gpqa_diamond_zeroshot": ("Idavidrein/gpqa", "gpqa_diamond", "acc"),
}


def eval_results(manifest: dict[str, Any]) -> dict[str, bytes]:
    """File name -> YAML of every registered benchmark among the measured tasks; values are percentages."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    tasks = manifest.get("measurements", {}).get("tasks") or {}
    found = {}
    for name, (dataset, task, metric) in BENCHMARKS.items():
        values, settings = tasks.get("results", {}).get(name, {}), tasks.get("settings", {}).get(name, {})
        value = values.get(metric)
        if value is None or settings.get("limit") is not None:
            continue
        shots = f", {settings['fewshot']}-shot" if settings.get("fewshot") is not None else ""
        entry = EvalResultEntry(
            dataset_id=dataset,
            task_id=task,
            value=round(100 * value, 2),
            notes=f"{tasks['harness']}{shots}, {metric}",
        )
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        found[f".eval_results/{name}.yaml"] = text.encode()
    return found
