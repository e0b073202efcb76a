"""What `surgeon bench` runs, and how results are summarised."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

RUNTIMES = ("transformers", "transformers-compiled", "llama.cpp", "vllm")


@dataclass(frozen=True)
class BenchSettings:
    """prompt_tokens P and new_tokens N of each sequence, batch sizes, timed runs, threads, dtype, device."""

    prompt_tokens: int = 512
    new_tokens: int = 64
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 5
    threads: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    seed: int = 42

    def as_json(self) -> dict[str, Any]:
        """Its entry in surgeon.json."""
        return {**asdict(self), "batches": list(self.batches)}


def summary(values: list[float]) -> dict[str, Any] | None:
    """Median, smallest and largest of several runs; None where there was none."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}
