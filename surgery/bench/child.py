"""The process that one runtime is measured in: `python -m surgery.bench.child JOB RESULT`, both JSON files.

A runtime is a function that loads a model and returns what generates: `generate(prompts, n)` continues each
of the prompts by exactly n tokens, greedily. With prompts of P tokens in batches of B,

    prefill = B P / t(1)    and    decode = B N / (t(N + 1) - t(1))    tokens a second,

where t(n) is the time of generating n tokens. That is the same for every runtime.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.bench.loaded import Loaded
from surgery.bench.runtimes import LOADERS
from surgery.bench.settings import summary
from surgery.errors import SurgeonError, one_line


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The result of a job: load time, memory, and for each batch size the speeds of its runs."""
    start = time.perf_counter()
    loaded = LOADERS[job["runtime"]](job)
    load_seconds = time.perf_counter() - start
    batches = [timed_batch(loaded, job, batch) for batch in job["batches"]]
    return {
        "load_seconds": load_seconds,
        "peak_bytes": peak_bytes(),
        "device_bytes": loaded.device_bytes(),
        "versions": loaded.versions,
        "batches": batches,
    }


def timed_batch(
    loaded: Loaded, job: dict[str, Any], batch: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Speeds of a batch size, after one run that warms up (and compiles) and is not counted."""
    length, new = job["prompt_tokens"], job["new_tokens"]
    draw = random.Random(job["seed"])
    prompts = [[draw.randrange(loaded.vocabulary) for _ in range(length)] for _ in range(batch)]

    def seconds(tokens: int) -> float:
        start = clock()
        loaded.generate(prompts, tokens)
        return clock() - start

    warm_up = seconds(1) + seconds(new + 1)
    prefill, decode = [], []
    for _ in range(job["repeats"]):
        first, whole = seconds(1), seconds(new + 1)
        prefill.append(batch * length / first)
        if whole > first:
            decode.append(batch * new / (whole - first))
    return {
        "batch": batch,
        "warm_up_seconds": warm_up,
        "prefill": summary(prefill),
        "decode": summary(decode),
    }


def peak_bytes() -> int:
    """The largest resident memory of this process so far, libraries and mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(job_file: str, result_file: str) -> None:
    """Run a job and write its result; an error becomes a result too, which says what failed."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        result = run(job)
    except SurgeonError as error:
        result = {"failed": error.message}
    except Exception as error:  # noqa: BLE001 (a runtime may fail in any way; the others are still measured)
        result = {"failed": f"{type(error).__name__}: {one_line(error)}"}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
